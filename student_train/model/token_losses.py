"""The losses of single tokens from whole logits, in plain autograd, for who weighs tokens or has another head."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.losses import ABSENT, entry_divergence


class TokenLosses(NamedTuple):
    """Losses of n tokens, differentiable in the logits."""

    loss: Float[Tensor, " n"]
    """(1 - alpha) * CE + alpha * T^2 * D."""
    ce: Float[Tensor, " n"]
    """Cross-entropy with the token itself, in nats."""
    divergence: Float[Tensor, " n"]
    """D at T, without T^2, in nats; 0 where alpha is 0."""


def token_losses(logits: Float[Tensor, "n vocab"], targets: SparseTargets, loss: LossSection) -> TokenLosses:
    """The losses of each token from whole logits: for weights per token, or heads unknown to `fused_head_loss`.

    Computed in float32, or float64 for such logits. Sum `loss` and divide once, by the supervised tokens of the global
    batch.

    Args:
        logits: that predict the supervised tokens, in the order of the targets, without padding columns.
        targets: decoded at `loss.temperature`.
        loss: weight, divergence and temperature.

    Raises:
        MismatchError: the divergence is not known, or these targets do not estimate it without bias.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    ce = z.logsumexp(1) - z.gather(1, targets.labels[:, None])[:, 0]
    if not loss.alpha:
        return TokenLosses(ce, ce, torch.zeros_like(ce))
    divergence = entry_divergence(*entries_and_tail((z / loss.temperature).log_softmax(1), targets), targets, loss)
    return TokenLosses((1 - loss.alpha) * ce + loss.alpha * loss.temperature**2 * divergence, ce, divergence)


def entries_and_tail(
    log_q: Float[Tensor, "n vocab"], targets: SparseTargets
) -> tuple[Float[Tensor, "n K"], Float[Tensor, " n"]]:
    """The student's log-probs of the entries, and of all outside the head together, which is below `ABSENT / 2` where
    nothing is outside."""
    ids = targets.ids.long()
    outside = log_q.scatter_add(1, ids, torch.where(targets.in_head, ABSENT, 0.0).to(log_q.dtype))
    return log_q.gather(1, ids), outside.logsumexp(1)
