"""Stage one's end of the dump: create it, commit units to it, seal it."""

import hashlib
import json
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Self

import numpy as np

from storage_schemas import codec
from storage_schemas import dataset_card as card
from storage_schemas.canonical import differences
from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.provenance import Provenance, refuse_differences
from storage_schemas.reader import Dump, parse_unit
from storage_schemas.records import (
    RUN,
    SEAL,
    TOKENIZER,
    CommitRecord,
    Seal,
    TokenizerRecord,
    count_statuses,
    data_key,
    manifest_bytes,
    record_key,
    records_sha256,
    totals,
    unit_of_data,
    unit_of_record,
)
from storage_schemas.rows import Row, UnitRows, rows_to_unit
from storage_schemas.stores.store import Store
from storage_schemas.targets import Targets


class DumpWriter:
    """Any number of workers may hold one for the same URL at the same time."""

    def __init__(self, store: Store, provenance: Provenance) -> None:
        self.store, self.provenance = store, provenance
        self._dump = Dump(store, provenance)

    @classmethod
    def open(cls, url: str, provenance: Provenance, *, options: Mapping[str, str] | None = None) -> Self:
        """Create the dump, or join the one that is there if its content is the same, with what its run.json says.

        Raises:
            MismatchError: the dump at `url` differs in some field (each is named), or the store ignores the condition
                of a conditional write.
        """
        if joined := cls.join(url, provenance, options=options):
            return joined
        store = Store(url, options=options)
        store.probe()
        store.put_new(RUN, provenance.to_json())  # Where another worker was faster, its run.json counts.
        dump = Dump.open(url, options=options)
        dump.provenance.refuse_other(provenance, url=url)
        return cls(dump.store, dump.provenance)

    @classmethod
    def join(cls, url: str, provenance: Provenance, *, options: Mapping[str, str] | None = None) -> Self | None:
        """The dump that is there, or None.

        Raises:
            MismatchError: it differs in some field.
        """
        dump = Dump.open_if_begun(Store(url, options=options))
        if dump is None:
            return None
        dump.provenance.refuse_other(provenance, url=url)
        return cls(dump.store, dump.provenance)

    def put_tokenizer(self, files: Mapping[str, bytes]) -> None:
        """Store the tokenizer, so that stage two never re-tokenises and can check the student's.

        Its files first, then the record that names them: a reader sees all of it or nothing.

        Raises:
            MismatchError: another tokenizer is there already.
        """
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        record = TokenizerRecord(fingerprint=self.provenance.fingerprint, files=hashes)
        present = self._dump.read_tokenizer_record()
        if present is None:
            for name, data in files.items():
                if not self.store.put_new(f"tokenizer/{name}", data):
                    there = hashlib.sha256(self.store.get(f"tokenizer/{name}")).hexdigest()
                    self._refuse_other_tokenizer({name: there}, {name: hashes[name]})
            self.store.put_new(TOKENIZER, record.to_json())
            present = self._dump.read_tokenizer_record()
        self._refuse_other_tokenizer(present.files if present else {}, hashes)

    def _refuse_other_tokenizer(self, present: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        refuse_differences(f"{self.store.url} was started with another tokenizer", differences(present, wanted))

    def has_tokenizer(self) -> bool:
        """Whether the dump has its tokenizer; run.json says that it is the one that made the ids."""
        return self._dump.read_tokenizer_record() is not None

    def committed(self) -> set[int]:
        """Units that are committed now, by listing the records."""
        return self._dump.list_committed()

    def committed_from(self, unit: int) -> tuple[set[int], bool]:
        """Committed units from `unit` on, and whether there may be more: one page of the listing of an object store."""
        keys, more = self.store.list_after(record_key(unit - 1) if unit else "commits/unit")
        found = map(unit_of_record, keys)
        return {each for each in found if each is not None and each < self.provenance.units}, more

    def is_committed(self, unit: int) -> bool:
        """Whether `unit` is committed now, durably."""
        if self.store.size(record_key(unit)) is None:
            return False
        self.store.settle("commits")
        return True

    def is_sealed(self) -> bool:
        """Whether the dump is complete."""
        return self.store.size(SEAL) is not None

    def commit_unit(self, unit: int, rows: Sequence[Row]) -> CommitRecord | None:
        """Encode, prove, write and commit one unit; None if another worker was first.

        Raises:
            DataError: the encoded unit does not read back as what was encoded.
            TemporaryError: the store cannot be written to.
        """
        expected = self.provenance.unit_range(unit)
        if [row.sample_index for row in rows] != list(expected):
            raise ValueError(f"unit {unit} holds samples {expected.start}:{expected.stop}, one row each, in order")
        attempt = uuid.uuid4().hex
        record, data = self._encode(unit, rows, attempt)
        if not self.store.put_new(record.file, data):
            if self.is_committed(unit):
                return None  # A clean-up swept this attempt away.
            raise TemporaryError(
                f"{record.file} exists already", got="a clash of random names", fix="run the same command again"
            )
        faults.point("commit:between")
        if not self.store.put_new(record_key(unit), record.to_json()):
            self._delete(record.file)
            return None
        return record

    def clean(self) -> int:
        """Remove what killed and losing attempts left, also after the seal; how many files.

        No clock decides: a data file goes when its unit's commit record names another one. So nothing that a stopped
        worker could still commit is ever removed, and this may run beside any number of workers.
        """
        committed = self.committed()
        files: dict[int, list[str]] = defaultdict(list)
        for key in self.store.list("data"):
            unit = unit_of_data(key)
            if unit in committed:
                files[unit].append(key)
        orphans = self.store.list("probe")
        crowded = [unit for unit, keys in files.items() if len(keys) > 1]
        for record in self._dump.fetch_records(crowded):
            orphans += [key for key in files[record.unit] if key != record.file]
        removed = sum(self._delete(key) for key in orphans)

        def decided(key: str) -> bool:
            unit = unit_of_data(key)
            return unit in committed or key.startswith("probe/") or self.store.size(key) is not None

        return removed + self.store.remove_staged(decided)

    def seal(self) -> bool:
        """Write the seal if every unit is committed; True if the dump is sealed now."""
        if self.is_sealed():
            self.clean()  # A worker that was stopped before the seal may have put a file after it, and died.
            return True
        if len(self.committed()) < self.provenance.units:
            return False
        self.store.settle("commits")
        records = {record.unit: record for record in self._dump.fetch_records(range(self.provenance.units))}
        manifest = manifest_bytes(records)
        tokenizer = self._dump.read_tokenizer_record()
        seal = Seal(
            fingerprint=self.provenance.fingerprint,
            units=self.provenance.units,
            statuses=count_statuses(records),
            records_sha256=records_sha256(records),
            manifest=f"manifest-{hashlib.sha256(manifest).hexdigest()}.parquet",
            tokenizer=tokenizer.files if tokenizer else {},
            **totals(records),
        )
        self.store.put_new(seal.manifest, manifest)
        self.store.put_new("README.md", card.dataset_card(self.provenance, seal).encode())
        self.store.put_new(SEAL, seal.to_json())
        self.clean()
        return True

    def _delete(self, key: str) -> bool:
        """Delete an orphan, as far as this worker may: it needs no right to delete."""
        try:
            self.store.delete(key)
        except MismatchError:
            return False
        return True

    def _encode(self, unit: int, rows: Sequence[Row], attempt: str) -> tuple[CommitRecord, bytes]:
        provenance = self.provenance
        flat = rows_to_unit(rows, provenance.recipe)
        ids = sum(len(row.sample_id.encode()) + 4 for row in rows)
        most = codec.string_limit(len(rows), len(flat.input_ids))
        if ids > most:
            raise DataError(
                f"the ids of the samples of unit {unit} are too long",
                got=f"{ids} bytes",
                expected=f"at most {most}",
                fix="shorten the ids of the corpus, or leave them out: then a hash of the content is used",
            )
        rounded = codec.round_targets(
            flat.targets,
            temperatures=provenance.temperatures,
            coarsest=provenance.logprob_step,
            max_kl=provenance.max_kl,
        )
        # Not `>`: NaN must not pass.
        if not max(rounded.fidelity) <= provenance.max_kl:
            raise DataError(
                f"unit {unit} misses the fidelity gate",
                got=f"mean KL(exact || stored) {rounded.fidelity} nats at temperatures {provenance.temperatures}",
                expected=f"at most {provenance.max_kl} nats at each",
                fix="the teacher's log-probs are not finite; report it with the configuration of this run",
            )
        stored = replace(flat, targets=rounded.targets)
        metadata = {
            "llm_neo.format_version": str(provenance.format_version),
            "llm_neo.fingerprint": provenance.fingerprint,
            "llm_neo.unit": str(unit),
            "llm_neo.run": json.dumps(provenance.model_dump(mode="json"), sort_keys=True),
        }
        data = codec.encode(stored, metadata, step=rounded.step)
        record = CommitRecord(
            fingerprint=provenance.fingerprint,
            unit=unit,
            file=data_key(unit, attempt),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            fidelity=rounded.fidelity,
            logprob_step=rounded.step,
            **codec.figures(stored),
        )
        _refuse_difference(parse_unit(data, record, provenance, name=record.file), stored, name=record.file)
        return record, data


def _refuse_difference(read: UnitRows, written: UnitRows, *, name: str) -> None:
    """Raise DataError unless the encoded unit reads back as what was encoded."""
    pairs = [(f.name, getattr(read, f.name), getattr(written, f.name)) for f in fields(UnitRows) if f.name != "targets"]
    pairs += [(f.name, getattr(read.targets, f.name), getattr(written.targets, f.name)) for f in fields(Targets)]
    if different := [field for field, here, there in pairs if not np.array_equal(here, there)]:
        raise DataError(
            f"{name} does not read back as what was encoded",
            got=f"other values in {', '.join(different)}",
            expected="the same arrays",
            fix="check this machine's memory and its pyarrow; nothing was written",
        )
