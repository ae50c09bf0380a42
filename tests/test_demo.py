"""The demo's corpus: deterministic, without repetitions, split by module."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from docstrings import MAX_CHARACTERS, MIN_CHARACTERS, docstring_pairs, is_heldout, jsonl, shorten, split

STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = ["json", "argparse.py", "heapq.py", "collections", "string.py", "email", "textwrap.py", "os.py", "abc.py"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the standard library: all of it takes seconds to parse."""
    root = tmp_path_factory.mktemp("library")
    for name in MODULES:
        copy = shutil.copytree if (STDLIB / name).is_dir() else shutil.copyfile
        copy(STDLIB / name, root / name)
    (root / "broken.py").write_text("def f(:\n")
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text(
        '"""' + "This module tests something and must not be in the corpus. " * 2 + '"""'
    )
    return root


def test_the_corpus_depends_on_the_sources_alone(library: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(library, tmp_path / "elsewhere")
    first, second = (split(docstring_pairs(root), 1600, 80) for root in (library, elsewhere))
    assert first == second
    assert len(first[0]) > 60
    assert first[0] != sorted(first[0])


def test_no_module_is_in_both_splits_and_no_answer_twice(library: Path) -> None:
    pairs = docstring_pairs(library)
    train, heldout = split(pairs, len(pairs) * 16, len(pairs) * 16)
    assert {pair.module for pair in train}.isdisjoint(pair.module for pair in heldout)
    assert len(train) + len(heldout) == len(pairs)
    assert heldout
    assert all(is_heldout(pair) for pair in heldout)
    assert len({pair.answer for pair in pairs}) == len(pairs)
    assert "test" not in {pair.module for pair in pairs}


def test_no_module_has_more_than_its_share(library: Path) -> None:
    train, _ = split(docstring_pairs(library), 32, 0)
    modules = [pair.module for pair in train]
    assert max(modules.count(module) for module in modules) <= 2


def test_records_are_conversations_of_bounded_length(library: Path) -> None:
    lines = jsonl(docstring_pairs(library)).splitlines()
    assert len(lines) > 100
    questions = set()
    for line in lines:
        record = json.loads(line)
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert record["id"].rpartition(".")[2] in user["content"]
        assert MIN_CHARACTERS <= len(assistant["content"]) <= MAX_CHARACTERS
        assert ">>>" not in assistant["content"]
        questions.add(user["content"].split("`")[0])
    assert len(questions) > 6


def test_long_docstrings_end_at_a_paragraph_or_a_sentence() -> None:
    first = "One paragraph that says enough to stand alone, being rather long."
    assert shorten(f"{first}\n\n{'more ' * 200}") == first
    assert shorten(f"A sentence. {'word ' * 40}end. {'word ' * 200}").endswith("end.")
    assert shorten("word " * 200) == ""
    assert shorten("  short  ") == "short"
