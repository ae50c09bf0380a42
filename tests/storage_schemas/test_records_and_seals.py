"""Hostile commit records, seals and manifests, and what verify makes of a damaged dump."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dumps import make_dump, metadata_of, record_of, replace_unit, some_provenance, unit_rows
from support.poison import good_unit

from storage_schemas import codec
from storage_schemas.canonical import canonical_json
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.config import Adaptive, Estimator, TopK
from storage_schemas.reader import Dump
from storage_schemas.records import Seal, data_key, manifest_bytes, record_key
from storage_schemas.stores.store import Store
from storage_schemas.targets import decode
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter

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
    real = dump.store.get_if_present

    def get(key: str, **limits: int) -> bytes | None:
        opened.append(key)
        return real(key, **limits)

    monkeypatch.setattr(dump.store, "get_if_present", get)
    with pytest.raises(DataError, match=r"unit-00000000\.json") as caught:
        dump.read_unit(0)
    assert caught.value.fix
    assert opened == [record_key(0)], "nothing that a bad record names is read"
    assert not verify(str(tmp_path)).ok


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"a":' * 10**5, b'{"format_version":1,"format_version":1}', b"\xff", b'"\\ud800"'],
)
def test_records_that_are_no_records(data: bytes, tmp_path: Path) -> None:
    make_dump(tmp_path, seal=False)
    (tmp_path / record_key(0)).write_bytes(data)
    with pytest.raises(DataError, match=r"unit-00000000\.json"):
        Dump.open(str(tmp_path)).read_record(0)


def test_records_of_another_version(tmp_path: Path) -> None:
    make_dump(tmp_path, seal=False)
    path = tmp_path / record_key(0)
    path.write_bytes(path.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(MismatchError, match="format version"):
        Dump.open(str(tmp_path)).read_record(0)


# Seal and verify


def test_the_seal_covers_everything(tmp_path: Path) -> None:
    make_dump(tmp_path / "a")
    make_dump(tmp_path / "b", some_provenance(samples=11))
    seal = tmp_path / "a" / "SEALED.json"
    original = seal.read_bytes()
    seal.write_bytes((tmp_path / "b" / "SEALED.json").read_bytes())
    with pytest.raises(DataError, match="belongs elsewhere: fingerprint"):
        Dump.open(str(tmp_path / "a")).is_sealed()
    seal.write_bytes(original.replace(b'"rows":10', b'"rows":11'))
    with pytest.raises(DataError, match="torn or was changed"):
        Dump.open(str(tmp_path / "a")).is_sealed()
    seal.write_bytes(original)
    manifest = next((tmp_path / "a").glob("manifest-*"))
    manifest.write_bytes(next((tmp_path / "b").glob("manifest-*")).read_bytes())
    with pytest.raises(DataError, match="manifest"):
        Dump.open(str(tmp_path / "a")).read_records()


def forge_seal(folder: Path, records: list[dict[str, object]], **claims: object) -> None:
    """A manifest of `records`, which are changes to the real ones, and a seal that names it by its right hash."""
    there = [record_of(folder, unit) for unit in range(3)]
    changed = [there[i].model_copy(update=changes) for i, changes in enumerate(records)]
    data = manifest_bytes(dict(enumerate(changed)))
    name = f"manifest-{hashlib.sha256(data).hexdigest()}.parquet"
    (folder / name).write_bytes(data)
    seal = Seal.from_json((folder / "SEALED.json").read_bytes(), name="s")
    (folder / "SEALED.json").write_bytes(seal.model_copy(update={"manifest": name, **claims}).to_json())


FORGED_SEALS: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "a unit less": ([{}, {}], {}, "2 rows with the columns"),
    "units in another order": ([{"unit": 1}, {"unit": 0}, {}], {}, "every unit"),
    "another number of units": ([{}, {}, {}], {"units": 4}, "belongs elsewhere: units"),
    "rows that the unit has not": ([{"rows": 3}, {}, {}], {}, "belongs elsewhere"),
    "a path that leads away": ([{"file": "../run.json"}, {}, {}], {}, "does not belong to unit 0"),
    "a manifest elsewhere": ([{}, {}, {}], {"manifest": "run.json"}, "not the file that was written"),
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
        Dump.open(str(tmp_path)).read_records()[0]
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
        Dump.open(str(tmp_path)).read_records()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: next((d / "data").glob("unit-00000001*")).unlink(), "unit 1: .* has no data"),
    "empty shard": (lambda d: next((d / "data").glob("unit-00000001*")).write_bytes(b""), "unit 1: .* written"),
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
    units = 2 if case == "missing record" else 3
    assert seen == [(i + 1, units) for i in range(units)], "one damage hides no other unit"


def test_verify_reports_sums(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path)
    report = verify(str(tmp_path))
    rows = [row for unit in range(3) for row in unit_rows(provenance, unit)]
    assert report.model_dump() == {
        "ok": True,
        "sealed": True,
        "units": 3,
        "rows": 10,
        "supervised_tokens": sum(len(row.targets) for row in rows if row.targets is not None),
        "bytes": sum(path.stat().st_size for path in (tmp_path / "data").iterdir()),
        "errors": [],
        "orphans": [],
    }


def test_a_record_that_was_replaced_after_the_seal_is_found(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path)
    record = record_of(tmp_path, 0).model_copy(update={"mean_entropy": 0.0})
    (tmp_path / record_key(0)).write_bytes(record.to_json())
    assert provenance.units == 3
    assert any("differs from the manifest" in error for error in verify(str(tmp_path)).errors)


def test_counts_that_nothing_can_hold_are_refused_and_no_list_of_them_is_made(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path, some_provenance(samples=10), seal=False)

    def claim(samples: int) -> None:
        corpus = provenance.corpus.model_copy(update={"samples": samples})
        (tmp_path / "run.json").write_bytes(provenance.model_copy(update={"corpus": corpus}).to_json())

    for samples in (10**18, 2**70):
        claim(samples)
        with pytest.raises(DataError, match="samples"):
            Dump.open(str(tmp_path))
    claim(10**12)
    with pytest.raises(DataError, match="belongs elsewhere"):
        Dump.open(str(tmp_path)).read_records()
    report = verify(str(tmp_path))
    assert "249999999981 more units: not committed yet" in report.errors
    assert len(report.errors) < 30


def test_an_orphan_of_a_sealed_dump_is_named_and_goes_with_a_rerun(tmp_path: Path) -> None:
    """A worker that was stopped before its put, continued after the seal and then died."""
    provenance = make_dump(tmp_path)
    orphan = data_key(1, "f" * 32)
    foreign = tmp_path / "data" / "notes.txt"
    foreign.write_text("of somebody else")
    Store(str(tmp_path)).put_new(orphan, b"the late worker's")
    assert verify(str(tmp_path)).orphans == [orphan]
    assert DumpWriter.open(str(tmp_path), provenance).seal()
    report = verify(str(tmp_path))
    assert report.ok
    assert report.orphans == []
    assert foreign.exists()
    assert len(list((tmp_path / "data").glob("unit-*"))) == 3


def test_the_remedy_for_one_corrupt_unit_makes_the_dump_whole(tmp_path: Path) -> None:
    provenance = make_dump(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    record = record_of(tmp_path, 1)
    (tmp_path / record.file).write_bytes(b"damaged")
    with pytest.raises(DataError) as caught:
        Dump.open(str(tmp_path)).read_unit(1)
    named = re.search(r"delete it, (\S+), (\S+) and (\S+), and run the same", str(caught.value.fix))
    assert named is not None
    for path in (record.file, named[1], named[2], named[3]):
        (found,) = tmp_path.glob(path)
        found.unlink()
    writer = DumpWriter.open(str(tmp_path), provenance)
    assert writer.committed() == {0, 2}
    assert writer.commit_unit(1, unit_rows(provenance, 1)) is not None
    assert writer.seal()
    assert verify(str(tmp_path)).ok
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed <= {"unit-00000001.json", "SEALED.json"}


FORGED: dict[str, tuple[dict[str, object], str]] = {
    "statuses": ({"statuses": {"ok": 1000, "<b>": -996}}, "statuses is"),
    "max_id": ({"max_id": 3}, "max_id is 3"),
    "kept mass": ({"mean_kept_mass": 7.0}, "mean_kept_mass is 7"),
    "a little kept mass": ({"mean_kept_mass": 0.9}, "mean_kept_mass is 0.9"),
    "entropy": ({"mean_entropy": 0.5}, "mean_entropy is 0.5"),
    "fidelity": ({"fidelity": (5.0,)}, "fidelity is"),
    "fidelity below 0": ({"fidelity": (-1.0,)}, "fidelity is"),
    "grid": ({"logprob_step": 1.0}, "logprob_step is 1.0"),
}


@pytest.mark.parametrize("case", FORGED)
def test_verify_compares_every_field_of_a_record_with_the_data(case: str, tmp_path: Path) -> None:
    """The record's own checksum is right."""
    claims, says = FORGED[case]
    make_dump(tmp_path, seal=False)
    record = record_of(tmp_path, 0).model_copy(update=claims)
    (tmp_path / record_key(0)).write_bytes(record.to_json())
    (error,) = [line for line in verify(str(tmp_path)).errors if line.startswith("unit 0")]
    assert says in error


