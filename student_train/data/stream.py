"""A rank's micro-batches, step by step, decoded ahead of their use by a thread.

The only state is the number of the step: what a step holds is a function of the order, and prefetching is forgotten
when a run ends. Which units are open meanwhile says `blocks.py`.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from student_train.data.batch import TrainBatch
from student_train.data.blocks import READERS, WAITING, Blocks, Held, Sample
from student_train.data.deal import Limit, rank_slice
from student_train.data.mix import Mix

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
        limit: Limit,
        start: int,
        stop: int,
        allowed: int,
        dealt: bool = False,
    ) -> None:
        """Start reading the steps `start` to `stop` - 1.

        Args:
            dumps: that the orders of `mix` are of.
            collate: makes a micro-batch of the rows of each dump; of none, a filler.
            limit: of a micro-batch.
            allowed: how many steps of the run may be read by now, see `allow`.
            dealt: whether samples are dealt to ranks as they stand in a step, so that a rank keeps its own alone; else
                by their lengths, which balances ranks better and needs all rows of a step on each. Ranks may then have
                different numbers of micro-batches, see `filler`.
        """
        self._mix, self._collate = mix, collate
        self._rank, self._world_size, self._limit = rank, world_size, limit
        self._start, self._stop, self._allowed = start, stop, allowed
        self._ready: deque[tuple[int, list[TrainBatch] | BaseException]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threads = READERS + WAITING * any(dump.is_shared for dump in dumps)
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="unit-reader")
        self._dealt = dealt
        self.blocks = []
        for i, (dump, order) in enumerate(zip(dumps, mix.orders, strict=True)):
            own = partial(mix.dealt, i, rank=rank, world_size=world_size) if dealt else None
            self.blocks.append(Blocks(i, dump, order, self._readers, own))
        """What is open of each dump."""
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

    def filler(self) -> TrainBatch:
        """A micro-batch without samples, for a rank that has fewer than others."""
        return self._collate([[] for _ in self.blocks])

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
        taken = self._take(step)
        lengths = [sample[0] for sample in taken]
        numbers = np.arange(len(taken))
        place = (0, 1) if self._dealt else (self._rank, self._world_size)
        shares = rank_slice(numbers, *place, self._limit, lengths=lengths)
        return [self._collate(self._by_dump([taken[i] for i in share.tolist()])) for share in shares]

    def _by_dump(self, samples: Sequence[Sample]) -> list[list[Row]]:
        dumps = range(len(self.blocks))
        return [[held.row(place) for _, held, place in samples if held.dump == dump] for dump in dumps]

    def _take(self, step: int) -> list[Sample]:
        """The samples of a step, all or the rank's own; one may be there twice, if its dump is small."""
        spans = list(zip(self.blocks, self._mix.taken(step), self._mix.taken(step + 1), strict=True))
        # What the step itself waits for comes before what is read ahead.
        for blocks, start, stop in spans:
            blocks.open(start, stop)
        limits = zip(self._mix.taken(self._stop), self._mix.windows(self._allowed), strict=True)
        for (blocks, _, stop), (end, windows) in zip(spans, limits, strict=True):
            blocks.read_ahead(stop, end=end, windows=windows)
        return [sample for blocks, start, stop in spans for sample in blocks.take(start, stop, self._result)]

    def _result(self, future: Future[Held]) -> Held:
        """A unit's samples. A store may take its time to answer; closing does not wait for it."""
        while not (future.done() or wait([future], timeout=0.5).done):
            if self._closed:
                raise CancelledError
        return future.result()
