"""One row per sample: its Python form, its Arrow schema, and the way between them without a loop over tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage_schemas.common.errors import DataError
from storage_schemas.provenance import Recipe
from storage_schemas.shift import Positions, supervised_positions
from storage_schemas.targets import I32, I64, Targets, concatenate, joined_offsets

OK = "ok"
"""The row has targets for every supervised token."""
EMPTY = "empty"
"""Nothing is supervised."""
TOO_LONG = "too_long"
"""Longer than allowed and dropped by policy."""
NONFINITE = "nonfinite"
"""The teacher's logits hold NaN or infinity."""
INVALID_TEXT = "invalid_text"
"""The record cannot be used: not valid Unicode, of another shape than its format, or refused by the template."""
STATUSES = (OK, EMPTY, TOO_LONG, NONFINITE, INVALID_TEXT)


def _schema(*, nullable: bool) -> pa.Schema:
    """The columns of a data file, with `nullable` elements of lists or without."""

    def some(kind: pa.DataType, nullable: bool = nullable) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=nullable))

    return pa.schema(
        [
            pa.field("sample_index", pa.int64(), nullable=False),
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("input_ids", some(pa.int32()), nullable=False),
            pa.field("loss_mask", some(pa.bool_()), nullable=False),
            pa.field("target_ids", some(some(pa.int32())), nullable=False),
            pa.field("target_logprobs", some(some(pa.float32())), nullable=False),
            pa.field("head_size", some(pa.int32()), nullable=False),
            pa.field("target_counts", some(some(pa.int32()))),
            pa.field("tail_logprob", some(some(pa.float32(), nullable=True)), nullable=False),
            pa.field("logsumexp", some(some(pa.float32()))),
        ]
    )


SCHEMA = _schema(nullable=False)
"""The columns of every data file, in this order; `docs/format.md` says what they mean. Within lists only values of
`tail_logprob` may be null: asking each of the others whether it is there costs a reader of Parquet time."""
FIRST_SCHEMA = _schema(nullable=True)
"""The columns as the first writers declared them. They hold the same values, so no null either."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample. A sample that cannot be used is a row with a status and without targets: nothing is lost."""

    sample_index: int
    """Place in the frozen corpus, from 0."""
    sample_id: str
    """The user's id, or a content hash."""
    status: str
    """One of STATUSES."""
    input_ids: I32
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,) which tokens are supervised; never the first."""
    targets: Targets | None = None
    """One target per supervised token, in order, if the status is `ok` and the teacher was asked."""

    @cached_property
    def positions(self) -> Positions:
        """Of its supervised tokens, and of the logits that predict them."""
        return supervised_positions(self.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRows:
    """All rows of one unit in flat arrays."""

    sample_index: I64
    """(rows,)"""
    sample_id: list[str]
    """(rows,)"""
    status: list[str]
    """(rows,)"""
    token_offsets: I64
    """(rows + 1,) row i owns tokens token_offsets[i]:token_offsets[i + 1]."""
    input_ids: I32
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,)"""
    target_offsets: I64
    """(rows + 1,) row i owns the targets target_offsets[i]:target_offsets[i + 1]."""
    targets: Targets
    """Of all supervised tokens of the unit."""

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def used_tokens(self) -> I64:
        """(rows,) tokens of each row, 0 of one without targets: what it costs in training."""
        return np.where([status == OK for status in self.status], np.diff(self.token_offsets), 0)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    def row(self, i: int, *, own: bool = False) -> Row:
        """Row i of the unit, sharing memory; with `own` its entries, which are most of it, do not keep the unit's."""
        tokens = slice(self.token_offsets[i], self.token_offsets[i + 1])
        ok = self.status[i] == OK
        return Row(
            sample_index=int(self.sample_index[i]),
            sample_id=self.sample_id[i],
            status=self.status[i],
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
            targets=self.targets.slice(*self.target_offsets[i : i + 2].tolist(), own=own) if ok else None,
        )


