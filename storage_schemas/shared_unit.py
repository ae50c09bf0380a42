"""A decoded unit as a file that all processes of a node take rows of.

Parquet gives no row without the pages of its neighbours. Of the ranks of a node, therefore, one proves a data file
against its commit record and decodes it, into this; each then reads the rows that are its own, and proves each by its
checksum. It is no part of a dump: it lives as long as the processes that share it.
"""

import errno
import logging
import os
import weakref
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from storage_schemas.provenance import Provenance
from storage_schemas.records import CommitRecord
from storage_schemas.rows import OK, STATUSES, Row, UnitRows
from storage_schemas.targets import I64, Targets

log = logging.getLogger(__name__)

_INDEX = np.dtype(
    [("at", "i8"), *((name, "i4") for name in ("tokens", "targets", "entries", "id", "status")), ("check", "u4")]
)
"""Of each row: where its bytes end, counted from where the index ends; its lengths, the last that of its id in UTF-8;
its status as a place in STATUSES; the CRC-32 of its bytes."""
_CHECK = np.dtype("i8")


def write_shared(file: BinaryIO, unit: UnitRows, record: CommitRecord) -> None:
    """Write a unit to an empty file: the checksum of the index, the index, row after row.

    Raises:
        OSError: the disk is full.
    """
    rows, at = [], 0
    file.seek(_CHECK.itemsize + len(unit) * _INDEX.itemsize)
    for row in unit:
        name, targets = row.sample_id.encode(), row.targets
        parts: list[Any] = [row.input_ids, row.loss_mask, name]
        supervised = entries = 0
        if targets is not None:
            supervised, entries = len(targets), len(targets.ids)
            optional = [part for part in (targets.counts, targets.logsumexp) if part is not None]
            # The offsets first, and masks and texts last, so that all are aligned.
            parts = [targets.offsets, targets.ids, targets.logprobs, targets.head_size, targets.tail_logprob]
            parts += [*optional, row.input_ids, row.loss_mask, name]
        payload = b"".join(parts)
        at += len(payload)
        status = STATUSES.index(row.status)
        rows.append((at, len(row.input_ids), supervised, entries, len(name), status, zlib.crc32(payload)))
        file.write(payload)
    index = np.array(rows, _INDEX).tobytes()
    file.seek(0)
    file.write(_check_of(index, record) + index)


def _check_of(index: bytes, record: CommitRecord) -> bytes:
    return np.array(zlib.crc32(index, zlib.crc32(record.sha256.encode())), _CHECK).tobytes()


class SharedUnit:
    """The rows of a unit in a file that `write_shared` has written. None of them is in memory."""

    def __init__(
        self, descriptor: int, record: CommitRecord, provenance: Provenance, *, again: Callable[[], UnitRows]
    ) -> None:
        """Read and prove the index.

        Args:
            descriptor: of the file; it is closed with this object.
            again: the unit itself, where a row of the file is damaged.

        Raises:
            OSError: the index is damaged or cannot be read.
        """
        weakref.finalize(self, os.close, descriptor)
        head = os.pread(descriptor, _CHECK.itemsize + record.rows * _INDEX.itemsize, 0)
        index = head[_CHECK.itemsize :]
        if head[: _CHECK.itemsize] != _check_of(index, record):
            raise OSError(errno.EIO, "a decoded unit is damaged")
        self._index = np.frombuffer(index, _INDEX)
        self._begin = len(head)
        self._descriptor, self._again, self._name = descriptor, again, record.file
        self._temperatures, self._draws = len(provenance.temperatures), provenance.estimator.draws > 0
        self._logsumexp, self._first = provenance.logsumexp, provenance.unit_range(record.unit).start
        self._whole: UnitRows | None = None

    @property
    def used_tokens(self) -> I64:
        """(rows,) as `UnitRows.used_tokens`."""
        return np.where(self._index["status"] == STATUSES.index(OK), self._index["tokens"], 0)

    def row(self, i: int, *, own: bool = True) -> Row:
        """Row i of the unit, in memory of its own, whatever `own` says.

        Raises:
            NeoError: it is damaged, and so is the unit.
        """
        if self._whole is not None:
            return self._whole.row(i, own=own)
        at = int(self._index["at"][i - 1]) if i else 0
        end, *numbers, check = self._index[i].item()
        buffer: Any = np.empty(end - at, np.uint8)
        try:
            os.preadv(self._descriptor, [buffer], self._begin + at)
            if zlib.crc32(buffer) == check:
                return self._row(i, buffer, *numbers)
            log.warning("a row of %s was damaged after it was decoded; it is decoded again", self._name)
        except OSError as error:
            log.warning("%s is decoded again, since its rows cannot be read: %s", self._name, error)
        self._whole = self._again()
        return self.row(i, own=own)

    def _row(self, i: int, buffer: Any, tokens: int, supervised: int, entries: int, name: int, status: int) -> Row:
        at, width = 0, self._temperatures

        def take(count: int, dtype: type = np.int32) -> Any:
            nonlocal at
            start, at = at, at + count * np.dtype(dtype).itemsize
            return buffer[start:at].view(dtype)

        targets = None
        if STATUSES[status] == OK:
            targets = Targets(
                offsets=take(supervised + 1, np.int64),
                ids=take(entries),
                logprobs=take(entries, np.float32),
                head_size=take(supervised),
                tail_logprob=take(supervised * width, np.float32).reshape(-1, width),
                counts=take(entries) if self._draws else None,
                logsumexp=take(supervised * width, np.float32).reshape(-1, width) if self._logsumexp else None,
            )
        return Row(
            sample_index=self._first + i,
            input_ids=take(tokens),
            loss_mask=take(tokens, np.bool_),
            sample_id=take(name, np.uint8).tobytes().decode(),
            status=STATUSES[status],
            targets=targets,
        )
