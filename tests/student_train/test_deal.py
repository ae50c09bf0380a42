"""Micro-batches of so many tokens: each sample once, as many on all ranks, none too large, no more than it takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_student import write_dump

from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from student_train.config import TrainSection
from student_train.data.batch import collate
from student_train.data.deal import Limit, rank_slice
from student_train.zero import deepspeed_config

TOKENS = 700
SAMPLES = np.arange(100, 180)
LENGTHS = np.random.default_rng(2).lognormal(5.0, 0.8, len(SAMPLES)).astype(np.int64)
LENGTHS[[3, 50]] = 0
LENGTHS[7] = 2000


def dealt(world_size: int, limit: Limit) -> list[list[np.ndarray]]:
    """Micro-batches of all ranks, as places in SAMPLES."""
    ranks = [rank_slice(SAMPLES, rank, world_size, limit, lengths=LENGTHS) for rank in range(world_size)]
    return [[batch - SAMPLES[0] for batch in batches] for batches in ranks]


def size(batch: np.ndarray, *, packed: bool) -> int:
    """Tokens that the device sees."""
    lengths = LENGTHS[batch]
    return int(lengths.sum() if packed else len(lengths) * lengths.max(initial=0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 100])
def test_every_sample_is_in_one_micro_batch_of_one_rank(world_size: int, packed: bool) -> None:
    """But for those without tokens; and a sample that is too long is alone."""
    ranks = dealt(world_size, Limit(tokens=TOKENS, packed=packed))
    batches = [batch for batches in ranks for batch in batches]
    assert sorted(np.concatenate(batches)) == np.flatnonzero(LENGTHS).tolist()
    assert len({len(batches) for batches in ranks}) == 1
    assert all(size(batch, packed=packed) <= TOKENS or len(batch) == 1 for batch in batches)
    assert max(size(batch, packed=packed) for batch in batches) == 2000


def fewest(packed: bool) -> int:
    """Micro-batches that samples in order of length need, by trying each in turn."""
    batches: list[list[int]] = []
    for i in np.argsort(-LENGTHS, kind="stable"):
        fits = batches and size(np.array([*batches[-1], i]), packed=packed) <= TOKENS
        batches = [*batches[:-1], [*batches[-1], i]] if fits else [*batches, [i]]
    return len([batch for batch in batches if LENGTHS[batch].any()])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_no_more_rounds_than_needed_and_micro_batches_are_even(world_size: int, packed: bool) -> None:
    ranks = dealt(world_size, Limit(tokens=TOKENS, packed=packed))
    assert len(ranks[0]) == -(-fewest(packed) // world_size)
    assert all(batch.size for batches in ranks for batch in batches[:-1])
    largest = max(size(batch, packed=packed) for batches in ranks for batch in batches if len(batch) > 1)
    assert largest < TOKENS
    assert len(dealt(world_size, Limit(tokens=largest - 1, packed=packed))[0]) > len(ranks[0])


def test_nothing_usable_needs_no_micro_batch() -> None:
    assert rank_slice(SAMPLES[:3], 0, 2, Limit(tokens=5), lengths=[0, 0, 0]) == []
    assert rank_slice(SAMPLES[:0], 1, 2, Limit(tokens=5), lengths=[]) == []


def test_what_is_counted_is_what_the_model_is_given(tmp_path: Path) -> None:
    """Padding too, and with `packed` none."""
    write_dump(tmp_path / "dump")
    unit = Dump.open(str(tmp_path / "dump")).read_unit(0)
    rows = [unit.row(i) for i in range(len(unit)) if unit.status[i] == "ok"]
    lengths = [len(row.input_ids) for row in rows]
    for packed in (False, True):
        most = max(lengths) * 2
        shares = rank_slice(np.arange(len(rows)), 0, 1, Limit(tokens=most, packed=packed), lengths=lengths)
        sizes = [
            collate([rows[i] for i in share], temperature_index=0, temperature=1.0, packed=packed).input_ids.numel()
            for share in shares
        ]
        assert max(sizes) <= most
        assert len(sizes) < len(rows)


def test_one_of_both_limits_decides() -> None:
    def limit(**changes: Any) -> Limit:
        return TrainSection(output=Path("run"), **changes).micro_batch

    assert limit() == Limit(4)
    assert limit(micro_batch_size=3, packing=True) == Limit(3, packed=True)
    assert limit(micro_batch_size=None, micro_batch_tokens=9).tokens == 9
    with pytest.raises(ValueError, match="set one of them to null"):
        limit(micro_batch_size=4, micro_batch_tokens=9)


def test_deepspeeds_own_key_is_told_whom_it_contradicts() -> None:
    given = {"train_micro_batch_size_per_gpu": 16}
    with pytest.raises(MismatchError, match=r"contradicts train\.micro_batch_tokens"):
        deepspeed_config(TrainSection(output=Path("run"), micro_batch_tokens=9, deepspeed=given))
