"""Parquet bytes of a unit and back, and the fidelity of what is stored.

Compression comes only from encodings that every Parquet reader knows and from rounding: ids stay plain absolute
ids, log-probs natural logs. How the settings were chosen: `benchmarks/storage.md`.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.rows import SCHEMA, UnitRows, table_to_unit, unit_to_table
from storage_schemas.targets import F32, Targets, decode

ROW_GROUP_BYTES = 32 * 2**20
"""Uncompressed bytes of a row group, at most (unless one row alone is larger): what hub viewers can scan."""
FINEST_STEP = 2.0**-12
"""Below this grid, in nats, values are stored unrounded."""
_CELLS = 2**19
"""Padded entries that are decoded at a time: few enough for the processor's cache."""
_LEAF = "{}.list.element.list.element"


class Rounded(NamedTuple):
    """Targets as they will be stored."""

    targets: Targets
    step: float
    """Grid in nats that the log-probs lie on; 0 when they are exact."""
    fidelity: tuple[float, ...]
    """Mean bucketed KL(exact || stored) in nats, per temperature."""


def round_targets(targets: Targets, *, temperatures: tuple[float, ...], coarsest: float, max_kl: float) -> Rounded:
    """Round log-probs to the coarsest grid that keeps the fidelity gate, halving from `coarsest` down.

    Tail masses and logsumexp keep 8 significant bits below the point: a log tail mass near 0 (a flat distribution)
    needs relative precision, since 1 - exp(tail) is what the head is rescaled to.
    """
    step = coarsest
    while True:
        stored = Targets(
            offsets=targets.offsets,
            ids=targets.ids,
            logprobs=_to_grid(targets.logprobs, step),
            head_size=targets.head_size,
            counts=targets.counts,
            tail_logprob=_to_bits(targets.tail_logprob) if step else targets.tail_logprob,
            logsumexp=None if targets.logsumexp is None else _to_grid(targets.logsumexp, step / 4),
        )
        loss = fidelity(targets, stored, temperatures=temperatures)
        if step == 0.0 or max(loss) <= max_kl:
            return Rounded(stored, step, loss)
        step = step / 2 if step > FINEST_STEP else 0.0


def fidelity(exact: Targets, stored: Targets, *, temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """Mean KL(exact || stored) in nats over head entries and one tail bucket, per temperature.

    For draws, whose log-probs enter a divergence linearly, the size of their mean error is added.
    """
    totals = np.zeros(len(temperatures))
    for start, stop in _slices(exact):
        for i, temperature in enumerate(temperatures):
            p = decode(exact.slice(start, stop), temperature_index=i, temperature=temperature)
            q = decode(stored.slice(start, stop), temperature_index=i, temperature=temperature)
            gap = p.logprobs.astype(np.float64) - q.logprobs
            tail_mass = np.exp(p.tail_logprob.astype(np.float64))
            with np.errstate(invalid="ignore"):
                tail = np.where(tail_mass > 0, tail_mass * (p.tail_logprob - q.tail_logprob), 0.0)
            totals[i] += (p.weights * gap * p.in_head).sum() + tail.sum()
            totals[i] += abs((p.weights * gap * ~p.in_head).sum())
    return tuple(float(total) / max(len(exact), 1) for total in totals)


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


def encode(unit: UnitRows, metadata: dict[str, str]) -> bytes:
    """Parquet bytes with page checksums, page index and `metadata` as key-value metadata."""
    table = unit_to_table(unit)
    schema = SCHEMA.with_metadata({key.encode(): value.encode() for key, value in metadata.items()})
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=["status"],
        column_encoding={
            _LEAF.format("target_logprobs"): "BYTE_STREAM_SPLIT",
            _LEAF.format("tail_logprob"): "BYTE_STREAM_SPLIT",
            _LEAF.format("logsumexp"): "BYTE_STREAM_SPLIT",
        },
        write_page_checksum=True,
        write_page_index=True,
        store_schema=True,
    ) as writer:
        for start, stop in _row_groups(unit):
            writer.write_table(table.slice(start, stop - start).replace_schema_metadata(schema.metadata))
    return sink.getvalue()


def open_parquet(data: bytes) -> pq.ParquetFile:
    """The file's footer; pages are checked against their checksums when read."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, arrow_extensions_enabled=False)


def decode_file(file: pq.ParquetFile, *, temperatures: int, draws: bool, logsumexp: bool) -> UnitRows:
    """Flat arrays of a data file.

    Raises:
        ValueError: another schema, or lists that do not fit together.
    """
    if not file.schema_arrow.remove_metadata().equals(SCHEMA):
        raise ValueError(f"the columns are {file.schema_arrow.remove_metadata()}")
    return table_to_unit(file.read(use_threads=False), temperatures=temperatures, draws=draws, logsumexp=logsumexp)


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


def _to_grid(values: F32, step: float) -> F32:
    return (
        values
        if step == 0.0
        else (np.round(values / np.float32(step)) * np.float32(step)).astype(np.float32) + np.float32(0.0)
    )


def _to_bits(values: F32) -> F32:
    """Round to 9 significant bits (one implicit, 8 stored), to nearest even; infinities stay."""
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = 15
    rounded = bits + np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    kept = (rounded >> np.uint32(dropped)) << np.uint32(dropped)
    return np.where(np.isfinite(values), kept.view(np.float32), values).astype(np.float32)
