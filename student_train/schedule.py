"""Learning rate as a pure function of the step, so that no scheduler state needs saving."""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import get_scheduler

from storage_schemas.common.errors import MismatchError
from student_train.config import TrainSection


def warmup_of(train: TrainSection, total_steps: int) -> int:
    """Steps with a rising rate: `train.warmup_steps` if given, else that share of all, rounded up."""
    return math.ceil(total_steps * train.warmup_ratio) if train.warmup_steps is None else train.warmup_steps


def learning_rate(train: TrainSection, step: int, *, total_steps: int) -> float:
    """Learning rate of an optimizer step.

    After the warm-up it is that of `transformers.get_scheduler`. In the warm-up, step s has the rate that transformers
    gives to step s + 1: there the first step has rate 0, and what it computes is thrown away.

    Args:
        train: what names the schedule as transformers does; `constant` is `constant_with_warmup`.
        step: 0-based; the last step of a warm-up has the peak rate. From `total_steps` on the rate stays what it is
            there.
        total_steps: where the schedule ends.

    Raises:
        MismatchError: the schedule does not take `train.lr_scheduler_kwargs`.
    """
    kind, peak, arguments = train.lr_scheduler_type, train.learning_rate, train.lr_scheduler_kwargs
    warmup_steps = warmup_of(train, total_steps)
    if step + 1 == warmup_steps:
        return peak
    try:
        factor = _factor(kind, warmup_steps, total_steps, peak, json.dumps(arguments, sort_keys=True))
        return peak * factor(step + 1 if step < warmup_steps else min(step, total_steps))
    except (TypeError, ValueError) as error:
        raise MismatchError(
            f"the schedule {kind} does not take what train.lr_scheduler_kwargs says",
            got=f"{arguments}: {error}",
            expected="arguments of that schedule of transformers",
            fix="correct train.lr_scheduler_kwargs, or choose another train.lr_scheduler_type",
        ) from error


@lru_cache(maxsize=4)
def _factor(kind: str, warmup_steps: int, total_steps: int, peak: float, arguments: str) -> Callable[[int], float]:
    """What the peak rate is multiplied by before each step, as transformers counts them; `arguments` as JSON."""
    own = json.loads(arguments)
    if own and kind.startswith("constant"):  # transformers would take them in silence.
        raise ValueError("it has no arguments")
    name = "constant_with_warmup" if kind == "constant" else kind
    nothing = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler: Any = get_scheduler(name, nothing, warmup_steps, total_steps, scheduler_specific_kwargs=own or None)
    return scheduler.lr_lambdas[0]  # type: ignore[no-any-return]
