"""A whole dump: write, rerun, seal, read, verify, and everything hostile that a reader may meet."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dumps import TOKENIZER, make_dump, metadata_of, replace_unit, run_info, unit_rows

from storage_schemas import codec
from storage_schemas.commit import TOKENIZER as TOKENIZER_RECORD
from storage_schemas.commit import CommitRecord, Seal, TokenizerRecord, manifest_bytes, record_key
from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.errors import DataError, Exit, MismatchError, NeoError, TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.rows import SCHEMA, Row, UnitRows, rows_to_unit
from storage_schemas.run_info import RunInfo, canonical_json
from storage_schemas.store import Store
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter

ESTIMATORS = [TopK(k=8), Adaptive(kind="adaptive", k_max=6, tail_draws=4), Sampled(kind="sampled", draws=12)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.kind)
def test_what_is_written_is_read(estimator: object, tmp_path: Path) -> None:
    temperatures = (1.0, 2.0) if isinstance(estimator, TopK) else (1.0,)
    run = run_info(estimator=estimator, temperatures=temperatures)  # type: ignore[arg-type]
    make_dump(tmp_path, run)
    dump = Dump.open(str(tmp_path))
    assert dump.run == run
    assert dump.sealed()
    assert dump.tokenizer_files() == TOKENIZER
    records = dump.records()
    assert list(records) == [0, 1, 2]
    for unit, record in records.items():
        made, read = unit_rows(run, unit), dump.read_unit(unit)
        assert len(read) == dump.unit_rows(unit) == record.rows == len(made)
        for i, row in enumerate(made):
            got = read.row(i)
            for name in ("sample_index", "sample_id", "status"):
                assert getattr(got, name) == getattr(row, name)
            assert np.array_equal(got.input_ids, row.input_ids)
            assert np.array_equal(got.loss_mask, row.loss_mask)
            assert (got.targets is None) == (row.targets is None)
            if row.targets is not None and got.targets is not None:
                for name in ("offsets", "ids", "head_size", "counts"):
                    assert np.array_equal(getattr(got.targets, name), getattr(row.targets, name)), name
                np.testing.assert_allclose(got.targets.logprobs, row.targets.logprobs, atol=0.016, rtol=0.016)
                np.testing.assert_allclose(got.targets.tail_logprob, row.targets.tail_logprob, rtol=2e-3)
                np.testing.assert_allclose(got.targets.logsumexp, row.targets.logsumexp, atol=0.01)
        assert max(record.fidelity) <= run.max_kl
        assert record.bytes == (tmp_path / record.file).stat().st_size
    assert verify(str(tmp_path)).ok


@pytest.mark.parametrize("vocabulary", [151_936, 262_144])
def test_large_vocabularies(vocabulary: int, tmp_path: Path) -> None:
    """Absolute ids up to the last row of the head, and not one further."""
    run = run_info(head_size=vocabulary, samples=2, samples_per_unit=2)
    writer = DumpWriter.open(str(tmp_path), run)
    rows = unit_rows(run, 0)
    first = next(row.targets for row in rows if row.targets is not None)
    first.ids[7] = vocabulary
    with pytest.raises(DataError, match=f"the head has {vocabulary} rows"):
        writer.commit_unit(0, rows)
    first.ids[7] = vocabulary - 1
    assert writer.commit_unit(0, rows) is not None
    record = Dump.open(str(tmp_path)).record(0)
    assert record is not None
    assert record.max_id == vocabulary - 1
    read = Dump.open(str(tmp_path)).read_unit(0).targets
    assert np.array_equal(read.ids[:8], first.ids[:8])
    assert read.ids.dtype == np.int32


def test_a_rerun_does_nothing(tmp_path: Path) -> None:
    run = make_dump(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    writer = DumpWriter.open(str(tmp_path), run)
    writer.put_tokenizer(TOKENIZER)
    assert writer.committed() == {0, 1, 2}
    assert writer.commit_unit(1, unit_rows(run, 1, seed=9)) is None, "the first commit wins, whatever comes later"
    assert writer.seal()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_continues_where_it_was(tmp_path: Path) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    dump = Dump.open(str(tmp_path))
    assert not dump.sealed()
    assert dump.records() == {}
    assert dump.record(1) is None
    with pytest.raises(DataError, match="not committed"):
        dump.read_unit(1)
    writer.commit_unit(1, unit_rows(run, 1))
    assert dump.record(1) is not None
    assert len(dump.read_unit(1)) == 4
    assert not writer.seal()
    other = DumpWriter.open(str(tmp_path), run)
    assert other.committed() == {1}
    assert other.is_committed(1)
    assert not other.is_committed(0)
    for unit in (0, 2):
        other.commit_unit(unit, unit_rows(run, unit))
    assert other.seal()
    assert writer.seal()
    assert dump.sealed(), "a follower sees the seal"
    assert list(dump.records()) == [0, 1, 2]


def test_a_sealed_reader_needs_no_commit_records(tmp_path: Path) -> None:
    make_dump(tmp_path)
    for path in (tmp_path / "commits").iterdir():
        path.unlink()
    dump = Dump.open(str(tmp_path))
    assert len(dump.records()) == 3
    assert len(dump.read_unit(2)) == 2
    assert not verify(str(tmp_path)).ok


def test_rows_of_another_unit_are_refused(tmp_path: Path) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    with pytest.raises(ValueError, match="samples 0:4"):
        writer.commit_unit(0, unit_rows(run, 1))
    with pytest.raises(ValueError, match="samples 0:4"):
        writer.commit_unit(0, unit_rows(run, 0)[:-1])
    assert not (tmp_path / "data").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run = make_dump(tmp_path)
    writer = DumpWriter.open(str(tmp_path), run)
    for other in ({"tokenizer.json": b"other"}, TOKENIZER | {"more.json": b"{}"}, {"../run.json": b"other"}, {}):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(MismatchError, match="another tokenizer") as caught:
            writer.put_tokenizer(other)
        assert caught.value.got != caught.value.expected
        assert sorted(tmp_path.rglob("*")) == before
    writer.put_tokenizer(TOKENIZER)
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(DataError, match="not the file that was written"):
        Dump.open(str(tmp_path)).tokenizer_files()
    assert not verify(str(tmp_path)).ok


def test_a_tokenizer_that_is_half_written_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower opens the dump while its first worker is still at the tokenizer."""
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    dump = Dump.open(str(tmp_path))
    seen: list[object] = []
    real = Store.put_new

    def put_and_look(self: Store, key: str, data: bytes) -> bool:
        with pytest.raises(TemporaryError, match="not complete yet") as caught:
            dump.tokenizer_files()
        seen.append(caught.value.exit_code)
        return real(self, key, data)

    monkeypatch.setattr(Store, "put_new", put_and_look)
    writer.put_tokenizer(TOKENIZER)
    assert seen == [Exit.TEMPORARY] * 3, "two files, then the record that names them"
    assert dump.tokenizer_files() == TOKENIZER
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(DataError, match="not the file that was written"):
        dump.tokenizer_files()


