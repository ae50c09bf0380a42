"""A whole dump: write, rerun, seal, read, and what a writer refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.dumps import ESTIMATORS, TOKENIZER, make_dump, record_of, some_provenance, unit_rows
from support.poison import POISON, poisoned

from storage_schemas import codec
from storage_schemas.common.errors import DataError, MismatchError, NeoError, TemporaryError
from storage_schemas.common.exits import Exit
from storage_schemas.config import Estimator, TopK
from storage_schemas.reader import Dump
from storage_schemas.records import TOKENIZER as TOKENIZER_RECORD
from storage_schemas.records import TokenizerRecord
from storage_schemas.rows import UnitRows
from storage_schemas.stores.store import Store
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.kind)
def test_what_is_written_is_read(estimator: Estimator, tmp_path: Path) -> None:
    temperatures = (1.0, 2.0) if isinstance(estimator, TopK) else (1.0,)
    provenance = some_provenance(estimator=estimator, temperatures=temperatures)
    make_dump(tmp_path, provenance)
    dump = Dump.open(str(tmp_path))
    assert dump.provenance == provenance
    assert dump.is_sealed()
    assert dump.read_tokenizer() == TOKENIZER
    records = dump.read_records()
    assert list(records) == [0, 1, 2]
    for unit, record in records.items():
        made, read = unit_rows(provenance, unit), dump.read_unit(unit)
        assert len(read) == len(dump.provenance.unit_range(unit)) == record.rows == len(made)
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
        assert max(record.fidelity) <= provenance.max_kl
        assert record.bytes == (tmp_path / record.file).stat().st_size
    assert verify(str(tmp_path)).ok


@pytest.mark.parametrize("vocabulary", [151_936, 262_144])
def test_large_vocabularies(vocabulary: int, tmp_path: Path) -> None:
    """Absolute ids up to the last row of the head, and not one further."""
    provenance = some_provenance(lm_head_rows=vocabulary, samples=2, samples_per_unit=2)
    writer = DumpWriter.open(str(tmp_path), provenance)
    rows = unit_rows(provenance, 0)
    first = next(row.targets for row in rows if row.targets is not None)
    first.ids[7] = vocabulary
    with pytest.raises(DataError, match=rf"target_ids lie outside of 0 \.\.\. {vocabulary - 1}"):
        writer.commit_unit(0, rows)
    first.ids[7] = vocabulary - 1
    assert writer.commit_unit(0, rows) is not None
    assert record_of(tmp_path, 0).max_id == vocabulary - 1
    read = Dump.open(str(tmp_path)).read_unit(0).targets
    assert np.array_equal(read.ids[:8], first.ids[:8])
    assert read.ids.dtype == np.int32


def test_a_rerun_does_nothing(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    writer = DumpWriter.open(str(tmp_path), provenance)
    writer.put_tokenizer(TOKENIZER)
    assert writer.committed() == {0, 1, 2}
    assert writer.commit_unit(1, unit_rows(provenance, 1, seed=9)) is None, (
        "the first commit wins, whatever comes later"
    )
    assert writer.seal()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_continues_where_it_was(tmp_path: Path) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    dump = Dump.open(str(tmp_path))
    assert not dump.is_sealed()
    assert dump.read_records() == {}
    assert dump.read_record(1) is None
    with pytest.raises(DataError, match="not committed"):
        dump.read_unit(1)
    writer.commit_unit(1, unit_rows(provenance, 1))
    assert dump.read_record(1) is not None
    assert len(dump.read_unit(1)) == 4
    assert not writer.seal()
    other = DumpWriter.open(str(tmp_path), provenance)
    assert other.committed() == {1}
    assert other.is_committed(1)
    assert not other.is_committed(0)
    for unit in (0, 2):
        other.commit_unit(unit, unit_rows(provenance, unit))
    assert other.seal()
    assert writer.seal()
    assert dump.is_sealed(), "a follower sees the seal"
    assert list(dump.read_records()) == [0, 1, 2]


def test_a_sealed_reader_needs_no_commit_records(tmp_path: Path) -> None:
    make_dump(tmp_path)
    for path in (tmp_path / "commits").iterdir():
        path.unlink()
    dump = Dump.open(str(tmp_path))
    assert len(dump.read_records()) == 3
    assert len(dump.read_unit(2)) == 2
    assert not verify(str(tmp_path)).ok


def test_rows_of_another_unit_are_refused(tmp_path: Path) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    with pytest.raises(ValueError, match="samples 0:4"):
        writer.commit_unit(0, unit_rows(provenance, 1))
    with pytest.raises(ValueError, match="samples 0:4"):
        writer.commit_unit(0, unit_rows(provenance, 0)[:-1])
    assert not (tmp_path / "data").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path)
    writer = DumpWriter.open(str(tmp_path), provenance)
    for other in ({"tokenizer.json": b"other"}, TOKENIZER | {"more.json": b"{}"}, {"../run.json": b"other"}, {}):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(MismatchError, match="another tokenizer") as caught:
            writer.put_tokenizer(other)
        assert caught.value.got != caught.value.expected
        assert sorted(tmp_path.rglob("*")) == before
    writer.put_tokenizer(TOKENIZER)
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(DataError, match="not the file that was written"):
        Dump.open(str(tmp_path)).read_tokenizer()
    assert not verify(str(tmp_path)).ok


def test_a_tokenizer_that_is_half_written_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower opens the dump while its first worker is still at the tokenizer."""
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    dump = Dump.open(str(tmp_path))
    seen: list[object] = []
    real = Store.put_new

    def put_and_look(self: Store, key: str, data: bytes) -> bool:
        with pytest.raises(TemporaryError, match="not complete yet") as caught:
            dump.read_tokenizer()
        seen.append(caught.value.exit_code)
        return real(self, key, data)

    monkeypatch.setattr(Store, "put_new", put_and_look)
    writer.put_tokenizer(TOKENIZER)
    assert seen == [Exit.TEMPORARY] * 3, "two files, then the record that names them"
    assert dump.read_tokenizer() == TOKENIZER
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(DataError, match="not the file that was written"):
        dump.read_tokenizer()


