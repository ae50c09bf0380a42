"""The order is a bijection, local, well shuffled, seekable, and the same for every world size."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.deal import Limit, rank_slice
from student_train.data.mix import Mix
from student_train.data.order import Order, Span

SHAPES = [  # samples, samples per unit, window units, block units, global batch
    (1000, 7, 5, 3, 32),
    (1, 1, 1, 1, 1),
    (10, 512, 8, 8, 3),
    (4096, 16, 64, 8, 32),
    (513, 512, 1024, 8, 32),
    (97, 10, 4, 4, 97),
    (100, 10, 3, 1, 200),
    (37, 1, 5, 2, 8),
]


def order(shape: tuple[int, ...], seed: int = 0) -> Order:
    names = "samples", "samples_per_unit", "window_units", "block_units"
    return Order(**dict(zip(names, shape[:4], strict=True)), seed=seed)


def mix(shape: tuple[int, ...], seed: int = 0) -> Mix:
    """Of one dump."""
    return Mix(orders=(order(shape, seed),), shares=(shape[0],), global_batch_size=shape[4])


def epoch_samples(o: Order, epoch: int = 0) -> np.ndarray:
    return o.samples_at(epoch, 0, o.samples)


def spearman(a: np.ndarray) -> float:
    """Rank correlation of values with their places."""
    return float(np.corrcoef(np.arange(len(a)), np.argsort(np.argsort(a)))[0, 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_epoch_has_each_sample_once(shape: tuple[int, ...]) -> None:
    o, m = order(shape), mix(shape)
    for epoch in range(3):
        first = epoch * m.steps_per_epoch
        steps = [m.step_samples(step) for step in range(first, first + m.steps_per_epoch)]
        assert all(len(step) == m.global_batch_size for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= m.global_batch_size
        assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(o.samples))
        assert np.array_equal(np.concatenate(steps), epoch_samples(o, epoch))


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 400),
    per_unit=st.integers(1, 40),
    window=st.integers(1, 12),
    block=st.integers(1, 12),
    batch=st.integers(1, 64),
    seed=st.integers(0, 2**64),
)
def test_any_shape_is_a_bijection(samples: int, per_unit: int, window: int, block: int, batch: int, seed: int) -> None:
    shape = samples, per_unit, window, block, batch
    o, m = order(shape, seed), mix(shape, seed)
    steps = [m.step_samples(step) for step in range(m.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(samples))
    for start in range(0, samples, 29):  # any piece is what a walk from 0 gives
        assert np.array_equal(o.samples_at(0, start, samples), epoch_samples(o)[start:])


def test_the_order_is_fixed_for_ever() -> None:
    # A resumed run relies on these numbers: if they must change, change the version in the key as well.
    m = mix((1000, 7, 5, 3, 8), seed=1)
    assert m.step_samples(0).tolist() == [9, 11, 25, 20, 14, 27, 12, 18]
    assert m.step_samples(200).tolist() == [625, 595, 624, 627, 622, 619, 596, 601]  # of the second epoch


def test_any_positions_are_those_of_whole_epochs_put_together() -> None:
    """No positions are no samples, also between the pieces that are remembered."""
    o = order((2500, 7, 5, 3, 8))
    whole = np.concatenate([o.samples_at(epoch, 0, 2500) for epoch in range(3)])
    for start, stop in ((0, 0), (1024, 1024), (2500, 2500), (1020, 1030), (2490, 2510), (3, 2600), (1500, 7500)):
        assert np.array_equal(o.samples_of(start, stop), whole[start:stop])


def test_seed_and_epoch_change_the_order() -> None:
    shape = (2000, 10, 50, 8, 32)
    kinds = [epoch_samples(order(shape, 0), 0), epoch_samples(order(shape, 0), 1), epoch_samples(order(shape, 1), 0)]
    for i in range(3):
        for j in range(i):
            assert np.mean(kinds[i] == kinds[j]) < 0.02
    assert np.array_equal(kinds[0], epoch_samples(order(shape, 0), 0))


@pytest.mark.parametrize("world_size", range(1, 33))
def test_any_world_size_trains_on_the_same_samples(world_size: int) -> None:
    m = mix((333, 7, 5, 3, 32))
    lengths = np.random.default_rng(0).integers(1, 500, 333)
    for step in (0, 4, m.steps_per_epoch - 1):
        samples = m.step_samples(step)
        for micro_batch_size in (1, 3, 4, 64):
            ranks = [
                rank_slice(samples, rank, world_size, Limit(micro_batch_size), lengths=lengths[samples])
                for rank in range(world_size)
            ]
            assert {len(batches) for batches in ranks} == {-(-len(samples) // (world_size * micro_batch_size))}
            assert max(len(batch) for batches in ranks for batch in batches) <= micro_batch_size
            together = np.concatenate([batch for batches in ranks for batch in batches])
            assert np.array_equal(np.sort(together), np.sort(samples))


def test_more_ranks_than_samples_leaves_fillers() -> None:
    ranks = [rank_slice(np.array([5, 6, 7]), rank, 5, Limit(2), lengths=[1, 1, 1]) for rank in range(5)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[1], [1], [1], [0], [0]]
    assert rank_slice(np.empty(0, np.int64), 0, 2, Limit(4), lengths=[]) == []


def test_lengths_sort_micro_batches_and_keep_the_steps_membership() -> None:
    samples, lengths = np.arange(100, 124), np.random.default_rng(1).permutation(24) * 10 + 5
    length_of = dict(zip(samples, lengths, strict=True))
    ranks = [rank_slice(samples, rank, 2, Limit(3), lengths=lengths) for rank in range(2)]
    assert sorted(np.concatenate([batch for batches in ranks for batch in batches])) == list(samples)
    for i in range(4):  # what ranks run at the same time: neighbours in length
        together = sorted(length_of[s] for batches in ranks for s in batches[i])
        assert together[-1] - together[0] == 50
    padded = sum(max(length_of[s] for s in batch) * len(batch) for batches in ranks for batch in batches)
    unsorted = [rank_slice(samples, rank, 2, Limit(3), lengths=[1] * 24) for rank in range(2)]
    padded_unsorted = sum(max(length_of[s] for s in batch) * len(batch) for batches in unsorted for batch in batches)
    assert padded < 0.8 * padded_unsorted


@pytest.mark.parametrize("shape", [(4000, 10, 50, 8, 32), (4007, 10, 64, 5, 48)])
def test_a_reader_has_one_block_open(shape: tuple[int, ...]) -> None:
    o = order(shape)
    sequence, position, blocks = epoch_samples(o) // o.samples_per_unit, 0, []
    while position < o.samples:
        span, units = o.block_at(0, position)
        assert span == Span(0, position, span.stop)
        assert len(units) <= o.block_units
        assert set(sequence[span.start : span.stop]) == set(units.tolist())
        assert o.block_at(0, span.stop - 1)[0] == span
        blocks.append(units)
        position = span.stop
    assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(o.units))  # each unit is opened once per epoch


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_say_what_a_follower_waits_for(shape: tuple[int, ...]) -> None:
    o, m = order(shape), mix(shape)
    assert [unit for w in range(o.windows) for unit in o.units_of_window(w)] == list(range(o.units))
    touched: set[int] = set()
    for step in range(2 * m.steps_per_epoch):
        touched |= set((m.step_samples(step) // o.samples_per_unit).tolist())
        (windows,) = m.windows(step + 1)
        assert touched <= {unit for w in range(windows) for unit in o.units_of_window(w)}
        assert touched & set(o.units_of_window(windows - 1))  # and nothing is waited for in vain
        assert m.steps_within([windows], step + 1) == step + 1
        assert m.windows(m.steps_within([windows - 1], step + 1))[0] <= windows - 1


def test_samples_are_well_shuffled() -> None:
    o = order((40_000, 50, 800, 8, 32))
    for epoch in range(3):
        sequence = epoch_samples(o, epoch)
        assert abs(spearman(sequence[:400])) < 0.2  # one block, 3 sigma = 0.15
        assert abs(spearman(sequence // 50)) < 0.3  # order of 100 blocks, 3 sigma = 0.3
        inside = [spearman(sequence[start : start + 400]) for start in range(0, 40_000, 400)]
        assert abs(np.mean(inside)) < 0.02
        for lag in (1, 2, 8):  # neighbours know nothing of each other's place in their unit
            rows = sequence % 50
            assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 0.02
    whole = order((40_000, 50, 800, 800, 32))  # one block: a full shuffle
    assert abs(spearman(epoch_samples(whole))) < 0.015


def test_every_sample_may_come_first() -> None:
    first = [mix((8, 2, 4, 4, 1), seed).step_samples(0)[0] for seed in range(800)]
    assert np.bincount(first, minlength=8).min() > 60


def test_seek_is_immediate_at_any_size() -> None:
    m = mix((10**9, 10_000, 1024, 8, 32))
    assert m.orders[0].units == 100_000
    m.step_samples(0)
    for step in (1, 15_000_000, m.steps_per_epoch - 1, 7 * m.steps_per_epoch + 3):
        times = []
        for repeat in range(5):
            start = time.perf_counter()
            m.step_samples(step + repeat)
            times.append(time.perf_counter() - start)
        assert min(times) < 5e-3  # 0.5 ms on an idle machine
