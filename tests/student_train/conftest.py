"""What the tests of this package share. Annotations of the numeric core are checked in every call."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook
from support.tiny_student import save_student, write_dump

_hook = install_import_hook(
    [
        "student_train.data.batch",
        "student_train.model.losses",
        "student_train.model.token_losses",
        "student_train.model.head",
    ],
    "beartype.beartype",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, and two students: `student`, and `tied` whose head is its embedding."""
    folder = tmp_path_factory.mktemp("folder")
    write_dump(folder / "dump")
    save_student(folder / "student")
    save_student(folder / "tied", tied=True)
    return folder
