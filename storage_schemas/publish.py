"""The one way in which directories of results get their names: whole, durable, or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from storage_schemas.errors import MismatchError, TemporaryError
from storage_schemas.store import _fsync_directory

_NEVER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
"""Errors that another try will not mend."""


@contextmanager
def publishing(folder: Path, *, setting: str) -> Iterator[Path]:
    """A new directory to write into, which takes the name `folder`, on the disk for good, once the block ends well.

    Args:
        folder: a directory or link of that name is replaced. What a link points to is left alone.
        setting: where the user named it.

    Raises:
        TemporaryError: the disk is full or away.
        MismatchError: nothing can be written there.
    """
    folder = folder.absolute()
    staged = folder.with_name(f".{folder.name}.staged")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged
        for path in [*staged.rglob("*"), staged]:
            _fsync(path)
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
        os.rename(staged, folder)
        _fsync_directory(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error, setting) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fsync(path: Path) -> None:
    if path.is_dir():
        _fsync_directory(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(folder: Path, error: Exception, setting: str) -> MismatchError | TemporaryError:
    # safetensors tells the system's number in its text alone.
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number in _NEVER:
        return MismatchError(
            f"cannot write {folder}",
            got=str(error),
            expected="a new directory in a writable one",
            fix=f"correct {setting}",
        )
    return TemporaryError(
        f"cannot write {folder}",
        got=str(error),
        fix="free space or repair the file system, then run the same command again; what was read is intact",
    )