def rows_to_unit(rows: Sequence[Row], recipe: Recipe) -> UnitRows:
    """Flatten the rows of one unit, whose targets were made by `recipe`.

    Raises:
        ValueError: a row's targets and its loss mask disagree; a bug in what made the row.
    """
    for row in rows:
        supervised = len(row.positions.tokens)
        if row.status not in STATUSES or (row.targets is None) != (row.status != OK):
            raise ValueError(f"sample {row.sample_index}: status {row.status!r} with targets {row.targets is not None}")
        if row.targets is not None and (len(row.targets) != supervised or not supervised):
            raise ValueError(
                f"sample {row.sample_index}: {len(row.targets)} targets for {supervised} supervised tokens"
            )
        try:
            row.sample_id.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the id of sample {row.sample_index} is not valid Unicode",
                got=ascii(row.sample_id),
                expected="text without lone surrogates",
                fix="correct the ids of the corpus, or leave them out: then a hash of the content is used",
            ) from error
        if len(row.input_ids) != len(row.loss_mask):
            raise ValueError(f"sample {row.sample_index}: {len(row.input_ids)} ids, {len(row.loss_mask)} mask entries")
    counts = np.array([0 if row.targets is None else len(row.targets) for row in rows], np.int64)
    return UnitRows(
        sample_index=np.array([row.sample_index for row in rows], np.int64),
        sample_id=[row.sample_id for row in rows],
        status=[row.status for row in rows],
        token_offsets=_offsets([len(row.input_ids) for row in rows]),
        input_ids=np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]),
        loss_mask=np.concatenate([np.empty(0, bool), *(row.loss_mask for row in rows)]),
        target_offsets=_offsets(counts),
        targets=concatenate([no_targets(recipe), *(row.targets for row in rows if row.targets is not None)]),
    )


def no_targets(recipe: Recipe) -> Targets:
    """Targets of zero tokens."""
    per_temperature = np.empty((0, len(recipe.temperatures)), np.float32)
    return Targets(
        offsets=np.zeros(1, np.int64),
        ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        head_size=np.empty(0, np.int32),
        counts=np.empty(0, np.int32) if recipe.estimator.draws else None,
        tail_logprob=per_temperature,
        logsumexp=per_temperature if recipe.logsumexp else None,
    )


