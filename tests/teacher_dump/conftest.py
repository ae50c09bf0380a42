"""Shape and dtype annotations of the numeric core are checked in every call."""

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
