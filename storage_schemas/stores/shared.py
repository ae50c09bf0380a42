"""Files that one process of a node makes and the others read, on its disk for as long as one of them is there."""

import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from storage_schemas.common.locks import locked
from storage_schemas.common.publish import publishing_shared

KEPT = 16
"""Files that stay: other processes may not have come so far."""
_FILE = "[0-9a-f]" * 64 + ".rows"
_MADE = (_FILE, f".{_FILE}.staged", ".??.lock")
"""What is deleted: whatever else a user keeps there stays."""


class SharedFiles:
    """Files in a folder, which never change. Several processes and runs may share it.

    The first who comes and the last who goes empties it. Locks of the operating system say who is there, so that what
    was killed counts as gone: no file is read that was made before all who share the folder began.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is made or looked at before the first file is asked for."""
        self._folder, self._mutex, self._joined = folder, threading.Lock(), False

    def __reduce__(self) -> Any:
        return SharedFiles, (self._folder,)

    def get(self, sha256: str, fill: Callable[[BinaryIO], None]) -> int:
        """A descriptor of a file, to read from and to close. It stays good when the file is deleted.

        Args:
            sha256: of what it is made from, its name.
            fill: writes its content, if it is not there; once for all processes that ask meanwhile.

        Raises:
            OSError: the folder cannot be used, or is not this user's alone.
        """
        with self._mutex:
            if not self._joined:
                self._join()
        path = self._folder / f"{sha256}.rows"
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._make(path, fill)

    def _join(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = self._folder.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "it is not this user's alone", str(self._folder))
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, _leave, lock, self._folder)
        _empty_if_alone(lock, self._folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        self._joined = True

    def _make(self, path: Path, fill: Callable[[BinaryIO], None]) -> None:
        # Few locks for many names: that two of them share one costs some waiting.
        with locked(self._folder / f".{path.name[:2]}.lock"):
            if not path.exists():
                with publishing_shared(path) as file:
                    fill(file)
                self._thin()

    def _thin(self) -> None:
        """Delete the oldest files."""
        found = []
        for file in self._folder.glob(_FILE):
            with suppress(FileNotFoundError):  # Another process thins, too.
                found.append((file.stat().st_mtime_ns, file))
        for _, file in sorted(found)[:-KEPT]:
            file.unlink(missing_ok=True)


def _empty_if_alone(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    for file in chain.from_iterable(map(folder.glob, _MADE)):
        file.unlink(missing_ok=True)


def _leave(lock: int, folder: Path) -> None:
    try:
        _empty_if_alone(lock, folder)
    except OSError:  # Who comes next empties it.
        pass
    finally:
        os.close(lock)
