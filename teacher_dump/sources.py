"""Records of one source, read through `datasets`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from storage_schemas.errors import DataError
from teacher_dump.config import SourceSection
from teacher_dump.formats import detect_format
from teacher_dump.masks import Unusable

_BATCH = 256
_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
RawRecord = Mapping[str, Any] | Unusable


def read_source(source: SourceSection) -> Iterator[tuple[str, str, RawRecord]]:
    """(where, format, record) of every record of a source, in order.

    Raises:
        DataError: the source cannot be read, or its format is not known.
    """
    kind: str | None = None if source.format == "auto" else source.format
    for number, record in enumerate(_records(source)):
        where = f"{source.path}, record {number + 1}"
        if isinstance(record, Unusable):
            yield where, kind or "text", record
            continue
        if kind is None:
            kind = detect_format(record.keys(), where=source.path)
        yield where, kind, record


def _records(source: SourceSection) -> Iterator[RawRecord]:
    path = Path(source.path)
    builder = _builder(path)
    if "://" not in source.path and builder and not path.is_file():
        raise DataError(
            "a source of the corpus is missing",
            got=f"no file {source.path}",
            expected="a JSONL, JSON or Parquet file, a directory, or a dataset id",
            fix="correct corpus.sources[].path",
        )
    try:
        dataset = _load(source, builder)
    except Exception as error:
        # Arrow refuses a whole file for one bad string; read by line, only that record is lost.
        if builder == "json" and path.suffix in _BUILDERS and path.is_file() and _split_name(source.split) == "train":
            return _json_lines(path, source)
        raise _unreadable(source, error.__cause__ or error) from error
    return _rows(dataset)


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _load(source: SourceSection, builder: str | None) -> Any:
    path = Path(source.path)
    if builder is not None:
        return datasets.load_dataset(builder, data_files=source.path, split=source.split)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_split_name(source.split)]
        return saved.select(range(*_split_range(source, len(saved))))
    return datasets.load_dataset(source.path, source.name, split=source.split)


def _rows(dataset: Any) -> Iterator[RawRecord]:
    for start in range(0, len(dataset), _BATCH):
        stop = min(start + _BATCH, len(dataset))
        try:
            columns = dataset[start:stop]
        except UnicodeDecodeError:
            yield from (_row(dataset, i) for i in range(start, stop))
            continue
        yield from ({name: column[i] for name, column in columns.items()} for i in range(stop - start))


def _row(dataset: Any, i: int) -> RawRecord:
    try:
        row: Mapping[str, Any] = dataset[i]
    except UnicodeDecodeError as error:
        return Unusable(f"not valid Unicode: {error}")
    return row


def _json_lines(path: Path, source: SourceSection) -> Iterator[RawRecord]:
    """Records of a JSONL file, line by line; a line that is not UTF-8 is an unusable record."""
    with path.open("rb") as file:
        numbers = [number for number, line in enumerate(file) if line.strip()]
    first, last = _split_range(source, len(numbers))
    wanted = set(numbers[first:last])
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number not in wanted:
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield Unusable(f"not valid Unicode: {error}")
                continue
            yield _json_object(text, where=f"{path}, line {number + 1}")


def _json_object(text: str, *, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not a JSON object",
            got=f"{error} in {text[:100]!r}",
            expected="one JSON object per line",
            fix="correct or drop the line",
        ) from error
    return record


def _split_name(split: str) -> str:
    return split.split("[")[0]


def _split_range(source: SourceSection, length: int) -> tuple[int, int]:
    """First and last + 1 of a split in the notation of `datasets`, such as `train[:1000]`."""
    try:
        instruction = datasets.ReadInstruction.from_spec(source.split)
        (part,) = instruction.to_absolute({_split_name(source.split): length})
    except (ValueError, AssertionError) as error:
        raise _unreadable(source, error) from error
    return part.from_ or 0, length if part.to is None else part.to


def _unreadable(source: SourceSection, error: BaseException) -> DataError:
    return DataError(
        f"a source of the corpus cannot be read: {source.path}",
        got=f"{type(error).__name__}: {str(error)[:300]}",
        expected="a JSONL, JSON or Parquet file, a directory, or a dataset id, with the configured split",
        fix="correct the file, or corpus.sources[] (path, name, split)",
    )
