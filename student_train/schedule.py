"""Learning rate as a pure function of the step, so that no scheduler state needs saving."""

import math
from typing import Literal


def learning_rate(
    step: int, *, total_steps: int, warmup_ratio: float, kind: Literal["cosine", "linear", "constant"], peak: float
) -> float:
    """Learning rate of an optimizer step, with ceil(total_steps * warmup_ratio) warm-up steps.

    After the warm-up it is that of `transformers.get_scheduler`. In the warm-up, step s has the rate that transformers
    gives to step s + 1: there the first step has rate 0, and what it computes is thrown away.

    Args:
        step: 0-based; the last step of a warm-up has the peak rate. From `total_steps` on the rate stays what it is
            there.
        total_steps: where the schedule ends.
        warmup_ratio: share of the steps with a linearly rising rate.
        kind: shape after the warm-up.
        peak: rate at the end of the warm-up.
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done, decay = min(step, total_steps) - warmup, max(1, total_steps - warmup)
    match kind:
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * done / decay))
        case "linear":
            return peak * (total_steps - warmup - done) / decay
        case "constant":
            return peak
