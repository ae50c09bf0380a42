"""Whether targets of the same tokens agree with the teacher: those of a dump, or those of another engine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage_schemas.codec import round_logprobs
from storage_schemas.provenance import Provenance
from storage_schemas.targets import F32, F64, I32, I64, Bool, Targets, decode

_LEAST_MASS = 1e-6
"""Of the bucket: an engine that only names the largest entries does not know the rest's mass any better."""


class Tolerance(NamedTuple):
    """By how much one teacher differs from itself in other batches, on another device or under another engine."""

    kl: float
    """Nats: mean KL of all tokens."""
    token_kl: float
    """Nats: KL of one token."""
    logprob: float
    """Nats: a log-prob, a log tail mass or a logsumexp, or how far a tie at the end of a head may be off."""
    draws: float
    """Share of the draws that may fall on another entry."""


TOLERANCES = {
    "float32": Tolerance(kl=1e-6, token_kl=5e-3, logprob=2e-3, draws=0.05),
    "float16": Tolerance(kl=1e-3, token_kl=0.05, logprob=0.25, draws=0.25),
    "bfloat16": Tolerance(kl=1e-2, token_kl=0.2, logprob=1.5, draws=0.5),
}
"""By compute dtype; docs/design/recompute.md has what was seen."""


class Compared(NamedTuple):
    """How far targets are from the teacher's, token by token."""

    kl: F64
    """(tokens, temperatures) KL(exact || found) over common head entries and one bucket for all else, nats."""
    logprob: F64
    """(tokens,) largest difference of an entry that both heads have, nats."""
    gap: F64
    """(tokens,) the most that an entry which only one head has lies above the smallest of the other head, nats: at
    most 0 where heads only end earlier or later, about 0 for ties, -inf where they have the same ids."""
    drawn: F64
    """(tokens,) draws."""
    redrawn: F64
    """(tokens,) draws that fell on the same entry."""
    drift: F64
    """(tokens,) mean error of the log-probs of common draws, nats."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether it explains the mean KL, and every log-prob and end of a head."""
        worst = np.maximum(self.logprob, self.gap).max()
        return bool(self.kl.mean() <= tolerance.kl and worst <= tolerance.logprob)


class _Entries(NamedTuple):
    """Heads or draws of all tokens, one behind the other."""

    token: I64
    ids: I32
    logprobs: F32
    place: Bool
    """(all entries,) which ones these are."""
    common: Bool
    """(entries,) which ones the other targets have, too: in the same order there, as tokens and ids ascend."""


def _matched(exact: Targets, found: Targets, *, heads: bool) -> tuple[_Entries, _Entries]:
    """The heads, or the draws, of both."""
    sides = []
    for each in (exact, found):
        place = each.in_head == heads
        token = np.repeat(np.arange(len(each)), each.lengths)[place]
        sides.append((token, each.ids[place], each.logprobs[place], place))
    p, q = (token << 32 | ids for token, ids, *_ in sides)
    return _Entries(*sides[0], np.isin(p, q)), _Entries(*sides[1], np.isin(q, p))


def compare(exact: Targets, found: Targets, *, temperatures: Sequence[float] = (1.0,)) -> Compared:
    """Targets of the same tokens: the teacher's, and what shall be like them. Draws only at T = 1."""
    n = len(exact)
    p_head, q_head = _matched(exact, found, heads=True)
    token = p_head.token[p_head.common]
    kl = np.zeros((n, len(temperatures)))
    for i, temperature in enumerate(temperatures):
        p, q = (decode(each, temperature_index=i, temperature=temperature) for each in (exact, found))
        log_p, log_q = (each.logprobs[each.in_head].astype(np.float64) for each in (p, q))
        p_rest, q_rest = _rest(p.tail_logprob, p_head, log_p), _rest(q.tail_logprob, q_head, log_q)
        log_p, log_q = log_p[p_head.common], log_q[q_head.common]
        kl[:, i] = np.bincount(token, np.exp(log_p) * (log_p - log_q), n) + p_rest * np.log(p_rest / q_rest)

    logprob = np.zeros(n)
    np.maximum.at(logprob, token, np.abs(p_head.logprobs[p_head.common] - q_head.logprobs[q_head.common]))
    gap = np.full(n, -np.inf)
    for one, other in ((p_head, q_head), (q_head, p_head)):
        alone = one.token[~one.common]
        np.maximum.at(gap, alone, one.logprobs[~one.common] - _least(other, n)[alone])
    drawn, redrawn, drift = np.zeros((3, n))
    if exact.counts is not None and found.counts is not None:
        p_draws, q_draws = _matched(exact, found, heads=False)
        p_counts, q_counts = exact.counts[p_draws.place], found.counts[q_draws.place]
        drawn += np.maximum(np.bincount(p_draws.token, p_counts, n), np.bincount(q_draws.token, q_counts, n))
        token, times = p_draws.token[p_draws.common], q_counts[q_draws.common]
        redrawn += np.bincount(token, np.minimum(p_counts[p_draws.common], times), n)
        off = p_draws.logprobs[p_draws.common].astype(np.float64) - q_draws.logprobs[q_draws.common]
        drift += np.bincount(token, off * times, n) / np.maximum(drawn, 1) * np.exp(found.tail_logprob[:, 0])
    return Compared(kl, logprob, gap, drawn, redrawn, drift)


