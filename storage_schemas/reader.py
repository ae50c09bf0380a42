"""Stage two's end of the dump: read it, and trust nothing that is not proven."""

import logging
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self

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
    TokenizerRecord,
    proven,
    read_manifest,
    record_key,
    refuse_elsewhere,
    refuse_foreign,
    unit_of_record,
)
from storage_schemas.rows import FIRST_SCHEMA, OK, SCHEMA, STATUSES, UnitRows
from storage_schemas.shared_unit import SharedUnit, write_shared
from storage_schemas.stores.cache import ShardCache
from storage_schemas.stores.shared import SharedFiles
from storage_schemas.stores.store import Store
from storage_schemas.targets import I32, Targets

log = logging.getLogger(__name__)

TOKENIZER_BYTES = 2**30
"""The largest file of a tokenizer that is read."""
MANIFEST_BYTES, MANIFEST_BYTES_PER_UNIT = 2**20, 4096
"""The largest manifest that is read; an ordinary one has 57 bytes per unit."""
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, MemoryError, NotImplementedError, pa.ArrowException)
"""What reading a damaged or hostile Parquet file may raise."""


class Dump:
    """A dump, sealed or still being written."""

    def __init__(self, store: Store, provenance: Provenance, *, cache: ShardCache | None = None) -> None:
        self.store, self.provenance, self._cache = store, provenance, cache
        self._shared: SharedFiles | None = None
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
    ) -> Self:
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
        cache = None if cache_dir is None else ShardCache(cache_dir, limit=cache_bytes)
        dump = cls.open_if_begun(Store(url, options=options), cache=cache)
        if dump is None:
            raise DataError(
                f"there is no dump at {url}",
                got="no run.json",
                expected="a dump made by `llm-neo dump`",
                fix="check the URL, or start stage one first",
            )
        return dump

    @classmethod
    def open_if_begun(cls, store: Store, *, cache: ShardCache | None = None) -> Self | None:
        """The dump in `store`, or None if it has no run.json."""
        provenance = store.parsed_if_present(RUN, Provenance.from_json)
        return None if provenance is None else cls(store, provenance, cache=cache)

    @property
    def fingerprint(self) -> str:
        """Hash of run.json's content."""
        return self.provenance.fingerprint

    def read_seal(self) -> Seal | None:
        """The seal, or None while the dump is being written."""
        if self._seal is None and (seal := self.store.parsed_if_present(SEAL, Seal.from_json)):
            claims = {"fingerprint": (seal.fingerprint, self.fingerprint), "units": (seal.units, self.provenance.units)}
            refuse_elsewhere(f"{self.store.url}/{SEAL}", claims)
            self._seal = seal
        return self._seal

    def is_sealed(self) -> bool:
        """Whether every unit is committed and the dump is complete."""
        return self.read_seal() is not None

    def list_committed(self) -> set[int]:
        """Units that are committed now, by listing the records."""
        listed = map(unit_of_record, self.store.list("commits"))
        return {unit for unit in listed if unit is not None and unit < self.provenance.units}

    def read_records(self) -> Mapping[int, CommitRecord]:
        """All commit records there are: from the manifest of a sealed dump, else by listing."""
        seal = self.read_seal()
        if seal is not None:
            if self._manifest is None:
                self._manifest = self.store.parsed(
                    seal.manifest,
                    partial(read_manifest, seal=seal, provenance=self.provenance),
                    limit=MANIFEST_BYTES + MANIFEST_BYTES_PER_UNIT * seal.units,
                )
            return self._manifest
        new = sorted(self.list_committed() - self._records.keys())
        self.store.settle("commits")
        self._records |= {record.unit: record for record in self.fetch_records(new)}
        return self._records

    def read_record(self, unit: int) -> CommitRecord | None:
        """The commit record of `unit`, or None while it is not committed. One request, unless it is known."""
        if unit not in self._records:
            if self._seal is not None:
                return self.read_records().get(unit)
            record = self.fetch_record(unit)
            if record is None:
                return None
            # Its name may be visible before it is durable: a power loss must not undo what was trained on.
            self.store.settle("commits")
            self._records[unit] = record
        return self._records[unit]

    def fetch_record(self, unit: int) -> CommitRecord | None:
        """What the commit record of `unit` says now, or None.

        Raises:
            DataError: it is torn, names another unit or dump, or claims more than the unit can hold.
            MismatchError: it has another format version.
        """
        record = self.store.parsed_if_present(record_key(unit), CommitRecord.from_json)
        return record and self._own(record, unit)

    def fetch_records(self, units: Collection[int]) -> Iterator[CommitRecord]:
        """As `fetch_record`, of many units that are committed."""
        records = self.store.parsed_many([record_key(unit) for unit in units], CommitRecord.from_json)
        return map(self._own, records, units)

    def _committed(self, unit: int) -> CommitRecord:
        record = self.read_record(unit)
        if record is None:
            raise DataError(
                f"unit {unit} of {self.store.url} is not committed",
                expected=f"commit records 0 ... {self.provenance.units - 1}",
                fix="let stage one finish: run `llm-neo dump` again",
            )
        return record

    def _own(self, record: CommitRecord, unit: int) -> CommitRecord:
        refuse_foreign(record, unit, self.provenance, name=f"{self.store.url}/{record_key(unit)}")
        return record

    def read_unit(self, unit: int) -> UnitRows:
        """All rows of a committed unit, proven against its record.

        Raises:
            DataError: the unit is not committed, its file is missing, torn or tampered with, or breaks a rule of the
                format.
        """
        return self._read_unit(self._committed(unit))

    def _read_unit(self, record: CommitRecord) -> UnitRows:
        if self._cache is None or self.store.root is not None:
            data = self._fetch(record)
        else:
            data = self._cache.get(record.sha256, fetch=lambda: self._fetch(record))
        return parse_unit(data, record, self.provenance, name=f"{self.store.url}/{record.file}")

    def share(self, folder: Path) -> None:
        """From now on, have units of which rows are taken (`open_unit`) decoded once for all processes that share them.

        The last units lie there decoded until the last of these processes is gone; if they cannot, each decodes for
        itself, with a warning.

        Args:
            folder: on a disk of this node, for its user alone. Each node has its own.
        """
        self._shared = SharedFiles(folder)

    @property
    def is_shared(self) -> bool:
        """Whether `open_unit` decodes for other processes, too."""
        return self._shared is not None

    def open_unit(self, unit: int) -> UnitRows | SharedUnit:
        """A committed unit, to take some of its rows: it has `used_tokens`, and `row(i)`.

        A unit that is shared was proven by the process that decoded it, and each row is proven again when it is taken.

        Raises:
            DataError: as `read_unit`.
        """
        shared = self._shared
        if shared is None:
            return self.read_unit(unit)
        record = self._committed(unit)

        def fill(file: BinaryIO) -> None:
            write_shared(file, self._read_unit(record), record)

        try:
            file = shared.get(record.sha256, fill)
            return SharedUnit(file, record, self.provenance, again=partial(self._read_unit, record))
        except OSError as error:
            if self._shared is not None:
                log.warning("units are decoded by each process for itself, since %s", error)
            self._shared = None
            return self._read_unit(record)

    def read_tokenizer(self) -> dict[str, bytes]:
        """Name and content of the tokenizer's files.

        Raises:
            TemporaryError: stage one has not written all of it yet.
            DataError: a file is not the one that was written.
        """
        if seal := self.read_seal():
            files = seal.tokenizer
        elif record := self.read_tokenizer_record():
            self.store.settle("tokenizer")
            files = record.files
        else:
            raise TemporaryError(
                f"the tokenizer of {self.store.url} is not complete yet",
                got=f"no {TOKENIZER}",
                expected="what stage one writes before its first unit",
                fix="run the same command again when `llm-neo dump` has come to its first unit",
            )
        fix = "restore the file: it is one of the teacher's tokenizer"
        return {
            name: self.store.parsed(f"tokenizer/{name}", partial(proven, sha256=sha256, fix=fix), limit=TOKENIZER_BYTES)
            for name, sha256 in sorted(files.items())
        }

    def read_tokenizer_record(self) -> TokenizerRecord | None:
        """TOKENIZER.json, or None as long as the tokenizer is not complete."""
        record = self.store.parsed_if_present(TOKENIZER, TokenizerRecord.from_json)
        if record is not None:
            claims = {"fingerprint": (record.fingerprint, self.fingerprint)}
            refuse_elsewhere(f"{self.store.url}/{TOKENIZER}", claims)
        return record

    def _fetch(self, record: CommitRecord) -> bytes:
        """The proven bytes of a data file."""
        fix = (
            "the file is torn, corrupt or was replaced: restore it; or, while no `llm-neo dump` runs, delete it, "
            f"{record_key(record.unit)}, {SEAL} and manifest-*.parquet, and run the same `llm-neo dump` again: it "
            "computes this unit alone"
        )
        check = partial(proven, sha256=record.sha256, size=record.bytes, fix=fix)
        return self.store.parsed(record.file, check, limit=record.bytes)


