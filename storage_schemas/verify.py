"""Prove a dump without the teacher: every record, every file, every value, and that they add up."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from storage_schemas.codec import figures, worst_mass_error
from storage_schemas.common.errors import DataError, NeoError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord, count_statuses, record_key, records_sha256, totals, unit_of_data
from storage_schemas.rows import UnitRows

_MEAN_ERROR = 2.0**-21
"""Relative error of a mean. Its terms are products of two float32, each of which may differ by one unit in the last
place (2^-23) on another machine's exponential; all terms of an entropy have one sign."""
_MASS_ERROR = 1e-3
"""What the teacher's float32 softmax may miss 1 by, as in the limit of a single log-prob."""
_WINDOW = 1024
"""Units that are handed to the threads at a time."""
_NAMED = 16
"""Units without a record that are named one by one."""
_THREADS = 4
"""Units that are in work at the same time: reading, hashing and decoding overlap."""


class VerifyReport(FrozenModel):
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
    orphans: list[str] = []
    """Data files of a sealed dump that no commit record names. This project's readers pass them by, but tools that read
    all of data/ do not; `llm-neo dump` removes them, with the right to delete."""


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
    sealed, units = False, list[int]()
    with _noted(errors, "SEALED.json"):
        sealed = dump.is_sealed()
        if sealed:
            dump.read_records()
        dump.read_tokenizer()
    with _noted(errors, "commits"):
        listed = set(dump.store.list("commits"))
        units = sorted(dump.list_committed())
        strange = listed - set(map(record_key, units))
        errors += [f"{key}: no commit record of this dump" for key in sorted(strange)]

    records: dict[int, CommitRecord] = {}

    def check(unit: int) -> list[str]:
        told: list[str] = []
        with _noted(told, f"unit {unit}"):
            records[unit] = _proven_record(dump, unit, sealed=sealed)
        return told

    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(units), _WINDOW):
            for told in pool.map(check, units[start : start + _WINDOW]):
                errors += told
                done += 1
                if progress is not None:
                    progress(done, len(units))
    errors += _absent(units, dump.provenance.units, sealed=sealed)
    orphans: list[str] = []
    with _noted(errors, "data"):
        if sealed:
            named = {record.file for record in records.values()}
            unnamed = set(dump.store.list("data")) - named
            orphans = sorted(key for key in unnamed if unit_of_data(key) in records)

    seal = dump.read_seal() if sealed else None
    sums = totals(records)
    if seal is None:
        errors.append("the dump is not sealed")
    elif not errors:
        expected = {**sums, "statuses": count_statuses(records), "records_sha256": records_sha256(records)}
        for name, value in expected.items():
            if getattr(seal, name) != value:
                errors.append(f"SEALED.json: {name} is {getattr(seal, name)}, the units give {value}")
    return VerifyReport(
        ok=not errors,
        sealed=sealed,
        units=len(records),
        rows=sums["rows"],
        supervised_tokens=sums["supervised_tokens"],
        bytes=sums["bytes"],
        errors=errors,
        orphans=orphans,
    )


@contextmanager
def _noted(errors: list[str], what: str) -> Iterator[None]:
    """An error in the block becomes a line of `errors`, after what it is about."""
    try:
        yield
    except NeoError as error:
        errors.append(f"{what}: {' | '.join(line.strip() for line in str(error).splitlines())}")


def _absent(units: Sequence[int], expected: int, *, sealed: bool) -> list[str]:
    """A line for each of the first units without a commit record, and one for all others: run.json may claim many."""
    missing, there = expected - len(units), set(units)
    what = "its commit record is missing" if sealed else "not committed yet"
    first = list(itertools.islice((unit for unit in range(expected) if unit not in there), min(missing, _NAMED)))
    rest = [f"{missing - len(first)} more units: {what}"] if missing > len(first) else []
    return [f"unit {unit}: {what}" for unit in first] + rest


def _proven_record(dump: Dump, unit: int, *, sealed: bool) -> CommitRecord:
    """The unit's own commit record, after everything it says was compared with its file and the manifest."""
    record = dump.fetch_record(unit)
    if record is None:
        raise DataError("its commit record is missing")
    if sealed and dump.read_record(unit) != record:
        raise DataError("its commit record differs from the manifest's")
    if wrong := list(_contradictions(dump.read_unit(unit), record, dump.provenance)):
        raise DataError(f"its commit record and its data disagree: {'; '.join(wrong)}")
    return record


def _contradictions(unit: UnitRows, record: CommitRecord, provenance: Provenance) -> Iterator[str]:
    """What a record says that its unit's rows do not: every statistic is computed again."""
    for name, here in figures(unit).items():
        got = getattr(record, name)
        # NaN must not pass.
        near = abs(got - here) <= _MEAN_ERROR * (1.0 + abs(here)) if isinstance(here, float) else got == here
        if not near:
            yield f"{name} is {got}, the rows give {here}"
    if not all(-_MEAN_ERROR <= value <= provenance.max_kl for value in record.fidelity):
        yield f"fidelity is {record.fidelity}, the gate {provenance.max_kl}"
    if not 0.0 <= record.logprob_step <= provenance.logprob_step:
        yield f"logprob_step is {record.logprob_step}, the coarsest allowed {provenance.logprob_step}"
    if (error := worst_mass_error(unit.targets, record.logprob_step)) > _MASS_ERROR:
        yield f"a token's head and tail hold 1 +- {error:.3g}, beyond rounding"
