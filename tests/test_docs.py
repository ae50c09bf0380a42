"""What the documents say is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_configuration_page_is_current() -> None:
    page = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert page.returncode == 0, page.stderr


def test_every_make_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    command = ["make", "--no-print-directory", "help"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets, _, codes = listed.partition("\n\n")
    assert {line.split()[0] for line in targets.splitlines()} == set(phony)
    assert "make itself ends with 2" in codes


def test_links_between_documents_lead_somewhere() -> None:
    for document in [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.relative_to(ROOT)} links to {link}"


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