def parse_unit(data: bytes, record: CommitRecord, provenance: Provenance, *, name: str) -> UnitRows:
    """Rows of a data file, checked against its record and the rules of the format, before and after decoding.

    Raises:
        DataError: the file breaks a rule.
        MismatchError: it was written by another format version.
    """
    try:
        file = codec.open_parquet(data)
        _check_footer(file, data, record, provenance, name=name)
        unit = codec.decode_file(codec.open_parquet(data, checked=file), provenance.recipe)
        _check_values(unit, record, provenance)
    except _UNREADABLE as error:
        raise DataError(
            f"{name} breaks the dump format",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            expected="what `llm-neo docs format` says",
            fix="run `llm-neo verify`; dump the unit again if the file is damaged",
        ) from error
    return unit


def _check_footer(
    file: pq.ParquetFile, data: bytes, record: CommitRecord, provenance: Provenance, *, name: str
) -> None:
    """Refuse another version, and a file that would decode to more than its record says, before decoding it."""
    if len(data) != record.bytes:  # A cached file is known by its hash alone.
        raise ValueError(f"the file has {len(data)} bytes, its record says {record.bytes}")
    metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    version = metadata.get("llm_neo.format_version")
    refuse_other_version({"format_version": version}, name=name, readable=[str(provenance.format_version)])
    for key, expected in (("llm_neo.fingerprint", provenance.fingerprint), ("llm_neo.unit", str(record.unit))):
        if metadata.get(key) != expected:
            raise ValueError(f"{key} is {metadata.get(key)}, expected {expected}")
    schema = file.schema_arrow.remove_metadata()  # Asked for before anything about their chunks.
    if not schema.equals(SCHEMA) and not schema.equals(FIRST_SCHEMA):
        raise ValueError(f"the columns are {schema}")
    # Values of a column, an empty list or a null counting as one: a file whose footer claims more is a bomb.
    tokens, targets, entries = record.tokens, record.supervised_tokens, record.entries
    limits = {
        **dict.fromkeys(("input_ids", "loss_mask"), tokens),
        **dict.fromkeys(("target_ids", "target_logprobs", "target_counts"), entries),
        "head_size": targets,
        **dict.fromkeys(("tail_logprob", "logsumexp"), targets * len(provenance.temperatures)),
    }
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
    in_order = np.array_equal(unit.sample_index, np.arange(span.start, span.stop))
    # (rows,) Only rows that are ok have targets, and those have one for each token that the mask supervises.
    ok = np.array([status == OK for status in unit.status])
    lengths, of_rows = np.diff(unit.token_offsets), np.diff(unit.target_offsets)
    supervised = np.diff(np.concatenate([[0], np.cumsum(unit.loss_mask)])[unit.token_offsets])
    rows, max_length = provenance.teacher.lm_head_rows, provenance.corpus.max_length
    tokens, entries, max_entries = lengths.max(initial=0), targets.lengths.max(initial=0), provenance.max_entries
    # Extremes are NaN where a value is; so no mask as long as the entries is made.
    lowest, highest = targets.logprobs.min(initial=0.0), targets.logprobs.max(initial=0.0)
    unknown = sorted(set(unit.status) - set(STATUSES))
    rules = {
        f"sample_index is not {span.start} ... {span.stop - 1} in order": not in_order,
        f"unknown status {', '.join(map(ascii, unknown[:3]))}": unknown,
        "loss_mask and targets disagree on the number of supervised tokens": np.any(of_rows != supervised * ok),
        "a row is ok but has no supervised token": np.any(ok & (of_rows == 0)),
        "token 0 of a sample is supervised": unit.loss_mask[unit.token_offsets[:-1][lengths > 0]].any(),
        f"input_ids lie outside of 0 ... {rows - 1}": _outside(unit.input_ids, rows),
        f"target_ids lie outside of 0 ... {rows - 1}": _outside(targets.ids, rows),
        "a log-prob is not finite or above 0": not (np.isfinite(lowest) and highest <= 1e-3),
        # A writer rounds towards nothing that is above 0; and what the head is scaled to, 1 - M, may not vanish.
        "a tail mass is NaN or above 1": not np.all(targets.tail_logprob <= 0),
        "a token has a head that holds nothing": np.any((targets.tail_logprob.T == 0) & (targets.head_size > 0)),
        "a token has no entry": not targets.lengths.all(),
        f"a sample has {tokens} tokens, the corpus at most {max_length}": tokens > max_length,
        f"a token has {entries} entries, the estimator chooses at most {max_entries}": entries > max_entries,
        "a token has draws, the estimator draws nothing":
            targets.counts is None and np.any(targets.head_size != targets.lengths),
        "a token has a head, the estimator only draws":
            provenance.estimator.kind == "sampled" and targets.head_size.any(),
        "a draw was counted less than once": (drawn := targets.draw_counts) is not None and np.any(drawn < 1),
        "a logsumexp is not finite": targets.logsumexp is not None and not np.isfinite(targets.logsumexp).all(),
    }  # fmt: skip
    if broken := [rule for rule, is_broken in rules.items() if is_broken]:
        raise ValueError("; ".join(broken))
    _check_id_order(targets)


def _outside(ids: I32, rows: int) -> bool:
    return bool(ids.min(initial=0) < 0 or ids.max(initial=0) >= rows)


def _check_id_order(targets: Targets) -> None:
    """Ids ascend strictly within a token's head, and within its draws."""
    # A step may fall where a token ends and where its head ends.
    free = np.zeros(len(targets.ids) + 1, bool)
    free[targets.offsets] = True
    free[targets.offsets[:-1] + targets.head_size] = True
    ascending = targets.ids[1:] > targets.ids[:-1]
    ascending |= free[1:-1]
    if not ascending.all():
        raise ValueError("the ids of a token do not ascend")
