"""Rows of Parquet, Arrow and JSONL files, in order: how most projects store their samples."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.hashes import file_sha256
from storage_schemas.targets import I64, Bool
from teacher_dump.corpus.cache import cache_folder
from teacher_dump.corpus.lines import READERS
from teacher_dump.corpus.masks import Unusable

SUFFIXES = (".parquet", ".arrow", ".jsonl")
_ROWS = 64
"""Rows of a file that are in memory at a time."""
IGNORED_LABEL = -100
"""What transformers computes no loss on."""
_ARROW_FILE = b"ARROW1"
"""What an Arrow file begins with, which is no stream."""
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in the names of files and directories by which `datasets` knows splits."""


class Record(NamedTuple):
    """One row of a file."""

    place: str
    """File and row, for messages."""
    columns: dict[str, Any]
    """Arrow scalars by name."""

    def tokens(self, name: str) -> npt.NDArray[Any]:
        """(tokens,) a column with one value per token."""
        return self._numbers(name, self._list(name))

    def entries(self, name: str, *, empty: float | None = None, like: str | None = None) -> npt.NDArray[Any]:
        """(rows, k) a column with a list per row, filled up with `empty` to the longest.

        Args:
            empty: the value to fill up with; None: all rows are of one length.
            like: another column, whose rows are as long as those of this one.
        """
        rows, lengths = self._rows(name)
        if like is not None:
            _, others = self._rows(like)
            if len(lengths) != len(others):
                raise self.unusable(f"{len(lengths)} rows of {name} for {len(others)} of {like}", "as many")
            for row in np.flatnonzero(lengths != others)[:1]:
                raise self.unusable(
                    f"{lengths[row]} values of {name} for {others[row]} of {like} in row {row} of the sample", "as many"
                )
        if empty is None:
            for row in np.flatnonzero(lengths != lengths[:1])[:1]:
                raise self.unusable(
                    f"{lengths[row]} values of {name} in row {row} of the sample, {lengths[0]} in row 0", "as many"
                )
        values = self._numbers(name, rows.flatten())
        found = np.full((len(rows), int(lengths.max(initial=0))), empty or 0, values.dtype)
        found[np.arange(found.shape[1]) < lengths[:, None]] = values
        return found

    def supervised(self, mask: str) -> Bool | None:
        """(tokens,) what the column `mask` supervises: zeros and ones, or labels, in which -100 is what no loss is
        computed on; None for `all`."""
        if mask == "all":
            return None
        found, tokens = self.tokens(mask), self.tokens("input_ids")
        if len(found) != len(tokens):
            raise self.unusable(f"{len(found)} values of {mask} for {len(tokens)} tokens", "one per token")
        unknown = set(np.unique(found).tolist()) - {0, 1}
        if unknown and IGNORED_LABEL not in unknown and not np.array_equal(found, tokens):
            raise self.unusable(f"{mask} holds {sorted(unknown)[:3]}", "0 and 1, or labels with -100")
        return np.asarray(found != IGNORED_LABEL if unknown else found == 1)

    def unusable(self, got: str, expected: str) -> DataError:
        """What to raise."""
        return DataError(f"{self.place} cannot be imported", got=got, expected=expected, fix="check FORMAT and SOURCE")

    def _list(self, name: str) -> pa.Array:
        if name not in self.columns:
            raise self.unusable(f"no column {name}; there are {', '.join(sorted(self.columns))}", f"a column {name}")
        column = self.columns[name]
        if not _is_list(column.type):
            raise self.unusable(f"{name} is of type {column.type}", "a list")
        if not column.is_valid or column.values.null_count:
            raise self.unusable(f"null in {name}", "a list without nulls")
        return column.values

    def _rows(self, name: str) -> tuple[pa.Array, I64]:
        """A column with a list per row, and how long each is."""
        rows = self._list(name)
        if pa.types.is_null(rows.type):  # Of an empty list in JSON.
            rows = rows.cast(pa.list_(pa.null()))
        if not _is_list(rows.type):
            raise self.unusable(f"{name} is a list of {rows.type}", "a list of lists")
        rows = rows.cast(pa.large_list(rows.type.value_type))
        return rows, np.diff(rows.offsets.to_numpy())

    def _numbers(self, name: str, values: pa.Array) -> npt.NDArray[Any]:
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            if len(values):
                raise self.unusable(f"{name} holds values of type {kind}", "numbers")
            return np.empty(0)
        if values.null_count:
            raise self.unusable(f"null in {name}", "numbers without nulls")
        return np.asarray(values.to_numpy(zero_copy_only=False))


