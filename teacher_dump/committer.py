"""Commits beside the forward pass: one thread, a bounded queue, and no failure that goes unnoticed."""

import queue
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

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
        self._error: BaseException | None = None
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._work, name="commits", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def commit(self, unit: int, rows: Sequence[Row]) -> None:
        """Hand a unit over; waits while the queue is full."""
        while True:
            self.check()
            try:
                self._queue.put((unit, rows), timeout=0.2)
                return
            except queue.Full:
                continue

    def check(self) -> None:
        """Raise what stopped the thread, if something did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until everything is committed."""
        while self._thread.is_alive():
            self.check()
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join()
        self.check()

    def abandon(self, *, seconds: float = 5.0) -> None:
        """Finish the unit under way if that takes no longer than `seconds`, and drop the others.

        Units that were not committed are computed again by whoever runs next.
        """
        self._abandon.set()
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                time.sleep(0.01)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                if self._abandon.is_set():
                    return
                unit, rows = work
                record = self.writer.commit_unit(unit, rows)
                if record is None:
                    self.lost.add(unit)
                else:
                    self.won[unit] = record
        except BaseException as error:
            self._error = error
