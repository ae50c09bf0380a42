"""Files that are read record by record: JSON, lines of text, and rows of CSV and TSV; bad records are among them.

JSON is not read by `datasets`, whose columns have one type each: it decodes strings that are JSON, rounds numbers and
sorts keys where records differ, and takes text for times.
"""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow import csv

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.masks import Unusable

RawRecord = Mapping[str, Any] | Unusable
_BLANKS = re.compile(r"\s*")
_BLOCK_BYTES = 2**24
"""A row of a table is at most so long."""


def _lines(paths: Sequence[str | Path]) -> Iterator[tuple[str, bytes]]:
    """(where, line) of every line with something on it."""
    for path in paths:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            # zstandard's reader knows no lines.
            for number, line in enumerate(io.BufferedReader(file), 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield f"{path}, line {number}", content


def _documents(paths: Sequence[str | Path]) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON files: lines as bytes, or the objects of a list or that take several lines."""
    for path in paths:
        where, first = next(_lines([path]), ("", b""))
        if first.lstrip()[:1] == b"[" or not _is_json(first):
            with fsspec.open(str(path), "rb", compression="infer") as file:
                whole = _parsed(file.read(), where=str(path))
            if whole is not None:
                yield from ((f"{path}, object {number}", one) for number, one in enumerate(whole, 1))
                continue
        if where:
            yield from _lines([path])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except UnicodeDecodeError:
        return True  # This record is unusable, the others are not.
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(content: bytes, *, where: str) -> list[Any] | None:
    """The elements of a list, or JSON objects one after the other; None if it is neither.

    Raises:
        DataError: a list that is not JSON.
    """
    decoder, found, place = json.JSONDecoder(), list[Any](), 0
    try:
        text = content.decode("utf-8-sig").strip()
        while place < len(text):
            one, place = decoder.raw_decode(text, place)
            found.append(one)
            place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] != b"[":
            return None
        expected, fix = (
            "a list of JSON objects",
            "correct the file, or make it one object per line, of which one may be bad",
        )
        raise DataError(f"{where} is no JSON", got=f"{error}", expected=expected, fix=fix) from error
    return found[0] if len(found) == 1 and isinstance(found[0], list) else found


def _json_object(where: str, given: Any) -> RawRecord:
    text = given
    try:
        if isinstance(given, bytes):
            text = given.decode()
            given = json.loads(text)
        if isinstance(given, str):
            return {"text": given}
        if not isinstance(given, dict):
            raise ValueError("not an object")
    except UnicodeDecodeError as error:
        return Unusable(f"not valid Unicode: {error}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not a JSON object",
            got=f"{error} in {str(text)[:100]!r}",
            expected="one JSON object per line, or a list of them",
            fix="correct or drop it",
        ) from error
    return given


def _text(_: str, line: bytes) -> RawRecord:
    return _row(_, {"text": line.rstrip(b"\r\n")})


def _rows(paths: Sequence[str | Path], *, delimiter: str) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """(file, row) of every row of tables with a header."""
    how = csv.ReadOptions(block_size=_BLOCK_BYTES)
    quoted = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    for path in paths:
        try:
            with fsspec.open(str(path), "rb", compression="infer") as file:
                names = csv.open_csv(file, how, quoted).schema.names
            if len(set(names)) < len(names):
                raise ValueError(f"a column has the name of another: {', '.join(names)}")
            # Text stays text: 007, 2024-01-01 and NA are no numbers, times or nulls.
            types = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()))
            with fsspec.open(str(path), "rb", compression="infer") as file:
                for batch in csv.open_csv(file, how, quoted, types):
                    yield from ((str(path), row) for row in batch.to_pylist())
        except (pa.ArrowInvalid, ValueError) as error:
            raise DataError(
                f"a table of the corpus cannot be read: {path}",
                got=str(error)[:300],
                expected="a header, and as many values in each row as the header has names",
                fix="correct the file, or convert it to JSONL",
            ) from error


def _row(_: str, row: Mapping[str, bytes]) -> RawRecord:
    try:
        return {name: value.decode() for name, value in row.items()}
    except UnicodeDecodeError as error:
        return Unusable(f"not valid Unicode: {error}")


READERS: dict[str, tuple[Callable[..., Iterator[tuple[str, Any]]], Callable[[str, Any], RawRecord]]] = {
    "json": (_documents, _json_object),
    "text": (_lines, _text),
    "csv": (partial(_rows, delimiter=","), _row),
    "tsv": (partial(_rows, delimiter="\t"), _row),
}
"""Kind of file -> (what gives the place and the bytes of each of its records, what makes a record of them)."""
