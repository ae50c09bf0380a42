"""What a configuration comes to: every setting with its origin, the JSON schema, and what differs between two."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from pipeline.config import Config, Loaded, load
from pipeline.elsewhere import RENAMED
from pipeline.init import TITLE
from pipeline.problems import says
from storage_schemas.common.errors import UsageError
from storage_schemas.common.secrets import is_secret, masked

Origin = Literal["file", "--set", "default"]
KEPT = "config.yaml"
"""The configuration that a run directory keeps."""
_Path = tuple[str, ...]


class Setting(NamedTuple):
    """One setting after defaults."""

    value: Any
    """As JSON, without secrets. A section that is absent is null."""
    origin: Origin


def settings_of(loaded: Loaded) -> dict[str, Setting]:
    """Dotted name, as `--set` takes it -> setting."""
    return {
        ".".join(path): Setting(_shown(value), _origin(loaded, path))
        for path, value in _leaves(loaded.config, loaded.config.model_dump(mode="json"))
    }


def differences(a: Mapping[str, Setting], b: Mapping[str, Setting]) -> dict[str, tuple[Setting | None, Setting | None]]:
    """Dotted name -> both settings, where their values differ; None where a configuration has none of that name."""
    both = {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}
    return {name: (x, y) for name, (x, y) in both.items() if x is None or y is None or x.value != y.value}


def load_any(place: Path) -> Loaded:
    """A configuration file, or the one that a run directory keeps.

    Raises:
        UsageError: there is none.
        MismatchError: it is invalid.
    """
    if place.is_dir() and not (place / KEPT).is_file():
        fix = "give a YAML file, or the directory that train.output names, once training has begun"
        raise UsageError(f"{place} is no run directory", got=f"a directory without {KEPT}", fix=fix)
    return load(place / KEPT if place.is_dir() else place)


def notices(loaded: Loaded) -> Iterator[str]:
    """Sentences about what is allowed and yet may not be meant."""
    teacher, student = loaded.config.teacher, loaded.config.student
    if teacher and student and (teacher.model, teacher.revision) == (student.model, student.revision):
        yield f"student and teacher are the same model, {student.model}: there is nothing to distil, their KL is 0"
    for old, new in RENAMED.items():
        if says(loaded.data, old):
            value: Any = loaded.config
            for name in new.split("."):
                value = getattr(value, name)
            yield f"{old} is called {new} now (here: {value}); the old name is still read"


def schema() -> str:
    """The JSON schema of a configuration, for editors: YAML's language servers know draft 7."""
    found = {"$schema": "http://json-schema.org/draft-07/schema#"} | Config.model_json_schema()
    return json.dumps(found | {"title": TITLE}, indent=2, ensure_ascii=False) + "\n"


def _leaves(model: BaseModel, dumped: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[_Path, Any]]:
    for name in type(model).model_fields:
        value, place = getattr(model, name), (*path, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, dumped[name], place)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for number, (member, inner) in enumerate(zip(value, dumped[name], strict=True)):
                yield from _leaves(member, inner, (*place, str(number)))
        else:
            yield place, dumped[name]


def _origin(loaded: Loaded, path: _Path) -> Origin:
    names = [".".join(path), *(old for old, new in RENAMED.items() if new == ".".join(path))]
    if not any(says(loaded.data, name) for name in names):
        return "default"
    return "--set" if any(_touches(loaded.overridden, name) for name in names) else "file"


def _touches(overridden: Collection[str], name: str) -> bool:
    return any(f"{name}.".startswith(f"{given}.") or given.startswith(f"{name}.") for given in overridden)


def _shown(value: Any) -> Any:
    """A value without secrets: a configuration that holds one is refused, and this is the second lock."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        hidden = {key: "***" for key, inner in value.items() if is_secret(key) and isinstance(inner, str)}
        return {key: _shown(inner) for key, inner in value.items()} | hidden
    return [_shown(inner) for inner in value] if isinstance(value, list) else value
