"""Hashes of large local files: one process reads a file, once since the machine was started."""

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from storage_schemas.canonical import canonical_json, with_checksum
from storage_schemas.common.locks import locked
from storage_schemas.common.publish import publish

SETTLED_SECONDS = 2.0
"""A file that was written less than this ago may be written again without a new time."""


def file_sha256(path: Path, *, folder: Path) -> str:
    """Hash of a file, read unless `folder` says what it was and nothing has written to the file since.

    Of several processes of a machine one reads and the others wait. A folder that cannot be used is no error.
    """
    entry = folder / f"{hashlib.sha256(f'{path.resolve()} {this_boot()}'.encode()).hexdigest()[:32]}.json"
    if found := _known(entry, path):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(entry.with_suffix(".lock")):
            return _known(entry, path) or _read(entry, path)
    except OSError:
        return _read(None, path)


def file_state(number: int | Path) -> list[int]:
    """What changes with any write to an open file or a path; nobody can set the time of its inode."""
    found = os.stat(number)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def this_boot() -> str:
    """Names this start of the machine: what lies in its memory may differ from what lies on the disk."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(uuid.getnode())


def _known(entry: Path, path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_bytes())
        if known == _note(path, file_state(path), known["sha256"]):
            return str(known["sha256"])
    return None


def _read(entry: Path | None, path: Path) -> str:
    with path.open("rb") as file:
        before = file_state(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest()
        after = file_state(file.fileno())
    if entry is not None and before == after and max(after[2:]) < (time.time() - SETTLED_SECONDS) * 1e9:
        with suppress(OSError):
            publish(entry, canonical_json(_note(path, after, found)))
    return found


def _note(path: Path, state: list[int], sha256: str) -> dict[str, Any]:
    """What is kept of a file: it holds as long as every part of it is as it was."""
    return with_checksum({"path": str(path.resolve()), "seen": [this_boot(), *state], "sha256": sha256})
