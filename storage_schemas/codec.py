"""Parquet bytes of a unit and back, and the fidelity of what is stored.

Compression comes only from encodings that every Parquet reader knows and from rounding: ids stay plain absolute
ids, log-probs natural logs. How the settings were chosen: `benchmarks/storage.md`.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.provenance import Recipe
from storage_schemas.rows import SCHEMA, UnitRows, columns_to_unit, concatenate_units, unit_to_table
from storage_schemas.targets import F32, Targets, decode

ROW_GROUP_BYTES = 32 * 2**20
"""Uncompressed bytes of a row group, at most (unless one row alone is larger): what hub viewers can scan."""
PAGE_BYTES = 4 * 2**20
"""Uncompressed bytes of a page: ids of neighbouring tokens repeat, and zstd sees repeats within a page only."""
DICTIONARY_STEP = 3 * 2.0**-6
"""From this grid on, log-probs down to e^-31 have at most 256 values (on the default grid of 2^-4, down to e^-64): one
byte each in a dictionary, which zstd then brings near their entropy. On finer grids byte planes are smaller."""
FINEST_STEP = 2.0**-12
"""Below this grid, in nats, values are stored unrounded."""
STRINGS = ("sample_id", "status")
"""Columns of strings."""
_NO_TAIL = -100.0
"""Log of a mass that is as good as none."""
_CELLS = 2**18
"""Entries that are decoded at a time, padding included: tens of MB, for short heads and whole vocabularies alike."""
_LEAF = "{}.list.element.list.element"


class Rounded(NamedTuple):
    """Targets as they will be stored."""

    targets: Targets
    step: float
    """Grid in nats of log-probs between -4 and -2; 0 when they are exact."""
    fidelity: tuple[float, ...]
    """Mean bucketed KL(exact || stored) in nats, per temperature."""


def round_targets(targets: Targets, *, temperatures: tuple[float, ...], coarsest: float, max_kl: float) -> Rounded:
    """Round log-probs to the coarsest grid of a ladder that begins with `coarsest` and keeps the fidelity gate.

    The grid is `step` between -4 and -2, twice as coarse from -8 to -4 and so on with each doubling, and step / 2
    above -2, down to 0: what an error costs in KL is p times its square. Tail masses keep 9 significant bits (a
    log tail mass near 0, a flat distribution, needs relative precision, since the head is rescaled to
    1 - exp(tail)), logsumexp a fixed grid of step / 4.
    """
    tail = np.minimum(targets.tail_logprob, np.float32(0))
    exact = replace(targets, tail_logprob=tail)
    for step in _ladder(coarsest):
        stored = replace(
            exact,
            logprobs=round_logprobs(exact.logprobs, step),
            tail_logprob=_to_bits(tail),
            logsumexp=None if exact.logsumexp is None else _to_grid(exact.logsumexp, np.float32(step / 4)),
        )
        loss = fidelity(exact, stored, temperatures=temperatures)
        if max(loss) <= max_kl:
            return Rounded(stored, step, loss)
    return Rounded(exact, 0.0, fidelity(exact, exact, temperatures=temperatures))


def _ladder(coarsest: float) -> Iterator[float]:
    """Grids to try: halves, and 3/4 in between as long as a dictionary takes them.

    Not the square root of 1/2, whose multiples fill all bytes of a float, for byte planes the worst case.
    """
    step = coarsest
    while step > 0.0:
        yield step
        if 0.75 * step >= DICTIONARY_STEP:
            yield 0.75 * step
        step = step / 2 if step > FINEST_STEP else 0.0


def round_logprobs(logprobs: F32, step: float) -> F32:
    """Log-probs on the grid that `round_targets` describes."""
    return _to_grid(logprobs, _grid(logprobs, step))


def _grid(logprobs: F32, step: float) -> F32:
    _, exponent = np.frexp(logprobs)
    # 2^octave <= |x| < 2^(octave + 1), and 0 below 1.
    octave = np.maximum(exponent - 1, 0)
    grid: F32 = np.ldexp(np.float32(step), octave - 1)
    return grid


def worst_mass_error(targets: Targets, step: float) -> float:
    """How far a token's probability, head and tail together at T = 1, is from 1 beyond what rounding explains.

    Half a grid step in a log-prob changes p by at most p (e^(grid / 2) - 1), and 9 significant bits change log M by at
    most |log M| / 2^9.
    """
    worst = 0.0
    for start, stop in _slices(targets):
        part = targets.slice(start, stop)
        token = np.repeat(np.arange(len(part)), part.head_size)
        logprobs = part.logprobs[part.in_head]
        p = np.exp(logprobs.astype(np.float64))
        tail = np.maximum(part.tail_logprob[:, 0].astype(np.float64), _NO_TAIL)
        tail_mass = np.exp(tail)
        mass = np.bincount(token, p, len(part)) + tail_mass
        rounding = np.bincount(token, p * np.expm1(_grid(logprobs, step) / 2.0), len(part))
        rounding = rounding + tail_mass * np.expm1(-tail / 2**9)
        worst = max(worst, float((np.abs(mass - 1.0) - rounding).max(initial=0.0)))
    return worst


def fidelity(exact: Targets, stored: Targets, *, temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """Mean KL(exact || stored) in nats over head entries and one tail bucket, per temperature.

    For draws, whose log-probs enter a divergence linearly, the size of their mean error is added.
    """
    totals = np.zeros(len(temperatures))
    for start, stop in _slices(exact):
        for i, temperature in enumerate(temperatures):
            p = decode(exact.slice(start, stop), temperature_index=i, temperature=temperature)
            q = decode(stored.slice(start, stop), temperature_index=i, temperature=temperature)
            tail_mass = np.exp(p.tail_logprob.astype(np.float64))
            with np.errstate(invalid="ignore"):
                gap = p.logprobs.astype(np.float64) - q.logprobs
                tail = np.where(tail_mass > 0, tail_mass * (p.tail_logprob - q.tail_logprob), 0.0)
            totals[i] += (p.weights * gap * p.in_head).sum() + tail.sum()
            totals[i] += abs((p.weights * gap * ~p.in_head).sum())
    return tuple(float(total) / max(len(exact), 1) for total in totals)


def figures(unit: UnitRows) -> dict[str, Any]:
    """What the commit record of a unit says of its rows, by field."""
    targets = unit.targets
    return {
        "rows": len(unit),
        "tokens": len(unit.input_ids),
        "supervised_tokens": len(targets),
        "entries": len(targets.ids),
        "max_id": int(targets.ids.max(initial=-1)),
        "statuses": dict(sorted(Counter(unit.status).items())),
        "mean_kept_mass": mean_kept_mass(targets),
        "mean_entropy": mean_entropy(targets),
    }


def mean_kept_mass(targets: Targets) -> float:
    """Mean probability inside the head, at T = 1."""
    return float(np.mean(-np.expm1(targets.tail_logprob[:, 0].astype(np.float64)))) if len(targets) else 0.0


def mean_entropy(targets: Targets) -> float:
    """Mean entropy in nats: of head and tail bucket for exact heads, an unbiased estimate where there are draws."""
    total = 0.0
    for start, stop in _slices(targets):
        p = decode(targets.slice(start, stop))
        total -= float((p.weights * p.logprobs.astype(np.float64)).sum())
        if targets.counts is None:
            tail_mass = np.exp(p.tail_logprob.astype(np.float64))
            total -= float((tail_mass * np.where(tail_mass > 0, p.tail_logprob, 0.0)).sum())
    return total / max(len(targets), 1)


def _slices(targets: Targets) -> list[tuple[int, int]]:
    step = max(1, _CELLS // int(targets.lengths.max(initial=1)))
    return [(start, min(start + step, len(targets))) for start in range(0, len(targets), step)]


def encode(unit: UnitRows, metadata: dict[str, str], *, step: float = 0.0) -> bytes:
    """Parquet bytes with page checksums, page index and `metadata` as key-value metadata.

    Args:
        unit: the rows, rounded.
        step: grid of the log-probs, 0 if there is none; it decides their encoding.
    """
    table = unit_to_table(unit)
    schema = SCHEMA.with_metadata({key.encode(): value.encode() for key, value in metadata.items()})
    logprobs = _LEAF.format("target_logprobs")
    few_values = step >= DICTIONARY_STEP
    planes = [_LEAF.format("tail_logprob"), _LEAF.format("logsumexp"), *([] if few_values else [logprobs])]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=["status", *([logprobs] if few_values else [])],
        column_encoding=dict.fromkeys(planes, "BYTE_STREAM_SPLIT"),
        data_page_size=PAGE_BYTES,
        write_page_checksum=True,
        write_page_index=True,
        store_schema=True,
    ) as writer:
        for start, stop in _row_groups(unit):
            writer.write_table(table.slice(start, stop - start).replace_schema_metadata(schema.metadata))
    return sink.getvalue()


def open_parquet(data: bytes, *, checked: pq.ParquetFile | None = None) -> pq.ParquetFile:
    """The file's footer; pages are checked against their checksums when read.

    Args:
        data: the whole file.
        checked: the same file, opened before, whose schema is the format's. Now its strings come as dictionaries, in
            which a long one that many rows share takes memory once.
    """
    return pq.ParquetFile(
        pa.BufferReader(data),
        metadata=None if checked is None else checked.metadata,
        read_dictionary=None if checked is None else list(STRINGS),
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def string_limit(rows: int, tokens: int) -> int:
    """Bytes that the ids of a unit, or its statuses, may have: 4 KiB per row, or as much as the text itself."""
    return 2**16 + 2**12 * rows + 2**4 * tokens


def levels(file: pq.ParquetFile) -> list[tuple[int, int]]:
    """Largest definition and repetition level of each column: one for each thing that may be null, or repeat."""
    columns = map(file.schema.column, range(len(SCHEMA)))
    return [(column.max_definition_level, column.max_repetition_level) for column in columns]


def decode_file(file: pq.ParquetFile, recipe: Recipe) -> UnitRows:
    """Flat arrays of a data file with the right schema, whose targets were made by `recipe`.

    Raises:
        ValueError: lists that do not fit together.
    """
    metadata = file.metadata
    # Of the ids, and so of the log-probs: at least as many as there are.
    i = SCHEMA.get_field_index("target_ids")
    entries = sum(metadata.row_group(group).column(i).num_values for group in range(metadata.num_row_groups))
    ids, logprobs = np.empty(entries, np.int32), np.empty(entries, np.float32)
    parts: list[UnitRows] = []
    start = 0
    for batch in file.iter_batches(max(1, metadata.num_rows * _CELLS // max(entries, 1)), use_threads=False):
        columns = dict(zip(SCHEMA.names, batch.columns, strict=True))
        part = columns_to_unit(columns, recipe)
        # Out of the reader's memory, which the next rows take: beside its values it takes two levels per entry,
        # decompressed pages and buffers that grow by doubling.
        stop = start + len(part.targets.ids)
        ids[start:stop], logprobs[start:stop] = part.targets.ids, part.targets.logprobs
        nothing = replace(part.targets, ids=ids[:0], logprobs=logprobs[:0])
        parts.append(replace(part, targets=nothing))
        start = stop
    joined = concatenate_units(parts)
    return replace(joined, targets=replace(joined.targets, ids=ids[:start], logprobs=logprobs[:start]))


def _row_groups(unit: UnitRows) -> list[tuple[int, int]]:
    """Row ranges of at most ROW_GROUP_BYTES uncompressed bytes each, at least one row."""
    if not len(unit):
        return [(0, 0)]
    entries = unit.targets.offsets[unit.target_offsets]
    width = unit.targets.tail_logprob.shape[1]
    # (rows + 1,) bytes of all rows before: ids and mask, entries (id, log-prob, count), per-token values.
    before = 5 * unit.token_offsets + 12 * entries + (4 + 8 * width) * unit.target_offsets
    groups, start = [], 0
    while start < len(unit):
        stop = int(np.searchsorted(before, before[start] + ROW_GROUP_BYTES, side="right")) - 1
        stop = max(start + 1, min(stop, len(unit)))
        groups.append((start, stop))
        start = stop
    return groups


def _to_grid(values: F32, grid: npt.NDArray[np.float32] | np.float32) -> F32:
    # Adding 0 turns -0 into 0.
    rounded: F32 = np.round(values / grid) * grid + np.float32(0)
    return rounded


def _to_bits(values: F32) -> F32:
    """Round to 9 significant bits, to nearest even; infinities stay."""
    mantissa, exponent = np.frexp(values)
    rounded: F32 = np.ldexp(np.round(mantissa * np.float32(2**9)) / np.float32(2**9), exponent)
    return rounded
