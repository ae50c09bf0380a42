"""How the pipeline writes its small text files."""

import os
from pathlib import Path

from storage_schemas.errors import TemporaryError, UsageError, explained


def write_whole(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file whole: a reader sees the old or the new content. Private: its owner alone may read it."""
    staged = path.with_name(f".{path.name}.staged")
    staged.unlink(missing_ok=True)
    staged.touch(0o600 if private else 0o666)
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


def write_asked_for(path: Path, text: str) -> None:
    """Write a file that was named on the command line, whole; its directory is made.

    Raises:
        UsageError: it cannot be written there.
        TemporaryError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        if isinstance(told := explained(error), TemporaryError):
            raise told from error
        raise UsageError(f"cannot write {path}", got=error.strerror, expected="a file in a writable place") from error
