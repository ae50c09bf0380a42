"""Which samples a step holds, of one dump or of several: a pure function of the step. No state, no I/O.

Dumps are mixed sample by sample. An epoch has a fixed number of samples of each, its share, and among its first p
positions there is of each dump what its share of p is, rounded, so that every step is mixed alike. What a step takes of
a dump is the next piece of that dump's own order, which goes on where the step before has left it: over all epochs no
sample is seen twice more often than another one of its dump.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from student_train.data.order import I64, Order


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The order of a run, over one or several dumps.

    Step s of an epoch owns positions [s * G, (s + 1) * G); an epoch of M samples has ceil(M / G) steps, so its last
    step is short where G does not divide M, and no step mixes two epochs.
    """

    orders: tuple[Order, ...]
    """Of each dump."""
    shares: tuple[int, ...]
    """Samples of each dump in an epoch: its own number of samples, more or fewer, but one at least."""
    global_batch_size: int
    """G, samples per optimizer step."""

    def __post_init__(self) -> None:
        assert len(self.orders) == len(self.shares) > 0
        assert min(*self.shares, self.global_batch_size) >= 1

    @cached_property
    def samples(self) -> int:
        """M, samples of an epoch."""
        return sum(self.shares)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(M / G)."""
        return -(-self.samples // self.global_batch_size)

    def taken(self, step: int) -> list[int]:
        """Samples of each dump in the first `step` steps of a run: so far its order has been read by then."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position, left = min(within * self.global_batch_size, self.samples), self.samples
        counts = []
        for share in self.shares:
            # Of the positions that the dumps before have left, this one has its share of what they have left.
            counts.append((2 * position * share + left) // (2 * left))
            position, left = position - counts[-1], left - share
        return [epoch * share + count for share, count in zip(self.shares, counts, strict=True)]

    def step_samples(self, step: int) -> I64:
        """Samples of a step's global batch, numbered over all dumps, see `locate`: G of them, fewer in the last step of
        an epoch."""
        parts = zip(self.orders, self._firsts, self.taken(step), self.taken(step + 1), strict=True)
        return np.concatenate([first + order.samples_of(start, stop) for order, first, start, stop in parts])

    def locate(self, sample: int) -> tuple[int, int]:
        """The dump of a sample of `step_samples`, and its index there."""
        dump = bisect_right(self._firsts, sample) - 1
        return dump, sample - self._firsts[dump]

    def dealt(self, dump: int, start: int, stop: int, *, rank: int, world_size: int) -> I64:
        """Positions start:stop of a dump's order, counted on over all epochs, that a rank gets where the samples of
        each step are dealt one by one, as they stand in it."""
        far = (start // self.shares[dump] + 2) * self.steps_per_epoch
        step = bisect_right(range(far), start, key=lambda step: self.taken(step)[dump]) - 1
        parts, taken = [np.empty(0, np.int64)], self.taken(step)
        while taken[dump] < stop:
            begins, taken, step = taken, self.taken(step + 1), step + 1
            before = sum(taken[:dump]) - sum(begins[:dump])
            first = begins[dump] + (rank - before) % world_size
            parts.append(np.arange(first, taken[dump], world_size))
        found = np.concatenate(parts)
        return found[(found >= start) & (found < stop)]

    def windows(self, step: int) -> list[int]:
        """Windows of each dump, counted from the first, that the first `step` steps read from."""
        return [
            order.window_of_position(min(taken, order.samples) - 1) + 1 if taken else 0
            for order, taken in zip(self.orders, self.taken(step), strict=True)
        ]

    def steps_within(self, windows: Sequence[int], stop: int) -> int:
        """How many of the first `stop` steps read from no more than so many windows of each dump."""

        def beyond(step: int) -> bool:
            return any(needed > there for needed, there in zip(self.windows(step), windows, strict=True))

        return bisect_left(range(1, stop + 1), True, key=beyond)

    @cached_property
    def _firsts(self) -> list[int]:
        """Of each dump, the number of its first sample."""
        return list(accumulate((order.samples for order in self.orders[:-1]), initial=0))
