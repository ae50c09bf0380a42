"""Shape and dtype annotations of the numeric core are checked in every call; and what several tests begin with."""

from pathlib import Path

import datasets
import pytest
from jaxtyping import install_import_hook
from support.dump_checks import write_corpus
from support.tiny_teachers import save_teacher

_hook = install_import_hook(
    [
        "teacher_dump.estimators.draws",
        "teacher_dump.estimators.estimate",
        "teacher_dump.estimators.selection",
        "teacher_dump.teachers.products",
        "teacher_dump.teachers.teacher",
    ],
    "beartype.beartype",
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept between starts lies in `tmp_path`: corpora in `neo`, and what `datasets` keeps in `cache`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LLM_NEO_CACHE", str(tmp_path / "neo"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus of `write_corpus`."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
