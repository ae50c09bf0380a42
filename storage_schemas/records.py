"""Commit records, the seal and its manifest: what says that work is done.

The commit record of a unit, written by put-if-absent, is the arbiter between workers: the first one wins, and every
other attempt's data file is an orphan. The seal is written once every unit is committed; it names one manifest of
all records, so that a reader of a hundred thousand units starts in seconds.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from storage_schemas.canonical import ProvenJson, validated
from storage_schemas.common.errors import DataError
from storage_schemas.provenance import Provenance

RUN = "run.json"
TOKENIZER = "TOKENIZER.json"
SEAL = "SEALED.json"
_RECORD = re.compile(r"commits/unit-(\d{8,})\.json")
_DATA = re.compile(r"data/unit-(\d{8,})-[0-9a-f]{32}\.parquet")


def data_key(unit: int, attempt: str) -> str:
    """Key of one attempt's data file."""
    return f"data/unit-{unit:08d}-{attempt}.parquet"


def record_key(unit: int) -> str:
    """Key of a unit's commit record."""
    return f"commits/unit-{unit:08d}.json"


def unit_of_record(key: str) -> int | None:
    """The unit whose commit record `key` is, if it is one."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) if match and record_key(int(match[1])) == key else None


def unit_of_data(key: str) -> int | None:
    """The unit of which `key` is an attempt's data file, if it is one."""
    match = _DATA.fullmatch(key)
    return int(match[1]) if match and key.startswith(data_key(int(match[1]), "")[:-8]) else None


class CommitRecord(ProvenJson):
    """One committed unit."""

    fingerprint: str
    """Of the dump that the unit belongs to."""
    unit: int
    """Which unit."""
    file: str
    """Key of the data file, one of this unit's."""
    bytes: int = Field(ge=1)
    """Its size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the whole file."""
    rows: int
    """Samples in the unit."""
    tokens: int
    """Tokens of all samples."""
    supervised_tokens: int
    """Tokens with a target."""
    entries: int = Field(ge=0)
    """Target entries, heads and draws."""
    max_id: int = Field(ge=-1)
    """Largest target id; -1 without entries."""
    statuses: dict[str, int]
    """Rows per status."""
    mean_kept_mass: float
    """Mean probability inside the heads."""
    mean_entropy: float
    """Mean entropy of the targets, nats."""
    fidelity: tuple[float, ...]
    """Mean bucketed KL(exact || stored) in nats, per temperature."""
    logprob_step: float
    """Grid in nats of log-probs between -4 and -2, see `codec.round_targets`; 0 when they are exact."""

    @model_validator(mode="after")
    def _own_file(self) -> Self:
        if unit_of_data(self.file) != self.unit:
            raise ValueError(f"file: {self.file} does not belong to unit {self.unit}")
        return self


class TokenizerRecord(ProvenJson):
    """TOKENIZER.json: the tokenizer is complete. Written after its files, before the first unit."""

    fingerprint: str
    """Of the dump."""
    files: dict[str, str]
    """sha256 of each file in tokenizer/, by name."""


class Seal(ProvenJson):
    """SEALED.json: the dump is complete."""

    fingerprint: str
    """Of the dump."""
    units: int
    """Number of units, all committed."""
    rows: int
    """Samples in all."""
    tokens: int
    """Tokens in all."""
    supervised_tokens: int
    """Tokens with a target in all."""
    bytes: int
    """Of all data files."""
    statuses: dict[str, int]
    """Rows per status in all."""
    tokenizer: dict[str, str]
    """sha256 of each file of the tokenizer, by name."""
    records_sha256: str
    """Hash over all commit records, in unit order."""
    manifest: str
    """Key of the manifest, which holds all records; its name is its hash."""


def refuse_foreign(record: CommitRecord, unit: int, provenance: Provenance, *, name: str) -> None:
    """Raise DataError if a commit record names another unit or dump, or claims more than the unit can hold."""
    rows = len(provenance.unit_range(unit))
    limits = {
        "tokens": (record.tokens, rows * provenance.corpus.max_length),
        "supervised_tokens": (record.supervised_tokens, record.tokens),
        "entries": (record.entries, record.supervised_tokens * provenance.max_entries),
        "max_id": (record.max_id, provenance.teacher.lm_head_rows - 1),
    }
    refuse_elsewhere(
        name,
        {
            "unit": (record.unit, unit),
            "fingerprint": (record.fingerprint, provenance.fingerprint),
            "rows": (record.rows, rows),
            "rows of all statuses": (sum(record.statuses.values()), rows),
            "values of fidelity": (len(record.fidelity), len(provenance.temperatures)),
        }
        | {field: (got, f"at most {limit}") for field, (got, limit) in limits.items() if got > limit},
    )


