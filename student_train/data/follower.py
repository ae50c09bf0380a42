"""How far dumps that are being written have come, and so how far training may read."""

import time
from collections.abc import Sequence

from storage_schemas.reader import Dump
from student_train.data.mix import Mix
from student_train.data.order import Order


class Follower:
    """Looks how far a dump has come. One rank looks; the others are told."""

    def __init__(self, dump: Dump, order: Order, *, interval: float = 2.0) -> None:
        """Nothing is read yet. `interval` is the time between two looks, in seconds."""
        self._dump, self._order, self._interval = dump, order, interval
        self._windows, self._next_look = 0, 0.0
        self._missing: list[int] = []

    def windows(self) -> int:
        """Windows, counted from the first, whose units are all committed.

        Raises:
            NeoError: the store is away, or a record is damaged.
        """
        if self._windows == self._order.windows or time.monotonic() < self._next_look:
            return self._windows
        if self._dump.is_sealed():
            self._windows = self._order.windows
        while self._windows < self._order.windows:
            self._missing = self._missing or list(self._order.units_of_window(self._windows))
            # One that is not there is reason enough to wait: a look costs one request, and one per new unit.
            while self._missing and self._dump.read_record(self._missing[0]) is not None:
                self._missing.pop(0)
            if self._missing:
                break
            self._windows += 1
        self._next_look = time.monotonic() + self._interval
        return self._windows


class Followers:
    """Looks at all dumps of a mix."""

    def __init__(self, dumps: Sequence[Dump], mix: Mix) -> None:
        """Nothing is read yet."""
        self._mix = mix
        self._each = [Follower(dump, order) for dump, order in zip(dumps, mix.orders, strict=True)]

    def windows(self) -> list[int]:
        """Of each dump, as `Follower.windows`."""
        return [follower.windows() for follower in self._each]

    def steps(self, stop: int) -> int:
        """How many of the first `stop` steps may be read. Raises NeoError as `Follower.windows`."""
        return self._mix.steps_within(self.windows(), stop)