def test_a_tokenizer_of_another_run_or_with_names_that_lead_away_is_refused(tmp_path: Path) -> None:
    run = make_dump(tmp_path, seal=False)
    path = tmp_path / TOKENIZER_RECORD
    for changes, message in (
        ({"fingerprint": "f" * 64}, "another dump"),
        ({"files": {"../run.json": "0" * 64}}, "plain relative path"),
        ({"files": {"absent.json": "0" * 64}}, "has no tokenizer"),
    ):
        path.write_bytes(TokenizerRecord(**{"fingerprint": run.fingerprint, "files": {}} | changes).to_json())
        with pytest.raises(DataError, match=message):
            Dump.open(str(tmp_path)).tokenizer_files()


def test_workers_with_different_tokenizers_agree_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no record; the files of one name decide, or else the record does."""
    run = run_info()
    first, second = (DumpWriter.open(str(tmp_path), run) for _ in range(2))
    monkeypatch.setattr(second, "_tokenizer", lambda: None)
    first.put_tokenizer(TOKENIZER)
    with pytest.raises(MismatchError, match=r"another tokenizer: tokenizer\.json"):
        second.put_tokenizer({"tokenizer.json": b"other"})
    monkeypatch.undo()
    looks = iter([lambda: None, second._tokenizer])
    monkeypatch.setattr(second, "_tokenizer", lambda: next(looks)())
    with pytest.raises(MismatchError, match=r"another tokenizer: more\.json"):
        second.put_tokenizer(TOKENIZER | {"more.json": b"{}"})
    assert Dump.open(str(tmp_path)).tokenizer_files() == TOKENIZER


def test_a_tokenizer_of_which_another_worker_left_a_part_is_refused(tmp_path: Path) -> None:
    writer = DumpWriter.open(str(tmp_path), run_info())
    writer.store.put_new("tokenizer/tokenizer.json", b"of a worker that was killed before its record")
    with pytest.raises(MismatchError, match=r"another tokenizer: tokenizer\.json"):
        writer.put_tokenizer(TOKENIZER)
    assert not (tmp_path / TOKENIZER_RECORD).exists()


def test_a_worker_needs_no_right_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Store, key: str) -> None:
        raise MismatchError("no access")

    monkeypatch.setattr(Store, "delete", refuse)
    run = make_dump(tmp_path, seal=False)
    orphan = tmp_path / f"data/unit-00000000-{'a' * 32}.parquet"
    orphan.write_bytes(b"of a killed worker")
    writer = DumpWriter.open(str(tmp_path), run)
    assert writer.clean() == 0
    assert writer.commit_unit(0, unit_rows(run, 0, seed=1)) is None, "the loser's file stays, too"
    assert writer.seal()
    assert orphan.exists()
    assert verify(str(tmp_path)).ok


def test_names_that_others_made_are_durable_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On local files a name may be visible and yet be lost with the power; whoever relies on it syncs it first."""
    run = make_dump(tmp_path, seal=False)
    settled: list[str] = []
    monkeypatch.setattr(Store, "settle", lambda self, folder: settled.append(folder))
    writer = DumpWriter.open(str(tmp_path), run)
    uses: list[tuple[Callable[[], object], str]] = [
        (lambda: Dump.open(str(tmp_path)).record(0), "commits"),
        (lambda: Dump.open(str(tmp_path)).records(), "commits"),
        (lambda: Dump.open(str(tmp_path)).tokenizer_files(), "tokenizer"),
        (lambda: writer.is_committed(0), "commits"),
        (writer.seal, "commits"),
    ]
    for use, folder in uses:
        settled.clear()
        assert use()
        assert settled == [folder]


