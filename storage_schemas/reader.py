"""Stage two's end of the dump: read it, and trust nothing that is not proven."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas import codec
from storage_schemas.canonical import refuse_other_version
from storage_schemas.common.errors import DataError, TemporaryError
from storage_schemas.footer import claimed_values, string_bytes
from storage_schemas.provenance import Provenance
from storage_schemas.records import (
    RUN,
    SEAL,
    TOKENIZER,
    CommitRecord,
    Manifest,
    Seal,
    parse_record,
    parse_tokenizer,
    read_manifest,
    record_key,
    unit_of_record,
)
from storage_schemas.rows import OK, SCHEMA, STATUSES, UnitRows, in_head
from storage_schemas.stores.cache import ShardCache
from storage_schemas.stores.store import Store, missing

TOKENIZER_BYTES = 2**30
"""The largest file of a tokenizer that is read."""
MANIFEST_BYTES, MANIFEST_BYTES_PER_UNIT = 2**20, 4096
"""The largest manifest that is read; an ordinary one has 57 bytes per unit."""
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, MemoryError, NotImplementedError, pa.ArrowException)
"""What reading a damaged or hostile Parquet file may raise."""


class Dump:
    """A dump, sealed or still being written."""

    def __init__(self, store: Store, provenance: Provenance, *, cache: ShardCache | None) -> None:
        self.store, self.provenance, self._cache = store, provenance, cache
        self._records: dict[int, CommitRecord] = {}
        self._seal: Seal | None = None
        self._manifest: Manifest | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        options: Mapping[str, str] | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int | None = None,
    ) -> "Dump":
        """Open the dump at `url`.

        Args:
            url: where it lies.
            options: settings of the object store.
            cache_dir: keep fetched shards here, named by their content, shared by all processes of the node. A dump
                on local files is read in place.
            cache_bytes: what this cache may hold; the shards that were not used for longest are deleted above it.
                None: no limit.

        Raises:
            DataError: there is no dump.
            MismatchError: it has another format version.
        """
        store = Store(url, options=options)
        provenance = store.parsed(RUN, lambda data: Provenance.from_json(data, name=f"{url}/{RUN}"))
        if provenance is None:
            raise DataError(
                f"there is no dump at {url}",
                got="no run.json",
                expected="a dump made by `llm-neo dump`",
                fix="check the URL, or start stage one first",
            )
        cache = None if cache_dir is None else ShardCache(cache_dir, limit=cache_bytes)
        return cls(store, provenance, cache=cache)

    @property
    def fingerprint(self) -> str:
        """Hash of run.json's content."""
        return self.provenance.fingerprint

    def seal(self) -> Seal | None:
        """The seal, or None while the dump is being written."""
        name = f"{self.store.url}/{SEAL}"
        if self._seal is None and (seal := self.store.parsed(SEAL, lambda data: Seal.from_json(data, name=name))):
            if seal.fingerprint != self.fingerprint or seal.units != self.provenance.units:
                raise DataError(
                    f"{name} belongs to another dump",
                    got=f"{seal.fingerprint}, {seal.units} units",
                    expected=f"{self.fingerprint}, {self.provenance.units} units",
                    fix="two dumps were mixed in one place; dump again",
                )
            self._seal = seal
        return self._seal

    def sealed(self) -> bool:
        """Whether every unit is committed and the dump is complete."""
        return self.seal() is not None

    def records(self) -> Mapping[int, CommitRecord]:
        """All commit records there are: from the manifest of a sealed dump, else by listing."""
        seal = self.seal()
        if seal is not None:
            if self._manifest is None:
                name = f"{self.store.url}/{seal.manifest}"
                self._manifest = self.store.parsed(
                    seal.manifest,
                    lambda data: read_manifest(data, seal=seal, provenance=self.provenance, name=name),
                    limit=MANIFEST_BYTES + MANIFEST_BYTES_PER_UNIT * seal.units,
                )
                if self._manifest is None:
                    raise missing(self.store.url, seal.manifest)
            return self._manifest
        listed = {unit_of_record(key) for key, _ in self.store.list("commits")}
        new = sorted(u for u in listed if u is not None and u < self.provenance.units and u not in self._records)
        self.store.settle("commits")
        for record in self.store.parsed_many([record_key(unit) for unit in new], self._parse_record):
            self._records[record.unit] = record
        return self._records

    def record(self, unit: int) -> CommitRecord | None:
        """The commit record of `unit`, or None while it is not committed. One request, unless it is known."""
        if unit not in self._records:
            if self._seal is not None:
                return self.records().get(unit)
            key = record_key(unit)
            record = self.store.parsed(key, lambda data: self._parse_record(key, data))
            if record is None:
                return None
            # Its name may be visible before it is durable: a power loss must not undo what was trained on.
            self.store.settle("commits")
            self._records[unit] = record
        return self._records[unit]

    def _parse_record(self, key: str, data: bytes) -> CommitRecord:
        unit = unit_of_record(key)
        assert unit is not None
        return parse_record(data, unit, self.provenance, url=self.store.url)

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
                expected=f"commit records 0 ... {self.provenance.units - 1}",
                fix="let stage one finish: run `llm-neo dump` again",
            )
        return parse_unit(self._fetch(record), record, self.provenance, name=f"{self.store.url}/{record.file}")

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name and content of the tokenizer's files.

        Raises:
            TemporaryError: stage one has not written all of it yet.
            DataError: a file is not the one that was written.
        """
        found: dict[str, bytes] = {}
        for name, sha256 in sorted(self._tokenizer_hashes().items()):

            def proven_file(data: bytes, name: str = name, sha256: str = sha256) -> bytes:
                if (digest := hashlib.sha256(data).hexdigest()) != sha256:
                    raise DataError(
                        f"{self.store.url}/tokenizer/{name} is not the file that was written",
                        got=f"sha256 {digest}",
                        expected=f"sha256 {sha256}",
                        fix="restore the file: it is one of the teacher's tokenizer",
                    )
                return data

            data = self.store.parsed(f"tokenizer/{name}", proven_file, limit=TOKENIZER_BYTES)
            if data is None:
                raise missing(self.store.url, f"tokenizer/{name}")
            found[name] = data
        return found

    def _tokenizer_hashes(self) -> Mapping[str, str]:
        seal = self.seal()
        if seal is not None:
            return seal.tokenizer
        record = self.store.parsed(TOKENIZER, lambda data: parse_tokenizer(data, self.provenance, url=self.store.url))
        if record is None:
            raise TemporaryError(
                f"the tokenizer of {self.store.url} is not complete yet",
                got=f"no {TOKENIZER}",
                expected="what stage one writes before its first unit",
                fix="run the same command again when `llm-neo dump` has come to its first unit",
            )
        self.store.settle("tokenizer")
        return record.files

    def _fetch(self, record: CommitRecord) -> bytes:
        """The proven bytes of a data file, through the node's cache for object stores."""
        if self._cache is None or self.store.root is not None:
            return self._download(record)
        return self._cache.get(
            record.sha256,
            is_proven=lambda data: _is_proven(data, record),
            fetch=lambda: self._download(record),
        )

    def _download(self, record: CommitRecord) -> bytes:
        name = f"{self.store.url}/{record.file}"
        data = self.store.parsed(record.file, lambda data: proven(data, record, name=name), limit=record.bytes)
        if data is None:
            raise missing(self.store.url, record.file)
        return data


