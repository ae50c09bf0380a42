"""Rows to Parquet bytes and back: everything comes back, for every estimator, vocabulary and shape."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import codec
from storage_schemas.common.errors import DataError
from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.rows import EMPTY, INVALID_TEXT, NONFINITE, OK, SCHEMA, TOO_LONG, Row, UnitRows, rows_to_unit
from storage_schemas.targets import Targets

TOPK = Recipe(estimator=TopK())
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def targets(draw: st.DrawFn, n: int, vocab: int, recipe: Recipe) -> Targets:
    kind, temperatures = recipe.estimator.kind, len(recipe.temperatures)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.integers(1, min(vocab, 20)))
    heads = np.zeros(n, int) if kind == "sampled" else rng.integers(1, longest + 1, n)
    drawn = np.zeros(n, int) if kind == "topk" else rng.integers(0 if kind == "adaptive" else 1, longest + 1, n)
    ids, counts = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for head, more in zip(heads, drawn, strict=True):
        for size in (head, more):
            ids.append(np.sort(rng.choice(vocab, size, replace=False)).astype(np.int32))
        counts += [np.zeros(head, np.int32), rng.integers(1, 9, more).astype(np.int32)]
    flat = np.concatenate(ids)
    tail = -rng.exponential(3.0, (n, temperatures)).astype(np.float32)
    tail[rng.random(n) < 0.2] = -np.inf
    return Targets(
        offsets=np.concatenate([[0], np.cumsum(heads + drawn)]).astype(np.int64),
        ids=flat,
        logprobs=-rng.exponential(4.0, len(flat)).astype(np.float32),
        head_size=heads.astype(np.int32),
        counts=None if kind == "topk" else np.concatenate(counts),
        tail_logprob=tail,
        logsumexp=rng.normal(0, 20, (n, temperatures)).astype(np.float32) if recipe.logsumexp else None,
    )


@st.composite
def units(draw: st.DrawFn) -> tuple[UnitRows, Recipe]:
    estimator = draw(st.sampled_from([TOPK.estimator, Adaptive(kind="adaptive"), Sampled(kind="sampled")]))
    vocab = draw(st.sampled_from([1, 7, 49_152, 151_936, 262_144, 2**31 - 1]))
    temperatures = (1.0, 2.0, 3.0)[: draw(st.integers(1, 3))]
    recipe = Recipe(estimator=estimator, temperatures=temperatures, logsumexp=draw(st.booleans()))
    rows = []
    for index in range(draw(st.integers(1, 6))):
        mask = np.array([False, *draw(st.lists(st.booleans(), max_size=8))])
        status = OK if mask.any() else draw(st.sampled_from([EMPTY, TOO_LONG, INVALID_TEXT]))
        status = draw(st.sampled_from([status, NONFINITE]))
        mask = mask[:0] if status in (TOO_LONG, INVALID_TEXT) else mask
        found = None
        if status == OK:
            found = draw(targets(int(mask.sum()), min(vocab, 10**6), recipe))
            if vocab > 10**6:
                found.ids[:] += vocab - 10**6
        ids = np.random.default_rng(index).integers(0, vocab, len(mask)).astype(np.int32)
        rows.append(
            Row(sample_index=index + 5, sample_id=draw(TEXT), status=status, input_ids=ids, loss_mask=mask,
                targets=found)
        )  # fmt: skip
    return rows_to_unit(rows, recipe), recipe


@given(units())
@settings(max_examples=120, deadline=None)
def test_everything_comes_back(made: tuple[UnitRows, Recipe]) -> None:
    unit, recipe = made
    data = codec.encode(unit, {"key": "value"})
    file = codec.open_parquet(data)
    assert file.metadata.metadata[b"key"] == b"value"
    assert_equal(codec.decode_file(file, recipe), unit)


def assert_equal(got: UnitRows, expected: UnitRows) -> None:
    for field in fields(UnitRows):
        if field.name != "targets":
            assert np.array_equal(getattr(got, field.name), getattr(expected, field.name)), field.name
    for field in fields(Targets):
        here, there = getattr(got.targets, field.name), getattr(expected.targets, field.name)
        assert np.array_equal(here, there), field.name
        assert here is None or here.dtype == there.dtype, field.name


def large_unit(rows: int, k: int) -> UnitRows:
    n = rows * 9
    rng = np.random.default_rng(0)
    return UnitRows(
        sample_index=np.arange(rows),
        sample_id=[str(i) for i in range(rows)],
        status=[OK] * rows,
        token_offsets=np.arange(rows + 1) * 10,
        input_ids=rng.integers(0, 100, rows * 10).astype(np.int32),
        loss_mask=np.tile(np.arange(10) > 0, rows),
        target_offsets=np.arange(rows + 1) * 9,
        targets=Targets(
            offsets=np.arange(n + 1) * k,
            ids=np.sort(rng.integers(0, 10**5, (n, k)), axis=1).astype(np.int32).reshape(-1),
            logprobs=-rng.exponential(2.0, n * k).astype(np.float32),
            head_size=np.full(n, k, np.int32),
            tail_logprob=np.full((n, 1), -3.0, np.float32),
        ),
    )


def test_row_groups_are_small_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = large_unit(rows=200, k=16)
    monkeypatch.setattr(codec, "ROW_GROUP_BYTES", 50_000)
    file = codec.open_parquet(codec.encode(unit, {}))
    assert file.metadata.num_row_groups > 5
    for group in range(file.metadata.num_row_groups):
        columns = file.metadata.row_group(group)
        ids = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema.startswith("target_"))
        assert ids.num_values * 12 <= 50_000
    assert_equal(codec.decode_file(file, TOPK), unit)


def test_the_file_is_what_the_format_says() -> None:
    unit = large_unit(rows=3, k=4)
    file = pq.ParquetFile(pa.BufferReader(codec.encode(unit, {})))
    assert file.schema_arrow.remove_metadata().equals(SCHEMA)
    columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert all(column.has_offset_index and column.has_column_index for column in columns)
    row = file.read().to_pylist()[1]
    assert row["target_ids"] == unit.row(1).targets.ids.reshape(9, 4).tolist()
    assert row["target_logprobs"] == unit.row(1).targets.logprobs.reshape(9, 4).tolist()
    assert row["tail_logprob"] == [[-3.0]] * 9
    assert row["target_counts"] is None
    assert row["logsumexp"] is None


def test_no_tail_is_a_null() -> None:
    unit = large_unit(rows=1, k=4)
    unit.targets.tail_logprob[2] = -np.inf
    tail = pq.read_table(pa.BufferReader(codec.encode(unit, {})))["tail_logprob"].to_pylist()[0]
    assert tail[1:4] == [[-3.0], [None], [-3.0]]


def good_row(**changes: object) -> Row:
    unit = large_unit(rows=1, k=4)
    one = unit.row(0)
    return Row(**{f.name: getattr(one, f.name) for f in fields(Row)} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "fine"},
        {"status": EMPTY},
        {"targets": None},
        {"loss_mask": np.arange(10) > 1},
        {"loss_mask": np.zeros(10, bool)},
        {"loss_mask": np.arange(10) >= 0},
        {"input_ids": np.zeros(9, np.int32)},
        {"sample_id": "broken \ud800"},
    ],
)
def test_rows_that_contradict_themselves_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises((ValueError, DataError), match=r"sample|token 0"):
        rows_to_unit([good_row(**changes)], TOPK)
    assert len(rows_to_unit([good_row()], TOPK)) == 1


def test_a_unit_of_two_to_the_31_entries_is_refused() -> None:
    unit = large_unit(rows=1, k=4)
    entries = replace(unit, targets=replace(unit.targets, offsets=np.array([0, 2**31])))
    tokens = replace(unit, input_ids=np.broadcast_to(np.int32(0), 2**31))
    for large in (entries, tokens):
        with pytest.raises(DataError, match="too large") as caught:
            codec.encode(large, {})
        assert "samples_per_unit" in str(caught.value.fix)


def test_decoding_is_free_of_copies() -> None:
    """What makes decoding fast on every machine: numpy looks at Arrow's memory, no value becomes a Python object."""
    got = codec.decode_file(codec.open_parquet(codec.encode(large_unit(rows=50, k=8), {})), TOPK)
    assert not got.targets.ids.flags.owndata
    assert not got.targets.logprobs.flags.owndata