def test_orphans_are_cleaned_up_without_a_clock(tmp_path: Path) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    writer.commit_unit(0, unit_rows(run, 0))
    files = {unit: f"data/unit-{unit:08d}-{'a' * 32}.parquet" for unit in range(2)}
    for file in files.values():
        (tmp_path / file).write_bytes(b"of a killed or stopped worker")
    other = tmp_path / f"data/unit-00000001-{'e' * 32}.parquet"
    other.write_bytes(b"of another worker at unit 1")
    staged = [tmp_path / "data" / f".staged-unit-{unit:08d}-{'d' * 32}.parquet-{'b' * 32}" for unit in files]
    for path in staged:
        path.write_bytes(b"half")
    (tmp_path / "probe").mkdir(exist_ok=True)
    (tmp_path / "probe" / ("c" * 32)).write_bytes(b"first")
    assert writer.clean() == 3
    assert not (tmp_path / files[0]).exists(), "unit 0 is decided"
    assert (tmp_path / files[1]).exists(), "unit 1 is not: its worker may still commit it"
    assert other.exists(), "or the other one"
    assert [path.exists() for path in staged] == [False, True]
    assert writer.clean() == 0
    assert len(Dump.open(str(tmp_path)).read_unit(0)) == 4


def test_the_card_says_what_the_dump_is(tmp_path: Path) -> None:
    run = make_dump(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert run.fingerprint in card
    assert "path: data/*.parquet" in card
    assert "| samples | 10 in 3 units |" in card


# What a writer refuses


def poisoned(rows: list[Row], **changes: Callable[[np.ndarray], None]) -> list[Row]:
    """The first row with targets, with some arrays changed in place."""
    row = next(row for row in rows if row.targets is not None)
    for name, change in changes.items():
        change(getattr(row.targets if hasattr(row.targets, name) else row, name))
    return rows


def put(value: float, at: int = 0) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.reshape(-1)[at] = value

    return change


POISON = {
    "NaN log-prob": {"logprobs": put(np.nan)},
    "infinite log-prob": {"logprobs": put(np.inf)},
    "log-prob of 0": {"logprobs": put(-np.inf)},
    "log-prob above 0": {"logprobs": put(1.0)},
    "NaN tail": {"tail_logprob": put(np.nan)},
    "tail above 1": {"tail_logprob": put(0.5)},
    "infinite logsumexp": {"logsumexp": put(np.inf)},
    "NaN logsumexp": {"logsumexp": put(np.nan)},
    "negative id": {"ids": put(-1)},
    "id beyond the head": {"ids": put(100, 7)},
    "ids out of order": {"ids": put(99)},
    "token id beyond the head": {"input_ids": put(100)},
    "negative token id": {"input_ids": put(-1)},
    "head larger than the entries": {"head_size": put(9)},
    "negative head": {"head_size": put(-1)},
    "head smaller than the entries": {"head_size": put(7)},
}


@pytest.mark.parametrize("case", POISON)
def test_bad_targets_are_never_written(case: str, tmp_path: Path) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    with pytest.raises((DataError, ValueError)) as caught:
        writer.commit_unit(0, poisoned(unit_rows(run, 0), **POISON[case]))
    assert not isinstance(caught.value, NeoError) or caught.value.exit_code == Exit.BAD_DATA
    assert not (tmp_path / "data").exists()
    assert writer.commit_unit(0, unit_rows(run, 0)) is not None


def test_a_unit_that_misses_the_gate_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    real = codec.round_targets
    monkeypatch.setattr(codec, "round_targets", lambda t, **k: real(t, **k | {"coarsest": 1.0, "max_kl": 10.0}))
    with pytest.raises(DataError, match="fidelity gate"):
        writer.commit_unit(0, unit_rows(run, 0))
    assert not (tmp_path / "data").exists()


def test_a_fidelity_that_is_no_number_misses_the_gate(tmp_path: Path) -> None:
    run = run_info()
    with pytest.raises(DataError, match="fidelity gate"):
        DumpWriter.open(str(tmp_path), run).commit_unit(0, poisoned(unit_rows(run, 0), **POISON["NaN log-prob"]))


def test_an_encoder_that_loses_values_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_info()
    writer = DumpWriter.open(str(tmp_path), run)
    real = codec.encode

    def damage(unit: UnitRows, metadata: dict[str, str], *, step: float) -> bytes:
        targets = replace(unit.targets, logprobs=unit.targets.logprobs - np.float32(0.25))
        return real(replace(unit, targets=targets), metadata, step=step)

    monkeypatch.setattr(codec, "encode", damage)
    with pytest.raises(DataError, match="read back"):
        writer.commit_unit(0, unit_rows(run, 0))
    assert not (tmp_path / "data").exists()


# What a reader refuses, although its hash is right: every MUST of the format


def good_unit(run: RunInfo, unit: int = 0) -> UnitRows:
    draws = run.estimator.kind != "topk"
    return rows_to_unit(unit_rows(run, unit), temperatures=len(run.temperatures), draws=draws, logsumexp=run.logsumexp)


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
    run = make_dump(tmp_path, seal=False)
    unit = HOSTILE[case](good_unit(run))
    replace_unit(tmp_path, run, 0, codec.encode(unit, metadata_of(run, 0)))
    with pytest.raises(DataError, match="breaks the dump format") as caught:
        Dump.open(str(tmp_path)).read_unit(0)
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
    run = make_dump(tmp_path, seal=False)
    change, claims, message = SUBTLE[case]
    record = Dump.open(str(tmp_path)).record(1)
    assert record is not None
    data = codec.encode(change(good_unit(run, 1)), metadata_of(run, 1))
    replace_unit(tmp_path, run, 1, data, **{name: getattr(record, name) + more for name, more in claims.items()})
    with pytest.raises(DataError, match=message):
        Dump.open(str(tmp_path)).read_unit(1)


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=lambda e: e.kind)
@pytest.mark.parametrize("case", ["not drawn", "too many entries", "head of sampled"])
def test_draws_that_break_a_rule_are_refused(case: str, estimator: object, tmp_path: Path) -> None:
    run = run_info(estimator=estimator)  # type: ignore[arg-type]
    make_dump(tmp_path, run, seal=False)
    unit = good_unit(run)
    if case == "not drawn":
        unit.targets.counts[unit.targets.counts > 0] = 0  # type: ignore[index]
    elif case == "too many entries":
        run = run.model_copy(update={"estimator": Adaptive(kind="adaptive", k_max=2, tail_draws=2)})
        (tmp_path / "run.json").write_bytes(run.to_json())
    elif isinstance(estimator, Sampled):
        unit.targets.head_size[:] = 1
    else:
        pytest.skip("only `sampled` has no head")
    replace_unit(tmp_path, run, 0, codec.encode(unit, metadata_of(run, 0)), fingerprint=run.fingerprint)
    with pytest.raises(DataError, match=r"breaks the dump format|belongs elsewhere"):
        Dump.open(str(tmp_path)).read_unit(0)


