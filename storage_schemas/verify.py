"""Prove a dump without the teacher: every record, every file, every value, and that they add up."""

from collections.abc import Callable, Mapping

from storage_schemas.commit import count_statuses, records_sha256, totals
from storage_schemas.errors import NeoError
from storage_schemas.reader import Dump, read_record
from storage_schemas.section import Section


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
    records = {}
    sealed = False

    def attempt(what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except NeoError as error:
            errors.append(f"{what}: {' | '.join(line.strip() for line in str(error).splitlines())}")

    def check_unit(unit: int) -> None:
        record = read_record(dump.store, unit, dump.run)
        if sealed and dump.record(unit) != record:
            raise NeoError("the record differs from the manifest's")
        dump.read_unit(unit)
        records[unit] = record

    def check_seal() -> None:
        nonlocal sealed
        sealed = dump.sealed()
        if sealed:
            dump.records()

    attempt("SEALED.json", check_seal)
    for unit in range(dump.run.units):
        if not sealed and dump.store.size(f"commits/unit-{unit:08d}.json") is None:
            errors.append(f"unit {unit}: not committed yet")
        else:
            attempt(f"unit {unit}", lambda unit=unit: check_unit(unit))  # type: ignore[misc]
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
    sums = totals(records)
    return VerifyReport(
        ok=not errors,
        sealed=seal is not None,
        units=len(records),
        errors=errors,
        rows=sums["rows"],
        supervised_tokens=sums["supervised_tokens"],
        bytes=sums["bytes"],
    )