def _is_proven(data: bytes, record: CommitRecord) -> bool:
    return len(data) == record.bytes and hashlib.sha256(data).hexdigest() == record.sha256


def proven(data: bytes, record: CommitRecord, *, name: str) -> bytes:
    """`data` if its size and hash are those of the record, else DataError."""
    if not _is_proven(data, record):
        raise DataError(
            f"{name} is not the file that was committed",
            got=f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}",
            expected=f"{record.bytes} bytes, sha256 {record.sha256}",
            fix="the file is torn, corrupt or was replaced: restore it; or, while no `llm-neo dump` runs, delete it, "
            f"{record_key(record.unit)}, {SEAL} and manifest-*.parquet, and run the same `llm-neo dump` again: it "
            "computes this unit alone",
        )
    return data


def parse_unit(data: bytes, record: CommitRecord, provenance: Provenance, *, name: str) -> UnitRows:
    """Rows of a data file, checked against its record and the rules of the format, before and after decoding.

    Raises:
        DataError: the file breaks a rule.
        MismatchError: it was written by another format version.
    """
    try:
        file = codec.open_parquet(data)
        _check_footer(file, data, record, provenance, name=name)
        unit = codec.decode_file(
            codec.open_parquet(data, checked=file),
            temperatures=len(provenance.temperatures),
            draws=provenance.estimator.draws > 0,
            logsumexp=provenance.logsumexp,
        )
        _check_values(unit, record, provenance)
    except _UNREADABLE as error:
        raise DataError(
            f"{name} breaks the dump format",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            expected="what docs/format.md says",
            fix="run `llm-neo verify`; dump the unit again if the file is damaged",
        ) from error
    return unit