def unit_to_table(unit: UnitRows) -> pa.Table:
    """The Arrow table of SCHEMA."""
    targets = unit.targets
    if max(int(targets.offsets[-1]), len(unit.input_ids)) >= 2**31:
        raise DataError(
            "a unit is too large for one file",
            got=f"{int(targets.offsets[-1])} entries",
            expected="fewer than 2^31",
            fix="lower dump.samples_per_unit",
        )

    def lists(name: str, values: Any, *levels: I64) -> pa.Array:
        """A column of lists, or with two levels of offsets of lists of lists; null where there are no values."""
        kind = SCHEMA.field(name).type
        if values is None:
            return pa.nulls(len(unit), kind)
        # Of values per temperature, -inf says "no tail"; in the file that is a null.
        column = pa.array(values.reshape(-1), mask=np.isneginf(values.reshape(-1)) if values.ndim == 2 else None)
        for offsets, of in reversed(list(zip(levels, (kind, kind.value_type), strict=False))):
            column = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), column, of)
        return column

    rows, entries = unit.target_offsets, targets.offsets
    per_temperature = _offsets(np.full(len(targets), targets.tail_logprob.shape[1]))
    columns = [
        pa.array(unit.sample_index),
        pa.array(unit.sample_id, pa.string()),
        pa.array(unit.status, pa.string()),
        lists("input_ids", unit.input_ids, unit.token_offsets),
        lists("loss_mask", unit.loss_mask, unit.token_offsets),
        lists("target_ids", targets.ids, rows, entries),
        lists("target_logprobs", targets.logprobs, rows, entries),
        lists("head_size", targets.head_size, rows),
        lists("target_counts", targets.draw_counts, rows, _offsets(targets.lengths - targets.head_size)),
        lists("tail_logprob", targets.tail_logprob, rows, per_temperature),
        lists("logsumexp", targets.logsumexp, rows, per_temperature),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def columns_to_unit(columns: Mapping[str, pa.Array], recipe: Recipe) -> UnitRows:
    """Flat arrays of the columns of SCHEMA, at Arrow level and sharing their memory.

    Raises:
        ValueError: the lists of one token disagree in length, or a null stands where none may.
    """
    temperatures, draws = len(recipe.temperatures), recipe.estimator.draws > 0
    there = {"target_counts": draws, "logsumexp": recipe.logsumexp}
    names = [name for name in SCHEMA.names if pa.types.is_list(SCHEMA.field(name).type) and there.get(name, True)]
    levels, values = {}, {}
    for name in names:
        levels[name], values[name] = _unfolded(name, columns[name])
    (token_offsets,) = levels["input_ids"]
    target_offsets, entry_offsets = levels["target_ids"]
    per_temperature = _offsets(np.full(len(entry_offsets) - 1, temperatures))

    def agree(name: str, *expected: I64) -> None:
        if name in levels and not all(map(np.array_equal, levels[name], expected)):
            raise ValueError(f"the lists of {name} disagree in length with their neighbours")

    agree("loss_mask", token_offsets)
    agree("target_logprobs", target_offsets, entry_offsets)
    agree("head_size", target_offsets)
    agree("tail_logprob", target_offsets, per_temperature)
    agree("logsumexp", target_offsets, per_temperature)
    if draws:
        agree("target_counts", target_offsets, _offsets(np.diff(entry_offsets) - values["head_size"]))
    targets = Targets(
        offsets=entry_offsets,
        ids=values["target_ids"],
        logprobs=values["target_logprobs"],
        head_size=values["head_size"],
        counts=np.zeros(len(values["target_ids"]), np.int32) if draws else None,
        tail_logprob=values["tail_logprob"].reshape(-1, temperatures),
        logsumexp=values["logsumexp"].reshape(-1, temperatures) if recipe.logsumexp else None,
    )
    if targets.counts is not None:
        targets.counts[~targets.in_head] = values["target_counts"]
    return UnitRows(
        sample_index=columns["sample_index"].to_numpy(),
        sample_id=_texts(columns["sample_id"]),
        status=_texts(columns["status"]),
        token_offsets=token_offsets,
        input_ids=values["input_ids"],
        loss_mask=values["loss_mask"],
        target_offsets=target_offsets,
        targets=targets,
    )


def concatenate_units(parts: Sequence[UnitRows]) -> UnitRows:
    """All rows of `parts`, in order."""
    return UnitRows(
        sample_index=np.concatenate([part.sample_index for part in parts]),
        sample_id=list(chain.from_iterable(part.sample_id for part in parts)),
        status=list(chain.from_iterable(part.status for part in parts)),
        token_offsets=joined_offsets([part.token_offsets for part in parts]),
        input_ids=np.concatenate([part.input_ids for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        target_offsets=joined_offsets([part.target_offsets for part in parts]),
        targets=concatenate([part.targets for part in parts]),
    )


def _offsets(lengths: Any) -> I64:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _texts(array: pa.Array) -> list[str]:
    """Each row's text; of a dictionary, rows with one text share it."""
    if not isinstance(array, pa.DictionaryArray):
        return list(array.to_pylist())
    texts = array.dictionary.to_pylist()
    return [texts[i] for i in array.indices.to_pylist()]


def _unfolded(name: str, column: pa.Array) -> tuple[list[I64], Any]:
    """Offsets of each level of a column's lists, from 0, and the values in the innermost: -inf for a tail's null.

    Raises:
        ValueError: another null.
    """
    levels = []
    while pa.types.is_list(column.type):
        if column.null_count:
            raise ValueError(f"{name} holds null for a list")
        offsets = column.offsets.to_numpy().astype(np.int64)
        levels.append(offsets - offsets[0])
        column = column.flatten()
    if name == "tail_logprob":
        column = column.fill_null(float("-inf"))
    if column.null_count:
        raise ValueError(f"{name} holds null for a value")
    return levels, column.to_numpy(zero_copy_only=False)