def problems(
    exact: Targets, found: Targets, figures: Compared, provenance: Provenance, *, step: float
) -> dict[int, str]:
    """By token, the first thing that neither the tolerance nor a dump's rounding explains; `step` is the grid of its
    log-probs, see `codec.round_targets`."""
    tolerance = TOLERANCES[provenance.teacher.dtype]
    mass = getattr(provenance.estimator, "mass", 1.0)  # At which heads end early; 1.0: never.
    n, logprob = len(exact), tolerance.logprob
    said: dict[int, str] = {}

    def say(token: Any, what: str) -> None:
        said.setdefault(int(token), what)

    p_head, q_head = _matched(exact, found, heads=True)
    # Rounding moves a log-prob by no more than a quarter of the step per nat.
    least = np.minimum(_least(p_head, n), _least(q_head, n))
    for t in np.flatnonzero(figures.gap > logprob + step / 4 * np.maximum(1.0, -least)):
        lacking, alone = (each.ids[~each.common & (each.token == t)] for each in (p_head, q_head))
        say(
            t,
            f"the head has {len(alone)} ids that the teacher has not among its largest, and lacks {len(lacking)}"
            f" (stored alone: {alone[:3].tolist()}, recomputed alone: {lacking[:3].tolist()})",
        )
    # A head of another length is right only where its mass is the one at which heads end.
    tails, stored = exact.tail_logprob, found.tail_logprob
    wrong = exact.head_size != found.head_size
    if mass < 1.0:
        shorter, end = np.where(exact.head_size < found.head_size, tails[:, 0], stored[:, 0]), np.log1p(-mass)
        wrong &= _off(shorter, end, logprob + _tail_rounding(end))
    for t in np.flatnonzero(wrong):
        say(t, f"the head has {found.head_size[t]} entries, the teacher gives {exact.head_size[t]}")

    kinds = [(p_head, q_head)]
    if found.counts is not None:
        kinds.append(_matched(exact, found, heads=False))
    for p, q in kinds:
        x, y = p.logprobs[p.common], q.logprobs[q.common]
        # Rounding is monotone, so that the bounds are rounded.
        low, high = x - np.float32(logprob), x + np.float32(logprob)
        if step:
            low, high = round_logprobs(low, step), round_logprobs(high, step)
        wrong, entries = np.flatnonzero((y < low) | (y > high)), np.flatnonzero(q.common)
        for i in wrong[np.argsort(-np.abs(x - y)[wrong], kind="stable")]:
            entry = entries[i]
            say(q.token[entry], f"the log-prob of id {q.ids[entry]} is stored as {y[i]:.4f}, recomputed {x[i]:.4f}")
    wrong = np.isneginf(figures.gap)[:, None] & _off(stored, tails, logprob + _tail_rounding(tails))
    for t, i in np.argwhere(wrong):
        say(t, f"the log tail mass is stored as {stored[t, i]:.4f}, recomputed {tails[t, i]:.4f}")
    if exact.logsumexp is not None and found.logsumexp is not None:
        # Half a cell of the grid of step / 4.
        for t, i in np.argwhere(_off(found.logsumexp, exact.logsumexp, logprob + step / 8)):
            say(t, f"the logsumexp is stored as {found.logsumexp[t, i]:.4f}, recomputed {exact.logsumexp[t, i]:.4f}")
    # Not `>`: NaN must not pass.
    for t in np.flatnonzero(~(figures.kl.max(1) <= provenance.max_kl + tolerance.token_kl)):
        say(t, f"KL(recomputed || stored) is {figures.kl[t].max():.3g} nats")
    return said


def _rest(tail: F32, head: _Entries, logprobs: F64) -> F64:
    """(n,) mass of the bucket: the tail's, and that of the entries that only this head has."""
    alone = np.bincount(head.token[~head.common], np.exp(logprobs[~head.common]), len(tail))
    return np.maximum(np.exp(tail.astype(np.float64)) + alone, _LEAST_MASS)


def _least(head: _Entries, n: int) -> F64:
    """(n,) the smallest log-prob of each head. An empty one has none that could be a tie: any entry lies far above."""
    found = np.full(n, np.inf)
    np.minimum.at(found, head.token, head.logprobs)
    return np.where(np.isposinf(found), -1e30, found)


def _off(found: npt.ArrayLike, expected: npt.ArrayLike, tolerance: npt.ArrayLike) -> Bool:
    """Where two are neither equal nor within the tolerance."""
    with np.errstate(invalid="ignore"):
        near = np.abs(np.subtract(found, expected, dtype=np.float64)) <= tolerance
    return np.asarray(~near & np.not_equal(found, expected))


def _tail_rounding(tail: npt.ArrayLike) -> F64:
    """By how much storing moves a log tail mass at most: 9 significant bits are kept."""
    return np.asarray(np.where(np.isfinite(tail), np.abs(tail) * 2.0**-9, 0.0))