def files_of(source: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of a store, in the order of their names; numbers in these count as numbers.

    Raises:
        MismatchError: there are none, or they are of several splits.
    """
    # `datasets` keeps what `map` made of a data set in cache-*.arrow, in the directory of its data.
    inside = [path for path in source.rglob("*") if path.suffix in suffixes and not path.match("cache-*.arrow")]
    found = [source] if source.is_file() else inside
    if not found or any(path.suffix not in suffixes for path in found):
        raise MismatchError(
            f"{source} is no store that can be imported",
            got="nothing" if not source.exists() else f"no file {' or '.join(f'*{suffix}' for suffix in suffixes)}",
            expected="a file, or a directory of files",
            fix="correct SOURCE; what lies on the hub is fetched by `hf download --repo-type dataset`",
        )
    names = [path.relative_to(source) for path in inside]
    if (source / "dataset_dict.json").is_file():  # Of `DatasetDict.save_to_disk`: a directory for each split.
        splits = {name.parts[0] for name in names}
    else:
        words = (word for name in names for word in re.split("[^a-z]+", str(name).lower()))
        splits = {_SPLITS[word] for word in words if word in _SPLITS}
    if len(splits) > 1:
        raise MismatchError(
            f"{source} holds several splits of a data set",
            got=" and ".join(sorted(splits)),
            expected="one: their samples would be mixed",
            fix="give the file or the directory of one split; or move its files to a directory of their own",
        )
    return sorted(
        found, key=lambda path: (path.parent, [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name)])
    )


def named_hashes(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, by as much of the end of its path as no other has; read once, unless a file changes.

    Raises:
        MismatchError: a file is not there.
    """
    ends = {path: ["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in files}
    shared = Counter(chain.from_iterable(ends.values()))
    found = {}
    for path in files:
        try:
            found[next(end for end in ends[path] if shared[end] == 1)] = file_sha256(
                path, folder=cache_folder() / "hashes"
            )
        except OSError as error:
            raise MismatchError(
                f"{path} cannot be read", got=error.strerror, expected="a file of the store", fix="copy it there"
            ) from error
    return found


def records(files: Sequence[Path]) -> Iterator[Record]:
    """All rows of all files, in order.

    Raises:
        DataError: a file is damaged.
    """
    for path in files:
        try:
            if path.suffix == ".jsonl":
                yield from _lines(path)
                continue
            row = 0
            for batch in _batches(path):
                for i in range(batch.num_rows):
                    yield Record(f"{path}, row {row}", {name: batch.column(name)[i] for name in batch.schema.names})
                    row += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path} cannot be read",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                expected="a whole file of its kind",
                fix="fetch or copy the file again",
            ) from error


def integers(values: npt.NDArray[Any]) -> I64:
    """Ids as int64. Raises DataError for one that is not whole."""
    found = np.asarray(values)
    if found.dtype.kind == "f" and (broken := found[found != np.rint(found)]).size:
        raise DataError(
            "an id is not a whole number",
            got=float(broken.flat[0]),
            expected="token ids",
            fix="name the columns as the store has them: ids and values may be exchanged",
        )
    return found.astype(np.int64)


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path, page_checksum_verification=True).iter_batches(_ROWS)
        return
    with pa.memory_map(str(path)) as file:
        if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
            whole = pa.ipc.open_file(file)
            yield from map(whole.get_batch, range(whole.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _lines(path: Path) -> Iterator[Record]:
    lines, parse = READERS["json"]
    for place, line in lines([path]):
        found = parse(place, line)
        try:
            if isinstance(found, Unusable):
                raise ValueError(found.reason)
            columns = {name: pa.scalar(value) for name, value in found.items()}
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{place} cannot be imported",
                got=str(error)[:300],
                expected="an object whose lists hold numbers of one kind",
                fix="correct the line",
            ) from error
        yield Record(place, columns)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
