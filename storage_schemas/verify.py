"""Prove a dump without the teacher: every record, every file, every value, and that they add up."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from storage_schemas.commit import (
    CommitRecord,
    count_statuses,
    parse_record,
    record_key,
    records_sha256,
    totals,
    unit_of_record,
)
from storage_schemas.errors import DataError, NeoError
from storage_schemas.reader import Dump
from storage_schemas.section import Section

_THREADS = 4
"""Units that are in work at the same time: reading, hashing and decoding overlap."""


class VerifyReport(Section):
    """What was found."""

    ok: bool
    """Sealed, complete and without errors."""
    sealed: bool
    """Whether the dump is sealed."""
    units: int
    """Units that were proven."""
    rows: int
    """Rows of these units."""
    supervised_tokens: int
    """Supervised tokens of these units."""
    bytes: int
    """Bytes of their data files."""
    errors: list[str]
    """Every problem, one line each."""


def verify(
    url: str, *, options: Mapping[str, str] | None = None, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Read the whole dump and check it against run.json, its commit records and its seal.

    Args:
        url: the dump.
        options: settings of the object store.
        progress: called with (units done, units in all).

    Raises:
        DataError: there is no dump at all.
    """
    dump = Dump.open(url, options=options)
    errors: list[str] = []
    records: dict[int, CommitRecord] = {}
    sealed = False
    try:
        sealed = dump.sealed()
        if sealed:
            dump.records()
        dump.tokenizer_files()
    except NeoError as error:
        errors.append(_line("SEALED.json", error))
    try:
        listed = {key for key, _ in dump.store.list("commits")}
        errors += [f"{key}: no commit record of this dump" for key in sorted(listed) if not _belongs(key, dump)]
    except NeoError as error:
        errors.append(_line("commits", error))

    def check(unit: int) -> CommitRecord | str:
        try:
            return _proven_record(dump, unit, sealed=sealed)
        except NeoError as error:
            return _line(f"unit {unit}", error)

    with ThreadPoolExecutor(_THREADS) as pool:
        for unit, found in enumerate(pool.map(check, range(dump.run.units))):
            if isinstance(found, str):
                errors.append(found)
            else:
                records[unit] = found
            if progress is not None:
                progress(unit + 1, dump.run.units)

    seal = dump.seal() if sealed else None
    if seal is None:
        errors.append("the dump is not sealed")
    elif not errors:
        expected = {**totals(records), "statuses": count_statuses(records), "records_sha256": records_sha256(records)}
        for name, value in expected.items():
            if getattr(seal, name) != value:
                errors.append(f"SEALED.json: {name} is {getattr(seal, name)}, the units give {value}")
    return VerifyReport(ok=not errors, sealed=seal is not None, units=len(records), errors=errors, **_sums(records))


def _proven_record(dump: Dump, unit: int, *, sealed: bool) -> CommitRecord:
    """The unit's own commit record, after everything it says was compared with its file and the manifest."""
    data = dump.store.get_if_present(record_key(unit))
    if data is None:
        raise DataError("its commit record is missing" if sealed else "not committed yet")
    record = parse_record(data, unit, dump.run, url=dump.store.url)
    if sealed and dump.record(unit) != record:
        raise DataError("its commit record differs from the manifest's")
    dump.read_unit(unit)
    return record


def _belongs(key: str, dump: Dump) -> bool:
    unit = unit_of_record(key)
    return unit is not None and unit < dump.run.units


def _line(what: str, error: NeoError) -> str:
    return f"{what}: {' | '.join(line.strip() for line in str(error).splitlines())}"


def _sums(records: Mapping[int, CommitRecord]) -> dict[str, int]:
    return {name: value for name, value in totals(records).items() if name in VerifyReport.model_fields}
