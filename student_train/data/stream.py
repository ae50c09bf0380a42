"""A rank's micro-batches, step by step, decoded ahead of their use by a thread.

The only state is the number of the step: what a step holds is a function of the order, and prefetching is forgotten
when a run ends. Units are fetched and decoded whole. At most two blocks of units are in memory: the one that is read
and the next one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row, UnitRows
from student_train.data.batch import TrainBatch
from student_train.data.order import Order, rank_slice

READERS = 2
"""Threads that fetch and decode units."""
AHEAD = 4
"""Steps that are ready before they are due, at most."""


class Stream:
    """Micro-batches of one rank.

    What goes wrong while reading ahead is raised by `get` at the step it would have served, not earlier.
    """

    def __init__(
        self,
        dump: Dump,
        order: Order,
        collate: Callable[[Sequence[Row]], TrainBatch],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        start: int,
        stop: int,
        windows: int,
    ) -> None:
        """Start reading the steps `start` to `stop` - 1.

        Args:
            collate: makes a micro-batch of rows; of none, a filler.
            micro_batch_size: samples per micro-batch, at most.
            windows: how many windows may be read by now, see `allow`.
        """
        self._dump, self._order, self._collate = dump, order, collate
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        self._start, self._stop, self._windows = start, stop, windows
        self._units: dict[int, Future[UnitRows]] = {}
        self._ready: deque[tuple[int, list[TrainBatch] | BaseException]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="unit-reader")
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def get(self, step: int, *, timeout: float) -> list[TrainBatch] | None:
        """The micro-batches of a step; None if they are not there within `timeout` seconds. Steps are asked in turn.

        Raises:
            NeoError: a unit of this step is missing, torn or out of range, or the store is away.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready, timeout)
            if not self._ready:
                return None
            due, result = self._ready[0]
            assert due == step, f"step {step} asked for, step {due} is next"
            if isinstance(result, BaseException):
                raise result
            self._ready.popleft()
            self._changed.notify_all()
            return result

    def allow(self, windows: int) -> None:
        """Say how many windows of the dump may be read; it never falls."""
        with self._changed:
            self._windows = max(windows, self._windows)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading. Errors of steps that were never asked for are dropped with the data of those steps.

        Raises:
            RuntimeError: the reading thread does not end.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout=30)
        if self._thread.is_alive():
            raise RuntimeError("the reading thread does not end")

    def _run(self) -> None:
        for step in range(self._start, self._stop):
            if not self._wait_for(lambda step=step: self._order.windows_of_step(step).stop <= self._windows):  # type: ignore[misc]
                return
            result: list[TrainBatch] | BaseException
            try:
                result = self._prepare(step)
            except BaseException as error:
                result = error
            if not self._wait_for(lambda: len(self._ready) < AHEAD):
                return
            with self._changed:
                self._ready.append((step, result))
                self._changed.notify_all()
            if isinstance(result, BaseException):
                return

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait; False if the stream is closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or condition())
            return not self._closed

    def _prepare(self, step: int) -> list[TrainBatch]:
        samples = self._order.step_samples(step)
        self._open(step)
        places = {sample: self._place(sample) for sample in samples.tolist()}
        # Rows that are not used cost nothing; the others are sorted by what they cost.
        lengths = [unit.tokens(i) if unit.status[i] == OK else 0 for unit, i in places.values()]
        shares = rank_slice(samples, self._rank, self._world_size, self._micro_batch_size, lengths=lengths)
        mine = [[places[sample] for sample in share.tolist()] for share in shares]
        return [self._collate([unit.row(i) for unit, i in share]) for share in mine]

    def _open(self, step: int) -> None:
        """Ask for the units of this step's blocks and of the next block, and let go of all others."""
        span = self._order.span_of_step(step)
        wanted: dict[int, None] = {}
        position = span.start
        while position < span.stop:
            block, units = self._order.block_at(span.epoch, position)
            wanted |= dict.fromkeys(map(int, units))
            position = block.stop
        wanted |= dict.fromkeys(self._next_block(span.epoch, position))
        for unit in [unit for unit in self._units if unit not in wanted]:
            self._units.pop(unit).cancel()
        for unit in wanted:
            if unit not in self._units and not self._closed:
                self._units[unit] = self._readers.submit(self._dump.read_unit, unit)

    def _next_block(self, epoch: int, position: int) -> list[int]:
        """Units of the block that begins at `position`, if there is one and it may be read already."""
        if position >= self._order.samples:
            epoch, position = epoch + 1, 0
        if self._order.window_of_position(position) >= self._windows:
            return []
        if epoch * self._order.steps_per_epoch >= self._stop:
            return []
        return [int(unit) for unit in self._order.block_at(epoch, position)[1]]

    def _place(self, sample: int) -> tuple[UnitRows, int]:
        """The unit that holds a sample, and the sample's row in it."""
        unit, place = divmod(sample, self._order.samples_per_unit)
        future = self._units[unit]
        # A store may take its time to answer; closing does not wait for it.
        while not (future.done() or wait([future], timeout=0.5).done):
            if self._closed:
                raise CancelledError
        return future.result(), place


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
        if self._dump.sealed():
            self._windows = self._order.windows
        while self._windows < self._order.windows:
            self._missing = self._missing or list(self._order.units_of_window(self._windows))
            # One that is not there is reason enough to wait: a look costs one request, and one per new unit.
            while self._missing and self._dump.record(self._missing[0]) is not None:
                self._missing.pop(0)
            if self._missing:
                break
            self._windows += 1
        self._next_look = time.monotonic() + self._interval
        return self._windows
