"""What is wrong with a configuration, in the words of the file that the user wrote, with suggestions."""

import difflib
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipeline import elsewhere
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.secrets import masked
from storage_schemas.common.suggest import did_you_mean

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = 40
_REPR.maxlevel = 4
UNSAID = object()
"""In place of a value that says nothing about the fault."""


class Problem(NamedTuple):
    """One line of the error message."""

    path: str
    text: str
    got: object = UNSAID
    hint: str | None = None


def report(
    path: str | Path, set_paths: Collection[str], problems: Sequence[Problem], written: Any = None
) -> MismatchError:
    """One error that lists every problem where it stands, on the command line or in the file, which holds `written`."""
    lines = []
    for problem in problems:
        by_hand = any(
            problem.path == p
            or problem.path.startswith(f"{p}.")
            # A section that only the command line has made.
            or (p.startswith(f"{problem.path}.") and not says(written, problem.path))
            # What a section says of one of its fields.
            or (p.startswith(f"{problem.path}.") and re.search(rf"\b{p.rpartition('.')[2]}\b", problem.text))
            for p in set_paths
        )
        # What disagrees with it.
        named = re.findall(r"[\w.]*\w", problem.text)
        other = next((p for p in set_paths if "." in p and p in named), None)
        place = "--set" if by_hand else f"{path} and --set {other}" if other else path
        line = f"  {place}: {problem.path} -> {problem.text}"
        if problem.got is not UNSAID:
            line += f", got {_short(problem.got)}"
        lines.append(line + (f"; {problem.hint}" if problem.hint else ""))
    lines = list(dict.fromkeys(lines))
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return MismatchError("\n".join([f"the configuration has {count}", *lines]))


def says(data: Any, dotted: str) -> bool:
    """Whether a configuration, as it is written, has something at a place; numbers in its name index lists."""
    for part in dotted.split("."):
        if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
        else:
            return False
    return True


def _short(value: object) -> str:
    """A value for a message: no secret, and nothing large is printed to be cut afterwards."""
    text = masked("null" if value is None else _REPR.repr(value))
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
        case "extra_forbidden" if dotted in elsewhere.RENAMED:  # Alone it is read.
            yield Problem(dotted, f"old name of {elsewhere.RENAMED[dotted]}; give one")
        case "extra_forbidden":
            # The input of this error is the value of a key that should not be there: it says nothing about the fault.
            yield Problem(dotted, "unknown key", UNSAID, _similar_key(parts, data, model))
        case "missing":
            inner = list(_models(model.model_fields[dotted].annotation)) if len(parts) == 1 else []
            needed = [name for member in inner for name, field in member.model_fields.items() if field.is_required()]
            yield Problem(".".join([dotted, *needed[:1]]), "missing, but required")
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
            said = _short(details["input"]).strip("'")
            hint = elsewhere.value(dotted, said) or did_you_mean(said, allowed)
            yield Problem(dotted, f"must be {context['expected']}", details["input"], hint)
        case "union_tag_invalid":
            allowed = re.findall(r"'([^']*)'", context["expected_tags"])
            hint = did_you_mean(_short(context["tag"]).strip("'"), allowed)
            yield Problem(f"{dotted}.kind", f"must be one of {', '.join(allowed)}", context["tag"], hint)
        case "model_type" | "model_attributes_type" | "dict_type":
            hint = _as_section(parts, details["input"], model)
            yield Problem(dotted, "must be a section, that is a mapping", details["input"], hint)
        case "list_type" | "tuple_type":
            yield Problem(dotted, "must be a list", details["input"], _as_list(parts, details["input"], model))
        case "value_error":
            got = UNSAID if isinstance(details["input"], Mapping) else details["input"]
            yield Problem(dotted, details["msg"].removeprefix("Value error, "), got)
        case _:
            text = (
                details["msg"]
                .replace("Input should be", "must be", 1)
                .replace("Input is not a valid", "must be a")
                .partition(" for <class")[0]
            )
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


def _similar_key(parts: Sequence[str], data: Any, model: type[BaseModel]) -> str | None:
    """A key of that name or nearly so: in the same section first, then below it, else anywhere."""
    section, name = tuple(part for part in parts[:-1] if not part.isdecimal()), parts[-1]
    around = data.get("heldout") if section[:2] == ("heldout", "estimator") else data
    estimator = around.get("estimator") if isinstance(around, dict) else None
    chosen = estimator.get("kind", "topk") if isinstance(estimator, dict) else "topk"
    if hint := elsewhere.setting(name, section):
        return hint
    if ":" in name:
        return "a colon needs a blank after it"
    for member in _members(section, model) if section[-1:] == ("estimator",) else ():
        if name in member.model_fields:
            kind, place = get_args(member.model_fields["kind"].annotation)[0], ".".join(section)
            return f"{place}.kind {chosen} has none, {kind} has: --set '{place}={{kind: {kind}, {name}: ...}}'"
    # What is said of held-out samples alone comes last.
    known = sorted(dict.fromkeys(keys(model, chosen)), key=lambda path: path[:2] == ("heldout", "estimator"))
    siblings = {path[-1]: (*parts[:-1], path[-1]) for path in known if path[:-1] == section}
    if found := difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.7):
        return f"did you mean {'.'.join(siblings[found[0]])}?"
    below = [path for path in known if path[: len(section)] == section != path]
    for choices in (below if section else [], [path for path in known if path[-1] == name], known):
        if found := difflib.get_close_matches(name, [path[-1] for path in choices], n=1, cutoff=0.7):
            places = [".".join(path) for path in choices if path[-1] == found[0]]
            return elsewhere.Here(tuple(places[:3])).hint()
    return f"known here: {', '.join(siblings)}" if siblings else None


def _as_section(parts: Sequence[str], given: object, model: type[BaseModel]) -> str | None:
    """How to write a section for which its most important field was given."""
    members = list(_members(parts, model))
    needed = [name for member in members for name, field in member.model_fields.items() if field.is_required()]
    if not needed or not isinstance(given, str):
        return None
    inner = _as_list([*parts, needed[0]], given, model) if list(_members([*parts, needed[0]], model)) else None
    return f"write {{{needed[0]}: {(inner or _short(given)).removeprefix('write ')}}}"


def _as_list(parts: Sequence[str], given: object, model: type[BaseModel]) -> str | None:
    """How to write a list for which one element was given."""
    if isinstance(given, Mapping):
        return "write [{...}], one mapping per element"
    if given is None:
        return None
    inner = _as_section(parts, given, model)
    return f"write [{inner.removeprefix('write ')}]" if inner else f"write [{_short(given)}]"


def _members(parts: Sequence[str], model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The sections that may stand at a place."""
    found = [model]
    for part in parts:
        if not part.isdecimal():
            fields = [member.model_fields[part] for member in found if part in member.model_fields]
            found = [inner for field in fields for inner in _models(field.annotation)]
    yield from found


def keys(model: type[BaseModel], estimator_kind: object = None) -> Iterator[tuple[str, ...]]:
    """Every dotted path that a configuration can have, without list indices; of the estimators, the chosen one's, or
    one after the other those of all."""
    for name, field in model.model_fields.items():
        yield (name,)
        for member in _models(field.annotation):
            kind = member.model_fields.get("kind")
            if kind is None or estimator_kind in (None, *get_args(kind.annotation)):
                yield from ((name, *rest) for rest in keys(member, estimator_kind))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, list, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)
