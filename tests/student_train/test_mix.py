"""Several dumps in one order: each sample as often as its weight says, any step at once, and steps mixed alike."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_student import write_dump
from test_stream import streaming

from storage_schemas.common.errors import DataError
from storage_schemas.reader import Dump
from student_train.data.mix import Mix
from student_train.data.order import Order
from student_train.resume import consumed_root

dumps = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.integers(1, 200)),
    min_size=1,
    max_size=4,
)
"""Samples, samples per unit, window units, block units, and the share of each dump."""


def mix_of(shapes: list[tuple[int, ...]], batch: int, seed: int = 0) -> Mix:
    """Of dumps of these shapes."""
    names = "samples", "samples_per_unit", "window_units", "block_units"
    orders = tuple(Order(**dict(zip(names, shape[:4], strict=True)), seed=seed) for shape in shapes)
    return Mix(orders=orders, shares=tuple(shape[4] for shape in shapes), global_batch_size=batch)


def located(mix: Mix, steps: range) -> list[tuple[int, int]]:
    """(dump, sample) of all samples of some steps."""
    return [mix.locate(sample) for step in steps for sample in mix.step_samples(step).tolist()]


@settings(deadline=None, max_examples=80)
@given(shapes=dumps, batch=st.integers(1, 40), seed=st.integers(0, 2**64))
def test_each_sample_is_seen_as_often_as_its_weight_says(shapes: list[tuple[int, ...]], batch: int, seed: int) -> None:
    """An epoch has each dump's share exactly; after any number of epochs no sample of a dump is seen twice more often
    than another; and the samples come in the dump's own order."""
    mix = mix_of(shapes, batch, seed)
    for epochs in (1, 2, 3):
        found = located(mix, range(epochs * mix.steps_per_epoch))
        for dump, (order, share) in enumerate(zip(mix.orders, mix.shares, strict=True)):
            mine = [sample for of, sample in found if of == dump]
            assert len(mine) == epochs * share
            counts = np.bincount(mine, minlength=order.samples)
            assert counts.min() == epochs * share // order.samples
            assert counts.max() == -(-epochs * share // order.samples)
            whole = [order.samples_at(epoch, 0, order.samples) for epoch in range(-(-epochs * share // order.samples))]
            assert mine == np.concatenate(whole)[: epochs * share].tolist()


@settings(deadline=None, max_examples=80)
@given(shapes=dumps, batch=st.integers(1, 40))
def test_every_step_is_mixed_alike(shapes: list[tuple[int, ...]], batch: int) -> None:
    """The first p positions hold of each dump its share of p, but for less than one sample per dump."""
    mix = mix_of(shapes, batch)
    for step in range(mix.steps_per_epoch + 1):
        position = min(step * batch, mix.samples)
        taken = mix.taken(step)
        assert sum(taken) == position
        for found, share in zip(taken, mix.shares, strict=True):
            assert abs(found - position * share / mix.samples) < len(shapes)


@settings(deadline=None, max_examples=40)
@given(shapes=dumps, batch=st.integers(1, 40), world_size=st.integers(1, 9), cut=st.integers(0, 10**6))
def test_dealt_samples_are_each_one_ranks(shapes: list[tuple[int, ...]], batch: int, world_size: int, cut: int) -> None:
    """Of every step the ranks have as many, but for one; any range of a dump's order gives the same ranks."""
    mix = mix_of(shapes, batch)
    last = mix.taken(2 * mix.steps_per_epoch)
    ranks = range(world_size)
    whole = [
        [mix.dealt(dump, 0, stop, rank=rank, world_size=world_size) for rank in ranks] for dump, stop in enumerate(last)
    ]
    for stop, parts in zip(last, whole, strict=True):
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(stop))
    for step in range(2 * mix.steps_per_epoch):
        bounds = list(zip(mix.taken(step), mix.taken(step + 1), strict=True))
        counts = [sum(((whole[d][r] >= a) & (whole[d][r] < b)).sum() for d, (a, b) in enumerate(bounds)) for r in ranks]
        assert max(counts) - min(counts) <= 1
    for dump, stop in enumerate(last):
        start = cut % stop
        for rank in ranks:
            found = mix.dealt(dump, start, stop, rank=rank, world_size=world_size)
            assert np.array_equal(found, whole[dump][rank][whole[dump][rank] >= start])


def test_one_dump_is_its_own_order() -> None:
    """Numbers that runs of before rely on: see `test_the_order_is_fixed_for_ever`."""
    mix = mix_of([(1000, 7, 5, 3, 1000)], 8, seed=1)
    assert mix.step_samples(0).tolist() == [9, 11, 25, 20, 14, 27, 12, 18]
    assert mix.step_samples(200).tolist() == [625, 595, 624, 627, 622, 619, 596, 601]


def test_the_mix_is_fixed_for_ever() -> None:
    """A resumed run relies on these numbers."""
    mix = mix_of([(100, 7, 5, 3, 100), (40, 6, 4, 2, 80), (50, 5, 2, 2, 5)], 8, seed=1)
    assert [mix.taken(step) for step in (0, 1, 2, 23, 24, 25)] == [
        [0, 0, 0], [4, 4, 0], [9, 7, 0], [99, 80, 5], [100, 80, 5], [104, 84, 5],
    ]  # fmt: skip
    assert mix.step_samples(2).tolist() == [16, 13, 8, 24, 115, 110, 116, 142]


def test_numbers_of_any_size() -> None:
    """Exact where float64 and int64 products are not, and at once."""
    mix = mix_of([(10**12, 10_000, 1024, 8, 10**12 + 1), (10**9, 512, 1024, 8, 3 * 10**9), (7, 2, 2, 1, 1)], 4096)
    assert mix.taken(mix.steps_per_epoch) == list(mix.shares)
    began = time.perf_counter()
    for step in (0, mix.steps_per_epoch // 3, 5 * mix.steps_per_epoch + 17):
        assert len(mix.step_samples(step)) == 4096
        assert mix.steps_within(mix.windows(step), 10**12) >= step
    assert time.perf_counter() - began < 1


def test_windows_of_every_dump_are_waited_for() -> None:
    """A step may be read once all windows of each dump that it reads from are there, and not before."""
    mix = mix_of([(60, 5, 2, 2, 60), (20, 5, 1, 1, 40)], 10)
    assert mix.steps_within([0, 4], 30) == 0
    assert mix.steps_within([6, 4], 30) == 30
    for have in [(1, 1), (2, 1), (1, 4), (3, 2), (6, 1)]:
        steps = mix.steps_within(have, 30)
        units = [{sample // 5 for of, sample in located(mix, range(steps)) if of == dump} for dump in (0, 1)]
        assert units[0] <= set(range(2 * have[0]))
        assert units[1] <= set(range(have[1]))
        after = located(mix, range(steps, steps + 1))
        assert any(sample // 5 >= (2 * have[0], have[1])[of] for of, sample in after)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dumps of other samples, units and sizes."""
    folder = tmp_path_factory.mktemp("mix")
    write_dump(folder / "a", samples=23, samples_per_unit=4)
    write_dump(folder / "b", samples=17, samples_per_unit=3, first=100)
    return folder


def both(folder: Path) -> list[Dump]:
    """Opened."""
    return [Dump.open(str(folder / name)) for name in "ab"]


SHAPES = [(23, 4, 2, 1, 23), (17, 3, 9, 2, 34)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_world_size_reads_the_same_samples(folder: Path, world_size: int) -> None:
    """Over two epochs, from any step on; rows come from the dump that they are counted in."""
    mix = mix_of(SHAPES, 6)
    stop = 2 * mix.steps_per_epoch
    for start in (0, 7, stop - 1):
        ranks = [
            streaming(both(folder), mix, rank=rank, world_size=world_size, start=start, stop=stop, allowed=stop)
            for rank in range(world_size)
        ]
        for step in range(start, stop):
            shares = [rank.get(step, timeout=20) for rank in ranks]
            expected = [sample + 100 * dump for dump, sample in located(mix, range(step, step + 1))]
            assert sorted(names(shares)) == sorted(expected)
            assert len({len(share or ()) for share in shares}) == 1
        for rank in ranks:
            rank.close()


def test_a_small_dump_may_be_seen_several_times_in_a_step(folder: Path) -> None:
    """Its samples are dealt like others, as often as they are there."""
    mix = mix_of([(23, 4, 2, 1, 23), (17, 3, 1, 1, 170)], 60)
    ranks = [
        streaming(both(folder), mix, rank=rank, world_size=2, start=0, stop=mix.steps_per_epoch, allowed=99)
        for rank in range(2)
    ]
    for step in range(mix.steps_per_epoch):
        expected = [sample + 100 * dump for dump, sample in located(mix, range(step, step + 1))]
        assert len(set(expected)) < len(expected) or step == mix.steps_per_epoch - 1
        shares = [rank.get(step, timeout=20) for rank in ranks]
        assert sorted(names(shares)) == sorted(expected)
    for rank in ranks:
        rank.close()


def names(shares: Any) -> list[int]:
    """Of the rows of all ranks, in their ids."""
    return [int(row.sample_id[1:]) for share in shares for batch in share for row in batch]


def test_a_rare_dump_keeps_its_block_open(folder: Path) -> None:
    """Steps without a sample of it do not let go of what the next ones need."""
    reads: Counter[tuple[int, int]] = Counter()

    class Counting(Dump):
        def read_unit(self, unit: int):  # type: ignore[no-untyped-def]
            reads[self.provenance.corpus.samples, unit] += 1
            return super().read_unit(unit)

    mix = mix_of([(23, 4, 9, 1, 230), (17, 3, 9, 2, 5)], 2)
    dumps = [Counting.open(str(folder / name)) for name in "ab"]
    stream = streaming(dumps, mix, rank=0, world_size=1, start=0, stop=mix.steps_per_epoch, allowed=999)
    for step in range(mix.steps_per_epoch):
        assert stream.get(step, timeout=20) is not None
    stream.close()
    block = {int(unit) for unit in mix.orders[1].block_at(0, 0)[1]}
    assert {unit: count for (samples, unit), count in reads.items() if samples == 17} == dict.fromkeys(block, 1)
    assert sum(count for (samples, _), count in reads.items() if samples == 23) == 10 * 6


def test_what_was_trained_on_is_known_of_each_dump(folder: Path, tmp_path: Path) -> None:
    """The hash over it changes where a unit of any dump does, and not before it was read."""
    mix, there = mix_of(SHAPES, 6), both(folder)
    write_dump(tmp_path / "b", samples=17, samples_per_unit=3, first=100, bad_samples=False)
    changed = [there[0], Dump.open(str(tmp_path / "b"))]
    assert consumed_root(changed, mix, 0) == consumed_root(there, mix, 0)
    assert consumed_root(changed, mix, 1) != consumed_root(there, mix, 1)
    assert consumed_root(there, mix, 4) != consumed_root(there, mix, 1)
    write_dump(tmp_path / "part", samples=17, samples_per_unit=3, first=100, units=range(2), seal=False)
    with pytest.raises(DataError, match=r"unit 2 of .*part was trained on"):
        consumed_root([there[0], Dump.open(str(tmp_path / "part"))], mix, 1)
