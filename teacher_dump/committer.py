"""Commits beside the forward pass: one thread, a bounded queue, and no failure that goes unnoticed."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import suppress
from types import TracebackType
from typing import Self

from storage_schemas.common.interrupt import in_background
from storage_schemas.records import CommitRecord
from storage_schemas.rows import Row
from storage_schemas.writer import DumpWriter

_WAITING_UNITS = 2
"""Units that may wait for the thread; with more, computing waits for writing."""


class Committer:
    """Encodes and commits units on a thread. Its error is raised by the next call and by leaving the context."""

    def __init__(self, writer: DumpWriter) -> None:
        self.writer = writer
        self.won: dict[int, CommitRecord] = {}
        """Records of the units that were committed here."""
        self.lost: set[int] = set()
        """Units that another worker committed first."""
        self._queue: queue.Queue[tuple[int, Sequence[Row]] | None] = queue.Queue(maxsize=_WAITING_UNITS)
        self._abandon = threading.Event()
        self._done = in_background(self._work, name="commits")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def commit(self, unit: int, rows: Sequence[Row]) -> None:
        """Hand a unit over; waits while the queue is full. Any thread may call it."""
        self._put((unit, rows))

    def check(self) -> None:
        """Raise what stopped the thread, if something did."""
        if self._done.done():
            self._done.result()

    def close(self) -> None:
        """Wait until everything is committed."""
        if not self._done.done():
            self._put(None)
        self._done.result()

    def abandon(self, *, seconds: float = 5.0) -> None:
        """Finish the unit under way if that takes no longer than `seconds`, and drop the others.

        Units that were not committed are computed again by whoever runs next.
        """
        self._abandon.set()
        with suppress(queue.Full):  # Else there is something else that wakes the thread.
            self._queue.put_nowait(None)
        wait([self._done], seconds)

    def _put(self, work: tuple[int, Sequence[Row]] | None) -> None:
        while not self._abandon.is_set():
            self.check()
            with suppress(queue.Full):
                self._queue.put(work, timeout=0.2)
                return

    def _work(self) -> None:
        while (work := self._queue.get()) is not None and not self._abandon.is_set():
            unit, rows = work
            record = self.writer.commit_unit(unit, rows)
            if record is None:
                self.lost.add(unit)
            else:
                self.won[unit] = record
