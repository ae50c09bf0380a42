"""A rank's micro-batches, step by step, decoded ahead of their use by a thread.

The only state is the number of the step: what a step holds is a function of the order, and prefetching is forgotten
when a run ends. Units are fetched and decoded whole. Of each dump at most two blocks of units are in memory: the one
that is read and the next one.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import numpy as np

from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row, UnitRows
from student_train.data.batch import TrainBatch
from student_train.data.mix import Mix
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
        dumps: Sequence[Dump],
        mix: Mix,
        collate: Callable[[Sequence[Sequence[Row]]], TrainBatch],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        start: int,
        stop: int,
        allowed: int,
    ) -> None:
        """Start reading the steps `start` to `stop` - 1.

        Args:
            dumps: that the orders of `mix` are of.
            collate: makes a micro-batch of the rows of each dump; of none, a filler.
            micro_batch_size: samples per micro-batch, at most.
            allowed: how many steps of the run may be read by now, see `allow`.
        """
        self._dumps, self._mix, self._collate = dumps, mix, collate
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        self._start, self._stop, self._allowed = start, stop, allowed
        self._units: dict[tuple[int, int], Future[UnitRows]] = {}
        """By dump and unit."""
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

    def allow(self, steps: int) -> None:
        """Say how many steps of the run may be read; it never falls."""
        with self._changed:
            self._allowed = max(steps, self._allowed)
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
            if not self._wait_for(lambda step=step: step < self._allowed):  # type: ignore[misc]
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
        self._open(step)
        # A sample may be among them twice, if its dump is small and its weight is large.
        places = [self._place(sample) for sample in self._mix.step_samples(step).tolist()]
        # Rows that are not used cost nothing; the others are sorted by what they cost.
        lengths = [unit.tokens(i) if unit.status[i] == OK else 0 for _, unit, i in places]
        numbers = np.arange(len(places))
        shares = rank_slice(numbers, self._rank, self._world_size, self._micro_batch_size, lengths=lengths)
        return [self._collate(self._rows([places[i] for i in share.tolist()])) for share in shares]

    def _rows(self, places: Sequence[tuple[int, UnitRows, int]]) -> list[list[Row]]:
        """The rows at these places, of each dump."""
        rows: list[list[Row]] = [[] for _ in self._dumps]
        for dump, unit, i in places:
            rows[dump].append(unit.row(i))
        return rows

    def _open(self, step: int) -> None:
        """Ask for the units of this step's blocks and of the next block of each dump, and let go of all others."""
        found: list[tuple[bool, int, int]] = []
        limits = zip(self._mix.taken(self._stop), self._mix.windows(self._allowed), strict=True)
        parts = zip(self._mix.orders, self._mix.taken(step), self._mix.taken(step + 1), limits, strict=True)
        for dump, (order, start, stop, (end, windows)) in enumerate(parts):
            found += [(later, dump, unit) for later, unit in _ahead(order, start, stop, end, windows)]
        # What the step itself waits for comes first.
        wanted = dict.fromkeys((dump, unit) for _, dump, unit in sorted(found, key=lambda one: one[0]))
        for key in [key for key in self._units if key not in wanted]:
            self._units.pop(key).cancel()
        for key in wanted:
            if key not in self._units and not self._closed:
                self._units[key] = self._readers.submit(self._dumps[key[0]].read_unit, key[1])

    def _place(self, sample: int) -> tuple[int, UnitRows, int]:
        """The dump and the unit that hold a sample, and its row there."""
        dump, index = self._mix.locate(sample)
        unit, place = divmod(index, self._mix.orders[dump].samples_per_unit)
        future = self._units[dump, unit]
        # A store may take its time to answer; closing does not wait for it.
        while not (future.done() or wait([future], timeout=0.5).done):
            if self._closed:
                raise CancelledError
        return dump, future.result(), place


def _ahead(order: Order, start: int, stop: int, end: int, windows: int) -> Iterator[tuple[bool, int]]:
    """(False, unit) of the blocks that hold positions start:stop, counted on over all epochs, and (True, unit) of the
    next block, if it begins before the position `end` and in the first `windows` windows."""
    position, later = start, False
    while not later and position < end:
        epoch, within = divmod(position, order.samples)
        later = position >= stop
        if later and order.window_of_position(within) >= windows:
            return
        block, units = order.block_at(epoch, within)
        yield from ((later, int(unit)) for unit in units)
        position = epoch * order.samples + block.stop