def test_a_tokenizer_of_another_run_or_with_names_that_lead_away_is_refused(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, seal=False)
    path = tmp_path / TOKENIZER_RECORD
    for changes, message in (
        ({"fingerprint": "f" * 64}, "belongs elsewhere"),
        ({"files": {"../run.json": "0" * 64}}, "plain relative path"),
        ({"files": {"absent.json": "0" * 64}}, "has no tokenizer"),
    ):
        path.write_bytes(TokenizerRecord(**{"fingerprint": provenance.fingerprint, "files": {}} | changes).to_json())
        with pytest.raises(DataError, match=message):
            Dump.open(str(tmp_path)).read_tokenizer()


def test_workers_with_different_tokenizers_agree_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no record; the files of one name decide, or else the record does."""
    provenance = some_provenance()
    first, second = (DumpWriter.open(str(tmp_path), provenance) for _ in range(2))
    monkeypatch.setattr(second._dump, "read_tokenizer_record", lambda: None)
    first.put_tokenizer(TOKENIZER)
    with pytest.raises(MismatchError, match=r"another tokenizer: tokenizer\.json"):
        second.put_tokenizer({"tokenizer.json": b"other"})
    monkeypatch.undo()
    looks = iter([lambda: None, second._dump.read_tokenizer_record])
    monkeypatch.setattr(second._dump, "read_tokenizer_record", lambda: next(looks)())
    with pytest.raises(MismatchError, match=r"another tokenizer: more\.json"):
        second.put_tokenizer(TOKENIZER | {"more.json": b"{}"})
    assert Dump.open(str(tmp_path)).read_tokenizer() == TOKENIZER


def test_a_tokenizer_of_which_another_worker_left_a_part_is_refused(tmp_path: Path) -> None:
    writer = DumpWriter.open(str(tmp_path), some_provenance())
    writer.store.put_new("tokenizer/tokenizer.json", b"of a worker that was killed before its record")
    with pytest.raises(MismatchError, match=r"another tokenizer: tokenizer\.json"):
        writer.put_tokenizer(TOKENIZER)
    assert not (tmp_path / TOKENIZER_RECORD).exists()


def test_a_worker_needs_no_right_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Store, key: str) -> None:
        raise MismatchError("no access")

    monkeypatch.setattr(Store, "delete", refuse)
    provenance = make_dump(tmp_path, seal=False)
    orphan = tmp_path / f"data/unit-00000000-{'a' * 32}.parquet"
    orphan.write_bytes(b"of a killed worker")
    writer = DumpWriter.open(str(tmp_path), provenance)
    assert writer.clean() == 0
    assert writer.commit_unit(0, unit_rows(provenance, 0, seed=1)) is None, "the loser's file stays, too"
    assert writer.seal()
    assert orphan.exists()
    assert verify(str(tmp_path)).ok


def test_names_that_others_made_are_durable_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On local files a name may be visible and yet be lost with the power; whoever relies on it syncs it first."""
    provenance = make_dump(tmp_path, seal=False)
    settled: list[str] = []
    monkeypatch.setattr(Store, "settle", lambda self, folder: settled.append(folder))
    writer = DumpWriter.open(str(tmp_path), provenance)
    uses: list[tuple[Callable[[], object], str]] = [
        (lambda: Dump.open(str(tmp_path)).read_record(0), "commits"),
        (lambda: Dump.open(str(tmp_path)).read_records(), "commits"),
        (lambda: Dump.open(str(tmp_path)).read_tokenizer(), "tokenizer"),
        (lambda: writer.is_committed(0), "commits"),
        (writer.seal, "commits"),
    ]
    for use, folder in uses:
        settled.clear()
        assert use()
        assert settled == [folder]


