"""Shards that were fetched from an object store, on this node's disk, for all processes of the node."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from storage_schemas.common.errors import cannot_write
from storage_schemas.common.hashes import file_state
from storage_schemas.common.locks import locked, read_or_make
from storage_schemas.common.publish import publish

_SUFFIX = ".parquet"


class ShardCache:
    """Files named by the hash of their content. Several processes and runs may share the folder.

    Above `limit` bytes the files that were not used for longest go. Nobody is ever in their way: a file is read whole
    under its lock, which its readers share, and one whose lock is held stays.
    """

    def __init__(self, folder: Path, *, limit: int | None) -> None:
        self._folder, self._limit = folder, limit

    def get(self, sha256: str, *, fetch: Callable[[], bytes]) -> bytes:
        """The content with this hash.

        Args:
            sha256: its name, and what its content is checked against: a damaged file is fetched again.
            fetch: gets it, proven, if it is not here; once for all processes of the node that ask meanwhile.

        Raises:
            MismatchError: the folder cannot be written to.
            TemporaryError: its disk is full or fails.
        """
        cached = self._folder / f"{sha256}{_SUFFIX}"

        def read() -> bytes | None:
            if cached.is_file() and hashlib.sha256(data := cached.read_bytes()).hexdigest() == sha256:
                _touch(cached)
                return data
            return None

        def make() -> bytes:
            data = fetch()
            publish(cached, data)
            _touch(cached)
            self._shrink(keep=cached)
            return data

        def state() -> object:
            return file_state(cached) if cached.is_file() else None

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return read_or_make(self._lock(sha256), read, make, state=state)
        except OSError as error:
            raise cannot_write(f"the shard cache {self._folder}", error, setting="train.cache_dir") from error

    def _shrink(self, *, keep: Path) -> None:
        """Delete the files that were used least recently until what is left fits."""
        if self._limit is None:
            return
        found = []
        for file in self._folder.glob(f"*{_SUFFIX}"):
            try:
                stat = file.stat()
            except FileNotFoundError:  # Another process shrinks, too.
                continue
            found.append((stat.st_mtime_ns, file, stat.st_size))
        total = sum(size for _, _, size in found)
        for _, file, size in sorted(found):
            if total <= self._limit:
                return
            if file == keep:
                continue
            try:
                with locked(self._lock(file.name.removesuffix(_SUFFIX)), wait=False):
                    file.unlink(missing_ok=True)
            except BlockingIOError:  # Somebody reads it.
                continue
            total -= size

    def _lock(self, sha256: str) -> Path:
        return self._folder / f".{sha256}.lock"


def _touch(file: Path) -> None:
    """Note its use; the kernel's own clock for files ticks too slowly to tell two apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))
