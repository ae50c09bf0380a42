"""The files of a frozen corpus: flat columns that grow part by part, each part under a hash."""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from storage_schemas.common.devices import usable_cores
from storage_schemas.common.errors import TemporaryError

COLUMNS = {
    "offsets": np.int64,
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "lengths": np.int64,
    "statuses": np.uint8,
    "id_offsets": np.int64,
    "id_bytes": np.uint8,
}
"""Name and type of each column. The two of offsets begin with 0; others have a value per sample, token or byte."""
JOURNAL = "parts.jsonl"
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive samples of one source in flat arrays."""

    sizes: npt.NDArray[np.int64]
    """(samples,) tokens of each."""
    lengths: npt.NDArray[np.int64]
    """(samples,) tokens of each before it was cut or dropped."""
    statuses: npt.NDArray[np.uint8]
    """(samples,) place of each status in STATUSES."""
    id_sizes: npt.NDArray[np.int64]
    """(samples,) bytes of each id."""
    input_ids: npt.NDArray[np.int32]
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,)"""
    id_bytes: npt.NDArray[np.uint8]
    """(bytes,) UTF-8."""
    problems: Sequence[str] = field(default=())
    """What is wrong with samples that cannot be used."""


def joined(parts: Sequence[Part]) -> Part:
    """One part after the other."""
    names = [each.name for each in fields(Part) if each.name != "problems"]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Part(**arrays, problems=[problem for part in parts for problem in part.problems])


class Columns:
    """Columns that parts are appended to, with a journal of them.

    In a folder they survive the process: the next one goes on after the last part whose content is what its line of
    the journal says. Without a folder they lie in files without a name, so that they need no memory and vanish.
    """

    def __init__(self, folder: Path | None, *, scratch: Path | None = None) -> None:
        self.parts: list[dict[str, Any]] = []
        """Lines of the journal."""
        self._journal: BinaryIO | None = None
        self._files: dict[str, BinaryIO] = {}
        if folder is None:
            self._where: Path | str = scratch or tempfile.gettempdir()
            with self._room():
                for name in COLUMNS:
                    self._files[name] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
            return
        self._where = folder
        self.parts = whole_parts(folder)
        lines = b"".join(_line(part) for part in self.parts)
        with self._room():
            for name, end in (*self._ends.items(), (JOURNAL, len(lines))):
                self._files[name] = open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115
                self._files[name].truncate(end)
                self._files[name].seek(end)
        self._journal = self._files.pop(JOURNAL)

    def append(self, part: Part, **note: Any) -> None:
        """Add the samples of a part; `note` is kept in the journal with it.

        Raises:
            TemporaryError: the disk is full.
        """
        ends, first = self._ends, [] if self.parts else [0]
        blocks: Arrays = {name: getattr(part, name) for name in COLUMNS if not name.endswith("offsets")}
        tokens = ends["input_ids"] // np.dtype(COLUMNS["input_ids"]).itemsize
        blocks["offsets"] = np.concatenate([first, tokens + np.cumsum(part.sizes)])
        blocks["id_offsets"] = np.concatenate([first, ends["id_bytes"] + np.cumsum(part.id_sizes)])
        self._append({name: np.ascontiguousarray(blocks[name], kind) for name, kind in COLUMNS.items()}, note)

    def finish(self, **note: Any) -> None:
        """Add a last line to the journal, and have all of it on the disk.

        Raises:
            TemporaryError: the disk is full.
        """
        self._append({}, note)
        if self._journal is not None:
            with self._room():
                for file in (*self._files.values(), self._journal):
                    os.fsync(file.fileno())

    def _append(self, blocks: Arrays, note: Mapping[str, Any]) -> None:
        ends = self._ends
        with self._room():
            for name, block in blocks.items():
                self._files[name].write(block.data)
                ends[name] += block.nbytes
            line = {**note, "ends": ends}
            line["sha256"] = _hash(line, blocks.values())
            for file in self._files.values():
                file.flush()
            if self._journal is not None:
                self._journal.write(_line(line))
                self._journal.flush()
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

    def arrays(self) -> Arrays:
        """All that is there, mapped."""
        return mapped(self._files)

    def close(self) -> None:
        """Close the files; what is mapped stays."""
        for file in (*self._files.values(), *([self._journal] if self._journal else [])):
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
    lines = list(_journal_lines(folder / JOURNAL))
    if not lines or any(not (folder / name).is_file() for name in COLUMNS):
        return []
    starts = [dict.fromkeys(COLUMNS, 0), *(line["ends"] for line in lines)]
    files = {name: (folder / name).open("rb") for name in COLUMNS}

    def whole(start: Mapping[str, int], line: dict[str, Any]) -> bool:
        blocks = [_block(files[name], start[name], line["ends"][name]) for name in COLUMNS]
        rest = {name: value for name, value in line.items() if name != "sha256"}
        return bool(_hash(rest, blocks) == line["sha256"])

    try:
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            good = pool.map(lambda pair: whole(*pair), zip(starts[:-1], lines, strict=True))
            return [line for line, _ in takewhile(lambda pair: pair[1], zip(lines, good, strict=True))]
    finally:
        for file in files.values():
            file.close()


def _journal_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a journal, as far as they have the form of one."""
    previous = dict.fromkeys(COLUMNS, 0)
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            part = json.loads(line)
            ends = part["ends"]
            if _line(part) != line + b"\n" or ends.keys() != previous.keys():
                return
            if not all(type(ends[name]) is int and ends[name] >= previous[name] for name in COLUMNS):
                return
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        previous = ends
        yield part


def _block(file: BinaryIO, start: int, end: int) -> bytes:
    return os.pread(file.fileno(), max(0, min(end, os.fstat(file.fileno()).st_size) - start), start)


def _line(part: Mapping[str, Any]) -> bytes:
    return json.dumps(part, sort_keys=True).encode() + b"\n"


def _hash(line: Mapping[str, Any], blocks: Iterable[Any]) -> str:
    digest = hashlib.sha256(_line(line))
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