def test_orphans_are_cleaned_up_without_a_clock(tmp_path: Path) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    writer.commit_unit(0, unit_rows(provenance, 0))
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
    provenance = make_dump(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert provenance.fingerprint in card
    assert "path: data/*.parquet" in card
    assert "| samples | 10 in 3 units |" in card
    assert "8.1e-4" not in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_card_of_a_16_bit_teacher_says_what_error_remains(dtype: str, tmp_path: Path) -> None:
    exact = some_provenance()
    make_dump(tmp_path, exact.model_copy(update={"teacher": exact.teacher.model_copy(update={"dtype": dtype})}))
    card = (tmp_path / "README.md").read_text()
    assert f"weights and body computed in {dtype}" in card
    assert "8.1e-4 nats" in card
    assert "\n\n```sql\n" in card


# What a writer refuses


@pytest.mark.parametrize("case", POISON)
def test_bad_targets_are_never_written(case: str, tmp_path: Path) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    with pytest.raises((DataError, ValueError)) as caught:
        writer.commit_unit(0, poisoned(unit_rows(provenance, 0), **POISON[case]))
    assert not isinstance(caught.value, NeoError) or caught.value.exit_code == Exit.BAD_DATA
    assert not (tmp_path / "data").exists()
    assert writer.commit_unit(0, unit_rows(provenance, 0)) is not None


def test_a_unit_that_misses_the_gate_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    real = codec.round_targets
    monkeypatch.setattr(codec, "round_targets", lambda t, **k: real(t, **k | {"coarsest": 1.0, "max_kl": 10.0}))
    with pytest.raises(DataError, match="fidelity gate"):
        writer.commit_unit(0, unit_rows(provenance, 0))
    assert not (tmp_path / "data").exists()


def test_a_fidelity_that_is_no_number_misses_the_gate(tmp_path: Path) -> None:
    provenance = some_provenance()
    with pytest.raises(DataError, match="fidelity gate"):
        DumpWriter.open(str(tmp_path), provenance).commit_unit(
            0, poisoned(unit_rows(provenance, 0), **POISON["NaN log-prob"])
        )


def test_an_encoder_that_loses_values_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(str(tmp_path), provenance)
    real = codec.encode

    def damage(unit: UnitRows, metadata: dict[str, str], *, step: float) -> bytes:
        targets = replace(unit.targets, logprobs=unit.targets.logprobs - np.float32(0.25))
        return real(replace(unit, targets=targets), metadata, step=step)

    monkeypatch.setattr(codec, "encode", damage)
    with pytest.raises(DataError, match="read back"):
        writer.commit_unit(0, unit_rows(provenance, 0))
    assert not (tmp_path / "data").exists()
