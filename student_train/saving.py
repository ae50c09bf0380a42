"""Checkpoints beside training: the state is copied between two steps, and written while the next ones are done.

The thread that writes takes part in no collective. What it has met is told to the other ranks where all of them agree
anyway: before the next step (`agreement.Vote`), and before the next checkpoint or the end (`Saver.settle`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Self

from torch import Tensor

from storage_schemas.common.interrupt import in_background
from student_train.checkpoint import INITIAL, Checkpoints, TrainState
from student_train.config import TrainSection
from student_train.world import World

log = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of a run, one after the other. Its main rank writes; all ranks take part in the copying.

    As a context it lets what is being written be finished before an error goes on.
    """

    def __init__(
        self, world: World, checkpoints: Checkpoints, train: TrainSection, *, waited: Callable[[float], object]
    ) -> None:
        """Nothing is written. `waited` is told how many seconds training stood still, each time, on the main rank."""
        self._world, self._checkpoints, self._waited = world, checkpoints, waited
        self._train = train
        self._begun = time.monotonic()
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or self._writing is None:
            return
        found = self._writing.exception()
        if found is not None and found is not error:
            log.error("the checkpoint that was under way could not be written either: %s", found)

    def due(self, step: int) -> bool:
        """Whether `train.save_steps` or `train.save_minutes` ask for a checkpoint of this step."""
        steps, minutes = self._train.save_steps, self._train.save_minutes
        return step % steps == 0 or (minutes is not None and time.monotonic() - self._begun >= 60 * minutes)

    def check(self) -> None:
        """Raise what has kept the last checkpoint from being written, if something has; see `Checkpoints.save`."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def give_up(self) -> None:
        """Wait for the last checkpoint, and forget it if it could not be written: a newer state can be saved then."""
        if self._writing is not None and self._writing.exception() is not None:
            self._writing = None

    def settle(self) -> None:
        """Have the last checkpoint complete. Collective. Raises on all ranks what `check` raises."""
        self._world.on_main(self._wait)

    def save(
        self,
        state: Callable[[], TrainState],
        exported: Iterator[tuple[str, Tensor]],
        initial: Mapping[str, Tensor],
        *,
        size: int,
        best: int | None,
    ) -> None:
        """Copy the state once the last checkpoint is complete, and begin to write it. Collective.

        The record of the start is written before this returns, so that a store that takes nothing is told before
        training; so is a state of more than `train.snapshot_bytes`, one file after the other: the other ranks wait no
        longer than that for the next part of the export.

        Args:
            state: asked on the main rank.
            exported: see `Engine.export`; exhausted on all ranks.
            initial: the start of a decomposed adapter, which training does not change.
            size: bytes of `exported`.
            best: a step whose checkpoint stays beside the newest.

        Raises:
            NeoError: as `Checkpoints.save`, of this checkpoint or of the last one; PeerError on the other ranks.
        """
        self.settle()

        def begin() -> None:
            try:
                if self._world.main:
                    with self._standing():
                        kept = ((f"{INITIAL}/{name}", tensor) for name, tensor in initial.items())
                        whole = size + sum(tensor.nbytes for tensor in initial.values())
                        self._begin(state(), chain(exported, kept), size=whole, best=best)
            finally:  # All ranks are in the middle of the export: a disk that is full here must not leave them there.
                for _ in exported:
                    pass

        self._world.together(begin)

    def _begin(self, state: TrainState, tensors: Iterator[tuple[str, Tensor]], *, size: int, best: int | None) -> None:
        self._begun = time.monotonic()
        copied = bool(state.step) and size <= self._train.snapshot_bytes
        if copied:
            taken = deque(tensors)
            tensors = (taken.popleft() for _ in range(len(taken)))  # Each is let go once its file is written.
        write = partial(self._checkpoints.save, state, tensors, keep=self._train.save_total_limit, best=best)
        if copied:
            self._writing = in_background(write, name="checkpoint")
        else:
            write()

    def _wait(self) -> None:
        if self._writing is not None:
            with self._standing():
                self._writing.result()

    @contextmanager
    def _standing(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited(time.monotonic() - began)
