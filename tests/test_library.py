"""The public names of the packages, and the examples that use nothing else."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import getdoc, isclass, signature
from pathlib import Path
from typing import Any

import pytest
from support.dump_checks import SAMPLES, write_corpus
from support.tiny_teachers import save_teacher

from storage_schemas import Dump

ROOT = Path(__file__).parent.parent
PACKAGES = ("storage_schemas", "teacher_dump", "student_train", "pipeline")
EXAMPLES = sorted((ROOT / "examples/library").glob("*.py"))
VERBS = {"fetch", "identify", "is", "list", "note", "pin", "read", "refuse", "start", "close", "to"}
"""First words of the methods that take nothing."""


def public(package: str) -> list[Any]:
    module = import_module(package)
    return [getattr(module, name) for name in module.__all__]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_and_documented(package: str) -> None:
    """What type checkers are told, what runs and what `*` imports is the same."""
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {(alias.name, line.module) for line in typed.body for alias in line.names}
    assert [name for name, _ in sorted(told)] == sorted(module.__all__)
    for name, place in told:
        assert getattr(module, name) is getattr(import_module(place), name)
    for found in public(package):
        if isclass(found) or callable(found):
            assert (getdoc(found) or "").strip(), found
            members = vars(found).items() if isclass(found) else ()
            for name, member in members:
                if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                    assert getdoc(member), f"{found.__name__}.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'Dmup'"):
        _ = module.Dmup


def test_methods_without_arguments_are_verbs() -> None:
    """`if dump.sealed:` of a method is always true: what reads or works is called, and sounds like it."""
    for found in filter(isclass, (each for package in PACKAGES for each in public(package))):
        for name, member in vars(found).items():
            if name.startswith("_") or not callable(member) or isinstance(member, staticmethod | classmethod):
                continue
            if len(signature(member).parameters) == 1:
                assert name.split("_")[0] in VERBS, f"{found.__name__}.{name}()"


def test_properties_of_a_dump_need_no_files(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "dump", tmp_path / "dump")
    dump = Dump.open(str(tmp_path / "dump"))
    row = next(iter(dump.read_unit(0)))
    shutil.rmtree(tmp_path / "dump")
    for thing in (dump, dump.provenance, row):
        for name, member in vars(type(thing)).items():
            if not name.startswith("_") and not callable(member):
                getattr(thing, name)


def test_the_packages_are_imported_without_torch() -> None:
    names = {"storage_schemas": "Dump", "teacher_dump": "TeacherSection", "student_train": "LossSection"}
    lines = [f"from {package} import {name}" for package, name in names.items()]
    code = "\n".join(["import pipeline, sys", *lines, "print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "storage_schemas.reader" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "deepspeed", "typer"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_import_nothing_below_the_packages(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    tree = ast.walk(ast.parse(text))
    modules = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    assert set(modules) & set(PACKAGES)
    assert [name for name in modules if name.split(".")[0] in PACKAGES and "." in name] == []
    assert not re.search(r"^import (" + "|".join(PACKAGES) + r")\b", text, re.MULTILINE)


def test_snippets_of_the_page_are_lines_of_the_examples() -> None:
    page = (ROOT / "docs/library.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    texts = [path.read_text() for path in EXAMPLES]
    assert len(snippets) == len(EXAMPLES)
    for path in EXAMPLES:
        assert f"examples/library/{path.name}" in page
    for snippet in snippets:
        assert any(snippet in text for text in texts), snippet


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, a corpus, and the dump that the first example makes of them."""
    folder = tmp_path_factory.mktemp("library")
    save_teacher(folder / "teacher")
    save_teacher(folder / "student", seed=1)
    write_corpus(folder / "corpus.jsonl")
    run("dump_own_model", folder / "teacher", folder / "corpus.jsonl", folder / "dump")
    return folder


def run(name: str, *arguments: Path) -> Any:
    """What the example's `main` returns."""
    return runpy.run_path(str(ROOT / f"examples/library/{name}.py"))["main"](*map(str, arguments))


def test_dumping_a_model_in_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once more it finds all done, and the rows are still those of the model."""
    run("dump_own_model", place / "teacher", place / "corpus.jsonl", place / "dump")
    out = capsys.readouterr().out
    assert f"{SAMPLES} samples" in out
    assert ", 0 errors" in out
    assert Dump.open(str(place / "dump")).provenance.teacher.in_memory


def test_reading(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("read_dump", place / "dump")
    out = capsys.readouterr().out
    assert f"{SAMPLES} samples, sealed: True" in out
    shown = [float(share) for share in re.findall(r"targets, (\S+) of the probability", out)]
    assert shown
    assert all(0.2 < share < 1 for share in shown)
    assert len(re.findall(r"^input_ids \(", out, re.MULTILINE)) == -(-SAMPLES // 4) - 1


def test_own_loop(place: Path) -> None:
    losses = run("own_loop", place / "student", place / "dump")
    assert losses[-1] < 0.9 * losses[0]


def test_trainer(place: Path, tmp_path: Path) -> None:
    """On average it is below what it begins with."""
    loss = run("trainer", place / "student", place / "dump", tmp_path)
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    assert 0 < loss < state["log_history"][0]["loss"]
    assert (tmp_path / "adapter_model.safetensors").is_file()
