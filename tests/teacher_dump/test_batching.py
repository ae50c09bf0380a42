"""Batches by token budget: each sample once, within the budget, little padding."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from support.tiny_teachers import sample_of

from storage_schemas.common.batching import length_sorted_batches
from teacher_dump.teachers.group import shares

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 2000), st.none() | st.integers(1, 300))
def test_batches_hold_each_sample_once_and_keep_the_budget(
    lengths: list[int], budget: int, apart_at: int | None
) -> None:
    batches = length_sorted_batches(lengths, budget=budget, apart_at=apart_at)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        if apart_at is not None:
            assert len({lengths[place] > apart_at for place in batch}) == 1
    flat = [lengths[place] for batch in batches for place in batch]
    assert flat == sorted(flat, reverse=True)
    assert batches == length_sorted_batches(lengths, budget=budget, apart_at=apart_at)


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 9))
def test_each_of_several_ways_keeps_the_budget(lengths: list[int], budget: int, ways: int) -> None:
    samples = [sample_of(length + 1, index=place, mask=[length]) for place, length in enumerate(lengths)]
    batches = length_sorted_batches(lengths, budget=budget, ways=ways)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        parts = shares([samples[place] for place in batch], ways)
        assert [sample.sample_index for part in parts for sample in part] == batch
        assert len(parts) == ways
        for part in parts:
            assert len(part) <= 1 or len(part) * max(lengths[sample.sample_index] for sample in part) <= budget
    for batch in batches[:-1]:
        assert len(batch) >= ways, "a process has nothing to do"


@given(LENGTHS, st.integers(1, 2000))
def test_no_two_neighbouring_batches_could_be_one(lengths: list[int], budget: int) -> None:
    batches = length_sorted_batches(lengths, budget=budget)
    for first, second in pairwise(batches):
        assert (len(first) + 1) * lengths[first[0]] > budget
        assert second


def test_like_lengths_share_a_batch() -> None:
    assert length_sorted_batches([5, 100, 6, 90], budget=200) == [[1, 3], [2, 0]]
