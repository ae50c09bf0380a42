"""What is wrong with a configuration, in the words of the file that the user wrote, with suggestions."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from storage_schemas.errors import MismatchError
from storage_schemas.masking import masked

UNSAID = object()
"""In place of a value that says nothing about the fault."""


class Problem(NamedTuple):
    """One line of the error message."""

    path: str
    text: str
    got: object = UNSAID
    hint: str | None = None


def report(path: str | Path, set_paths: Collection[str], problems: Sequence[Problem]) -> MismatchError:
    """One error that lists every problem where it stands: in the file, or on the command line."""
    lines = []
    for problem in problems:
        by_hand = any(problem.path == p or problem.path.startswith(f"{p}.") for p in set_paths)
        line = f"  {'--set' if by_hand else path}: {problem.path} -> {problem.text}"
        if problem.got is not UNSAID:
            line += f", got {_short(problem.got)}"
        lines.append(line + (f"; {problem.hint}" if problem.hint else ""))
    lines = list(dict.fromkeys(lines))
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return MismatchError("\n".join([f"the configuration has {count}", *lines]))


def _short(value: object) -> str:
    text = "null" if value is None else masked(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain(details: ErrorDetails, data: Any, model: type[BaseModel]) -> Iterator[Problem]:
    """Pydantic's error about `data` in the words of the file; `model` says which keys there are."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "sections_disagree":
        yield from (Problem(*problem) for problem in context["problems"])
        return
    parts = _location(details, data)
    dotted = ".".join(parts)
    match kind:
        case "extra_forbidden":
            # The input of this error is the value of a key that should not be there: it says nothing about the fault.
            yield Problem(dotted, "unknown key", UNSAID, _similar_key(parts, data, model))
        case "missing":
            yield Problem(dotted, "missing, but required")
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
            hint = _similar(str(details["input"]), allowed)
            yield Problem(dotted, f"must be {context['expected']}", details["input"], hint)
        case "union_tag_invalid":
            allowed = re.findall(r"'([^']*)'", context["expected_tags"])
            hint = _similar(str(context["tag"]), allowed)
            yield Problem(f"{dotted}.kind", f"must be one of {', '.join(allowed)}", context["tag"], hint)
        case "model_type" | "model_attributes_type" | "dict_type":
            yield Problem(dotted, "must be a section, that is a mapping", details["input"])
        case "value_error":
            got = UNSAID if isinstance(details["input"], Mapping) else details["input"]
            yield Problem(dotted, details["msg"].removeprefix("Value error, "), got)
        case _:
            text = details["msg"].replace("Input should be", "must be", 1).partition(" for <class")[0]
            yield Problem(dotted, text[:1].lower() + text[1:], details["input"])


def _location(details: ErrorDetails, data: Any) -> list[str]:
    """The path as it stands in the file: without the union members that pydantic names on the way."""
    parts: list[str] = []
    node = data
    for depth, part in enumerate(details["loc"]):
        absent = details["type"] == "missing" and depth == len(details["loc"]) - 1
        held = part in node if isinstance(node, dict) else isinstance(node, list | tuple) and isinstance(part, int)
        if held:
            node = node[part]
        elif not absent:
            continue
        parts.append(str(part))
    return parts


def _similar(word: str, choices: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f"did you mean {found[0]}?" if found else None


def _similar_key(parts: Sequence[str], data: Any, model: type[BaseModel]) -> str | None:
    """A key of that name or nearly so: in the same section first, else anywhere."""
    estimator = data.get("estimator")
    chosen = estimator.get("kind", "topk") if isinstance(estimator, dict) else "topk"
    section, name = tuple(part for part in parts[:-1] if not part.isdecimal()), parts[-1]
    known = list(dict.fromkeys(_keys(model, chosen)))
    siblings = {path[-1]: (*parts[:-1], path[-1]) for path in known if path[:-1] == section}
    elsewhere = {path[-1]: path for path in known}
    for choices in (siblings, {n: p for n, p in elsewhere.items() if n == name}, elsewhere):
        found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.7)
        if found:
            return f"did you mean {'.'.join(choices[found[0]])}?"
    return f"known here: {', '.join(siblings)}" if siblings else None


def _keys(model: type[BaseModel], estimator_kind: object) -> Iterator[tuple[str, ...]]:
    """Every dotted path that a configuration can have, without list indices; of the estimators, the chosen one's."""
    for name, field in model.model_fields.items():
        yield (name,)
        for member in _models(field.annotation):
            kind = member.model_fields.get("kind")
            if kind is None or estimator_kind in get_args(kind.annotation):
                yield from ((name, *rest) for rest in _keys(member, estimator_kind))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, list, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)