@pytest.mark.parametrize("case", ["all log-probs 0", "heads that hold too little", "a longer sample", "no entries"])
def test_verify_sees_what_no_teacher_says(case: str, tmp_path: Path) -> None:
    """Hashes and statistics agree with the data."""
    provenance = make_dump(tmp_path, seal=False)
    unit = good_unit(provenance)
    targets, longest = unit.targets, int(np.diff(unit.token_offsets).max())
    if case == "all log-probs 0":
        targets.logprobs[:] = 0.0
    elif case == "heads that hold too little":
        targets.logprobs[:] -= 1.0
    elif case == "a longer sample":
        provenance = provenance.model_copy(
            update={"corpus": provenance.corpus.model_copy(update={"max_length": longest - 1})}
        )
        (tmp_path / "run.json").write_bytes(provenance.to_json())
    else:
        targets.offsets[1] = 0
        targets.head_size[:2] = (0, 16)
    changes = codec.figures(unit) | {"fingerprint": provenance.fingerprint}
    replace_unit(tmp_path, provenance, 0, codec.encode(unit, metadata_of(provenance, 0)), **changes)
    (error,) = [line for line in verify(str(tmp_path)).errors if line.startswith("unit 0")]
    says = {"a longer sample": f"tokens, the corpus at most {longest - 1}", "no entries": "no entry"}
    assert says.get(case, "hold 1 +-") in error


@pytest.mark.parametrize("estimator", [TopK(k=1), Adaptive(kind="adaptive", k_max=2, tail_draws=2)])
def test_what_verify_accepts_decodes_to_finite_numbers(estimator: Estimator, tmp_path: Path) -> None:
    provenance = some_provenance(estimator=estimator)
    make_dump(tmp_path, provenance)
    report = verify(str(tmp_path))
    assert report.ok, report.errors
    for unit in range(provenance.units):
        decoded = decode(Dump.open(str(tmp_path)).read_unit(unit).targets)
        assert np.isfinite(decoded.logprobs).all()
        assert np.isfinite(decoded.weights).all()
