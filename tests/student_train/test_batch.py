"""Rows become tensors: padding, the shift, decoded targets, fillers, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from storage_schemas.common.errors import DataError
from storage_schemas.rows import EMPTY, NONFINITE, OK, Row
from storage_schemas.targets import Targets, decode
from student_train.data.batch import SparseTargets, TrainBatch, collate

VOCAB = 50


def make_row(index: int, mask: list[int], *, sizes: list[int] | None = None, draws: int = 0, seed: int = 0) -> Row:
    """A sample with one target per supervised token, of sizes[i] head entries and `draws` drawn ones."""
    rng = np.random.default_rng([seed, index])
    n, tokens = sum(mask), len(mask)
    sizes = sizes or [3] * n
    ids, logprobs, counts, tails = [], [], [], []
    for size in sizes:
        log_p = np.log(rng.dirichlet(np.full(VOCAB, 0.3)) + 1e-9)
        log_p -= np.log(np.exp(log_p).sum())
        ranked = np.argsort(-log_p)
        head, drawn = np.sort(ranked[:size]), np.sort(ranked[size : size + draws])
        ids.append(np.concatenate([head, drawn]))
        logprobs.append(log_p[ids[-1]])
        counts.append(np.concatenate([np.zeros(size), rng.integers(1, 4, draws)]))
        tails.append([np.log(np.exp(log_p[ranked[size:]]).sum())] * 2)
    lengths = [len(x) for x in ids]
    targets = Targets(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=np.concatenate(ids).astype(np.int32) if ids else np.empty(0, np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32) if ids else np.empty(0, np.float32),
        head_size=np.array(sizes, np.int32),
        counts=np.concatenate(counts).astype(np.int32) if draws else None,
        tail_logprob=np.array(tails, np.float32).reshape(n, 2) + np.array([0.0, -0.1], np.float32),
    )
    return Row(
        sample_index=index,
        sample_id=f"s{index}",
        status=OK if n else EMPTY,
        input_ids=rng.integers(1, VOCAB, tokens).astype(np.int32),
        loss_mask=np.array(mask, bool),
        targets=targets if n else None,
    )


def batch_of(rows: list[Row], **changes: Any) -> TrainBatch:
    return collate(rows, **({"temperature_index": 0, "temperature": 1.0} | changes))


ROWS = [
    make_row(4, [0, 0, 1, 1, 0, 1], sizes=[3, 1, 5]),
    make_row(9, [0, 1]),
    make_row(2, [0, 0, 0, 1, 1, 1, 1], sizes=[2, 2, 4, 1]),
]


def test_rows_are_right_padded_and_supervised_one_position_earlier() -> None:
    batch = batch_of(ROWS)
    assert batch.input_ids.shape == (3, 7)
    for i, row in enumerate(ROWS):
        assert batch.input_ids[i].tolist() == row.input_ids.tolist() + [0] * (7 - len(row.input_ids))
    assert batch.position_ids.tolist() == [list(range(7))] * 3
    assert batch.positions.tolist() == [1, 2, 4, 7 + 0, 14 + 2, 14 + 3, 14 + 4, 14 + 5]
    assert batch.tokens == 6 + 2 + 7
    expected = [int(row.input_ids[t]) for row in ROWS for t in np.flatnonzero(row.loss_mask)]
    assert batch.targets.labels.tolist() == expected
    # The label is the token that follows the selected position.
    following = batch.input_ids.roll(-1, 1).flatten()[batch.positions]
    assert torch.equal(following, batch.targets.labels)


def test_select_takes_the_hidden_states_in_the_targets_order() -> None:
    batch = batch_of(ROWS)
    hidden = torch.randn(3, 7, 5)
    got = batch.select(hidden)
    places = [(0, 1), (0, 2), (0, 4), (1, 0), (2, 2), (2, 3), (2, 4), (2, 5)]
    assert torch.equal(got, torch.stack([hidden[place] for place in places]))


@pytest.mark.parametrize("index", [0, 1])
def test_targets_are_decoded_over_the_whole_batch(index: int) -> None:
    temperature = [1.0, 2.0][index]
    batch = batch_of(ROWS, temperature_index=index, temperature=temperature).targets
    assert batch.ids.shape == (8, 5)
    assert not batch.has_draws
    start = 0
    for row in ROWS:
        alone = decode(row.targets, temperature_index=index, temperature=temperature)
        n, width = alone.ids.shape
        part = batch[start : start + n]
        for name in ("ids", "logprobs", "weights", "in_head"):
            assert np.array_equal(getattr(part, name)[:, :width].numpy(), getattr(alone, name)), name
            assert not getattr(part, name)[:, width:].any(), name
        assert np.array_equal(part.tail_logprob.numpy(), row.targets.tail_logprob[:, index])
        start += n
    total = batch.weights.sum(1) + batch.tail_logprob.exp()
    torch.testing.assert_close(total, torch.ones(8))


def test_draws_carry_the_tails_mass() -> None:
    targets = batch_of([make_row(1, [0, 1, 1], draws=4), make_row(2, [0, 1], draws=4)]).targets
    assert targets.has_draws
    assert targets.in_head.sum(1).tolist() == [3, 3, 3]
    torch.testing.assert_close(targets.weights.sum(1), torch.ones(3))


def test_without_entries_only_labels_are_kept() -> None:
    batch = batch_of(ROWS, entries=False)
    assert batch.targets.ids.shape == batch.targets.weights.shape == (8, 0)
    assert torch.equal(batch.targets.labels, batch_of(ROWS).targets.labels)


def test_bad_samples_are_counted_but_not_fed() -> None:
    bad = dataclasses.replace(make_row(6, [0, 1, 1, 0, 0, 0, 0, 0, 1]), status=NONFINITE, targets=None)
    empty = make_row(8, [0, 0])
    batch = batch_of([bad, ROWS[0], empty])
    assert batch.input_ids.shape == (1, 6)
    assert len(batch.targets) == 3


@pytest.mark.parametrize("rows", [[], [make_row(8, [0, 0])]], ids=["nothing", "nothing supervised"])
def test_a_filler_is_one_padding_token(rows: list[Row]) -> None:
    batch = batch_of(rows, vocab_size=VOCAB)
    assert batch.input_ids.tolist() == [[0]]
    assert batch.position_ids.tolist() == [[0]]
    assert len(batch.targets) == len(batch.positions) == batch.tokens == 0
    assert batch.select(torch.randn(1, 1, 4)).shape == (0, 4)


def test_slices_and_copies_keep_every_field() -> None:
    batch = batch_of(ROWS)
    part = batch.targets[2:5]
    assert isinstance(part, SparseTargets)
    assert len(part) == 3
    assert torch.equal(part.weights, batch.targets.weights[2:5])
    assert torch.equal(part.tail_logprob, batch.targets.tail_logprob[2:5])
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.positions)} == {"meta"}
    assert {getattr(moved.targets, name).device.type for name in ("labels", "ids", "logprobs", "weights")} == {"meta"}


def test_an_id_beyond_the_students_head_is_refused() -> None:
    highest = int(max(ROWS[0].targets.ids.max(), ROWS[0].input_ids.max()))
    batch_of(ROWS[:1], vocab_size=highest + 1)
    with pytest.raises(DataError, match="outside the student's vocabulary") as error:
        batch_of(ROWS[:1], vocab_size=highest)
    assert str(highest) in str(error.value)