def test_the_unchanged_unit_is_accepted(tmp_path: Path) -> None:
    run = make_dump(tmp_path, seal=False)
    replace_unit(tmp_path, run, 0, codec.encode(good_unit(run), metadata_of(run, 0)))
    assert len(Dump.open(str(tmp_path)).read_unit(0)) == 4


@pytest.mark.parametrize("claim", [{"bytes": 1}, {"sha256": "0" * 64}])
def test_size_and_hash_of_a_file_are_both_compared(claim: dict[str, object], tmp_path: Path) -> None:
    run = make_dump(tmp_path, seal=False)
    replace_unit(tmp_path, run, 0, codec.encode(good_unit(run), metadata_of(run, 0)), **claim)
    with pytest.raises(DataError, match="not the file that was committed"):
        Dump.open(str(tmp_path)).read_unit(0)


def rewritten(run: RunInfo, change: Callable[[pa.Table], pa.Table]) -> bytes:
    """A unit's file after a change to its table: schema drift."""
    table = pq.read_table(pa.BufferReader(codec.encode(good_unit(run), metadata_of(run, 0))))
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
    "a null token id": ("input_ids", at(0, 0, value=None), "input_ids holds nulls"),
    "a null in the mask": ("loss_mask", at(0, 0, value=None), "loss_mask holds nulls"),
    "a null head size": ("head_size", at(0, 0, value=None), "head_size holds nulls"),
    "a token without ids": ("target_ids", at(0, 0, value=None), "a list or an entry is null"),
    "a null id": ("target_ids", at(0, 0, 0, value=None), "a list or an entry is null"),
    "a token without log-probs": ("target_logprobs", at(0, 0, value=None), "a list or an entry is null"),
    "a null log-prob": ("target_logprobs", at(0, 0, 0, value=None), "a list or an entry is null"),
    "a row without counts": ("target_counts", at(0, value=None), "a list is null"),
    "a row without logsumexp": ("logsumexp", at(0, value=None), "a list is null"),
    "a token without tail": ("tail_logprob", at(0, 0, value=None), "has not 1 values"),
    "a token with two tails": ("tail_logprob", at(0, 0, value=[-1.0, -1.0]), "has not 1 values"),
    "two tails and none": ("tail_logprob", shift(0), "has not 1 values"),
    "mask of the neighbour": ("loss_mask", shift(), "loss_mask disagrees"),
    "log-probs of the neighbour": ("target_logprobs", shift(), "target_logprobs disagrees"),
    "a log-prob of the neighbour": ("target_logprobs", shift(0), "target_logprobs, per token disagrees"),
    "head size of the neighbour": ("head_size", shift(), "head_size disagrees"),
    "tail of the neighbour": ("tail_logprob", shift(), "tail_logprob disagrees"),
    "logsumexp of the neighbour": ("logsumexp", shift(), "logsumexp disagrees"),
    "counts of the neighbour": ("target_counts", shift(), "target_counts disagrees"),
    "a count of the neighbour": ("target_counts", shift(0), "target_counts, per token disagrees"),
}


