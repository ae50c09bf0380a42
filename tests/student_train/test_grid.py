"""Exhaustive grids: every arm under every stage, and every kind of adapter from its start to its saved form."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from dense import relative, train_plainly
from support.distributed import run_ranks
from support.rounding import FORWARD, GRADIENT

from storage_schemas.reader import Dump

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ARMS, STAGES = ("sft", "lora", "kd", "neo"), (0, 1, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"variant": "pissa"},
    "moslora": {"variant": "moslora"},
    "some modules": {"target_modules": ["q_proj", "v_proj"], "alpha": 3.0},
    "patterns": {"extra": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "bias": "none"}},
    "gaussian": {"extra": {"init_lora_weights": "gaussian"}, "dropout": 0.3},
    "moslora with patterns": {"variant": "moslora", "dropout": 0.3, "extra": {"rank_pattern": {"q_proj": 2}}},
    "pissa with patterns": {"variant": "pissa", "extra": {"rank_pattern": {"q_proj": 2}}},
}
"""What is passed as `student.lora`."""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_every_stage_equals_plain_torch(arm: str, checkpointing: bool, folder: Path) -> None:
    """Tied and untied heads, with and without recomputed activations."""
    stages = (2, 3) if checkpointing else STAGES
    cases = [
        {
            "model": str(folder / ("tied" if tied else "student")),
            "train": {
                "arm": arm,
                "zero_stage": stage,
                "max_grad_norm": 0.3,
                "gradient_checkpointing": checkpointing,
            },
            "steps": 2,
        }
        for tied, stage in product((False, True), stages)
    ]
    found = run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]
    dump = Dump.open(str(folder / "dump"))
    for i, tied in enumerate((False, True)):
        expected = train_plainly(
            dump, str(folder / ("tied" if tied else "student")), arm=arm, steps=2, batch=6, rate=1e-2, clip=0.3
        )
        for result in found[i * len(stages) : (i + 1) * len(stages)]:
            assert [loss for loss, *_ in result["steps"]] == pytest.approx(expected.losses, rel=FORWARD)
            assert [norm for *_, norm in result["steps"]] == pytest.approx(expected.norms, rel=GRADIENT)
            assert relative(result["first"], expected.first, "exp_avg") < GRADIENT
            assert relative(result["last"], expected.last, "master") < 2e-4


def test_moslora_under_every_stage(folder: Path) -> None:
    """A, B and M are trained alike, with weights that ZeRO-3 really spreads over the ranks."""
    spread = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    cases = [
        {
            "model": str(folder / "tied"),
            "lora": {"variant": "moslora"},
            "train": {"zero_stage": stage, "max_grad_norm": 0.3, "deepspeed": spread if stage == 3 else {}},
            "steps": 3,
        }
        for stage in STAGES
    ]
    first, *others = run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]
    mixers = [name for name in first["last"] if name.endswith("mixer.weight")]
    assert len(mixers) == 3 * 14
    assert all(first["last"][name].abs().max() > 0 for name in mixers)
    for other in others:
        assert [loss for loss, *_ in other["steps"]] == pytest.approx(
            [loss for loss, *_ in first["steps"]], rel=FORWARD
        )
        assert [norm for *_, norm in other["steps"]] == pytest.approx([n for *_, n in first["steps"]], rel=GRADIENT)
        assert other["last"].keys() == first["last"].keys()
        assert relative(other["last"], first["last"], "master") < 2e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_adapter(precision: str, folder: Path) -> None:
    """Trained under ZeRO 2 and 3 with the same losses, saved, and compared by the run itself; resumed bit for bit under
    the one in fp32 and under the other in bf16.
    """
    jobs: list[dict[str, Any]] = []
    first = 2 if precision == "fp32" else 3
    resumed = {name: first if number % 2 else 5 - first for number, name in enumerate(VARIANTS)}
    for (name, lora), stage in product(VARIANTS.items(), (2, 3)):
        base = {
            "dump": str(folder / "dump"),
            "model": str(folder / "tied"),
            "lora": lora,
            "train": {"zero_stage": stage, "precision": precision},
        }
        output = str(folder / f"{precision} {name} {stage}")
        jobs.append(base | {"output": f"{output} whole"})
        if stage == resumed[name]:
            jobs += [base | {"output": output, "stop_after": 2}, base | {"output": output}]
    results = iter(run_ranks("support.train_jobs:run_trainings", 2, jobs=jobs, timeout=900)[0])
    losses: dict[str, list[float]] = {}
    for name, stage in product(VARIANTS, (2, 3)):
        whole = next(results)
        assert whole["code"] == 0, (name, stage, whole)
        losses.setdefault(name, []).extend(event.loss for event in whole["events"])
        if stage == resumed[name]:
            half, rest = next(results), next(results)
            assert (half["code"], rest["code"]) == (75, 0), (name, stage, half, rest)
            assert rest["state"].keys() == whole["state"].keys()
            assert all(rest["state"][key].equal(value) for key, value in whole["state"].items()), (name, stage)
    for name, values in losses.items():
        tolerance = FORWARD if precision == "fp32" else 1e-2
        assert values[:6] == pytest.approx(values[6:], rel=tolerance), name


def test_an_offloaded_run_resumes_bit_for_bit(folder: Path) -> None:
    """Masters and moments that live on the host are exported and set like those on the device."""
    base = {
        "dump": str(folder / "dump"), "model": str(folder / "tied"), "lora": {},
        "train": {"zero_stage": 3, "precision": "bf16", "deepspeed": "zero3_offload"},
    }  # fmt: skip
    output = str(folder / "offloaded")
    jobs = [base | {"output": f"{output} whole"}, base | {"output": output, "stop_after": 2}, base | {"output": output}]
    whole, half, rest = run_ranks("support.train_jobs:run_trainings", 2, jobs=jobs, timeout=600)[0]
    assert (whole["code"], half["code"], rest["code"]) == (0, 75, 0)
    assert rest["state"].keys() == whole["state"].keys()
    assert all(rest["state"][key].equal(value) for key, value in whole["state"].items())
