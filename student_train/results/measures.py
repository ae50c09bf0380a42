"""What each supervised token says of a student beside its teacher, and what that comes to over many of them."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from storage_schemas.common.frozen import FrozenModel
from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.losses import entry_divergence, overlap, ranks_first
from student_train.model.token_losses import entries_and_tail

CALIBRATION_BINS = 15
"""Bins of equal width of the expected calibration error (arXiv 1706.04599, eq. 3)."""
PLACES = (0, 1, 4, 16, 64, 256, 1024)
"""Where groups of tokens by their place among the supervised tokens of their sample begin."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Where groups of tokens by the teacher's entropy begin, nats."""
Z_95 = 1.959964
"""Standard errors on either side of a 95 % interval of a normal distribution."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The same of Student's t with 1, 2, ... degrees of freedom; `students_t` has those of more."""


class TokenMeasures(NamedTuple):
    """Of n supervised tokens; (n,) each, at the temperature of the comparison unless something else is said."""

    kl: npt.NDArray[np.float32]
    """KL(teacher || student) on the stored entries and the tail bucket, nats; with draws a noisy estimate."""
    ce: npt.NDArray[np.float32]
    """-log q of the token itself at temperature 1."""
    label_ce: npt.NDArray[np.float32]
    """-log p of the token itself; the least that it can be where the token is not among the entries."""
    label_stored: npt.NDArray[np.bool_]
    """Whether it is among the entries."""
    overlap_least: npt.NDArray[np.float32]
    """See `losses.overlap`."""
    overlap_most: npt.NDArray[np.float32]
    """And the most."""
    same_first: npt.NDArray[np.bool_]
    """See `losses.ranks_first`."""
    top5: npt.NDArray[np.float32]
    """Share of the teacher's five most likely tokens, or as many as its head has, that are the student's, too."""
    entropy: npt.NDArray[np.float32]
    """The teacher's, nats, the tail as one outcome."""
    first: npt.NDArray[np.int64]
    """The student's most likely token."""
    confidence: npt.NDArray[np.float32]
    """Probability of it, at temperature 1."""
    correct: npt.NDArray[np.bool_]
    """Whether that is the token itself."""

    @property
    def label_p(self) -> npt.NDArray[np.float32]:
        """The student's probability of the token itself, at temperature 1."""
        return np.exp(-self.ce)

    @staticmethod
    def joined(parts: Sequence["TokenMeasures"]) -> "TokenMeasures":
        """All tokens of `parts`, in order."""
        return TokenMeasures(*map(np.concatenate, zip(*parts, strict=True)))


def measure(logits: Float[Tensor, "n vocab"], targets: SparseTargets, *, temperature: float) -> TokenMeasures:
    """Compare a student's logits with the teacher's targets, token by token.

    Args:
        logits: of all tokens that the student may give a probability to.
        targets: of the same tokens, decoded at `temperature`.
        temperature: T of both distributions.
    """
    ids, has = targets.ids.long(), targets.in_head | (targets.weights > 0)
    plain, (highest, first) = logits.log_softmax(1), logits.max(1)
    tempered = plain if temperature == 1.0 else (logits / temperature).log_softmax(1)
    log_q, outside = entries_and_tail(tempered, targets)
    log_p, p = targets.logprobs.to(logits.dtype), targets.weights.to(logits.dtype)
    least, most = overlap(log_q, outside, targets)
    tail = torch.zeros_like(outside) if targets.has_draws else targets.tail_logprob.to(logits.dtype)
    rest = torch.where(torch.isfinite(tail), tail.exp() * tail, 0.0)
    label = has & (ids == targets.labels[:, None])
    # A token that is not stored lies in the tail, and below each entry of the head.
    lowest = torch.nn.functional.pad(torch.where(targets.in_head, log_p, 0.0), (0, 1)).amin(1)  # 0 without a head.
    unseen = torch.minimum(targets.tail_logprob.to(logits.dtype), lowest)
    found = (
        entry_divergence(log_q, outside, targets, LossSection(temperature=temperature)),
        -plain.gather(1, targets.labels[:, None])[:, 0],
        -torch.where(label.any(1), torch.where(label, log_p, 0.0).sum(1), unseen),
        label.any(1),
        least,
        most,
        ranks_first(logits.gather(1, ids), highest, targets),
        _top5(logits, ids, targets),
        -(p * log_p).sum(1) - rest,
        first,
        plain.gather(1, first[:, None])[:, 0].exp(),
        first == targets.labels,
    )
    return TokenMeasures(*(value.cpu().numpy() for value in found))


