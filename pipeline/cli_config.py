"""The commands about the configuration itself, `init` and `config`, and the options that say it to all others."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import settings
from pipeline.config import Config, load
from pipeline.init import SCHEMA, recipes, write_recipe

log = logging.getLogger(__name__)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration; `llm-neo init` writes one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a setting; VALUE is YAML. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

app = typer.Typer(no_args_is_help=True, help="See what a configuration comes to: settings, schema, difference.")
_NEXT = """correct the places in it, then
  llm-neo doctor {out}      what this machine lacks for it
  llm-neo preview {out}     what the corpus becomes
  llm-neo plan {out}        what the dump will hold and cost
  llm-neo run {out}         both stages here; or `dump` and `train`, each where it belongs"""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Config:
    """The configuration of a command; whoever has typed it hears its `notices`, unless `quiet`."""
    loaded = load(path, overrides)
    for sentence in () if quiet else settings.notices(loaded):
        log.info("%s", sentence)
    return loaded.config


def init(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Which one; default: list them.")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File to write, or DIR/ to write to; default: RECIPE.yaml. Nothing is overwritten."
        ),
    ] = None,
) -> None:
    """Write a commented configuration to begin with. Without a recipe: list the recipes."""
    known = recipes()
    if recipe is None:
        if out is not None:
            raise typer.BadParameter(f"needs a recipe: {', '.join(known)}", param_hint="--out")
        for name, sentence in known.items():
            typer.echo(f"{name:24} {sentence}")
        return
    file = Path(f"{out or ''}{recipe}.yaml" if (out or "/").endswith(("/", os.sep)) else str(out))
    write_recipe(recipe, file)
    typer.echo(f"{file}: {known[recipe]}\n{file.parent / SCHEMA}: for editors\n" + _NEXT.format(out=file))


@app.command("show")
def show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every setting with its value after defaults, and who states it: file, --set or default."""
    found = settings.settings_of(load(config, overrides or ()))
    if as_json:
        typer.echo(_json({name: setting._asdict() for name, setting in found.items()}))
        return
    for name, setting in found.items():
        line = f"{name} = {_text(setting.value)}"
        typer.echo(line if setting.origin == "default" else f"{line}  # {setting.origin}")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a configuration, for editors and checks without llm-neo."""
    typer.echo(settings.schema(), nl=False)


@app.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="YAML configuration, or the directory of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Say in which settings two configurations differ, defaults included."""
    found = settings.differences(*(settings.settings_of(settings.load_any(place)) for place in (a, b)))
    if as_json:
        sides = {name: {"a": x, "b": y} for name, (x, y) in found.items()}
        typer.echo(_json({name: {k: v.value for k, v in side.items() if v} for name, side in sides.items()}))
        return
    for name, (x, y) in found.items():
        typer.echo(f"{name}\n  A  {_text(x.value) if x else 'absent'}\n  B  {_text(y.value) if y else 'absent'}")
    if not found:
        typer.echo("no difference")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json(found: Any) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False)
