"""What the documents say is what the code does."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage_schemas.common import errors
from storage_schemas.common.exits import Exit
from storage_schemas.config import TopK
from storage_schemas.stores.store import Store

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(file for folder in ("docs", "benchmarks", "examples") for file in ROOT.glob(f"{folder}/**/*.md")),
]


def test_generated_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which may have imported torch already."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr(sys, "argv", ["docs/generate.py", "--check"])
    runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="__main__")


def test_the_api_page_has_signatures_fields_and_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    entry = importlib.import_module("api_page").entry
    store, settings = ("\n".join(entry(thing.__name__, thing)) for thing in (Store, TopK))
    assert "class Store\n" in store
    assert "def __init__(self, url: str, *, options: Mapping[str, str] | None=None" in store
    assert (
        "- `options`: settings of the object store, such as `endpoint`; credentials come from the environment." in store
    )
    assert "**Raises**\n\n- `MismatchError`: the URL or an option is not understood" in store
    assert "\n- `k: int = Field(64, ge=1)`: At most this many entries per token." in settings


def test_every_make_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    command = ["make", "--no-print-directory", "help"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets, _, codes = listed.partition("\n\n")
    assert {line.split()[0] for line in targets.splitlines()} == set(phony)
    assert "make itself ends with 2" in codes


def prose(document: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    links = 0
    for document in DOCUMENTS:
        for link, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", prose(document)):
            target = document.parent / link if link else document
            assert target.exists(), f"{document.relative_to(ROOT)} links to {link}"
            assert not anchor or anchor in anchors(target), f"{document.relative_to(ROOT)} links to {link}#{anchor}"
            links += 1
    assert links > 40


def listed(navigation: Any) -> Iterator[str]:
    """Pages of a navigation of mkdocs."""
    match navigation:
        case str():
            yield navigation
        case list() | dict():
            for inner in navigation.values() if isinstance(navigation, dict) else navigation:
                yield from listed(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    # The one tag in there names a function of Python, which this loader leaves alone.
    pages = list(listed(yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"]))
    assert len(pages) == len(set(pages))
    below = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert below <= set(pages)
    assert not [page for page in set(pages) - below if not (ROOT / page).is_file()]


def said(message: ast.expr) -> str:
    """The text of an error in the code, with `...` for what is put in."""
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List(elts=[first, *_])]):
            return said(first)
    return "..."


def messages() -> Iterator[tuple[int, str]]:
    """Exit code and first line of every error that the code raises by a class of its own."""
    codes = {name: int(error.exit_code) for name, error in vars(errors).items() if hasattr(error, "exit_code")}
    for package in ("storage_schemas", "teacher_dump", "student_train", "pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(func=ast.Name(id=name), args=[message, *_]) if name in codes:
                        yield codes[name], said(message).replace("`", "")
                    case ast.Call(func=ast.Name(id="refuse_differences"), args=[message, *_]):
                        yield codes["MismatchError"], f"{said(message)}: ..."


def test_troubleshooting_has_every_exit_code_and_quotes_messages_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    _, *sections = re.split(r"^## (\d+): .*\n", page, flags=re.MULTILINE)
    by_code = dict(zip(map(int, sections[::2]), sections[1::2], strict=True))
    assert list(by_code) == sorted(int(code) for code in Exit)
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [str(code) for code in by_code]
    known = {*messages(), *((64, f"No such {what}") for what in ("option", "command"))}  # These two are Typer's.
    for code, section in by_code.items():
        quoted = re.findall(r"`(.+?)`", "\n".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)))
        assert quoted or not code
        assert not [message for message in quoted if (code, message) not in known]


def test_the_tests_that_guards_are_listed_with_exist() -> None:
    tests = {file.name: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    for document in ("docs/guards.md", "SECURITY.md"):
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / document).read_text())
        assert len(named) > 10
        for file, name in named:
            assert f"def {name}(" in tests.get(file, ""), f"{document} names {file}::{name}"


def test_where_things_are_decided_and_the_spines() -> None:
    page, readme = ((ROOT / name).read_text() for name in ("docs/where.md", "README.md"))
    rows = [re.findall(r"`([\w/]+\.py)`", line) for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert all(len(files) == 1 for files in rows[1:]), "one file per question"
    section = readme.partition("## Reading the code\n")[2].partition("\n## ")[0]
    spines = list(zip(*re.findall(r"^\| `(\S+)` .*\| `(\S+)` ", section, re.MULTILINE), strict=True))
    named = {*(file for files in rows for file in files), *spines[0], *spines[1]}
    assert not [file for file in named if not (ROOT / file).is_file()]
    for spine in spines:
        assert len(spine) == 8
        lines = sum(len((ROOT / file).read_text().splitlines()) for file in spine)
        assert lines <= 2200, f"{spine[0]} and so on: {lines} lines"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    folder, named = "", set()
    for line in tree.splitlines():
        folder = line.split("/")[0] if line[:1].isalpha() else folder
        named |= {f"{folder}/{file}" for file in re.findall(r"\b(\w+\.py)\b", line)}
    packages = {name.split("/")[0] for name in named}
    files = (file for package in packages for file in (ROOT / package).glob("*.py") if file.name != "__init__.py")
    assert named == {str(file.relative_to(ROOT)) for file in files}
