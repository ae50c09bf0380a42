"""Files that break one rule of the format although their hash is right: every MUST, shapes, nulls, bombs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dumps import ESTIMATORS, make_dump, metadata_of, record_of, replace_unit, some_provenance, unit_rows
from support.poison import POISON, good_unit

from storage_schemas import codec
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.config import Adaptive, Estimator
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump, parse_unit
from storage_schemas.rows import FIRST_SCHEMA, SCHEMA, UnitRows
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter


def encoded(provenance: Provenance, rows: UnitRows, unit: int = 0) -> bytes:
    return codec.encode(rows, metadata_of(provenance, unit))


def read_back(folder: Path, provenance: Provenance, data: bytes, *, unit: int = 0, **claims: object) -> UnitRows:
    """What a reader makes of a unit whose file is `data` now."""
    replace_unit(folder, provenance, unit, data, **claims)
    return Dump.open(str(folder)).read_unit(unit)


def with_targets(unit: UnitRows, **changes: Callable[[np.ndarray], None]) -> UnitRows:
    for name, change in changes.items():
        change(getattr(unit.targets, name))
    return unit


HOSTILE: dict[str, Callable[[UnitRows], UnitRows]] = {
    **{
        f"values: {case}": (lambda unit, changes=changes: with_targets(unit, **changes))  # type: ignore[misc]
        for case, changes in POISON.items()
        if not case.endswith("token id") and "input_ids" not in changes
    },
    "another sample": lambda unit: replace(unit, sample_index=unit.sample_index + 1),
    "samples out of order": lambda unit: replace(unit, sample_index=unit.sample_index[::-1].copy()),
    "a sample twice": lambda unit: replace(unit, sample_index=np.array([0, 1, 1, 3])),
    "unknown status": lambda unit: replace(unit, status=["fine", *unit.status[1:]]),
    "a bad row with targets": lambda unit: replace(unit, status=["nonfinite", *unit.status[1:]]),
    "token 0 supervised": lambda unit: replace(unit, loss_mask=np.ones_like(unit.loss_mask)),
    "mask without targets": lambda unit: replace(unit, loss_mask=~unit.loss_mask),
    "targets of the neighbour": lambda unit: replace(
        unit, target_offsets=np.array([0, *unit.target_offsets[1:-1] + 1, unit.target_offsets[-1]])
    ),
    "token ids beyond the head": lambda unit: replace(unit, input_ids=unit.input_ids + np.int32(100)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_breaks_a_rule_is_refused(case: str, tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    unit = HOSTILE[case](good_unit(provenance))
    with pytest.raises(DataError, match="breaks the dump format") as caught:
        read_back(tmp_path, provenance, encoded(provenance, unit))
    assert caught.value.fix
    report = verify(str(tmp_path))
    assert any(error.startswith("unit 0:") for error in report.errors)
    assert report.units == 2


def first_token_for_second(unit: UnitRows) -> UnitRows:
    """As many supervised tokens as before, but the first of row 0 instead of another."""
    mask = unit.loss_mask.copy()
    mask[[0, int(np.flatnonzero(mask)[0])]] = [True, False]
    return replace(unit, loss_mask=mask)


def an_id_twice(unit: UnitRows) -> UnitRows:
    unit.targets.ids[1] = unit.targets.ids[0]
    return unit


def one_entry_more(unit: UnitRows) -> UnitRows:
    """Token 0 has an entry of token 1."""
    targets = unit.targets
    targets.offsets[1] += 1
    targets.head_size[:2] += [1, -1]
    targets.ids[:9] = np.arange(9)
    return unit


SUBTLE: dict[str, tuple[Callable[[UnitRows], UnitRows], dict[str, int], str]] = {
    "unknown status without targets": (
        lambda u: replace(u, status=[u.status[0], "fine", *u.status[2:]]), {}, "unknown status",
    ),
    "ok without supervised tokens": (
        lambda u: replace(u, status=[*u.status[:2], "ok", u.status[3]]), {}, "no supervised token",
    ),
    "token 0 instead of another": (first_token_for_second, {}, "token 0"),
    "an id twice": (an_id_twice, {}, "do not ascend"),
    "a token with an entry too many": (one_entry_more, {}, "the estimator chooses at most 8"),
    "another number of tokens": (lambda u: u, {"tokens": 1}, "tokens, supervised tokens, entries"),
    "another number of entries": (lambda u: u, {"entries": -1}, "tokens, supervised tokens, entries"),
}  # fmt: skip
"""Units that every rule but one accepts, and claims of the record, as differences from the right ones."""


@pytest.mark.parametrize("case", SUBTLE)
def test_what_breaks_one_rule_alone_is_refused(case: str, tmp_path: Path) -> None:
    """Unit 1 has a row with non-finite logits and one without supervised tokens."""
    provenance = make_dump(tmp_path, seal=False)
    change, claims, message = SUBTLE[case]
    record = record_of(tmp_path, 1)
    data = encoded(provenance, change(good_unit(provenance, 1)), 1)
    claimed = {name: getattr(record, name) + more for name, more in claims.items()}
    with pytest.raises(DataError, match=message):
        read_back(tmp_path, provenance, data, unit=1, **claimed)


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=lambda e: e.kind)
def test_draws_that_were_never_drawn_are_refused(estimator: Estimator, tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, some_provenance(estimator=estimator), seal=False)
    unit = good_unit(provenance)
    assert unit.targets.counts is not None
    unit.targets.counts[unit.targets.counts > 0] = 0
    with pytest.raises(DataError, match="a draw was counted less than once"):
        read_back(tmp_path, provenance, encoded(provenance, unit))


def test_heads_where_all_is_drawn_are_refused(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, some_provenance(estimator=ESTIMATORS[2]), seal=False)
    unit = good_unit(provenance)
    unit.targets.head_size[:] = 1
    with pytest.raises(DataError, match="the estimator only draws"):
        read_back(tmp_path, provenance, encoded(provenance, unit))


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=lambda e: e.kind)
def test_more_entries_than_the_estimator_chooses_are_refused(estimator: Estimator, tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, some_provenance(estimator=estimator), seal=False)
    data = encoded(provenance, good_unit(provenance))
    provenance = provenance.model_copy(update={"estimator": Adaptive(kind="adaptive", k_max=2, tail_draws=2)})
    (tmp_path / "run.json").write_bytes(provenance.to_json())
    with pytest.raises(DataError, match="belongs elsewhere: entries"):
        read_back(tmp_path, provenance, data, fingerprint=provenance.fingerprint)


def test_the_unchanged_unit_is_accepted(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    assert len(read_back(tmp_path, provenance, encoded(provenance, good_unit(provenance)))) == 4


@pytest.mark.parametrize("claim", [{"bytes": 1}, {"sha256": "0" * 64}])
def test_size_and_hash_of_a_file_are_both_compared(claim: dict[str, object], tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    with pytest.raises(DataError, match=r"not the file that was written|larger than it can be"):
        read_back(tmp_path, provenance, encoded(provenance, good_unit(provenance)), **claim)


def test_a_size_that_the_record_invents_is_refused_of_a_cached_file_too(tmp_path: Path) -> None:
    provenance, record = make_dump(tmp_path, seal=False), record_of(tmp_path, 0)
    data = (tmp_path / record.file).read_bytes()
    assert len(parse_unit(data, record, provenance, name="shard")) == 4
    with pytest.raises(DataError, match=f"has {len(data)} bytes, its record says {len(data) + 1}"):
        parse_unit(data, record.model_copy(update={"bytes": len(data) + 1}), provenance, name="shard")


def rewritten(provenance: Provenance, change: Callable[[pa.Table], pa.Table]) -> bytes:
    """A unit's file after a change to its table: schema drift."""
    table = pq.read_table(pa.BufferReader(encoded(provenance, good_unit(provenance))))
    metadata = table.schema.metadata
    sink = pa.BufferOutputStream()
    pq.write_table(change(table).replace_schema_metadata(metadata), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(SCHEMA.get_field_index(name), pa.field(name, kind, False), t[name].cast(kind))


DRIFT: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a column less": lambda t: t.drop_columns(["head_size"]),
    "a column more": lambda t: t.append_column("extra", pa.array([1] * len(t))),
    "columns in another order": lambda t: t.select(SCHEMA.names[::-1]),
    "another name": lambda t: t.rename_columns(["index", *SCHEMA.names[1:]]),
    "int32 sample_index": cast("sample_index", pa.int32()),
    "int64 ids": cast("target_ids", pa.list_(pa.list_(pa.int64()))),
    "float16 log-probs": cast("target_logprobs", pa.list_(pa.list_(pa.float16()))),
    "float64 log-probs": cast("target_logprobs", pa.list_(pa.list_(pa.float64()))),
    "large strings": cast("sample_id", pa.large_string()),
    "large lists": cast("input_ids", pa.large_list(pa.int32())),
    "a row less": lambda t: t.slice(1),
    "a row twice": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
    "no rows": lambda t: t.slice(0, 0),
    "a null list": lambda t: t.set_column(
        5, SCHEMA.field(5).with_nullable(True), pa.array([None, *t["target_ids"].to_pylist()[1:]], SCHEMA.field(5).type)
    ),
}


