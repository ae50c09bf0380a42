"""Write docs/configuration.md, docs/commands.md, docs/api.md and the JSON schema: `python docs/generate.py`.

A test keeps them current.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from api_page import api_page
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperArgument
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Config
from pipeline.init import FOLDER, SCHEMA
from pipeline.settings import schema

HERE = Path(__file__).parent
HEAD = """# Configuration

One YAML file configures both stages; a section that a command does not use may be absent. `--set section.field=VALUE`
overrides a field on the command line, where VALUE is YAML. Unknown keys are refused, and names of TRL, transformers,
peft, axolotl, DistillKit, torchtune and LLaMA-Factory are answered with ours.

`llm-neo init` writes a configuration to begin with, and beside it the JSON schema by which editors complete and check
it (`llm-neo config schema` prints it). `llm-neo config show x.yaml` prints every setting after defaults and says which
ones the file or `--set` state; `llm-neo config diff x.yaml runs/a` says what a run was configured with otherwise.

This page is generated from the models by `python docs/generate.py`.
"""
COMMANDS = """# Commands

What `llm-neo COMMAND --help` says, for all of them. Running a command again continues it; the exit codes are those of
[troubleshooting.md](troubleshooting.md).

This page is generated from the commands by `python docs/generate.py`.
"""


def models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return [model for argument in get_args(annotation) for model in models(argument)]
    return []


def kind(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kind(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else kind(a) for a in get_args(annotation))
    if origin in (list, tuple):
        return f"list of {kind(get_args(annotation)[0])}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, "mapping")


def section(model: type[BaseModel], path: str, shown: dict[type[BaseModel], str]) -> Iterator[str]:
    """Heading, description and table of one section, then those inside it that are not `shown` elsewhere."""
    shown[model] = path.partition(" ")[0]
    yield f"\n## `{path}`\n\n{(model.__doc__ or '').strip()}\n"
    yield "| field | type | default | |\n|---|---|---|---|"
    inner = []
    for name, field in model.model_fields.items():
        nested = models(field.annotation)
        known = shown.get(nested[0]) if nested else None
        if not known:
            inner += [(m, f"{path}.{name}") for m in nested]
        if field.default is PydanticUndefined:
            default = "**required**"
        else:
            default = "" if nested else f"`{_yaml(field.default)}`"
        what = f"as `{known}`" if known else "section" if nested else kind(field.annotation)
        yield f"| `{name}` | {what} | {default} | {_cell(field.description)} |"
    for m, p in inner:
        yield from section(m, p, shown)


def _cell(text: str | None) -> str:
    """A text in a cell of a table."""
    return " ".join((text or "").split()).replace("|", chr(92) + "|")


def _yaml(value: Any) -> str:
    return json.dumps(value, default=str)


def page() -> str:
    """The whole page."""
    lines, shown = [HEAD], dict[type[BaseModel], str]()
    for name, field in Config.model_fields.items():
        nested = models(field.annotation)
        for model in nested:
            suffix = f" ({model.model_fields['kind'].annotation.__args__[0]})" if "kind" in model.model_fields else ""
            lines += section(model, name + suffix, shown)
        if not nested:
            what = f"{kind(field.annotation).capitalize()}, default `{_yaml(field.default)}`."
            lines.append(f"\n## `{name}`\n\n{what} {field.description}")
    return "\n".join(lines) + "\n"


def commands(command: Any, name: str) -> Iterator[str]:
    """What `--help` says of a command and those below it."""
    if hasattr(command, "commands"):
        for below, one in command.commands.items():
            yield from commands(one, f"{name} {below}")
        return
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    words = [_written(one) for one in shown if isinstance(one, TyperArgument)]
    yield f"\n## `{' '.join([name, *words])}`\n\n{' '.join((command.help or '').split())}\n"
    yield "| option | default | |\n|---|---|---|"
    for one in shown:
        default = "" if one.default is None or one.default is False or one.default == () else f"`{one.default}`"
        default = "**required**" if one.required else default
        yield f"| `{_written(one)}` | {default} | {_cell(getattr(one, 'help', None))} |"


def _written(one: Any) -> str:
    """An option or argument as it is typed."""
    if isinstance(one, TyperArgument):
        return str(one.metavar or one.name.upper())
    return str(one.opts[0]) if one.is_flag else f"{one.opts[0]} {one.metavar or 'VALUE'}"


if __name__ == "__main__":
    help_page = "\n".join([COMMANDS, *commands(get_command(app), "llm-neo")]) + "\n"
    pages = {HERE / "configuration.md": page(), HERE / "commands.md": help_page, HERE / "api.md": api_page()}
    pages[FOLDER / SCHEMA] = schema()
    for target, text in pages.items():
        if sys.argv[1:] != ["--check"]:
            target.write_text(text)
        elif not target.exists() or target.read_text() != text:
            sys.exit(f"{target} is not current: run `python docs/generate.py`")
