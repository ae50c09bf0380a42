"""Shape and dtype annotations of the numeric core are checked in every call."""

from jaxtyping import install_import_hook

_hook = install_import_hook(["student_train.batch", "student_train.losses", "student_train.head"], "beartype.beartype")