def at(*place: int, value: object) -> Callable[[list], None]:  # type: ignore[type-arg]
    """Put `value` at a place of nested lists."""

    def edit(rows: list) -> None:  # type: ignore[type-arg]
        for i in place[:-1]:
            rows = rows[i]
        rows[place[-1]] = value

    return edit


def shift(*place: int) -> Callable[[list], None]:  # type: ignore[type-arg]
    """Move the last element of the first list at a place to the front of the second: all totals stay."""

    def edit(rows: list) -> None:  # type: ignore[type-arg]
        for i in place:
            rows = rows[i]
        rows[1].insert(0, rows[0].pop())

    return edit


NESTED: dict[str, tuple[str, Callable[[list], None], str]] = {  # type: ignore[type-arg]
    "a null token id": ("input_ids", at(0, 0, value=None), "input_ids holds null for a value"),
    "a null in the mask": ("loss_mask", at(0, 0, value=None), "loss_mask holds null for a value"),
    "a null head size": ("head_size", at(0, 0, value=None), "head_size holds null for a value"),
    "a token without ids": ("target_ids", at(0, 0, value=None), "target_ids holds null for a list"),
    "a null id": ("target_ids", at(0, 0, 0, value=None), "target_ids holds null for a value"),
    "a token without log-probs": ("target_logprobs", at(0, 0, value=None), "target_logprobs holds null for a list"),
    "a null log-prob": ("target_logprobs", at(0, 0, 0, value=None), "target_logprobs holds null for a value"),
    "a row without counts": ("target_counts", at(0, value=None), "target_counts holds null for a list"),
    "a row without logsumexp": ("logsumexp", at(0, value=None), "logsumexp holds null for a list"),
    "a token without tail": ("tail_logprob", at(0, 0, value=None), "tail_logprob holds null for a list"),
    "a token with two tails": ("tail_logprob", at(0, 0, value=[-1.0, -1.0]), "tail_logprob disagree"),
    "two tails and none": ("tail_logprob", shift(0), "tail_logprob disagree"),
    "mask of the neighbour": ("loss_mask", shift(), "loss_mask disagree"),
    "log-probs of the neighbour": ("target_logprobs", shift(), "target_logprobs disagree"),
    "a log-prob of the neighbour": ("target_logprobs", shift(0), "target_logprobs disagree"),
    "head size of the neighbour": ("head_size", shift(), "head_size disagree"),
    "tail of the neighbour": ("tail_logprob", shift(), "tail_logprob disagree"),
    "logsumexp of the neighbour": ("logsumexp", shift(), "logsumexp disagree"),
    "counts of the neighbour": ("target_counts", shift(), "target_counts disagree"),
    "a count of the neighbour": ("target_counts", shift(0), "target_counts disagree"),
}


