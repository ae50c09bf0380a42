"""Per-token losses on sparse targets: cross-entropy, and divergences on the head's entries and one tail bucket.

p is the teacher, q the student, both at temperature T. Targets from the `topk` estimator leave one *bucket*, the mass
outside the head: M for the teacher, Q for the student. Head and bucket together are a distribution on K + 1 outcomes,
and every divergence here is exact on it (a lower bound of the one on the full vocabulary). A target whose head is the
whole vocabulary has no bucket. With draws, the forward KL is an unbiased estimate over the full vocabulary instead.
"""

import math
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from storage_schemas.common.errors import MismatchError
from student_train.config import Divergence, LossSection
from student_train.data.batch import SparseTargets

ABSENT = -1e30
"""What a masked logit becomes. Finite, so that a student without a tail gets probability and gradient 0, not NaN."""
_OUTSIDE = ABSENT / 1e9
"""Log-probs of a student with a tail are above this, those without below, at every temperature."""
_NO_MASS = math.log(2.0**-24)
"""Log-prob of the bucket where the teacher has no mass outside of the head: what float32 does not tell from none. The
divergences with log p under q, such as KL(q || p), are infinite at none."""
AKL_HEAD_MASS = 0.5
"""mu of arXiv 2404.02657: the head of adaptive KL is the fewest entries that hold this much of the teacher's mass."""


def refuse_biased(divergence: Divergence) -> None:
    """Raise MismatchError unless draws estimate this divergence without bias."""
    if divergence != "forward_kl":
        raise MismatchError(
            "drawn targets estimate expectations under the teacher, so only the forward KL is unbiased on them",
            got=f"loss.divergence: {divergence}",
            expected="forward_kl",
            fix="set loss.divergence to forward_kl, or dump with estimator.kind: topk",
        )


def entry_divergence(
    log_q: Float[Tensor, "n K"], log_q_tail: Float[Tensor, " n"], targets: SparseTargets, spec: LossSection
) -> Float[Tensor, " n"]:
    """D of each token from the student's log-probs of the entries and of the bucket; a function of nothing else.

    Differentiable in both arguments, which the caller may move freely: they need not sum to 1.

    Raises:
        MismatchError: the divergence is not known, or draws do not estimate it without bias.
    """
    log_p, p = targets.logprobs.to(log_q.dtype), targets.weights.to(log_q.dtype)
    if targets.has_draws:
        refuse_biased(spec.divergence)
        return (p * (log_p - log_q)).sum(1)
    # A head of the whole vocabulary leaves no bucket. (n, K + 1) from here on; both logs are 0 outside of `used`.
    used = torch.cat([targets.in_head, (log_q_tail > _OUTSIDE)[:, None]], 1)
    tail = targets.tail_logprob[:, None].to(log_q.dtype)
    log_p = torch.where(used, torch.cat([log_p, torch.where(torch.isfinite(tail), tail, _NO_MASS)], 1), 0.0)
    log_q = torch.where(used, torch.cat([log_q, log_q_tail[:, None]], 1), 0.0)
    p = torch.where(used, torch.cat([p, tail.exp()], 1), 0.0)
    if spec.divergence == "forward_kl":
        return (p * (log_p - log_q)).sum(1)
    q = torch.where(used, log_q.exp(), 0.0)
    match spec.divergence:
        case "reverse_kl":
            terms = q * (log_q - log_p)
        case "jsd":  # beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1)
            log_m = _log_mixture(log_p, log_q, spec.beta)
            terms = spec.beta * p * (log_p - log_m) + (1 - spec.beta) * q * (log_q - log_m)
        case "skewed_kl":  # KL(p || beta p + (1 - beta) q) (DistiLLM, arXiv 2402.03898, eq. 4)
            terms = p * (log_p - _log_mixture(log_p, log_q, spec.beta))
        case "skewed_reverse_kl":  # KL(q || (1 - beta) p + beta q)
            terms = q * (log_q - _log_mixture(log_q, log_p, spec.beta))
        case "akl":
            head_weight, tail_weight = _akl_weights(p, q)
            terms = head_weight * p * (log_p - log_q) + tail_weight * q * (log_q - log_p)
        case "tvd":
            terms = 0.5 * (p - q).abs()
        case unknown:
            raise MismatchError(
                "there is no such divergence",
                got=unknown,
                expected=f"one of {', '.join(get_args(Divergence))}",
                fix="correct LossSection(divergence=...)",
            )
    return terms.sum(1)


def overlap(
    log_q: Float[Tensor, "n K"], log_q_tail: Float[Tensor, " n"], targets: SparseTargets
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The least and the most that sum min(p, q) can be over the vocabulary, given the entries and the bucket.

    It is the chance that speculative sampling keeps a token that the student drafts for the teacher (arXiv 2211.17192,
    section 3), and 1 minus the total variation distance. The two differ by what the bucket leaves open, and are equal
    where there is none. With draws both are one unbiased estimate.

    Args:
        log_q: the student's log-probs of the entries.
        log_q_tail: and of all outside the head.
    """
    least = (targets.weights.to(log_q.dtype) * (log_q - targets.logprobs.to(log_q.dtype)).clamp(max=0.0).exp()).sum(1)
    if targets.has_draws:
        return least, least
    return least, least + torch.minimum(log_q_tail, targets.tail_logprob.to(log_q.dtype)).exp()


def ranks_first(
    entries: Float[Tensor, "n K"], highest: Float[Tensor, " n"], targets: SparseTargets
) -> Bool[Tensor, " n"]:
    """Whether the student ranks no token above the teacher's most likely one. False without an exact head.

    Args:
        entries: the student's logits at the entries.
        highest: its highest logit of all, or of all outside the head.
    """
    if not targets.ids.shape[1]:
        return torch.zeros_like(highest, dtype=torch.bool)
    best = torch.where(targets.in_head, targets.logprobs, -torch.inf).argmax(1, keepdim=True)
    highest = torch.maximum(highest, torch.where(targets.in_head, entries, -torch.inf).amax(1))
    return targets.in_head.any(1) & (entries.gather(1, best)[:, 0] >= highest)


def _log_mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight * exp(a) + (1 - weight) * exp(b))."""
    return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))


def _akl_weights(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1) weights of the forward and of the reverse KL (arXiv 2404.02657, section 4): the shares of the head and of
    the tail in the L1 distance, where the head is the fewest entries that hold half of the teacher's mass. The bucket
    always counts as tail. Detached; half and half where p = q."""
    p, q = p.detach(), q.detach()
    sorted_p, order = p[:, :-1].sort(dim=1, descending=True, stable=True)
    before = sorted_p.cumsum(1) - sorted_p
    head = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, before < AKL_HEAD_MASS)
    gap = (p - q).abs()
    head_gap = torch.where(head, gap, 0.0).sum(1, keepdim=True)
    both = gap.sum(1, keepdim=True)
    share = torch.where(both > 0, head_gap / torch.where(both > 0, both, 1.0), 0.5)
    return share, 1 - share