def refuse_elsewhere(name: str, claims: Mapping[str, tuple[object, object]]) -> None:
    """Raise DataError if what a file claims, (got, expected) by field, is not what its dump says."""
    if wrong := {field: claim for field, claim in claims.items() if claim[0] != claim[1]}:
        raise DataError(
            f"{name} belongs elsewhere: {', '.join(wrong)}",
            got="; ".join(str(got) for got, _ in wrong.values()),
            expected="; ".join(str(expected) for _, expected in wrong.values()),
            fix="two dumps were mixed in one place, or a file was changed; dump again into another URL",
        )


def proven(data: bytes, name: str, *, sha256: str, size: int | None = None, fix: str) -> bytes:
    """`data` if its hash, and its size where that is known, are those of what was written; else DataError."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256 or size not in (None, len(data)):
        raise DataError(
            f"{name} is not the file that was written",
            got=f"{len(data)} bytes, sha256 {found}",
            expected=f"sha256 {sha256}" if size is None else f"{size} bytes, sha256 {sha256}",
            fix=fix,
        )
    return data


_MANIFEST_SCHEMA = pa.schema(
    [
        *[(n, pa.int64()) for n in ("unit", "bytes", "rows", "tokens", "supervised_tokens", "entries", "max_id")],
        *[(n, pa.string()) for n in ("file", "sha256", "statuses", "fidelity")],
        *[(n, pa.float64()) for n in ("mean_kept_mass", "mean_entropy", "logprob_step")],
    ]
)


def records_sha256(records: Mapping[int, CommitRecord]) -> str:
    """Hash over all records, in unit order."""
    digest = hashlib.sha256()
    for unit in sorted(records):
        digest.update(records[unit].to_json())
    return digest.hexdigest()


def totals(records: Mapping[int, CommitRecord]) -> dict[str, int]:
    """Sums over records of rows, tokens, supervised_tokens and bytes."""
    names = ("rows", "tokens", "supervised_tokens", "bytes")
    return {name: sum(getattr(record, name) for record in records.values()) for name in names}


def mean_per_token(records: Mapping[int, CommitRecord], name: str) -> float | None:
    """Mean of a per-token mean over all supervised tokens; None without any."""
    tokens = sum(record.supervised_tokens for record in records.values())
    total = sum(getattr(record, name) * record.supervised_tokens for record in records.values())
    return total / tokens if tokens else None


def count_statuses(records: Mapping[int, CommitRecord]) -> dict[str, int]:
    """Rows per status over all records."""
    found = Counter[str]()
    for record in records.values():
        found.update(record.statuses)
    return dict(sorted(found.items()))


def manifest_bytes(records: Mapping[int, CommitRecord]) -> bytes:
    """All records as one Parquet file."""
    rows = []
    for unit in sorted(records):
        row = records[unit].model_dump(mode="json", exclude={"format_version", "fingerprint"})
        rows.append(
            row | {"statuses": json.dumps(row["statuses"], sort_keys=True), "fidelity": json.dumps(row["fidelity"])}
        )
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=_MANIFEST_SCHEMA), sink, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue()


class Manifest(Mapping[int, CommitRecord]):
    """The records of a sealed dump. They are made when asked for: a hundred thousand objects take half a gigabyte."""

    _BLOCK = 256

    def __init__(self, table: pa.Table, provenance: Provenance, *, name: str) -> None:
        self._table, self._run, self._name = table, provenance, name
        self._fingerprint = provenance.fingerprint
        self._rows: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, unit: int) -> CommitRecord:
        if not 0 <= unit < len(self):
            raise KeyError(unit)
        block, place = divmod(unit, self._BLOCK)
        rows = self._rows
        if rows[0] != block:
            # One assignment: several threads may ask.
            self._rows = rows = (block, self._table.slice(block * self._BLOCK, self._BLOCK).to_pylist())
        row = rows[1][place]
        row = row | {"statuses": json.loads(row["statuses"]), "fidelity": json.loads(row["fidelity"])}
        record = validated(CommitRecord, row | {"fingerprint": self._fingerprint}, name=self._name)
        refuse_foreign(record, unit, self._run, name=self._name)
        return record


def read_manifest(data: bytes, name: str, *, seal: Seal, provenance: Provenance) -> Manifest:
    """The records of a manifest, checked against the seal.

    Raises:
        DataError: the manifest is not the one that was sealed.
    """
    sealed = seal.manifest.removeprefix("manifest-").removesuffix(".parquet")
    proven(data, name, sha256=sealed, fix="restore the file from a backup; commits/ still holds every record")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if file.schema_arrow != _MANIFEST_SCHEMA or file.metadata.num_rows != seal.units:
            raise ValueError(f"{file.metadata.num_rows} rows with the columns {file.schema_arrow.names}")
        table = file.read().combine_chunks()
        if not np.array_equal(table["unit"].to_numpy(), np.arange(seal.units)):
            raise ValueError("units out of order")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{name} does not hold every unit",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            expected=f"units 0 ... {seal.units - 1}",
            fix="the dump was not written by this project; do not use it",
        ) from error
    return Manifest(table, provenance, name=name)
