"""Configurations to begin with, and their JSON schema for editors: the files of `pipeline/recipes`.

The schema is written beside the configuration, whose first line names it there. So an editor finds it without network,
from an installed wheel as from a checkout, and it knows the settings of the version that wrote it.
"""

from pathlib import Path

from storage_schemas.common.errors import UsageError, cannot_write
from storage_schemas.common.publish import publish
from storage_schemas.common.suggest import did_you_mean

FOLDER = Path(__file__).parent / "recipes"
SCHEMA = "llm-neo.schema.json"
TITLE = "llm-neo configuration"
"""Of the schema, by which it is known as ours."""


def recipes() -> dict[str, str]:
    """Name -> the first sentence about it, the smallest one first."""
    files = sorted(FOLDER.glob("*.yaml"), key=lambda file: file.stem != "smollm2-demo")
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ") for file in files}


def write_recipe(name: str, out: Path) -> None:
    """Write the recipe to a file that is not there yet, and the schema beside it.

    Raises:
        UsageError: no such recipe, or the file is there already.
        TemporaryError: the disk is full.
        MismatchError: nothing can be written there.
    """
    if name not in (known := recipes()):
        hint = did_you_mean(name, known) or "`llm-neo init` lists them"
        raise UsageError("no such recipe", got=name, expected=f"one of {', '.join(known)}", fix=hint)
    beside, schema = out.parent / SCHEMA, (FOLDER / SCHEMA).read_text(encoding="utf-8")
    if out.exists() or out.is_symlink():
        got, fix = "a directory" if out.is_dir() else "a file", "choose another one: --out FILE"
        raise UsageError(f"{out} is there already", got=got, expected="a new file", fix=fix)
    if beside.exists() and f'"title": "{TITLE}"' not in beside.read_text(encoding="utf-8", errors="replace"):
        fix = "choose another directory: --out DIR/FILE"
        raise UsageError(f"{beside} is there already, and is no schema of ours", expected="none, or one", fix=fix)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(beside, schema)
        publish(out, (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot_write(str(out), error, setting="--out") from error
