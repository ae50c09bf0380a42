"""Sparse target distributions, and the one rule by which stored values become probabilities again.

A target is, per supervised token, an exact *head* (entries of the teacher's distribution), optionally *draws* from
what the head leaves out, and the log mass of that rest, the *tail*. `docs/format.md` is the specification.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_LOWEST = -700.0
"""Below it, exponentials leave the normal float64 numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Targets of n tokens with E entries in all, in compressed rows: token i owns entries offsets[i]:offsets[i+1]."""

    offsets: I64
    """(n + 1,) starts at 0, ends at E."""
    ids: I32
    """(E,) absolute token ids: the head's first, ascending, then the draws', ascending."""
    logprobs: F32
    """(E,) natural log p at T = 1, finite, normalised over the full vocabulary."""
    head_size: I32
    """(n,) how many leading entries of a token are exact."""
    counts: I32 | None = None
    """(E,) how often an entry was drawn, 0 in the head; None when the estimator draws nothing (`topk`)."""
    tail_logprob: F32
    """(n, temperatures) log of the mass outside the head; -inf where there is none."""
    logsumexp: F32 | None = None
    """(n, temperatures) log sum exp(z / T) of the raw logits."""

    def __len__(self) -> int:
        return len(self.head_size)

    @property
    def lengths(self) -> I64:
        """(n,) entries per token."""
        return np.diff(self.offsets)

    @property
    def in_head(self) -> Bool:
        """(E,) true for exact entries: the leading `head_size` of each token."""
        parts = np.stack([self.head_size, self.lengths - self.head_size], axis=1)
        return np.repeat(np.tile([True, False], len(self)), parts.reshape(-1))

    @property
    def draw_counts(self) -> I32 | None:
        """(draws,) counts of the draws alone; None when the estimator draws nothing."""
        return None if self.counts is None else self.counts[~self.in_head]

    def slice(self, start: int, stop: int, *, own: bool = False) -> "Targets":
        """Tokens start:stop, sharing memory; with `own`, the entries have memory of their own."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        ids, logprobs = self.ids[first:last], self.logprobs[first:last]
        counts = None if self.counts is None else self.counts[first:last]
        if own:
            ids, logprobs, counts = ids.copy(), logprobs.copy(), None if counts is None else counts.copy()
        return Targets(
            offsets=self.offsets[start : stop + 1] - first,
            ids=ids,
            logprobs=logprobs,
            head_size=self.head_size[start:stop],
            counts=counts,
            tail_logprob=self.tail_logprob[start:stop],
            logsumexp=None if self.logsumexp is None else self.logsumexp[start:stop],
        )


def concatenate(parts: Sequence[Targets]) -> Targets:
    """All tokens of `parts`, one at least, in order. The parts agree on draws, temperatures and logsumexp."""
    columns: dict[str, Any] = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Targets)}
    offsets = joined_offsets(columns.pop("offsets"))
    joined: dict[str, Any] = {
        name: None if arrays[0] is None else np.concatenate(arrays) for name, arrays in columns.items()
    }
    return Targets(offsets=offsets, **joined)


def joined_offsets(parts: Sequence[I64]) -> I64:
    """Offsets of several arrays laid one behind the other; each part starts at 0."""
    starts = np.cumsum([0, *(part[-1] for part in parts)])
    return np.concatenate([[0], *(part[1:] + start for part, start in zip(parts, starts, strict=False))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Probabilities of n tokens at one temperature, padded to the K entries of the longest token."""

    ids: I32
    """(n, K) token ids; 0 in padding."""
    logprobs: F32
    """(n, K) log p at the temperature; 0 in padding."""
    weights: F32
    """(n, K) what an entry counts in an expectation under the teacher: p in the head, (M / m) * count for draws, 0 in
    padding. A token's weights, plus the bucket's mass when there are no draws, sum to 1."""
    in_head: npt.NDArray[np.bool_]
    """(n, K) true for exact entries."""
    tail_logprob: F32
    """(n,) log mass outside the head at the temperature; -inf where there is none."""


def decode(targets: Targets, *, temperature_index: int = 0, temperature: float = 1.0) -> Decoded:
    """The decoding rule: the head is rescaled to hold exactly 1 - exp(tail).

    Stored values are rounded, so that a head's sum misses 1 - tail by up to 5e-3; taken raw, the divergence of two
    identical models would not be 0. Loss, fidelity gate and evaluation all decode here.

    Args:
        temperature_index: column of `tail_logprob` that belongs to `temperature`.
        temperature: T; the head becomes p^(1/T), renormalised to the mass stored for T.

    Raises:
        ValueError: draws at T != 1; they were made at T = 1 and cannot be re-tempered.
    """
    if targets.counts is not None and temperature != 1.0:
        raise ValueError("targets with draws can only be decoded at temperature 1")
    lengths = targets.lengths
    columns = np.arange(int(lengths.max(initial=1)), dtype=np.int32)
    # (n, K)
    filled = columns < lengths.astype(np.int32)[:, None]
    in_head = filled if targets.counts is None else columns < targets.head_size[:, None]
    tail = targets.tail_logprob[:, temperature_index]
    mass = tail.astype(np.float64)

    # log p^(1/T), plus the log of what makes the head hold its mass. On the entries alone, without padding, in place
    # and with one exponential: this is a good part of what a loader does.
    drawn = None if targets.counts is None else ~in_head[filled]
    head = targets.logprobs.astype(np.float64)
    if drawn is not None:
        head[drawn] = -np.inf
    if temperature != 1.0:
        head /= temperature
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # A writer decodes before it refuses NaN.
        if not head.min(initial=0.0) > _LOWEST:
            top = _per_token(np.maximum, head, targets.offsets, empty=0.0)
            head -= np.repeat(np.where(np.isfinite(top), top, 0.0), lengths)
        weights = np.exp(head)
        total = _per_token(np.add, weights, targets.offsets, empty=0.0)
        scale = -np.expm1(mass) / np.where(total == 0.0, 1.0, total)  # A token may have no head.
        weights *= np.repeat(scale, lengths)
        head += np.repeat(np.log(scale), lengths)
    if drawn is not None and targets.counts is not None:
        draws = _per_token(np.add, targets.counts, targets.offsets, empty=0)
        weights += np.repeat(np.exp(mass) / np.maximum(draws, 1), lengths) * targets.counts
        head[drawn] = targets.logprobs[drawn]
    return Decoded(
        ids=_padded(targets.ids, filled, np.int32),
        logprobs=_padded(head, filled, np.float32),
        weights=_padded(weights, filled, np.float32),
        in_head=in_head,
        tail_logprob=tail,
    )


def _per_token(reduce: np.ufunc, values: Any, offsets: I64, *, empty: float) -> Any:
    """(n,) what `reduce` makes of each token's entries; `empty` for a token without any, where reduceat is no use."""
    some = np.flatnonzero(np.diff(offsets))
    reduced = np.full(len(offsets) - 1, empty, values.dtype)
    reduced[some] = reduce.reduceat(values, offsets[some]) if len(some) else empty
    return reduced


def _padded(values: Any, filled: Bool, dtype: type) -> Any:
    """(n, K) the values of all tokens, one token a row, and 0 behind them; `filled` says where they are."""
    if len(values) == filled.size:
        return values.reshape(filled.shape).astype(dtype)
    rows: Any = np.zeros(filled.shape, dtype)
    rows[filled] = values
    return rows