@pytest.mark.parametrize("case", NESTED)
def test_lists_that_do_not_fit_together_are_refused(case: str, tmp_path: Path) -> None:
    run = run_info(estimator=ESTIMATORS[1])
    make_dump(tmp_path, run, seal=False)
    name, edit, message = NESTED[case]

    def change(table: pa.Table) -> pa.Table:
        rows = table[name].to_pylist()
        edit(rows)
        column = pa.array(rows, SCHEMA.field(name).type)
        return table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)

    replace_unit(tmp_path, run, 0, rewritten(run, change))
    with pytest.raises(DataError, match=message):
        Dump.open(str(tmp_path)).read_unit(0)


@pytest.mark.parametrize("case", DRIFT)
def test_schema_drift_is_refused(case: str, tmp_path: Path) -> None:
    run = make_dump(tmp_path, seal=False)
    replace_unit(tmp_path, run, 0, rewritten(run, DRIFT[case]))
    with pytest.raises(DataError, match="breaks the dump format"):
        Dump.open(str(tmp_path)).read_unit(0)


def test_a_rewritten_but_equal_table_is_accepted(tmp_path: Path) -> None:
    """Encodings are free: what counts is the schema and the values."""
    run = make_dump(tmp_path, seal=False)
    replace_unit(tmp_path, run, 0, rewritten(run, lambda t: pa.Table.from_arrays(t.columns, schema=SCHEMA)))
    assert len(Dump.open(str(tmp_path)).read_unit(0)) == 4


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
    run = make_dump(tmp_path, seal=False)
    metadata = metadata_of(run, 0)
    metadata = {k: v for k, v in (metadata | {key: value or ""}).items() if v}
    replace_unit(tmp_path, run, 0, codec.encode(good_unit(run), metadata))
    with pytest.raises(error):
        Dump.open(str(tmp_path)).read_unit(0)


