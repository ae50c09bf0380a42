"""Ranks of a node share decoded units: the same batches as before, each unit decoded once, each rank's rows its own."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_student import write_dump
from test_mix import mix_of
from test_stream import streaming

from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord
from storage_schemas.rows import Row, UnitRows
from storage_schemas.shared_unit import SharedUnit
from student_train.data.batch import TrainBatch, collate_mixed
from student_train.data.dataset import DumpDataset
from student_train.data.deal import Limit
from student_train.data.mix import Mix
from student_train.data.stream import Stream
from student_train.heldout import Heldout

SIZES = [*range(1, 9), 64]
SAMPLES = (24, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dumps, one of them not sealed."""
    folder = tmp_path_factory.mktemp("shared")
    write_dump(folder / "dump", temperatures=(1.0, 2.0))
    write_dump(folder / "growing", samples=17, samples_per_unit=3, first=100, temperatures=(1.0, 2.0), seal=False)
    return folder


def mixed(*, batch: int = 20) -> Mix:
    """Of both, in two windows and in one."""
    return mix_of([(24, 5, 3, 2, 24), (17, 3, 10**6, 3, 34)], batch)


class Counting(Dump):
    """A dump whose units are decoded once, and that counts what is asked of it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.decoded: dict[int, UnitRows] = {}
        self.asked = Counter[int]()

    def _read_unit(self, record: CommitRecord) -> UnitRows:
        self.asked[record.unit] += 1
        if record.unit not in self.decoded:
            self.decoded[record.unit] = super()._read_unit(record)
        return self.decoded[record.unit]


def opened(folder: Path, shared: Path | None = None) -> list[Counting]:
    """Both dumps."""
    dumps = [Counting.open(str(folder / name)) for name in ("dump", "growing")]
    for dump in dumps:
        dump.read_seal()
        if shared is not None:
            dump.share(shared)
    return dumps


def steps_of(stream: Stream, steps: int) -> Iterator[list[Any]]:
    """Its micro-batches, step by step."""
    with closing(stream):
        for step in range(steps):
            found = stream.get(step, timeout=20)
            assert found is not None
            yield found


def ranks_of(size: int) -> Sequence[int]:
    """All of a few ranks, and some of many."""
    return range(size) if size <= 8 else (0, 1, 19, size - 1)


KNOWN = {
    False: "ffe52e6514f4e2b3078bed75e5b69d06313dac30cf4db5d269c5e9c7013d3521",
    True: "dcfd4018ac123dd4c67e9bdaa0954bc9b752ba828562e463643e305e5bd78282",
}
"""What the last version made of it in which every rank decoded every unit, by whether samples are dealt one by one."""


@pytest.mark.parametrize("dealt", KNOWN)
def test_samples_are_dealt_as_ever(dealt: bool, folder: Path) -> None:
    """Which samples are in which micro-batch, fillers apart, over two epochs and all numbers of ranks."""
    digest, mix, dumps = hashlib.sha256(), mixed(), opened(folder)
    steps = 2 * mix.steps_per_epoch
    for size in SIZES:
        for rank in ranks_of(size):
            stream = streaming(dumps, mix, rank=rank, world_size=size, start=0, stop=steps, allowed=steps, dealt=dealt)
            for found in steps_of(stream, steps):
                digest.update(repr([[row.sample_id for row in batch] for batch in found if batch]).encode())
    assert digest.hexdigest() == KNOWN[dealt]


def batches(dumps: Sequence[Dump], mix: Mix, rank: int, size: int, *, dealt: bool, packed: bool) -> Iterator[Any]:
    """A rank's, step by step, over two epochs."""
    make = partial(collate_mixed, temperature_indices=[1, 1], temperature=2.0, packed=packed)
    steps = 2 * mix.steps_per_epoch
    stream = Stream(
        dumps, mix, make, rank=rank, world_size=size, limit=Limit(2), start=0, stop=steps, allowed=steps,
        dealt=dealt,
    )  # fmt: skip
    return steps_of(stream, steps)


