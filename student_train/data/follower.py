"""How far a dump that is being written has come, and so how far training may read."""

import time

from storage_schemas.reader import Dump
from student_train.data.order import Order


class Follower:
    """Looks how far a dump has come. One rank looks; the others are told."""

    def __init__(self, dump: Dump, order: Order, *, interval: float = 2.0) -> None:
        """Nothing is read yet. `interval` is the time between two looks, in seconds."""
        self._dump, self._order, self._interval = dump, order, interval
        self._units, self._next_look = 0, 0.0

    def windows(self) -> int:
        """Windows, counted from the first, whose units are all committed.

        Raises:
            NeoError: the store is away, or a record is damaged.
        """
        units = self._order.units
        if self._units < units and time.monotonic() >= self._next_look:
            if self._dump.is_sealed():
                self._units = units
            # One that is not there is reason enough to wait: a look costs one request, and one per new unit.
            while self._units < units and self._dump.read_record(self._units) is not None:
                self._units += 1
            self._next_look = time.monotonic() + self._interval
        return self._order.windows if self._units == units else self._units // self._order.window_units
