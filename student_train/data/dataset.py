"""A dump for a loop that is not this project's: samples by position, and micro-batches step by step."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from storage_schemas.common.errors import MismatchError, TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.rows import Row, UnitRows
from storage_schemas.shared_unit import SharedUnit
from student_train.data.batch import TrainBatch, collate, collate_mixed
from student_train.data.deal import Limit
from student_train.data.mix import Mix
from student_train.data.order import Order
from student_train.data.stream import Stream


class DumpDataset(Dataset[Row]):
    """A complete dump in the shuffled order that `llm-neo train` reads it in, for torch's `DataLoader` and others.

    Item p is the sample at position p of an epoch. Ask for positions in turn, without another shuffle, and each shard
    is decoded once per epoch; `block_units` decoded shards are kept. `batches` reads ahead by itself.
    """

    def __init__(self, dump: Dump, *, seed: int = 0, window_units: int = 1024, block_units: int = 8) -> None:
        """Nothing but the seal is read yet.

        Args:
            dump: sealed.
            seed: of the order.
            window_units: shards that are shuffled among each other, as `train.shuffle_window_units`.
            block_units: shards whose samples are shuffled together, as `train.shuffle_block_units`.

        Raises:
            TemporaryError: the dump is still being written.
        """
        if min(window_units, block_units) < 1:
            raise ValueError(f"window_units and block_units are at least 1, got {window_units} and {block_units}")
        if not dump.is_sealed():
            raise TemporaryError(
                f"{dump.store.url} is not complete",
                got="no SEALED.json",
                expected="a sealed dump",
                fix="let `llm-neo dump` finish; `llm-neo train` can read a dump that is being written",
            )
        run = dump.provenance
        self.dump = dump
        self._order = Order(
            samples=run.corpus.samples,
            samples_per_unit=run.samples_per_unit,
            window_units=window_units,
            block_units=block_units,
            seed=seed,
        )
        self._epoch, self._process = 0, os.getpid()
        self._units: dict[int, UnitRows | SharedUnit] = {}

    def __len__(self) -> int:
        return self._order.samples

    def __getitem__(self, position: int) -> Row:
        """The sample at a position of the epoch; its `targets` are None unless its status is `ok`.

        Raises:
            IndexError: there is no such position.
            DataError: the sample's shard is missing, torn or tampered with.
            MismatchError: this is a forked worker of a `DataLoader`.
        """
        if os.getpid() != self._process:  # The object store's threads are not forked: a request would wait for ever.
            raise MismatchError(
                "a dump cannot be read in a forked process",
                got="multiprocessing_context='fork', which is torch's default",
                expected="'forkserver' or 'spawn', or no workers",
                fix="give DataLoader multiprocessing_context='forkserver', or TrainingArguments the same as "
                "dataloader_multiprocessing_context; or set the number of workers to 0",
            )
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        at = self._epoch * len(self) + position
        sample = int(self._order.samples_of(at, at + 1)[0])
        unit, place = divmod(sample, self._order.samples_per_unit)
        if unit not in self._units:
            while len(self._units) >= self._order.block_units:
                del self._units[next(iter(self._units))]
            self._units[unit] = self.dump.open_unit(unit)
        return self._units[unit].row(place)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": {}}  # Workers of a DataLoader read for themselves.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order `[position]` has; Trainer and accelerate call this.

        It does not reach workers of a `DataLoader` that have started: leave `persistent_workers` at False.
        """
        self._epoch = epoch

    def steps_per_epoch(self, batch_size: int, *, world_size: int = 1) -> int:
        """Steps of an epoch with `batch_size` samples on each rank; the last may be short."""
        return -(-len(self) // (batch_size * world_size))

    def batches(
        self,
        batch_size: int,
        *,
        temperature: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int | None = None,
        vocab_size: int | None = None,
        packed: bool = False,
    ) -> Iterator[TrainBatch]:
        """One rank's batch of each step, decoded ahead by threads.

        A step is `batch_size * world_size` samples of the order, dealt to the ranks by length, so that every sample of
        an epoch is in one batch of one rank. All ranks get as many batches. One whose samples all lack targets is a
        filler with `supervised` 0.

        Args:
            batch_size: samples per batch, at most.
            temperature: that targets are decoded at, one that the dump was made with.
            rank: in [0, world_size).
            world_size: number of ranks.
            start: the first step, counted on over all epochs; any is reached at once.
            stop: the step behind the last. None: the end of the epoch that `start` lies in.
            vocab_size: rows of the student's head; an id beyond it is refused.
            packed: put samples one after the other in one row, instead of padding.

        Raises:
            MismatchError: the dump holds no tail mass for this temperature.
            DataError: from the iterator, at the step that a damaged shard belongs to.
        """
        if not 0 <= rank < world_size or batch_size < 1 or start < 0:
            raise ValueError(f"rank {rank} of {world_size}, batch_size {batch_size}, start {start}")
        make = partial(
            collate_mixed,
            temperature_indices=[self.dump.provenance.temperature_index(temperature)],
            temperature=temperature,
            vocab_size=vocab_size,
            packed=packed,
        )
        epoch = self.steps_per_epoch(batch_size, world_size=world_size)
        stop = (start // epoch + 1) * epoch if stop is None else stop
        mix = Mix(orders=(self._order,), shares=(len(self),), global_batch_size=batch_size * world_size)

        def read() -> Iterator[TrainBatch]:
            stream = Stream(
                [self.dump], mix, make, rank=rank, world_size=world_size, limit=Limit(batch_size), start=start,
                stop=stop, allowed=stop,
            )  # fmt: skip
            with closing(stream):
                for step in range(start, stop):
                    while (found := stream.get(step, timeout=60.0)) is None:
                        pass
                    yield from found

        return read()


class DumpCollator:
    """Samples of a dump become the batch that `DumpTrainer` takes."""

    def __init__(self, dump: Dump, *, temperature: float = 1.0, vocab_size: int | None = None) -> None:
        """For the arguments see `DumpDataset.batches`. Raises MismatchError as that does."""
        self._temperature, self._vocab_size = temperature, vocab_size
        self._index = dump.provenance.temperature_index(temperature)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids` and `labels`, both (batch, seq), and `batch`, the `TrainBatch`.

        Labels stand at the supervised tokens themselves, as in transformers, and are -100 elsewhere: by them Trainer
        counts what the loss is divided by. Samples without targets are left out.

        Raises:
            DataError: an id is out of range.
        """
        batch = collate(rows, temperature_index=self._index, temperature=self._temperature, vocab_size=self._vocab_size)
        labels = torch.full_like(batch.input_ids, -100)
        for place, row in enumerate(row for row in rows if row.targets is not None):
            labels[place, : len(row.input_ids)] = torch.from_numpy(np.where(row.loss_mask, row.input_ids, -100))
        return {"input_ids": batch.input_ids, "labels": labels, "batch": batch}
