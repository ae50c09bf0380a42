"""The files of a frozen corpus: flat columns that grow part by part, each part under a hash."""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from storage_schemas.common.devices import usable_cores
from storage_schemas.common.errors import TemporaryError
from storage_schemas.targets import joined_offsets

COLUMNS = {
    "offsets": np.int64,
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "lengths": np.int64,
    "statuses": np.uint8,
    "id_offsets": np.int64,
    "id_bytes": np.uint8,
}
"""Name and type of each column of a corpus, which says what they hold. Those of offsets begin with 0."""
_OFFSETS = {"offsets": "input_ids", "id_offsets": "id_bytes"}
"""Columns of offsets -> what they are offsets of."""
JOURNAL = "parts.jsonl"
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)

Arrays = dict[str, npt.NDArray[Any]]


class Part(NamedTuple):
    """Consecutive samples of one source."""

    arrays: Arrays
    """Columns of these samples alone."""
    problems: Sequence[str] = ()
    """What is wrong with samples that cannot be used."""
    records: int = 0
    """Records that they were made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Columns, mapped."""

    arrays: Arrays
    parts: Sequence[Mapping[str, Any]]
    """Lines of their journal."""
    folder: Path | None = None
    """Where they are kept, if they are."""


def joined(parts: Sequence[Part]) -> Part:
    """One part after the other."""
    arrays: Arrays = {}
    for name in COLUMNS:
        columns = [part.arrays[name] for part in parts]
        arrays[name] = joined_offsets(columns) if name in _OFFSETS else np.concatenate(columns)
    problems = [problem for part in parts for problem in part.problems]
    return Part(arrays, problems, sum(part.records for part in parts))


class Columns:
    """Columns that parts are appended to, with a journal of them.

    In a folder they survive the process: the next one goes on after the last part whose content is what its line of
    the journal says. Without a folder they lie in files without a name, so that they need no memory and vanish.
    """

    def __init__(self, folder: Path | None, *, scratch: Path | None = None) -> None:
        self._keeps, self._where = folder is not None, folder or scratch or tempfile.gettempdir()
        self.parts = whole_parts(folder) if folder else []
        """Lines of the journal."""
        self._files: dict[str, BinaryIO] = {}
        lines = b"".join(map(_line, self.parts))
        with self._room():
            for name, end in (*self._ends.items(), (JOURNAL, len(lines))):
                if folder is None:
                    self._files[name] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
                else:
                    number = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
                    self._files[name] = open(number, "r+b")  # noqa: SIM115
                self._files[name].truncate(end)
                self._files[name].seek(end)

    def append(self, part: Part, **note: Any) -> None:
        """Add the samples of a part; `note` is kept in the journal with it.

        Raises:
            TemporaryError: the disk is full.
        """
        blocks = dict(part.arrays)
        for name, values in _OFFSETS.items():
            before = self._ends[values] // np.dtype(COLUMNS[values]).itemsize
            blocks[name] = part.arrays[name][1 if self.parts else 0 :] + before
        self._append({name: np.ascontiguousarray(blocks[name], kind) for name, kind in COLUMNS.items()}, note)

    def finish(self, **note: Any) -> None:
        """Add a last line to the journal, and have all of it on the disk.

        Raises:
            TemporaryError: the disk is full.
        """
        self._append({}, note)
        if self._keeps:
            with self._room():
                for file in self._files.values():
                    os.fsync(file.fileno())

    def _append(self, blocks: Arrays, note: Mapping[str, Any]) -> None:
        ends = self._ends
        with self._room():
            for name, block in blocks.items():
                self._files[name].write(block.data)
                self._files[name].flush()
                ends[name] += block.nbytes
            line = {**note, "ends": ends}
            line["sha256"] = _hash(line, blocks.values())
            self._files[JOURNAL].write(_line(line))
            self._files[JOURNAL].flush()
        self.parts.append(line)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TemporaryError(
                "the tokenised corpus cannot be written",
                got=f"{error.strerror or error}: {self._where}",
                expected="room for 5 bytes per token and about 50 per sample",
                fix="free space, or set corpus.cache_dir; then run the same command again",
            ) from error

    def frozen(self) -> Frozen:
        """All that is there."""
        return Frozen(arrays=mapped(self._files), parts=self.parts)

    def close(self) -> None:
        """Close the files; what is mapped stays."""
        for file in self._files.values():
            with suppress(OSError):  # What found no room was told; it is tried once more here.
                file.close()

    @property
    def _ends(self) -> dict[str, int]:
        """Bytes of each column."""
        return dict(self.parts[-1]["ends"]) if self.parts else dict.fromkeys(COLUMNS, 0)


def mapped(files: Mapping[str, BinaryIO]) -> Arrays:
    """The columns in these files. Copied when written to, as torch wants arrays that it may write to."""
    found: Arrays = {}
    for name, kind in COLUMNS.items():
        number = files[name].fileno()
        if os.fstat(number).st_size == 0:
            found[name] = np.empty(0, kind)
            continue
        # Without a reservation: a private mapping of more than the memory would be refused.
        found[name] = np.frombuffer(mmap.mmap(number, 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE), kind)
    return found


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal of a whole corpus.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    parts = [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
    if not parts or "fingerprint" not in parts[-1]:
        raise ValueError(f"{JOURNAL} has no end")
    return parts


def whole_parts(folder: Path) -> list[dict[str, Any]]:
    """The leading parts of a folder whose content is what was written; every byte of it is read."""
    if any(not (folder / name).is_file() for name in (*COLUMNS, JOURNAL)):
        return []
    lines: list[dict[str, Any]] = []
    with suppress(ValueError):  # Who was killed may have written half a line.
        for line in (folder / JOURNAL).read_bytes().splitlines():
            lines.append(json.loads(line))
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb")) for name in COLUMNS}

        def is_whole(before: Any, line: Any) -> bool:
            try:
                starts = before["ends"] if before else dict.fromkeys(COLUMNS, 0)
                blocks = [_block(files[name], starts[name], line["ends"][name]) for name in COLUMNS]
                return bool(_hash({name: line[name] for name in line if name != "sha256"}, blocks) == line["sha256"])
            except (KeyError, TypeError, ValueError, OverflowError):
                return False

        pool = stack.enter_context(ThreadPoolExecutor(min(8, usable_cores())))
        whole = pool.map(is_whole, [None, *lines[:-1]], lines)
        return [line for line, good in takewhile(lambda pair: pair[1], zip(lines, whole, strict=True))]


def _block(file: BinaryIO, start: int, end: int) -> bytes:
    return os.pread(file.fileno(), max(0, min(end, os.fstat(file.fileno()).st_size) - start), start)


def _line(part: Mapping[str, Any]) -> bytes:
    return json.dumps(part, sort_keys=True).encode() + b"\n"


def _hash(line: Mapping[str, Any], blocks: Iterable[Any]) -> str:
    digest = hashlib.sha256(_line(line))
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
