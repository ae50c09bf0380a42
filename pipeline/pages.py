"""The pages of docs/, which the wheel holds too: what a message points to can be read where it is met.

`pipeline/docs` is a link to `docs/`, which building a wheel or a source distribution follows.
"""

from pathlib import Path

from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.common.suggest import did_you_mean

FOLDER = Path(__file__).parent / "docs"


def pages() -> dict[str, str]:
    """Name -> title.

    Raises:
        MismatchError: there are none, as in a checkout without links.
    """
    files = sorted((*FOLDER.glob("*.md"), *FOLDER.glob("design/*.md")))
    if not files:
        raise MismatchError(
            "the pages are not here",
            got=f"{FOLDER} is {'a file' if FOLDER.is_file() else 'missing'}",
            expected="a directory of Markdown, or a link to one",
            fix="install the wheel, or clone with `git clone -c core.symlinks=true`",
        )
    titles = {file: file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for file in files}
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): title for file, title in titles.items()}


def page(name: str) -> str:
    """Its Markdown. Raises UsageError if there is no such page."""
    known = pages()
    if name not in known:
        hint = did_you_mean(name, known) or "`llm-neo docs` lists them"
        raise UsageError("no such page", got=name, expected=f"one of {', '.join(known)}", fix=hint)
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")
