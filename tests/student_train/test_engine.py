"""Under every ZeRO stage, on two ranks: the steps of plain torch on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Trace, assert_same_steps, relative, train_plainly
from support.distributed import run_ranks
from support.rounding import FORWARD, GRADIENT, update_excess
from torch import Tensor

from storage_schemas.reader import Dump

pytestmark = pytest.mark.exact

BATCH, STEPS, RATE, CLIP = 6, 3, 1e-2, 0.3
CASES = [
    ("neo", False, 0), ("neo", False, 1), ("neo", False, 2), ("neo", False, 3), ("neo", True, 2), ("neo", True, 3),
    ("kd", False, 1), ("kd", False, 2), ("kd", False, 3), ("kd", True, 0), ("kd", True, 2), ("kd", True, 3),
    ("lora", False, 2), ("sft", True, 2),
]  # fmt: skip
"""(arm, tied head, ZeRO stage)"""
SPLITS: list[tuple[int, dict[str, Any]]] = [
    (1, {"micro_batch_size": 8}), (1, {"micro_batch_size": 1}), (1, {"micro_batch_size": 3}),
    (1, {"micro_batch_size": 3, "packing": True}), (1, {"micro_batch_tokens": 90}),
    (2, {"micro_batch_size": 4}), (2, {"micro_batch_size": 1}), (2, {"micro_batch_tokens": 70}),
    (2, {"micro_batch_tokens": 70, "packing": True}), (2, {"micro_batch_tokens": 20, "zero_stage": 3}),
]  # fmt: skip
"""(ranks, how a global batch of 8 is cut)"""
ON_TWO = len([n for n, _ in SPLITS if n == 2])


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """All cases: those of the stages on two ranks, and the splits; by number of ranks, of rank 0."""
    stages = [
        {
            "model": str(folder / ("tied" if tied else "student")),
            "train": {
                "arm": arm, "zero_stage": stage, "max_grad_norm": CLIP, "global_batch_size": BATCH,
                "learning_rate": RATE,
            },
            "steps": STEPS,
        }
        for arm, tied, stage in CASES
    ]  # fmt: skip
    offloaded = {
        "model": str(folder / "student"),
        "train": {
            "arm": "neo", "zero_stage": 3, "max_grad_norm": CLIP, "global_batch_size": BATCH, "learning_rate": RATE,
            "deepspeed": "zero3_offload",
        },
        "steps": STEPS,
    }  # fmt: skip
    splits = {
        ranks: [
            {
                "model": str(folder / "tied"),
                "train": {"arm": "kd", "global_batch_size": 8, "max_grad_norm": 0.0, **cut},
            }
            for n, cut in SPLITS
            if n == ranks
        ]
        for ranks in (1, 2)
    }
    function, dump = "support.engine_jobs:run_cases", str(folder / "dump")
    return {
        1: run_ranks(function, 1, dump=dump, cases=splits[1])[0],
        2: run_ranks(function, 2, dump=dump, cases=[*splits[2], *stages, offloaded])[0],
    }


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[str, bool], Trace]:
    """The reference of each arm and student."""
    dump = Dump.open(str(folder / "dump"))
    return {
        (arm, tied): train_plainly(
            dump, str(folder / ("tied" if tied else "student")), arm=arm, steps=STEPS, batch=BATCH, rate=RATE, clip=CLIP
        )
        for arm, tied in {(arm, tied) for arm, tied, _ in CASES}
    }


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_equals_plain_torch(
    case: int, results: dict[int, list[dict[str, Any]]], plain: dict[tuple[str, bool], Trace]
) -> None:
    """Losses, gradients, the logged norm and, after some clipped steps, the weights."""
    arm, tied, _ = CASES[case]
    expected, found = plain[arm, tied], results[2][ON_TWO + case]
    assert min(expected.norms) > CLIP, "clipping must be active"
    assert_same_steps(found, expected, rate=RATE)


def test_values_are_read_once_the_gradient_is_there(folder: Path) -> None:
    """No micro-batch waits for a value, and of what comes after the gradient, the update, none is read."""
    cases: list[dict[str, Any]] = [
        {"model": str(folder / "student"), "train": {"zero_stage": stage, "micro_batch_size": 3}} for stage in (0, 3)
    ]
    cases.append({"model": str(folder / "student"), "train": {"micro_batch_size": 3, "packing": True}})
    found = run_ranks("support.engine_jobs:reads_of_a_step", 1, dump=str(folder / "dump"), cases=cases)[0]
    # At stage 0 clipping is this project's; at the others DeepSpeed has looked at the gradient before the update.
    assert found[0] == ["update", "ClippedAdamW.step", "Underway.read"]
    usual = ["update", "Underway.read", "Underway.read"]
    assert found[1:] == [usual, ["look", "look", *usual]]


def test_weights_are_gathered_in_groups(folder: Path) -> None:
    """The state does not depend on how many come at once, nor on a size that three ranks share unequally."""
    cases: list[dict[str, Any]] = [
        {"model": str(folder / "student"), "train": {"zero_stage": stage, "global_batch_size": 6}, "gathered": most}
        for stage in (2, 3)
        for most in (2**24, 300, 1)
    ]
    found = run_ranks("support.engine_jobs:run_cases", 3, dump=str(folder / "dump"), cases=cases)
    states = [[case["last"] for case in rank] for rank in found]
    for number, state in enumerate(states[0]):
        one_by_one = states[0][3 * (number // 3) + 2]
        assert list(state) == list(one_by_one)
        for rank in states:
            assert all(torch.equal(value, rank[number][name]) for name, value in one_by_one.items())


def test_offloading_to_the_host_changes_nothing(results: dict[int, list[dict[str, Any]]]) -> None:
    """Weights and optimizer on the host: the steps and the state of ZeRO-3 without it."""
    found, expected = results[2][-1], dict(zip(CASES, results[2][ON_TWO:-1], strict=True))["neo", False, 3]
    for here, there in zip(found["steps"], expected["steps"], strict=True):
        assert here == pytest.approx(there, rel=GRADIENT)
    assert update_excess(found["last"], expected["last"], first=expected["first"], rate=RATE, steps=STEPS) < 1
    assert relative(found["last"], expected["last"], "exp_avg_sq") < 2 * GRADIENT


def test_split_of_the_batch_changes_nothing(results: dict[int, list[dict[str, Any]]]) -> None:
    """One batch of 8 = eight of 1 = a ragged split = packed rows = cut by tokens = two ranks: loss and gradients."""
    found = [*results[1], *results[2][:ON_TWO]]
    whole = found[0]
    for other in found[1:]:
        assert other["steps"][0][0] == pytest.approx(whole["steps"][0][0], rel=FORWARD)
        gradient, expected = (_flat(x["first"], "exp_avg") for x in (other, whole))
        assert float((gradient - expected).norm() / expected.norm()) < GRADIENT


def test_first_step_of_neo_is_that_of_full_distillation(results: dict[int, list[dict[str, Any]]]) -> None:
    """The adapter starts at zero: same loss as the full arm, and no gradient for A, since B is 0."""
    by_case = dict(zip(CASES, results[2][ON_TWO:-1], strict=True))
    for tied in (False, True):
        neo, kd = by_case["neo", tied, 2], by_case["kd", tied, 2]
        assert neo["steps"][0][:3] == pytest.approx(kd["steps"][0][:3], rel=FORWARD)
        gradients = {key: value for key, value in neo["first"].items() if key.startswith("exp_avg/")}
        assert all(not value.any() for key, value in gradients.items() if "lora_A" in key)
        assert all(value.any() for key, value in gradients.items() if "lora_B" in key)


def test_arms_without_divergence_need_none(results: dict[int, list[dict[str, Any]]]) -> None:
    """`sft` and `lora` minimise the cross-entropy alone."""
    by_case = dict(zip(CASES, results[2][ON_TWO:-1], strict=True))
    for case in (("lora", False, 2), ("sft", True, 2)):
        for loss, ce, divergence, _ in by_case[case]["steps"]:
            assert loss == pytest.approx(ce, rel=1e-6)
            assert ce > 0
            assert divergence == 0


def _flat(state: dict[str, Tensor], kind: str) -> Tensor:
    return torch.cat([state[key].flatten() for key in sorted(state) if key.startswith(f"{kind}/")])
