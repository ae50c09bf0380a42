"""Whether two engines give the same targets for one model: bucketed KL, and heads that agree up to ties."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage_schemas.targets import Targets

_LEAST_MASS = 1e-6
"""Of the bucket: an engine that only names the largest entries does not know the rest's mass any better."""

TOLERANCES = {"float32": (1e-6, 1e-3), "float16": (1e-3, 0.2), "bfloat16": (1e-2, 1.0)}
"""By compute dtype, in nats: mean bucketed KL, and how far an entry that only one head has may lie above the smallest
of the other head. Seen (docs/design/teacher.md): float32 2e-9 and below 0, bfloat16 2e-3 and 0.4; float16 lies between.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far `found` is from `expected`, over n tokens."""

    tokens: int
    """n."""
    kl_mean: float
    """Nats: mean KL(expected || found) over the entries that both heads have, and a bucket for everything else."""
    kl_max: float
    """Nats: the largest one of a token."""
    logprob_max: float
    """Nats: largest difference of an entry that both heads have."""
    gap: float
    """Nats: the most that an entry which only one head has lies above the smallest of the other head; at most 0 where
    heads only end earlier or later, about 0 for ties."""

    def within(self, dtype: str) -> bool:
        """Whether rounding in this dtype explains it."""
        kl, gap = TOLERANCES[dtype]
        # A negative KL means that `found` is no distribution.
        return abs(self.kl_mean) <= kl and self.gap <= gap


def agreement(expected: Sequence[Targets], found: Sequence[Targets]) -> Agreement:
    """Compare targets of the same tokens, sample by sample, at T = 1; both without draws."""
    pairs = zip(expected, found, strict=True)
    figures = np.array([_token(a, b, i) for a, b in pairs for i in range(len(a))]).reshape(-1, 3)
    kl, difference, gap = figures.T
    return Agreement(
        tokens=len(figures),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        logprob_max=float(difference.max()),
        gap=float(gap.max()),
    )


def _token(expected: Targets, found: Targets, i: int) -> tuple[float, float, float]:
    """KL, largest difference and gap of token i."""
    (a_ids, a, a_tail), (b_ids, b, b_tail) = _entries(expected, i), _entries(found, i)
    in_a, in_b = np.isin(a_ids, b_ids), np.isin(b_ids, a_ids)
    p, q = a[in_a], b[in_b]
    p_rest = max(np.exp(a_tail) + np.exp(a[~in_a]).sum(), _LEAST_MASS)
    q_rest = max(np.exp(b_tail) + np.exp(b[~in_b]).sum(), _LEAST_MASS)
    kl = (np.exp(p) * (p - q)).sum() + p_rest * np.log(p_rest / q_rest)
    gap = max(a[~in_a].max(initial=-np.inf) - b.min(), b[~in_b].max(initial=-np.inf) - a.min())
    return kl, np.abs(p - q).max(initial=0.0), gap


def _entries(targets: Targets, i: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], float]:
    """Ids, ascending, float64 log-probs and log tail mass of token i."""
    here = slice(targets.offsets[i], targets.offsets[i + 1])
    return targets.ids[here], targets.logprobs[here].astype(np.float64), float(targets.tail_logprob[i, 0])