def assert_equal(found: Any, expected: Any) -> None:
    """To the bit, of whatever a micro-batch holds."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(found, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    elif hasattr(found, "__dataclass_fields__"):
        for field in fields(found):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


@pytest.mark.parametrize("dealt", [False, True])
def test_batches_are_the_same_where_units_are_shared(dealt: bool, folder: Path, tmp_path: Path) -> None:
    """To the bit, for all numbers of ranks, right-padded and packed, of sealed and of growing dumps; and each unit is
    decoded once for all of them."""
    mix = mixed()
    whole, shared = opened(folder), opened(folder, tmp_path / "shared")
    for size in SIZES:
        for rank in ranks_of(size):
            pairs = [batches(dumps, mix, rank, size, dealt=dealt, packed=size % 2 == 0) for dumps in (whole, shared)]
            for expected, found in zip(*pairs, strict=True):
                assert_equal(found, expected)
    for dump in shared:
        assert dump.is_shared
        assert dump.asked == Counter(range(dump.provenance.units))


@pytest.mark.parametrize("dealt", [False, True])
def test_a_rank_reads_its_own_rows_alone(
    dealt: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an epoch of eight ranks, of which the first decodes: each row is read by one rank, each unit decoded once."""
    read: Counter[int] = Counter()
    taken = SharedUnit.row

    def counted(unit: SharedUnit, i: int, *, own: bool = True) -> Row:
        row = taken(unit, i, own=own)
        read[row.sample_index] += 1
        return row

    monkeypatch.setattr(SharedUnit, "row", counted)
    ranks = [opened(folder, tmp_path / "shared")[:1] for _ in range(8)]
    mix = mix_of([(24, 5, 3, 2, 24)], 8)
    for rank, dumps in enumerate(ranks):
        before = read.total()
        stream = streaming(
            dumps, mix, rank=rank, world_size=8, start=0, stop=mix.steps_per_epoch, allowed=mix.steps_per_epoch,
            dealt=dealt,
        )  # fmt: skip
        found = [row.sample_index for batches in steps_of(stream, mix.steps_per_epoch) for b in batches for row in b]
        assert read.total() - before == len(found) == 3
    assert read == Counter(range(24))
    assert [sum(dump.asked.total() for dump in dumps) for dumps in ranks] == [5, *[0] * 7]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_held_out_batches_are_shared_alike(size: int, folder: Path, tmp_path: Path) -> None:
    """Together the ranks have the micro-batches of one, in its order, and each reads its own alone."""
    whole, shared = opened(folder)[0], opened(folder, tmp_path / "shared")[0]

    def rounds(dump: Dump, rank: int, size: int) -> list[TrainBatch]:
        world: Any = SimpleNamespace(rank=rank, world_size=size)
        return list(Heldout(dump, temperature=2.0, limit=Limit(2))._rounds(world, None))

    ranks = [rounds(shared, rank, size) for rank in range(size)]
    found = [batch for together in zip(*ranks, strict=True) for batch in together]
    expected = rounds(whole, 0, 1)
    assert_equal(found[: len(expected)], expected)
    assert not any(batch.supervised for batch in found[len(expected) :])
    assert shared.asked == Counter(range(5))


def test_a_dataset_reads_shared_units_too(folder: Path, tmp_path: Path) -> None:
    """In another process of a `DataLoader` as here: it is pickled for that."""
    whole, shared = opened(folder)[0], opened(folder, tmp_path / "shared")[0]
    again = pickle.loads(pickle.dumps(DumpDataset(shared)))
    for found in (DumpDataset(shared), again):
        for position in range(24):
            assert_equal(found[position].targets, DumpDataset(whole)[position].targets)
    assert shared.asked == Counter(range(5))
    assert again.dump.is_shared
    assert not again.dump.asked
