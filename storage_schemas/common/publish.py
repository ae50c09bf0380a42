"""The one way in which files and directories get their names: whole, durable, or not at all.

What a name may never be given twice, in a dump and in a checkpoint, goes through `Store.put_new`.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from storage_schemas.common.errors import cannot_write


def publish(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write a file: whoever looks sees the old or the new content, after a power cut too.

    Args:
        path: nobody else writes it at the same time, so that what a killed writer left beside it is written over.
        private: its owner alone may read it.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    staged = path.with_name(f".{path.name}.staged")
    try:
        staged.unlink(missing_ok=True)
        staged.touch(0o600 if private else 0o666)
        staged.write_bytes(data.encode() if isinstance(data, str) else data)
        give_name(staged, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # A full disk names none.
        raise


@contextmanager
def publishing_shared(path: Path) -> Iterator[BinaryIO]:
    """A new file, readable by its owner alone, that takes the name `path` once the block ends well.

    It is for processes that run now: nobody waits for the disk, and no start after a power cut may trust it.
    """
    staged = path.with_name(f".{path.name}.staged")
    staged.unlink(missing_ok=True)
    try:
        staged.touch(0o600, exist_ok=False)
        with staged.open("r+b") as file:
            yield file
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def give_name(staged: Path, path: Path) -> None:
    """Have a file, or a directory and all in it, on the disk, and only then under its name."""
    for found in [*staged.rglob("*"), staged] if staged.is_dir() else [staged]:
        _fsync(found)
    os.replace(staged, path)
    fsync_directory(path.parent)


@contextmanager
def publishing(folder: Path, *, setting: str, replace: bool = False) -> Iterator[Path]:
    """A new directory to write into, which takes the name `folder`, on the disk for good, once the block ends well.

    Args:
        folder: a link of that name, or an empty directory, is replaced. What a link points to is left alone.
        setting: where the user named it.
        replace: a directory with content, too.

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
        if folder.is_symlink():
            folder.unlink()
        elif replace and folder.is_dir():
            shutil.rmtree(folder)
        give_name(staged, folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(str(folder), error, setting=setting) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fsync(path: Path) -> None:
    if path.is_dir():
        fsync_directory(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot be asked about directories; there names are the server's business.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
