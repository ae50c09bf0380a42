"""Export: a dump as the columns that axolotl's KD trainer reads, one Parquet file, for its `skip_prepare_dataset`.

The alignment of axolotl after 0.18.0 (`kd_prepared_targets_alignment: current`): row j describes token j + 1.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.common.errors import MismatchError, UsageError, cannot_write
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.publish import give_name
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from storage_schemas.targets import decode
from teacher_dump.foreign.tables import IGNORED_LABEL

_PAD = -1e9
"""Log-prob of a slot without an entry, as axolotl's own collator fills up."""
_ENTRIES = 2**22
"""Slots that are written at a time, or those of one sample: about 100 MB of lists."""
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "attention_mask": pa.list_(pa.int8()),
        "labels": pa.list_(pa.int32()),
        "target_token_ids": pa.list_(pa.list_(pa.int32())),
        "target_logprobs": pa.list_(pa.list_(pa.float32())),
        "target_mask": pa.list_(pa.list_(pa.int8())),
    }
)


class ExportSummary(FrozenModel):
    """What was written, and what of the dump is not in it."""

    file: str
    """Where it lies."""
    rows: int
    """Samples with targets."""
    rows_left_out: int
    """Samples of another status than `ok`."""
    supervised_tokens: int
    """Tokens with a target."""
    k: int
    """Slots per token."""
    lost_tail_mass: float
    """Mean probability outside the heads, which axolotl's columns have no place for: heads are renormalised."""
    lost_draws: int
    """Entries that were drawn from the tail."""


def export_axolotl(
    url: str, out: Path, *, options: Mapping[str, str] | None = None, progress: Callable[[int, int], None] | None = None
) -> ExportSummary:
    """Write the targets of a sealed dump as axolotl's columns.

    Args:
        out: the file to write; it must not be there.
        progress: called with (units done, units in all).

    Raises:
        MismatchError: the dump is not complete, or has no exact heads; or the file cannot be written.
        UsageError: the file is there, or has another ending.
    """
    if out.suffix != ".parquet" or out.exists():
        raise UsageError(
            f"{out} cannot be written",
            got="it is there" if out.exists() else f"the ending {out.suffix or 'nothing'}",
            expected="the name of a new file, NAME.parquet",
        )
    dump = Dump.open(url, options=options)
    if not dump.is_sealed() or dump.provenance.estimator.kind == "sampled":
        raise MismatchError(
            f"{url} cannot be exported",
            got="it has draws alone, no exact entries" if dump.is_sealed() else "it is not complete",
            expected="a sealed dump with exact heads: estimator topk or adaptive",
            fix="let `llm-neo dump` finish, or dump with estimator.kind: topk",
        )
    units = dump.provenance.units
    # All rows are filled up to it, so that no collator needs to know of shorter ones.
    k = dump.provenance.max_entries - dump.provenance.estimator.draws
    rows = tokens = draws = left_out = 0
    tail = 0.0
    staged = out.with_name(f".{out.name}.staged")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(staged, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for unit in range(units):
                flat = dump.read_unit(unit)
                usable = [row for row in flat if row.targets is not None]
                step = max(1, _ENTRIES // (k * max((len(row.input_ids) for row in usable), default=1)))
                for start in range(0, len(usable), step):
                    part = [_columns(row, k) for row in usable[start : start + step]]
                    writer.write_table(pa.Table.from_pylist(part, schema=_SCHEMA))
                rows, left_out = rows + len(usable), left_out + len(flat) - len(usable)
                tokens += len(flat.targets)
                tail += float(np.exp(flat.targets.tail_logprob[:, 0].astype(np.float64)).sum())
                draws += int((~flat.targets.in_head).sum())
                if progress is not None:
                    progress(unit + 1, units)
        give_name(staged, out)
    except OSError as error:
        raise cannot_write(str(out), error, setting="OUT") from error
    finally:
        staged.unlink(missing_ok=True)
    return ExportSummary(
        file=str(out),
        rows=rows,
        rows_left_out=left_out,
        supervised_tokens=tokens,
        k=k,
        lost_tail_mass=tail / max(1, tokens),
        lost_draws=draws,
    )


def _columns(row: Row, k: int) -> dict[str, object]:
    """One sample. Its heads are renormalised, as axolotl's own preprocessing does."""
    assert row.targets is not None
    ids = np.zeros((len(row.input_ids), k), np.int32)
    logprobs, mask = np.full(ids.shape, _PAD, np.float32), np.zeros(ids.shape, np.int8)
    found = decode(row.targets)
    head = found.in_head[:, :k]
    mass = np.where(found.in_head, np.exp(found.logprobs.astype(np.float64)), 0.0).sum(1, keepdims=True)
    renormalised = found.logprobs - np.log(np.where(mass > 0, mass, 1.0))
    places = row.positions.logits  # Row j describes token j + 1: these are the positions of the logits.
    width = head.shape[1]
    ids[places, :width] = np.where(head, found.ids[:, :k], 0)
    logprobs[places, :width] = np.where(head, renormalised[:, :k], _PAD)
    mask[places, :width] = head
    return {
        "input_ids": row.input_ids,
        "attention_mask": np.ones(len(row.input_ids), np.int8),
        "labels": np.where(row.loss_mask, row.input_ids, IGNORED_LABEL),
        "target_token_ids": list(ids),
        "target_logprobs": list(logprobs),
        "target_mask": list(mask),
    }