@pytest.mark.parametrize("case", NESTED)
def test_lists_that_do_not_fit_together_are_refused(case: str, tmp_path: Path) -> None:
    provenance = some_provenance(estimator=ESTIMATORS[1])
    make_dump(tmp_path, provenance, seal=False)
    name, edit, message = NESTED[case]

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pydict()
        edit(rows[name])
        return pa.table(rows, FIRST_SCHEMA)  # Here a null can be written.

    data = rewritten(provenance, change)
    with pytest.raises(DataError, match=message):
        read_back(tmp_path, provenance, data)


@pytest.mark.parametrize("case", DRIFT)
def test_schema_drift_is_refused(case: str, tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    with pytest.raises(DataError, match="breaks the dump format"):
        read_back(tmp_path, provenance, rewritten(provenance, DRIFT[case]))


def test_a_rewritten_but_equal_table_is_accepted(tmp_path: Path) -> None:
    """Encodings are free: what counts is the schema and the values."""
    provenance = make_dump(tmp_path, seal=False)
    data = rewritten(provenance, lambda t: pa.Table.from_arrays(t.columns, schema=SCHEMA))
    assert len(read_back(tmp_path, provenance, data)) == 4


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("llm_neo.format_version", "2", MismatchError),
        ("llm_neo.format_version", None, MismatchError),
        ("llm_neo.fingerprint", "f" * 64, DataError),
        ("llm_neo.unit", "1", DataError),
    ],
)
def test_footers_of_other_dumps(key: str, value: str | None, error: type[Exception], tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    metadata = metadata_of(provenance, 0)
    metadata = {k: v for k, v in (metadata | {key: value or ""}).items() if v}
    with pytest.raises(error):
        read_back(tmp_path, provenance, codec.encode(good_unit(provenance), metadata))


def bomb(provenance: Provenance, values: int) -> bytes:
    """A file of a kilobyte or two that unfolds into `values` token ids."""
    unit = replace(
        good_unit(provenance),
        token_offsets=np.array([0, 0, 0, 0, values]),
        input_ids=np.zeros(values, np.int32),
        loss_mask=np.zeros(values, bool),
    )
    from storage_schemas.rows import unit_to_table

    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata(metadata_of(provenance, 0))
    table = pa.Table.from_arrays(unit_to_table(unit).columns, schema=schema)
    pq.write_table(table, sink, compression="zstd", compression_level=19, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("honest", [False, True])
def test_a_bomb_is_refused_before_it_unfolds(honest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = make_dump(tmp_path, seal=False)
    data = bomb(provenance, 20_000_000)
    assert len(data) < 100_000
    monkeypatch.setattr(codec, "decode_file", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="tokens" if honest else "claims"):
        read_back(tmp_path, provenance, data, **({"tokens": 20_000_000} if honest else {}))


@pytest.mark.parametrize("version", [None, b"1"])
def test_the_smallest_bomb_is_refused_before_it_unfolds(
    version: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 600 bytes that unfold into 20 million numbers, with and without the metadata of a dump."""
    provenance = make_dump(tmp_path, seal=False)
    sink = pa.BufferOutputStream()
    table = pa.table({"x": pa.repeat(pa.scalar(0, pa.int32()), 20_000_000)})
    one_page = {"data_page_size": 2**30, "max_rows_per_page": 2**30, "row_group_size": 2**30, "write_batch_size": 2**30}
    metadata = None if version is None else {k.encode(): v.encode() for k, v in metadata_of(provenance, 0).items()}
    try:
        pq.write_table(table.replace_schema_metadata(metadata), sink, store_schema=version is not None, **one_page)
    except TypeError:
        pytest.skip(f"pyarrow {pa.__version__} writes no page of so many rows")
    data = sink.getvalue().to_pybytes()
    assert version is not None or len(data) < 700
    monkeypatch.setattr(codec, "decode_file", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(MismatchError if version is None else DataError):
        read_back(tmp_path, provenance, data)


def string_bomb(provenance: Provenance, size: int, **settings: object) -> bytes:
    """A few KB that hold one id of `size` bytes for every row."""
    table = pq.read_table(pa.BufferReader(encoded(provenance, good_unit(provenance))))
    ids = pa.array(["x" * size] * len(table), pa.string())
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays([table["sample_index"], ids, *table.columns[2:]], schema=SCHEMA)
    table = table.replace_schema_metadata(metadata_of(provenance, 0))
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **settings)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, dict[str, object]] = {
    "plain": {"use_dictionary": False},
    "dictionary": {"use_dictionary": ["sample_id"]},
    "data pages of version 2": {"use_dictionary": ["sample_id"], "data_page_version": "2.0"},
    "lengths apart": {"use_dictionary": False, "column_encoding": {"sample_id": "DELTA_LENGTH_BYTE_ARRAY"}},
    "shared prefixes": {"use_dictionary": False, "column_encoding": {"sample_id": "DELTA_BYTE_ARRAY"}},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_ids_that_unfold_are_refused_before_they_do(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance = make_dump(tmp_path, seal=False)
    if writer not in ("shared prefixes", "lengths apart"):
        small = read_back(tmp_path, provenance, string_bomb(provenance, 40, **WRITERS[writer]))
        assert small.sample_id == ["x" * 40] * 4
    data = string_bomb(provenance, 2**22, **WRITERS[writer])
    assert len(data) < 20_000
    monkeypatch.setattr(codec, "decode_file", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"sample_id has|encoding that strings may not have"):
        read_back(tmp_path, provenance, data)


def test_rows_that_share_a_long_id_share_its_memory(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    ids = read_back(tmp_path, provenance, string_bomb(provenance, 60_000, use_dictionary=["sample_id"])).sample_id
    assert ids == ["x" * 60_000] * 4
    assert len({id(text) for text in ids}) == 1


def test_ids_that_no_reader_would_take_are_not_written(tmp_path: Path) -> None:
    provenance = some_provenance()
    rows = [replace(row, sample_id="x" * 10**5) for row in unit_rows(provenance, 0)]
    with pytest.raises(DataError, match="ids of the samples of unit 0 are too long"):
        DumpWriter.open(str(tmp_path), provenance).commit_unit(0, rows)
