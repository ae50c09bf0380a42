"""What a source calls its columns and roles, brought to the names that formats read."""

from collections.abc import Iterator, Mapping
from typing import Any

from storage_schemas.common.errors import DataError
from teacher_dump.config import SourceSection
from teacher_dump.corpus.formats import Message
from teacher_dump.corpus.lines import RawRecord
from teacher_dump.corpus.masks import Unusable

_TURNS = ("messages", "conversations", "prompt", "completion")
"""Columns that may hold messages."""


def named(
    source: SourceSection, numbered: Iterator[tuple[int, RawRecord]], *, uniform: bool
) -> Iterator[tuple[int, RawRecord]]:
    """(place, record) with the names of formats, and without the columns that are ignored.

    Args:
        source: its `columns`, `roles` and `ignore_columns`.
        numbered: (place, record) as its files have them.
        uniform: whether each record has the columns of all.

    Raises:
        DataError: no record has a column that is named.
    """
    missing = set(source.columns.values())
    for number, record in numbered:
        if not isinstance(record, Unusable):
            missing -= record.keys()
            if missing and uniform:
                raise _absent(source, missing, record)
            record = _renamed(record, source)
        yield number, record
    if missing and not uniform:
        raise _absent(source, missing, {})


def _renamed(record: Mapping[str, Any], source: SourceSection) -> Mapping[str, Any]:
    taken = {*source.columns, *source.columns.values(), *source.ignore_columns}
    found = {name: value for name, value in record.items() if name not in taken}
    found |= {ours: record[theirs] for ours, theirs in source.columns.items() if theirs in record}
    for column in _TURNS if source.roles else ():
        if isinstance(turns := found.get(column), list):
            found[column] = [_with_role(turn, source.roles) if isinstance(turn, Mapping) else turn for turn in turns]
    return found


def _with_role(message: Mapping[str, Any], roles: Mapping[str, str]) -> Message:
    return {
        key: roles.get(value, value) if key in ("role", "from") and isinstance(value, str) else value
        for key, value in message.items()
    }


def _absent(source: SourceSection, missing: set[str], record: Mapping[str, Any]) -> DataError:
    ours = ", ".join(f"{name}: {column}" for name, column in source.columns.items() if column in missing)
    return DataError(
        f"{source.path} has no column {', '.join(sorted(missing))}, which corpus.sources[].columns names",
        got=f"columns {', '.join(sorted(record))}" if record else "no record with it",
        expected=f"the columns of {{{ours}}}",
        fix="correct `columns` of this source",
    )
