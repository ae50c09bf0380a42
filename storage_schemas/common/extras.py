"""Packages that only some of the work needs: an extra of this one brings them, `pip install 'llm-neo[EXTRA]'`."""

import importlib.util

from storage_schemas.common.errors import MismatchError

STAGE_TWO = ("deepspeed", "peft")
"""What training needs and dumping does not: the extra `train` brings it."""


def installed(package: str) -> bool:
    """Whether a package can be imported under this name; it is not."""
    return importlib.util.find_spec(package) is not None


def refuse_missing(what: str, *packages: str, extra: str, instead: str | None = None) -> None:
    """Raise MismatchError if a package that is needed is not installed.

    Args:
        what: command or setting that needs them.
        packages: the names that they are imported by.
        extra: of this project, which brings them.
        instead: what else the user may do.
    """
    if missing := [package for package in packages if not installed(package)]:
        raise MismatchError(
            f"{what} needs {' and '.join(missing)}",
            got="not installed",
            expected=f"the packages of the extra `{extra}`",
            fix=f"pip install 'llm-neo[{extra}]'" + (f", or {instead}" if instead else ""),
        )