def _check_footer(
    file: pq.ParquetFile, data: bytes, record: CommitRecord, provenance: Provenance, *, name: str
) -> None:
    """Refuse another version, and a file that would decode to more than its record says, before decoding it."""
    metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    version = metadata.get("llm_neo.format_version")
    refuse_other_version({"format_version": version}, name=name, readable=[str(provenance.format_version)])
    for key, expected in (("llm_neo.fingerprint", provenance.fingerprint), ("llm_neo.unit", str(record.unit))):
        if metadata.get(key) != expected:
            raise ValueError(f"{key} is {metadata.get(key)}, expected {expected}")
    codec.refuse_other_schema(file)
    # Values of a column, an empty list or a null counting as one: a file whose footer claims more is a bomb.
    tokens, targets, width = record.tokens, record.supervised_tokens, len(provenance.temperatures)
    limits = {"input_ids": tokens, "loss_mask": tokens, "target_ids": record.entries, "target_logprobs": record.entries}
    limits |= {"head_size": targets, "target_counts": record.entries}
    limits |= {"tail_logprob": targets * width, "logsumexp": targets * width}
    for column, values in zip(SCHEMA.names, claimed_values(data, codec.levels(file)), strict=True):
        limit = limits.get(column, 0) + record.rows + targets
        if values > limit:
            raise ValueError(f"column {column} claims {values} values, expected at most {limit}")
    most = codec.string_limit(record.rows, tokens)
    for column in codec.STRINGS:
        if (size := string_bytes(data, SCHEMA.get_field_index(column))) > most:
            raise ValueError(f"column {column} has {size} bytes, expected at most {most}")


def _check_values(unit: UnitRows, record: CommitRecord, provenance: Provenance) -> None:
    """The MUSTs of docs/format.md that are about values; each costs one vectorised pass."""
    targets, span = unit.targets, provenance.unit_range(record.unit)
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
        if len(ids) and (ids.min() < 0 or ids.max() >= provenance.teacher.lm_head_rows):
            raise ValueError(
                f"{name} lie in {ids.min()} ... {ids.max()}, the head has {provenance.teacher.lm_head_rows} rows"
            )
    # Extremes are NaN where a value is; so no mask as long as the entries is made.
    lowest, highest = targets.logprobs.min(initial=0.0), targets.logprobs.max(initial=0.0)
    if not (np.isfinite(lowest) and highest <= 1e-3):
        raise ValueError("a log-prob is not finite or above 0")
    # A writer rounds towards nothing that is above 0; and what the head is scaled to, 1 - M, may not vanish.
    if np.isnan(targets.tail_logprob).any() or np.any(targets.tail_logprob > 0):
        raise ValueError("a tail mass is NaN or above 1")
    if np.any((targets.tail_logprob == 0) & (targets.head_size > 0)[:, None]):
        raise ValueError("a token has a head that holds nothing")
    if len(targets) and not targets.lengths.all():
        raise ValueError("a token has no entry")
    longest_sample = int(np.diff(unit.token_offsets).max(initial=0))
    if longest_sample > provenance.corpus.max_length:
        raise ValueError(f"a sample has {longest_sample} tokens, the corpus at most {provenance.corpus.max_length}")
    longest = int(targets.lengths.max(initial=0))
    if longest > provenance.max_entries:
        raise ValueError(f"a token has {longest} entries, the estimator chooses at most {provenance.max_entries}")
    if targets.counts is None and np.any(targets.head_size != targets.lengths):
        raise ValueError("a token has draws, the estimator draws nothing")
    if provenance.estimator.kind == "sampled" and targets.head_size.any():
        raise ValueError("a token has a head, the estimator only draws")
    if targets.counts is not None and np.any(targets.counts[~in_head(targets.offsets, targets.head_size)] < 1):
        raise ValueError("a draw was counted less than once")
    if targets.logsumexp is not None and not np.isfinite(targets.logsumexp).all():
        raise ValueError("a logsumexp is not finite")
    _check_id_order(unit)


def _check_id_order(unit: UnitRows) -> None:
    """Ids ascend strictly within a token's head, and within its draws."""
    targets = unit.targets
    if len(targets.ids) < 2:
        return
    ascending = targets.ids[1:] > targets.ids[:-1]
    # A step may fall where a token ends and where its head ends.
    free = np.zeros(len(targets.ids) + 1, bool)
    free[targets.offsets] = True
    free[targets.offsets[:-1] + targets.head_size] = True
    ascending |= free[1:-1]
    if not ascending.all():
        raise ValueError("the ids of a token do not ascend")
