"""Stage two's end of the dump: read it, and trust nothing that is not proven."""

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from storage_schemas import codec
from storage_schemas.commit import RUN, SEAL, CommitRecord, Seal, read_manifest, record_key, unit_of_record
from storage_schemas.errors import DataError, MismatchError
from storage_schemas.rows import OK, STATUSES, UnitRows
from storage_schemas.run_info import RunInfo, parse_json, refuse_other_version, validated
from storage_schemas.store import Store

MAX_BYTES_PER_ENTRY = 64
"""Uncompressed bytes that an honest file needs per row, token or entry, at most: the guard against bombs."""


class Dump:
    """A dump, sealed or still being written."""

    def __init__(self, store: Store, run: RunInfo, *, cache_dir: Path | None) -> None:
        self.store, self.run, self.cache_dir = store, run, cache_dir
        self._records: dict[int, CommitRecord] = {}
        self._seal: Seal | None = None

    @classmethod
    def open(cls, url: str, *, options: Mapping[str, str] | None = None, cache_dir: Path | None = None) -> "Dump":
        """Open the dump at `url`.

        Args:
            url: where it lies.
            options: settings of the object store.
            cache_dir: keep fetched shards here, named by their content, shared by all processes of the node. A dump
                on local files is read in place.

        Raises:
            DataError: there is no dump.
            MismatchError: it has another format version.
        """
        store = Store(url, options=options)
        data = store.get_if_present(RUN)
        if data is None:
            raise DataError(
                f"there is no dump at {url}",
                got="no run.json",
                expected="a dump made by `llm-neo dump`",
                fix="check dump.url, or start stage one first",
            )
        return cls(store, RunInfo.from_json(data, url=url), cache_dir=cache_dir)

    @property
    def fingerprint(self) -> str:
        """Hash of run.json's content."""
        return self.run.fingerprint

    def seal(self) -> Seal | None:
        """The seal, or None while the dump is being written."""
        if self._seal is None and (data := self.store.get_if_present(SEAL)) is not None:
            name = f"{self.store.url}/{SEAL}"
            content = parse_json(data, name=name)
            refuse_other_version(content, name=name)
            seal: Seal = validated(Seal, content, name=name)
            if seal.fingerprint != self.fingerprint or seal.units != self.run.units:
                raise DataError(
                    f"{name} belongs to another dump",
                    got=f"{seal.fingerprint}, {seal.units} units",
                    expected=f"{self.fingerprint}, {self.run.units} units",
                    fix="two dumps were mixed in one place; dump again",
                )
            self._seal = seal
        return self._seal

    def sealed(self) -> bool:
        """Whether every unit is committed and the dump is complete."""
        return self.seal() is not None

    def records(self) -> dict[int, CommitRecord]:
        """All commit records there are: from the manifest of a sealed dump, else by listing."""
        seal = self.seal()
        if seal is not None:
            if len(self._records) < seal.units:
                self._records = read_manifest(self.store.get(seal.manifest), seal=seal, name=seal.manifest)
        else:
            units = {unit_of_record(key) for key, _ in self.store.list("commits")}
            for unit in sorted(u for u in units if u is not None):
                self.record(unit)
        return self._records

    def record(self, unit: int) -> CommitRecord | None:
        """The commit record of `unit`, or None while it is not committed."""
        if unit not in self._records:
            if self.sealed():
                return self.records()[unit]
            if self.store.size(record_key(unit)) is None:
                return None
            self.store.settle("commits")
            self._records[unit] = read_record(self.store, unit, self.run)
        return self._records[unit]

    def unit_rows(self, unit: int) -> int:
        """Rows of `unit`, known before its data exists."""
        return len(self.run.unit_range(unit))

    def read_unit(self, unit: int) -> UnitRows:
        """All rows of a committed unit, proven against its record.

        Raises:
            DataError: the unit is not committed, its file is missing, torn or tampered with, or breaks a rule of the
                format.
        """
        record = self.record(unit)
        if record is None:
            raise DataError(
                f"unit {unit} of {self.store.url} is not committed",
                expected=f"commit records 0 ... {self.run.units - 1}",
                fix="let stage one finish: run `llm-neo dump` again",
            )
        return parse_unit(self._fetch(record), record, self.run, name=f"{self.store.url}/{record.file}")

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name and content of the tokenizer's files."""
        keys = sorted(key for key, _ in self.store.list("tokenizer"))
        return {key.removeprefix("tokenizer/"): self.store.get(key) for key in keys}

    def _fetch(self, record: CommitRecord) -> bytes:
        """The proven bytes of a data file, through the node's cache for object stores."""
        if self.cache_dir is None or self.store.root is not None:
            return proven(self.store.get(record.file), record, name=f"{self.store.url}/{record.file}")
        cached = self.cache_dir / f"{record.sha256}.parquet"
        if cached.is_file():
            data = cached.read_bytes()
            if hashlib.sha256(data).hexdigest() == record.sha256:
                return data
        data = proven(self.store.get(record.file), record, name=f"{self.store.url}/{record.file}")
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        staged = self.cache_dir / f".staged-{uuid.uuid4().hex}"
        staged.write_bytes(data)
        os.replace(staged, cached)
        return data


