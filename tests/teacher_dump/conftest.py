"""Shape and dtype annotations of the numeric core are checked in every call; and a cache of its own for a test."""

from pathlib import Path

import datasets
import pytest
from jaxtyping import install_import_hook

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
