"""The learning rate equals that of transformers' schedulers, step by step, but for a warm-up that is one step ahead."""

import math
from typing import Any, get_args

import pytest
import torch
import transformers
from pydantic import ValidationError

from storage_schemas.common.errors import MismatchError
from student_train.config import Schedule, TrainSection
from student_train.schedule import learning_rate, warmup_of
from student_train.training_run import refuse_impossible_schedule, refuse_unfit_schedule

ARGUMENTS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-6},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
"""Of the schedules that need or have some."""


def section(kind: str = "cosine", *, peak: float = 1.0, **changes: Any) -> TrainSection:
    return TrainSection(output="runs/a", lr_scheduler_type=kind, learning_rate=peak, **changes)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", get_args(Schedule))
def test_learning_rate_equals_the_scheduler_of_transformers(kind: str, ratio: float, total: int) -> None:
    peak, arguments = 2e-4, ARGUMENTS.get(kind, {})
    train = section(kind, peak=peak, warmup_ratio=ratio, lr_scheduler_kwargs=arguments)
    warmup = warmup_of(train, total)
    assert warmup == math.ceil(total * ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=arguments or None
    )
    theirs = []
    # Theirs divides by the steps after the warm-up.
    last = total - (kind == "polynomial" and warmup == total)
    for step in range(last + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < last:
            scheduler.step()
    for step in range(last + 1):
        got = learning_rate(train, step, total_steps=total)
        wanted = peak if step + 1 == warmup else theirs[min(last, step + (step < warmup))]
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-20), step


def test_the_schedule_peaks_after_the_warm_up_and_ends_at_0() -> None:
    train = section(warmup_steps=5)
    rates = [learning_rate(train, step, total_steps=50) for step in range(51)]
    assert rates[0] == 0.2
    assert rates[4] == rates[5] == max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(train, 60, total_steps=50) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_every_step_of_a_run_can_learn(total: int, ratio: float) -> None:
    """A run of one step included, whose rate was 0."""
    for kind in ("cosine", "linear", "constant"):
        rates = [learning_rate(section(kind, warmup_ratio=ratio), s, total_steps=total) for s in range(total)]
        assert min(rates) > 0


def test_warm_up_steps_take_the_place_of_their_share() -> None:
    assert warmup_of(section(), 100) == 10
    assert warmup_of(section(warmup_steps=3), 100) == 3
    assert warmup_of(section(warmup_steps=0), 100) == 0


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("cosine", {"power": 2}),
        ("warmup_stable_decay", {}),
        ("polynomial", {"lr_end": 2.0}),
        ("cosine_with_min_lr", {}),
        ("cosine_with_min_lr", {"min_lr_rate": "0.1"}),
        ("constant", {"min_lr_rate": 0.1}),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused(kind: str, arguments: dict[str, Any]) -> None:
    train = section(kind, warmup_steps=2, lr_scheduler_kwargs=arguments)
    with pytest.raises(MismatchError, match=r"train.lr_scheduler_kwargs"):
        [learning_rate(train, step, total_steps=9) for step in range(9)]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("cosine", {"warmup_steps": 7}, "train.warmup_steps is more"),
        ("warmup_stable_decay", {"num_decay_steps": 7}, "num_decay_steps is more"),
        ("warmup_stable_decay", {"warmup_steps": 3, "num_decay_steps": 4}, "at most 3, the steps after the warm-up"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "min_lr_ratio": 1.5}, "min_lr_ratio is more"),
        ("cosine_with_min_lr", {"min_lr": 3e-4}, r"expected: at most 0.0002, train.learning_rate"),
        ("cosine_with_min_lr", {"min_lr_rate": 2.0}, "min_lr_rate is more"),
    ],
)
def test_what_no_schedule_can_do_is_refused(kind: str, changes: dict[str, Any], says: str) -> None:
    """A peak or an end that is never reached, and an end above the peak."""
    warmup = {name: value for name, value in changes.items() if name == "warmup_steps"}
    arguments = {name: value for name, value in changes.items() if name not in warmup}
    train = section(kind, peak=2e-4, warmup_ratio=0.0, lr_scheduler_kwargs=arguments, **warmup)
    refuse_unfit_schedule(train, 6)
    with pytest.raises(MismatchError, match=says):
        refuse_impossible_schedule(train, 6)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("kind", get_args(Schedule))
def test_what_a_schedule_can_just_do_is_taken(kind: str, steps: int) -> None:
    """Warm-up or decay over all steps, and an end that is the peak."""
    if kind == "warmup_stable_decay":
        train = section(kind, warmup_steps=0, lr_scheduler_kwargs={"num_decay_steps": steps})
    else:
        train = section(kind, warmup_steps=steps, lr_scheduler_kwargs=ARGUMENTS.get(kind, {}))
    refuse_impossible_schedule(train, steps)
    if kind == "cosine_with_min_lr":
        refuse_impossible_schedule(section(kind, peak=0.1, lr_scheduler_kwargs={"min_lr": 0.1}), steps)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_that_torch_takes_is_taken(seed: int) -> None:
    """And no other."""
    torch.manual_seed(section(seed=seed).seed)
    beyond = seed + 1 if seed > 0 else -(2**63) - 1
    with pytest.raises(ValidationError, match="seed"):
        section(seed=beyond)
