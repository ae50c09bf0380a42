"""AdamW's groups under every ZeRO stage, on two ranks: what decays, and how fast each learns; NEFTune's noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import plain_student
from support.distributed import run_ranks
from support.rounding import GRADIENT
from support.tiny_student import tiny_llama

from student_train.model.student import DTYPES, add_noise
from student_train.optimizer import parameter_groups

RATE, DECAY, RATIO = 1e-2, 0.5, 4.0
Case = tuple[str, int, str]
CASES: list[Case] = [
    ("kd", 0, "fp32"), ("kd", 1, "fp32"), ("kd", 3, "fp32"), ("neo", 0, "fp32"), ("neo", 2, "fp32"), ("neo", 3, "fp32"),
    ("kd", 1, "bf16"), ("kd", 2, "bf16"), ("neo", 3, "bf16"),
]  # fmt: skip
"""(arm, ZeRO stage, precision)"""


def settings(arm: str, stage: int, precision: str = "fp32") -> dict[str, Any]:
    """Of a case: the full arm has norms, the adapter matrices B."""
    ratio = {"loraplus_lr_ratio": RATIO} if arm == "neo" else {}
    common = {"weight_decay": DECAY, "learning_rate": RATE, "max_grad_norm": 0.0}
    return {"arm": arm, "zero_stage": stage, "precision": precision} | common | ratio


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[Case, dict[str, Any]]:
    """Two steps of each case."""
    cases = [{"model": str(folder / "student"), "train": settings(*case), "steps": 2} for case in CASES]
    found = run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_first_update_is_adams(case: Case, folder: Path, results: dict[Case, dict[str, Any]]) -> None:
    """In float64 from Adam's own moments: w (1 - rate * decay) - rate * m / (sqrt(v) + eps), with rate and decay of its
    group."""
    arm, state = case[0], results[case]["first"]
    plain = plain_student(str(folder / "student"), lora=arm == "neo")
    kinds = {"vector": 0, "B": 0, "matrix": 0}
    for name, start in plain.named_parameters():
        if not start.requires_grad:
            continue
        kind = "vector" if start.ndim == 1 else "B" if "lora_B" in name else "matrix"
        kinds[kind] += 1
        rate, decay = RATE * (RATIO if kind == "B" else 1.0), 0.0 if kind == "vector" else DECAY
        first, second = (state[f"{moment}/{name}"].double() for moment in ("exp_avg", "exp_avg_sq"))
        update = (first / 0.1) / ((second / 0.001).sqrt() + 1e-8)
        # In bf16 the master begins at the rounded weight.
        begun = start.detach().to(DTYPES[case[2]]).double()
        expected = begun * (1 - rate * decay) - rate * update
        found = state[f"master/{name}"].double()
        assert float((found - expected).abs().max()) <= 1e-6 + 1e-6 * float(expected.abs().max()), name
    assert min(kinds.pop("matrix"), *[kinds["B"] if arm == "neo" else kinds["vector"]]) > 0


@pytest.mark.parametrize("arm", ["kd", "neo"])
def test_resumed_at_another_stage(arm: str, folder: Path, results: dict[Case, dict[str, Any]]) -> None:
    """From the state after one step at another stage: the second step is that of the run that was never stopped."""
    cases = [
        {
            "model": str(folder / "student"),
            "train": settings(arm, stage),
            "first": 1,
            "state": results[arm, 0, "fp32"]["first"],
        }
        for stage in (0, 2, 3)
    ]
    found = run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]
    for result in found:
        assert result["steps"][0] == pytest.approx(results[arm, 0, "fp32"]["steps"][1], rel=GRADIENT)
        for key, tensor in results[arm, 0, "fp32"]["last"].items():
            assert float((result["last"][key] - tensor).abs().max()) <= 1e-4 * max(1e-3, float(tensor.abs().max())), key


def test_groups_are_as_few_as_can_be() -> None:
    """One where nothing differs, so that ZeRO's partitions stay as large as they can be."""
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    named = [("a.lora_A.weight", matrix), ("a.lora_B.weight", matrix), ("norm.weight", vector)]
    assert len(parameter_groups(named, weight_decay=0.0, ratio=1.0)) == 1
    assert len(parameter_groups(named, weight_decay=0.1, ratio=1.0)) == 2
    assert [group["lr_ratio"] for group in parameter_groups(named, weight_decay=0.1, ratio=2.0)] == [1.0, 2.0, 1.0]


def test_noise_is_that_of_the_paper() -> None:
    """Uniform, of alpha / sqrt(seq * hidden) at most, while training only, with the gradient of the embedding."""
    model = tiny_llama(1)
    ids = torch.arange(40).view(2, 20)
    plain = model.get_input_embeddings()(ids)
    add_noise(model.get_input_embeddings(), 5.0)
    assert torch.equal(model.eval().get_input_embeddings()(ids), plain)
    noise = model.train().get_input_embeddings()(ids) - plain
    most = 5.0 / (20 * 32) ** 0.5
    assert most * 0.98 < float(noise.detach().abs().max()) <= most * (1 + 1e-6)
    assert float(noise.detach().std()) == pytest.approx(most / 3**0.5, rel=0.05)
    assert model.get_input_embeddings()(ids).requires_grad
