"""A dump read by a loop of one's own: every sample once over all ranks, from any step, as training reads it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from storage_schemas import DataError, Dump, MismatchError
from student_train import DumpDataset, TrainBatch
from student_train.data.batch import collate
from student_train.data.mix import Mix
from student_train.data.order import Order

BATCH = 3


@pytest.fixture(scope="module")
def dump(folder: Path) -> Dump:
    return Dump.open(str(folder / "dump"))


def content(batches: list[TrainBatch]) -> list[bytes]:
    """The rows of some batches without padding, sorted."""
    rows = [ids[:n] for batch in batches for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]
    return sorted(row.numpy().tobytes() for row in rows)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_each_sample_once(world_size: int, dump: Dump) -> None:
    """As many on each rank, and those of each step are what `llm-neo train` has in it."""
    data = DumpDataset(dump, seed=5, block_units=2)
    ranks = [list(data.batches(BATCH, rank=rank, world_size=world_size)) for rank in range(world_size)]
    steps = data.steps_per_epoch(BATCH, world_size=world_size)
    assert [len(batches) for batches in ranks] == [steps] * world_size
    order = Order(samples=24, samples_per_unit=5, window_units=1024, block_units=2, seed=5)
    mix = Mix(orders=(order,), shares=(24,), global_batch_size=BATCH * world_size)
    for step, parts in enumerate(zip(*ranks, strict=True)):
        rows = [dump.read_unit(i // 5).row(i % 5) for i in mix.step_samples(step).tolist()]
        usable = [row for row in rows if row.targets is not None]
        assert content([part for part in parts if part.supervised]) == sorted(
            row.input_ids.astype(np.int64).tobytes() for row in usable
        )
        assert sum(part.supervised for part in parts) == sum(len(row.targets) for row in usable)


def test_any_step_is_reached_at_once(dump: Dump) -> None:
    data = DumpDataset(dump)
    whole = list(data.batches(BATCH, stop=2 * data.steps_per_epoch(BATCH)))
    assert len(whole) == 2 * data.steps_per_epoch(BATCH)
    assert content(whole[:8]) == content(whole[8:])
    assert [batch.supervised for batch in whole[:8]] != [batch.supervised for batch in whole[8:]], "another order"
    later = list(data.batches(BATCH, start=11))
    assert [batch.supervised for batch in later] == [batch.supervised for batch in whole[11:]]
    assert torch.equal(later[0].input_ids, whole[11].input_ids)


def test_positions_are_the_order_of_an_epoch(dump: Dump) -> None:
    data = DumpDataset(dump, seed=5, block_units=2)
    order = Order(samples=24, samples_per_unit=5, window_units=1024, block_units=2, seed=5)
    for epoch in range(2):
        data.set_epoch(epoch)
        assert [data[i].sample_index for i in range(len(data))] == order.samples_at(epoch, 0, 24).tolist()
    assert len(data._units) == 2, "no more shards than a block"
    for outside in (-1, 24):
        with pytest.raises(IndexError, match=f"position {outside} of 24"):
            _ = data[outside]


def test_a_data_loader_takes_it(dump: Dump) -> None:
    data = DumpDataset(dump)
    loader = DataLoader(
        data, batch_size=4, sampler=SequentialSampler(data),
        collate_fn=lambda rows: collate(rows, temperature_index=0, temperature=1.0),
    )  # fmt: skip
    assert sum(batch.supervised for batch in loader) == sum(
        record.supervised_tokens for record in dump.read_records().values()
    )


def test_workers_have_a_copy_without_what_was_read(dump: Dump) -> None:
    data = DumpDataset(dump)
    expected, data._process = data[3].sample_index, 0
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._units
    assert copy[3].sample_index == expected


def test_forked_workers_are_refused(dump: Dump) -> None:
    """They would wait for ever for threads that are not there. The loader raises what its worker has raised."""
    loader = DataLoader(DumpDataset(dump), num_workers=1, multiprocessing_context="fork", timeout=30)
    with pytest.raises(MismatchError, match="multiprocessing_context='forkserver'"):
        next(iter(loader))


def test_arguments_are_checked_before_anything_is_read(dump: Dump) -> None:
    data = DumpDataset(dump)
    for wrong in ({"rank": 1}, {"batch_size": 0}, {"start": -1}):
        with pytest.raises(ValueError, match="rank"):
            data.batches(**({"batch_size": 2} | wrong))
    with pytest.raises(ValueError, match="block_units"):
        DumpDataset(dump, block_units=0)
    with pytest.raises(MismatchError, match="tail mass"):
        data.batches(2, temperature=3.0)
    with pytest.raises(DataError, match="outside the student's vocabulary"):
        list(data.batches(2, vocab_size=10))