def read_record(store: Store, unit: int, run: RunInfo) -> CommitRecord:
    """The commit record of `unit`, checked to be this dump's.

    Raises:
        DataError: it is torn, names another unit or dump, or claims another number of rows.
    """
    name = f"{store.url}/{record_key(unit)}"
    record = CommitRecord.from_json(store.get(record_key(unit)), name=name)
    facts = {"unit": unit, "fingerprint": run.fingerprint, "rows": len(run.unit_range(unit))}
    for field, expected in facts.items():
        if getattr(record, field) != expected:
            raise DataError(
                f"{name} belongs elsewhere: {field} differs",
                got=getattr(record, field),
                expected=expected,
                fix="two dumps were mixed in one place, or a record was changed; dump again into another URL",
            )
    return record


def proven(data: bytes, record: CommitRecord, *, name: str) -> bytes:
    """`data` if its size and hash are those of the record, else DataError."""
    digest = hashlib.sha256(data).hexdigest()
    if (len(data), digest) != (record.bytes, record.sha256):
        raise DataError(
            f"{name} is not the file that was committed",
            got=f"{len(data)} bytes, sha256 {digest}",
            expected=f"{record.bytes} bytes, sha256 {record.sha256}",
            fix="the file is torn, corrupt or was replaced: restore it, or delete the dump and dump again",
        )
    return data


def parse_unit(data: bytes, record: CommitRecord, run: RunInfo, *, name: str) -> UnitRows:
    """Rows of a data file, checked against its record and the rules of the format, before and after decoding.

    Raises:
        DataError: the file breaks a rule.
        MismatchError: it was written by another format version.
    """
    try:
        file = codec.open_parquet(data)
        _check_footer(file, record, run, name=name)
        unit = codec.decode_file(
            file, temperatures=len(run.temperatures), draws=run.estimator.kind != "topk", logsumexp=run.logsumexp
        )
        _check_values(unit, record, run)
    except (OSError, ValueError, IndexError, MemoryError) as error:
        raise DataError(
            f"{name} breaks the dump format",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            expected="what docs/format.md says",
            fix="run `llm-neo verify`; dump the unit again if the file is damaged",
        ) from error
    return unit


