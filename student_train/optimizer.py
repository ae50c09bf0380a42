"""AdamW: which parameters decay, how fast each learns, and the clipping that DeepSpeed leaves to it at stage 0."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from student_train.config import TrainSection


def adamw(named: Sequence[tuple[str, nn.Parameter]], train: TrainSection) -> torch.optim.AdamW:
    """The optimizer of trained parameters, to be wrapped by DeepSpeed."""
    return (torch.optim.AdamW if train.zero_stage else ClippedAdamW)(
        parameter_groups(named, weight_decay=train.weight_decay, ratio=train.loraplus_lr_ratio or 1.0),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


def parameter_groups(
    named: Sequence[tuple[str, nn.Parameter]], *, weight_decay: float, ratio: float
) -> list[dict[str, Any]]:
    """Parameters by what AdamW does with them: one group for each pair of decay and learning rate that there is.

    Args:
        weight_decay: of matrices; vectors, that is norms, biases and DoRA's magnitudes, have none.
        ratio: learning rate of an adapter's matrices B over that of all else (LoRA+, arXiv 2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((decay, ratio if "lora_B" in name else 1.0), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "lr_ratio": times} for (decay, times), group in groups.items()]


class ClippedAdamW(torch.optim.AdamW):
    """For stage 0, where DeepSpeed tells no gradient norm and judges nothing: gradients are whole, equal on every
    rank, and measured, judged and clipped here. The attributes are those that DeepSpeed reads from its own optimizers.
    """

    max_grad_norm = 0.0
    """0: no clipping."""
    overflow = False
    """Whether the last step was left out, because a gradient was not finite."""
    _global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, if the gradients are finite."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        super().step(closure)
