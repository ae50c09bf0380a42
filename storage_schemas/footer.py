"""What a Parquet footer claims, read before pyarrow looks at its column chunks.

pyarrow ends the process, with an exception that it does not catch, when the level histograms of a column chunk do not
fit the column. Hashes keep damage away from it; this keeps away what was made with the right hashes: whoever can write
to a dump's URL shall not be able to end the jobs that read it, or to fill their memory.
"""

from collections.abc import Sequence
from typing import Any

_MAGIC = b"PAR1"
_DEPTH = 16
"""Nesting of a footer, at most; it needs 7."""
_BOUNDED = {0, 2, 8}
"""Encodings of strings, plain and dictionary, that pyarrow reads as a dictionary without unfolding them."""
_COLUMN_ELSEWHERE = {1, 8, 9}
"""Fields of a column chunk that say it lies in another file or is encrypted."""


def claimed_values(data: bytes, levels: Sequence[tuple[int, int]]) -> list[int]:
    """Values of each column over all row groups, an empty list or a null counting as one, as the footer claims them.

    Args:
        data: a whole Parquet file.
        levels: largest definition and repetition level per column.

    Raises:
        ValueError: the footer is torn, or a column chunk is none that pyarrow can describe.
    """
    totals = [0] * len(levels)
    try:
        for group in _footer(data).get(4, []):
            chunks = group.get(1, [])
            if len(chunks) != len(levels):
                raise ValueError(f"a row group has {len(chunks)} columns, expected {len(levels)}")
            for i, chunk in enumerate(chunks):
                about = chunk.get(3, {})
                histograms = about.get(16, {})
                if _COLUMN_ELSEWHERE & chunk.keys() or about.get(5, -1) < 0:
                    raise ValueError(f"column {i} lies elsewhere or has no number of values")
                for field, level in zip((3, 2), levels[i], strict=True):
                    if len(histograms.get(field, [])) not in (0, level + 1):
                        raise ValueError(f"column {i} has a histogram of {len(histograms[field])} levels")
                totals[i] += about[5]
    except (AttributeError, TypeError) as error:
        raise ValueError("the footer holds other types than Parquet's") from error
    return totals


def string_bytes(data: bytes, column: int) -> int:
    """Decompressed bytes of a column of strings, as its page headers have them: what pyarrow goes by.

    Read as a dictionary, the column takes no more memory than that.

    Raises:
        ValueError: the pages are torn, or encoded so that they unfold to more.
    """
    total = 0
    try:
        for group in _footer(data).get(4, []):
            about = group[1][column][3]
            at = min(offset for offset in (about.get(11), about[9]) if offset)
            end = at + about[7]
            while at < end:
                header = _Thrift(data, at)
                page = header.struct()
                values = page.get(5) or page.get(8) or {}
                if values and values.get(4 if 8 in page else 2) not in _BOUNDED:
                    raise ValueError(f"column {column} has an encoding that strings may not have")
                if page[2] < 0 or page[3] < 0:
                    raise ValueError(f"column {column} has a page of negative size")
                total += page[2]
                at = header.at + page[3]
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError("a page header holds other types than Parquet's") from error
    return total


def _footer(data: bytes) -> dict[int, Any]:
    size = int.from_bytes(data[-8:-4], "little")
    if data[-4:] != _MAGIC or not 0 < size <= len(data) - 12:
        raise ValueError("no Parquet footer")
    return _Thrift(data[-8 - size : -8]).struct()


class _Thrift:
    """Structures of the Thrift compact protocol as {field: value}."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.at = data, at

    def struct(self, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        while head := self._take(1)[0]:
            field = field + (head >> 4) if head >> 4 else self._signed()
            found[field] = head & 15 == 1 if head & 15 in (1, 2) else self._value(head & 15, depth + 1)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEPTH:
            raise ValueError("the footer is nested too deeply")
        match kind:
            case 1 | 2 | 3:
                return self._take(1)[0]
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._unsigned())
            case 9 | 10:
                head = self._take(1)[0]
                length = self._unsigned() if head >> 4 == 15 else head >> 4
                return [self._value(head & 15, depth + 1) for _ in range(length)]
            case 12:
                return self.struct(depth)
        raise ValueError(f"type {kind} in the footer")

    def _take(self, size: int) -> bytes:
        piece = self._data[self.at : self.at + size]
        if len(piece) != size:
            raise ValueError("the footer is torn")
        self.at += size
        return piece

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number in the footer is too long")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
