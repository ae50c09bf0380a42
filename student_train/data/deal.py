"""How the samples of a step are dealt to ranks and cut into micro-batches: pure functions, no state, no I/O."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from student_train.data.order import I64


class Limit(NamedTuple):
    """What a micro-batch may hold: so many samples or, if `tokens` is not 0, so many tokens."""

    samples: int = 1
    tokens: int = 0
    """Its samples times the longest of them. A sample that is longer is alone."""
    packed: bool = False
    """Whether samples stand one after the other, without padding: tokens are then their sum."""


def rank_slice(samples: I64, rank: int, world_size: int, limit: Limit, *, lengths: Sequence[int] | I64) -> list[I64]:
    """Micro-batches of one rank.

    Every rank gets the same number of them, as few as `limit` allows, so some may be empty (fillers). Over all ranks
    they hold each sample exactly once, but for those of length 0 if tokens are counted.

    Args:
        samples: sample indices of a step's global batch, of any length.
        lengths: tokens per sample, parallel to `samples` and the same on every rank. Sorts, longest first, so that the
            samples of a micro-batch, and the micro-batches that ranks run at the same time, are of similar length.
    """
    assert 0 <= rank < world_size
    assert len(lengths) == len(samples)
    by_length = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    samples, lengths = samples[by_length], np.asarray(lengths, np.int64)[by_length]
    if limit.tokens:
        return _by_tokens(samples[lengths > 0], lengths[lengths > 0], world_size, limit)[rank::world_size]
    parts = -(-len(samples) // (world_size * limit.samples)) * world_size
    # As np.array_split, but of this rank's parts alone: the first `longer` hold one sample more.
    least, longer = divmod(len(samples), parts or 1)
    mine = range(rank, parts, world_size)
    return [samples[i * least + min(i, longer) : (i + 1) * least + min(i + 1, longer)] for i in mine]


def _by_tokens(samples: I64, lengths: I64, world_size: int, limit: Limit) -> list[I64]:
    """Micro-batches of all ranks, a multiple of `world_size`; samples longest first, none of length 0."""
    if not len(samples):
        return []
    rounds = -(-len(_starts(lengths, limit.tokens, packed=limit.packed)) // world_size)

    def enough(tokens: int) -> bool:
        return len(_starts(lengths, tokens, packed=limit.packed)) <= rounds * world_size

    # The smallest limit that needs no more rounds: a lower one never needs fewer micro-batches, but they are more even.
    even = 1 + bisect_left(range(1, limit.tokens), True, key=enough)
    found = np.split(samples, _starts(lengths, even, packed=limit.packed)[1:])
    return found + [samples[:0]] * (rounds * world_size - len(found))


def _starts(lengths: I64, most: int, *, packed: bool) -> list[int]:
    """Where each micro-batch begins, if it takes samples as they come up to so many tokens, and one at least."""
    ends, starts, at = np.cumsum(lengths), list[int](), 0
    while at < len(lengths):
        starts.append(at)
        fit = np.searchsorted(ends, ends[at] - lengths[at] + most, "right") - at if packed else most // lengths[at]
        at += max(1, int(fit))
    return starts