def bomb(run: RunInfo, values: int) -> bytes:
    """A file of a kilobyte or two that unfolds into `values` token ids."""
    unit = replace(
        good_unit(run),
        token_offsets=np.array([0, 0, 0, 0, values]),
        input_ids=np.zeros(values, np.int32),
        loss_mask=np.zeros(values, bool),
    )
    from storage_schemas.rows import unit_to_table

    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata(metadata_of(run, 0))
    table = pa.Table.from_arrays(unit_to_table(unit).columns, schema=schema)
    pq.write_table(table, sink, compression="zstd", compression_level=19, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("honest", [False, True])
def test_a_bomb_is_refused_before_it_unfolds(honest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_dump(tmp_path, seal=False)
    data = bomb(run, 20_000_000)
    assert len(data) < 100_000
    replace_unit(tmp_path, run, 0, data, **({"tokens": 20_000_000} if honest else {}))
    monkeypatch.setattr(codec, "decode_file", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="tokens" if honest else "claims"):
        Dump.open(str(tmp_path)).read_unit(0)


@pytest.mark.parametrize("version", [None, b"1"])
def test_the_smallest_bomb_is_refused_before_it_unfolds(
    version: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 600 bytes that unfold into 20 million numbers, with and without the metadata of a dump."""
    run = make_dump(tmp_path, seal=False)
    sink = pa.BufferOutputStream()
    table = pa.table({"x": pa.repeat(pa.scalar(0, pa.int32()), 20_000_000)})
    one_page = {"data_page_size": 2**30, "max_rows_per_page": 2**30, "row_group_size": 2**30, "write_batch_size": 2**30}
    metadata = None if version is None else {k.encode(): v.encode() for k, v in metadata_of(run, 0).items()}
    pq.write_table(table.replace_schema_metadata(metadata), sink, store_schema=version is not None, **one_page)
    data = sink.getvalue().to_pybytes()
    assert version is not None or len(data) < 700
    replace_unit(tmp_path, run, 0, data)
    monkeypatch.setattr(codec, "decode_file", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(MismatchError if version is None else DataError):
        Dump.open(str(tmp_path)).read_unit(0)


# Commit records


RECORDS: dict[str, Callable[[dict[str, object]], object]] = {
    "path traversal": lambda r: r.update(file="../../etc/passwd"),
    "path inside a good name": lambda r: r.update(file=f"data/unit-00000000-{'0' * 32}.parquet/../../run.json"),
    "absolute path": lambda r: r.update(file="/etc/passwd"),
    "URL": lambda r: r.update(file="s3://elsewhere/x"),
    "newline": lambda r: r.update(file=str(r["file"]) + "\n"),
    "NUL": lambda r: r.update(file="data/\0"),
    "file of another unit": lambda r: r.update(file=f"data/unit-00000001-{'0' * 32}.parquet"),
    "file in another style": lambda r: r.update(file=f"data/unit-000000000-{'0' * 32}.parquet"),
    "another unit": lambda r: r.update(unit=1),
    "another dump": lambda r: r.update(fingerprint="f" * 64),
    "fewer rows": lambda r: r.update(rows=3),
    "no size": lambda r: r.update(bytes=0),
    "huge": lambda r: r.update(entries=10**12),
    "huger tokens": lambda r: r.update(tokens=10**12),
    "more targets than tokens": lambda r: r.update(supervised_tokens=10**5),
    "negative": lambda r: r.update(tokens=-1),
    "negative targets": lambda r: r.update(supervised_tokens=-1),
    "negative entries": lambda r: r.update(entries=-1),
    "an id below none": lambda r: r.update(max_id=-2),
    "beyond the head": lambda r: r.update(max_id=100),
    "statuses that do not add up": lambda r: r.update(statuses={"ok": 1}),
    "hash in another style": lambda r: r.update(sha256="F" * 64),
    "missing key": lambda r: r.pop("sha256"),
    "unknown key": lambda r: r.update(more=1),
    "wrong type": lambda r: r.update(rows="four"),
    "fidelity for other temperatures": lambda r: r.update(fidelity=[0.0, 0.0]),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("checksum", ["right", "stale"])
def test_hostile_commit_records(case: str, checksum: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dump(tmp_path, seal=False)
    path = tmp_path / record_key(0)
    content = json.loads(path.read_bytes())
    RECORDS[case](content)
    if checksum == "right":
        body = {key: value for key, value in content.items() if key != "checksum"}
        content["checksum"] = hashlib.sha256(canonical_json(body)).hexdigest()
    path.write_bytes(canonical_json(content))
    opened: list[str] = []
    dump = Dump.open(str(tmp_path))
    real = dump.store.get
    monkeypatch.setattr(dump.store, "get", lambda key: opened.append(key) or real(key))
    with pytest.raises(DataError, match=r"unit-00000000\.json") as caught:
        dump.read_unit(0)
    assert caught.value.fix
    assert opened == [], "nothing that a bad record names is read"
    assert not verify(str(tmp_path)).ok


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"a":' * 10**5, b'{"format_version":1,"format_version":1}', b"\xff", b'"\\ud800"'],
)
def test_records_that_are_no_records(data: bytes, tmp_path: Path) -> None:
    make_dump(tmp_path, seal=False)
    (tmp_path / record_key(0)).write_bytes(data)
    with pytest.raises(DataError, match=r"unit-00000000\.json"):
        Dump.open(str(tmp_path)).record(0)


def test_records_of_another_version(tmp_path: Path) -> None:
    make_dump(tmp_path, seal=False)
    path = tmp_path / record_key(0)
    path.write_bytes(path.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(MismatchError, match="format version"):
        Dump.open(str(tmp_path)).record(0)


# Seal and verify


def test_the_seal_covers_everything(tmp_path: Path) -> None:
    make_dump(tmp_path / "a")
    make_dump(tmp_path / "b", run_info(samples=11))
    seal = tmp_path / "a" / "SEALED.json"
    original = seal.read_bytes()
    seal.write_bytes((tmp_path / "b" / "SEALED.json").read_bytes())
    with pytest.raises(DataError, match="another dump"):
        Dump.open(str(tmp_path / "a")).sealed()
    seal.write_bytes(original.replace(b'"rows":10', b'"rows":11'))
    with pytest.raises(DataError, match="torn or was changed"):
        Dump.open(str(tmp_path / "a")).sealed()
    seal.write_bytes(original)
    manifest = next((tmp_path / "a").glob("manifest-*"))
    manifest.write_bytes(next((tmp_path / "b").glob("manifest-*")).read_bytes())
    with pytest.raises(DataError, match="manifest"):
        Dump.open(str(tmp_path / "a")).records()


def forge_seal(folder: Path, records: list[dict[str, object]], **claims: object) -> None:
    """A manifest of `records`, which are changes to the real ones, and a seal that names it by its right hash."""
    there = [CommitRecord.from_json((folder / record_key(unit)).read_bytes(), name="r") for unit in range(3)]
    changed = [there[i].model_copy(update=changes) for i, changes in enumerate(records)]
    data = manifest_bytes(dict(enumerate(changed)))
    name = f"manifest-{hashlib.sha256(data).hexdigest()}.parquet"
    (folder / name).write_bytes(data)
    seal = Seal.from_json((folder / "SEALED.json").read_bytes(), name="s")
    (folder / "SEALED.json").write_bytes(seal.model_copy(update={"manifest": name, **claims}).to_json())


FORGED_SEALS: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "a unit less": ([{}, {}], {}, "2 rows with the columns"),
    "units in another order": ([{"unit": 1}, {"unit": 0}, {}], {}, "every unit"),
    "another number of units": ([{}, {}, {}], {"units": 4}, "another dump"),
    "rows that the unit has not": ([{"rows": 3}, {}, {}], {}, "belongs elsewhere"),
    "a path that leads away": ([{"file": "../run.json"}, {}, {}], {}, "does not belong to unit 0"),
    "a manifest elsewhere": ([{}, {}, {}], {"manifest": "run.json"}, "not the manifest that was sealed"),
    "a manifest outside": ([{}, {}, {}], {"manifest": "../run.json"}, "plain relative path"),
}


@pytest.mark.parametrize("case", FORGED_SEALS)
def test_forged_seals_and_manifests_are_refused(case: str, tmp_path: Path) -> None:
    make_dump(tmp_path)
    records, claims, message = FORGED_SEALS[case]
    forge_seal(tmp_path, [{}, {}, {}])
    assert len(Dump.open(str(tmp_path)).read_unit(0)) == 4
    forge_seal(tmp_path, records, **claims)
    with pytest.raises(DataError, match=message):
        Dump.open(str(tmp_path)).records()[0]
    assert not verify(str(tmp_path)).ok


@pytest.mark.parametrize(
    "claim",
    [{"rows": 11}, {"tokens": 1}, {"supervised_tokens": 1}, {"bytes": 1}, {"statuses": {}}, {"records_sha256": ""}],
    ids=lambda claim: next(iter(claim)),
)
def test_verify_adds_up_what_the_seal_claims(claim: dict[str, object], tmp_path: Path) -> None:
    make_dump(tmp_path)
    forge_seal(tmp_path, [{}, {}, {}])
    assert verify(str(tmp_path)).ok
    forge_seal(tmp_path, [{}, {}, {}], **claim)
    (error,) = verify(str(tmp_path)).errors
    assert f"SEALED.json: {next(iter(claim))} is" in error


@pytest.mark.parametrize("damage", ["no Parquet file", "a column less"])
def test_a_manifest_of_another_shape_is_refused(damage: str, tmp_path: Path) -> None:
    """Although the seal names it by its right hash."""
    make_dump(tmp_path)
    data = b"not Parquet"
    if damage == "a column less":
        sink = pa.BufferOutputStream()
        pq.write_table(pq.read_table(next(tmp_path.glob("manifest-*"))).drop_columns(["statuses"]), sink)
        data = sink.getvalue().to_pybytes()
    name = f"manifest-{hashlib.sha256(data).hexdigest()}.parquet"
    (tmp_path / name).write_bytes(data)
    forge_seal(tmp_path, [{}, {}, {}], manifest=name)
    with pytest.raises(DataError, match="every unit"):
        Dump.open(str(tmp_path)).records()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: next((d / "data").glob("unit-00000001*")).unlink(), "unit 1: .* has no data"),
    "empty shard": (lambda d: next((d / "data").glob("unit-00000001*")).write_bytes(b""), "unit 1: .* committed"),
    "missing record": (lambda d: (d / record_key(2)).unlink(), "unit 2: its commit record is missing"),
    "surplus record": (
        lambda d: (d / record_key(9)).write_bytes((d / record_key(2)).read_bytes()), "unit-00000009.json: no commit",
    ),
    "record of another unit": (
        lambda d: (d / record_key(0)).write_bytes((d / record_key(1)).read_bytes()), "unit 0: .* elsewhere: unit",
    ),
    "a record under another name": (
        lambda d: (d / "commits" / "unit-000000002.json").write_bytes((d / record_key(2)).read_bytes()),
        "unit-000000002.json: no commit",
    ),
    "missing manifest": (lambda d: next(d.glob("manifest*")).unlink(), r"SEALED\.json: .* has no manifest"),
    "missing seal": (lambda d: (d / "SEALED.json").unlink(), "the dump is not sealed"),
    "missing tokenizer": (lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), "has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_names_the_damage(case: str, tmp_path: Path) -> None:
    make_dump(tmp_path)
    assert verify(str(tmp_path)).errors == []
    damage, message = DAMAGE[case]
    damage(tmp_path)
    seen: list[tuple[int, int]] = []
    report = verify(str(tmp_path), progress=lambda *counts: seen.append(counts))
    assert not report.ok
    assert any(re.search(message, error) for error in report.errors), report.errors
    assert seen == [(1, 3), (2, 3), (3, 3)], "one damage hides no other unit"


def test_verify_reports_sums(tmp_path: Path) -> None:
    run = make_dump(tmp_path)
    report = verify(str(tmp_path))
    rows = [row for unit in range(3) for row in unit_rows(run, unit)]
    assert report.model_dump() == {
        "ok": True,
        "sealed": True,
        "units": 3,
        "rows": 10,
        "supervised_tokens": sum(len(row.targets) for row in rows if row.targets is not None),
        "bytes": sum(path.stat().st_size for path in (tmp_path / "data").iterdir()),
        "errors": [],
    }


def test_a_record_that_was_replaced_after_the_seal_is_found(tmp_path: Path) -> None:
    run = make_dump(tmp_path)
    path = tmp_path / record_key(0)
    record = CommitRecord.from_json(path.read_bytes(), name="r")
    path.write_bytes(record.model_copy(update={"mean_entropy": 0.0}).to_json())
    assert run.units == 3
    assert any("differs from the manifest" in error for error in verify(str(tmp_path)).errors)