def _top5(logits: Tensor, ids: Tensor, targets: SparseTargets) -> Tensor:
    """(n,) see `TokenMeasures.top5`; 0 without a head."""
    most = min(5, ids.shape[1], logits.shape[1])
    if not most:
        return logits.new_zeros(len(logits))
    head = torch.where(targets.in_head, targets.logprobs, -torch.inf)
    teachers, students = ids.gather(1, head.topk(most).indices), logits.topk(most).indices
    size = targets.in_head.sum(1).clamp(max=most)
    counts = torch.arange(most, device=ids.device) < size[:, None]
    same = (teachers[:, :, None] == students[:, None, :]) & counts[:, :, None] & counts[:, None, :]
    return same.sum((1, 2)) / size.clamp(min=1)


class TokenGroup(FrozenModel):
    """Means over the supervised tokens of one group."""

    least: float
    """Where the group begins."""
    tokens: int
    kl: float
    ce: float
    top1_agreement: float | None
    acceptance_rate_min: float
    acceptance_rate_max: float


def groups(
    tokens: TokenMeasures, value: npt.NDArray[np.generic], edges: Sequence[float], *, exact_head: bool
) -> tuple[TokenGroup, ...]:
    """The tokens by a value of theirs, from each edge to the next; groups without tokens are left out."""
    which, found = np.searchsorted(np.asarray(edges), value, side="right") - 1, []
    for number, edge in enumerate(edges):
        mine = which.clip(min=0) == number
        if mine.any():
            mean = {name: float(getattr(tokens, name)[mine].mean(dtype=np.float64)) for name in (
                "kl", "ce", "same_first", "overlap_least", "overlap_most")}  # fmt: skip
            found.append(TokenGroup(
                least=edge, tokens=int(mine.sum()), kl=mean["kl"], ce=mean["ce"],
                top1_agreement=mean["same_first"] if exact_head else None,
                acceptance_rate_min=mean["overlap_least"], acceptance_rate_max=mean["overlap_most"],
            ))  # fmt: skip
    return tuple(found)


def calibration_error(confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error of the most likely token: over bins of confidence, the mean of |right - sure|."""
    which = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    off = np.bincount(which, correct.astype(np.float64) - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(off).sum() / len(confidence))


def students_t(freedom: int) -> float:
    """Standard errors on either side of a 95 % interval, by Student's t (Abramowitz and Stegun, eq. 26.7.5)."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z, n = Z_95, 4 * freedom
    return (
        z + (z**3 + z) / n + (5 * z**5 + 16 * z**3 + 3 * z) / (6 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (6 * n**3)
    )  # fmt: skip


class Difference(FrozenModel):
    """Of the means of two models over the same tokens, the second one less the first one."""

    difference: float
    interval: tuple[float, float] | None
    """95 %, for other samples of the same kind: the tokens of a sample are no independent ones. Null for one sample."""


def paired(
    first: npt.NDArray[np.generic], second: npt.NDArray[np.generic], samples: npt.NDArray[np.int64]
) -> Difference:
    """Compare two models by a measure of the same tokens.

    The difference is a ratio of sums over samples, and its standard error that of a ratio (Cochran, Sampling
    Techniques, 3rd ed., eq. 2.39); the interval is Student's, by the number of samples.

    Args:
        first: (n,) of one model.
        second: (n,) of the other.
        samples: (n,) which sample a token is of.
    """
    by_token = second.astype(np.float64) - first.astype(np.float64)
    mean = float(by_token.mean())
    _, which = np.unique(samples, return_inverse=True)
    off = np.bincount(which, by_token - mean)
    if len(off) < 2:
        return Difference(difference=mean, interval=None)
    error = math.sqrt(len(off) / (len(off) - 1) * float((off**2).sum())) / len(by_token)
    wide = students_t(len(off) - 1) * error
    return Difference(difference=mean, interval=(mean - wide, mean + wide))


def by_seed(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of second - first over seeds, and its 95 % interval by Student's t; none for one seed."""
    off = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(off)
    if len(off) < 2:
        return mean, None
    wide = students_t(len(off) - 1) * statistics.stdev(off) / math.sqrt(len(off))
    return mean, (mean - wide, mean + wide)
