"""Shape and dtype annotations of the numeric core are checked in every call."""

from jaxtyping import install_import_hook

_hook = install_import_hook(
    ["student_train.data.batch", "student_train.model.losses", "student_train.model.head"], "beartype.beartype"
)
