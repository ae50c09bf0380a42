"""Canonical JSON: one sequence of bytes for one value, so that it can be hashed; and how such files are read."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ValidationError

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import FrozenModel

FORMAT_VERSION = 1
"""Version of the dump format."""
OTHER_VERSION = "use the version of llm-neo that wrote this dump, or dump again"
"""What to do about a dump of another version."""
M = TypeVar("M", bound=BaseModel)


def canonical_json(value: Any, *, indent: int | None = None) -> bytes:
    """Sorted keys, no NaN, UTF-8, one trailing newline; two equal values give equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=separators, indent=indent)
    return (text + "\n").encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, and the hash of it as `checksum`: such a file proves itself."""
    return {**content, "checksum": digest(content)}


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Parse an object of at most 64 MiB; duplicate keys, NaN and deep nesting are refused with DataError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("duplicate key")
        return dict(pairs)

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not a number")

    try:
        if len(data) > 64 * 2**20:
            raise ValueError("more than 64 MiB")
        value = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _not_valid(name, f"{type(error).__name__}: {str(error)[:200]}", expected="a JSON object") from error
    return value


def refuse_other_version(
    content: Mapping[str, Any], *, name: str, readable: Collection[object] = (FORMAT_VERSION,), fix: str = OTHER_VERSION
) -> None:
    """Raise MismatchError unless `content` is of a version that this code reads."""
    version = content.get("format_version")
    if version not in readable or isinstance(version, bool):
        raise MismatchError(
            f"{name} has another format version", got=version, expected=" or ".join(map(str, readable)), fix=fix
        )


def validated(model: type[M], content: Mapping[str, Any], *, name: str) -> M:
    """`model` from parsed JSON, or DataError that names every bad field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        expected = f"the fields of {model.__name__}, see `llm-neo docs format`"
        raise _not_valid(name, problems[:1000], expected=expected) from error


def _not_valid(name: str, got: str, *, expected: str) -> DataError:
    fix = "the file is torn or was not written by this project; run `llm-neo verify`"
    return DataError(f"{name} is not valid", got=got, expected=expected, fix=fix)


class ProvenJson(FrozenModel):
    """A JSON file with a checksum in it: there is one sequence of bytes for one content, and no other is accepted."""

    indent: ClassVar[int | None] = None
    restore: ClassVar[str] = "restore the file from a backup, or dump again into another URL"
    """What to do about a file that was changed."""
    other_version: ClassVar[str] = OTHER_VERSION
    """What to do about one of another version."""

    format_version: int = FORMAT_VERSION
    """Version of the format that the file belongs to."""

    def to_json(self) -> bytes:
        """Canonical JSON; `checksum` is the sha256 of the canonical JSON without it."""
        return canonical_json(with_checksum(self.model_dump(mode="json")), indent=self.indent)

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Self:
        """Parse and check such a file.

        Raises:
            DataError: torn, tampered with, or of another shape.
            MismatchError: another format version.
        """
        content = parse_json(data, name=name)
        readable = (cls.model_fields["format_version"].default,)
        refuse_other_version(content, name=name, readable=readable, fix=cls.other_version)
        content.pop("checksum", None)
        found = validated(cls, content, name=name)
        if found.to_json() != data:
            raise DataError(
                f"{name} is torn or was changed",
                got=f"{len(data)} bytes in another form, or with another checksum",
                expected="canonical JSON with its own sha256 in `checksum`",
                fix=cls.restore,
            )
        return found


class Differences(NamedTuple):
    """In what two nested dictionaries differ."""

    keys: list[str]
    """Dotted names."""
    here: str
    """`name = value` of the first, for each."""
    there: str
    """The same of the second."""


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Differences | None:
    """Every leaf that is not the same, or None if all are."""
    one, other = dict(leaves(here)), dict(leaves(there))
    keys = [key for key in sorted(one | other) if one.get(key, ...) != other.get(key, ...)]
    told = ["; ".join(f"{key} = {side.get(key, 'absent')}" for key in keys) for side in (one, other)]
    return Differences(keys, *told) if keys else None


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dictionaries."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