def _check_footer(file: pq.ParquetFile, record: CommitRecord, run: RunInfo, *, name: str) -> None:
    """Refuse another version, and a file that would decode to more than its record says, before decoding it."""
    metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    version = metadata.get("llm_neo.format_version")
    if version != str(run.format_version):
        raise MismatchError(
            f"{name} has another format version",
            got=version,
            expected=run.format_version,
            fix="use the version of llm-neo that wrote this dump, or dump again",
        )
    for key, expected in (("llm_neo.fingerprint", run.fingerprint), ("llm_neo.unit", str(record.unit))):
        if metadata.get(key) != expected:
            raise ValueError(f"{key} is {metadata.get(key)}, expected {expected}")
    if file.metadata.num_rows != record.rows:
        raise ValueError(f"{file.metadata.num_rows} rows, expected {record.rows}")
    allowed = MAX_BYTES_PER_ENTRY * (
        record.rows * 16 + record.tokens + record.entries + record.supervised_tokens * len(run.temperatures)
    )
    limits = {"target_ids": record.entries, "target_logprobs": record.entries, "input_ids": record.tokens}
    for group in range(file.metadata.num_row_groups):
        columns = file.metadata.row_group(group)
        for i in range(columns.num_columns):
            column = columns.column(i)
            limit = limits.get(column.path_in_schema.split(".")[0], allowed)
            # An empty list takes one slot too.
            if (
                column.num_values > limit + record.rows + record.supervised_tokens
                or column.total_uncompressed_size > allowed
            ):
                raise ValueError(f"column {column.path_in_schema} claims {column.num_values} values")


def _check_values(unit: UnitRows, record: CommitRecord, run: RunInfo) -> None:
    """The MUSTs of docs/format.md that are about values; each costs one vectorised pass."""
    targets, span = unit.targets, run.unit_range(record.unit)
    got = (len(unit.input_ids), len(targets), len(targets.ids))
    expected = (record.tokens, record.supervised_tokens, record.entries)
    if got != expected:
        raise ValueError(f"tokens, supervised tokens, entries are {got}, expected {expected}")
    if not np.array_equal(unit.sample_index, np.arange(span.start, span.stop)):
        raise ValueError(f"sample_index is not {span.start} ... {span.stop - 1} in order")
    if unknown := set(unit.status) - set(STATUSES):
        raise ValueError(f"unknown status {sorted(unknown)}")
    # (rows,) supervised tokens by mask; only rows that are ok have targets, and those have one for each.
    supervised = np.concatenate([[0], np.cumsum(unit.loss_mask)])[unit.token_offsets]
    has_targets = np.array([status == OK for status in unit.status])
    if not np.array_equal(np.diff(unit.target_offsets), np.where(has_targets, np.diff(supervised), 0)):
        raise ValueError("loss_mask and targets disagree on the number of supervised tokens")
    if np.any(has_targets & (np.diff(unit.target_offsets) == 0)):
        raise ValueError("a row is ok but has no supervised token")
    starts = unit.token_offsets[:-1][np.diff(unit.token_offsets) > 0]
    if unit.loss_mask[starts].any():
        raise ValueError("token 0 of a sample is supervised")
    for name, ids in (("target_ids", targets.ids), ("input_ids", unit.input_ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= run.teacher.head_size):
            raise ValueError(f"{name} lie in {ids.min()} ... {ids.max()}, the head has {run.teacher.head_size} rows")
    if not np.isfinite(targets.logprobs).all() or np.any(targets.logprobs > 1e-3):
        raise ValueError("a log-prob is not finite or above 0")
    if np.isnan(targets.tail_logprob).any() or np.any(targets.tail_logprob > 1e-3):
        raise ValueError("a tail mass is NaN or above 1")
    if np.any(targets.head_size < 0) or np.any(targets.head_size > targets.lengths):
        raise ValueError("a head is larger than its list of entries")
    if targets.counts is not None and np.any(targets.counts < 0):
        raise ValueError("a draw was counted less than once")
    if targets.logsumexp is not None and not np.isfinite(targets.logsumexp).all():
        raise ValueError("a logsumexp is not finite")
    _check_id_order(unit)


def _check_id_order(unit: UnitRows) -> None:
    """Ids ascend strictly within a token's head, and within its draws."""
    targets = unit.targets
    if len(targets.ids) < 2:
        return
    ascending = np.diff(targets.ids.astype(np.int64)) > 0
    # A step may fall where a token ends and where its head ends.
    free = np.zeros(len(targets.ids) + 1, bool)
    free[targets.offsets] = True
    free[targets.offsets[:-1] + targets.head_size] = True
    if not np.all(ascending | free[1:-1]):
        raise ValueError("the ids of a token do not ascend")
