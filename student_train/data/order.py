"""The order in which a dump is read, a pure function of (seed, position). No state, no I/O.

Which positions a step owns, of one dump or of several, says `mix.py`, and which micro-batches it is cut into `deal.py`.

Windows of `window_units` consecutive units follow each other. Inside a window the units are shuffled and cut into
blocks of `block_units`, and the rows of a block are shuffled together: a reader has one block open at a time, and who
follows a dump that is still being written waits for one window. Every shuffle is a keyed permutation that is evaluated
at single points, so that nothing is stored and any position is reached at once.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_ROUNDS = 8
_TOGETHER = 1024
"""Samples that are permuted at a time, if fewer are asked for."""
_PERSON = b"llm-neo order 1"
"""Part of every key: a change of this file that changes the order must change this too."""


class Span(NamedTuple):
    """Positions start:stop of an epoch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order of a dump: position p of an epoch is one sample, and each of the N samples has one position."""

    samples: int
    """N, samples of the dump."""
    samples_per_unit: int
    """All units hold this many, but the last one may hold fewer."""
    window_units: int
    """Units per window."""
    block_units: int
    """Units per block."""
    seed: int
    """Of all permutations."""

    def __post_init__(self) -> None:
        assert min(self.samples, self.samples_per_unit, self.window_units, self.block_units) >= 1

    @property
    def units(self) -> int:
        """Units of the dump."""
        return -(-self.samples // self.samples_per_unit)

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.units // self.window_units)

    def samples_of(self, start: int, stop: int) -> I64:
        """Sample indices at positions start:stop, counted on over all epochs; their neighbours are remembered, since a
        permutation takes as long for a few as for many."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, first = divmod(start, self.samples)
            last = min(first + stop - start, self.samples)
            if last - first > _TOGETHER:
                parts.append(self.samples_at(epoch, first, last))
            else:
                piece = first // _TOGETHER
                near = [_samples(self, epoch, number) for number in range(piece, -(-last // _TOGETHER))]
                parts.append(np.concatenate(near)[first - piece * _TOGETHER :][: last - first])
            start += last - first
        return np.concatenate(parts)

    def samples_at(self, epoch: int, start: int, stop: int) -> I64:
        """Sample indices at positions start:stop of an epoch."""
        parts = [np.empty(0, np.int64)]
        position = start
        while position < stop:
            span, units = self.block_at(epoch, position)
            inside = np.arange(position - span.start, min(stop, span.stop) - span.start)
            row = _permute(inside, span.stop - span.start, self._key(epoch, "rows", span.start))
            slot, offset = np.divmod(row, self.samples_per_unit)
            parts.append(units[slot] * self.samples_per_unit + offset)
            position = span.stop
        return np.concatenate(parts)

    def block_at(self, epoch: int, position: int) -> tuple[Span, I64]:
        """The block that a position lies in: its positions, and the units that they come from.

        Who reads ahead walks from here: the next block of the epoch, if any, begins at the span's `stop`.
        """
        window = self.window_of_position(position)
        within = position - window * self.window_units * self.samples_per_unit
        return _block(self, epoch, window, within // (self.block_units * self.samples_per_unit))

    def window_of_position(self, position: int) -> int:
        """The window that a position lies in, in every epoch."""
        return position // (self.window_units * self.samples_per_unit)

    def units_of_window(self, window: int) -> range:
        """Units that must all be committed before any position of the window can be read, in every epoch."""
        return range(window * self.window_units, min((window + 1) * self.window_units, self.units))

    def _key(self, epoch: int, purpose: str, index: int) -> U64:
        """(_ROUNDS,) round keys of one permutation."""
        name = f"{self.seed}/{epoch}/{purpose}/{index}".encode()
        return np.frombuffer(hashlib.blake2b(name, digest_size=8 * _ROUNDS, person=_PERSON).digest(), "<u8")


@lru_cache(maxsize=64)
def _samples(order: Order, epoch: int, piece: int) -> I64:
    """Sample indices of one of the pieces that an epoch is cut into."""
    return order.samples_at(epoch, piece * _TOGETHER, min((piece + 1) * _TOGETHER, order.samples))


@lru_cache(maxsize=64)
def _block(order: Order, epoch: int, number: int, block: int) -> tuple[Span, I64]:
    """Positions and units of a block, counted within a window; cached, since each step of it asks."""
    window = order.units_of_window(number)
    slots = np.arange(block * order.block_units, min((block + 1) * order.block_units, len(window)))
    start = (window.start + block * order.block_units) * order.samples_per_unit
    stop = min(start + len(slots) * order.samples_per_unit, order.samples)
    # A short last unit stays in the last slot, so that only the last block is short.
    full = len(window) - (window.stop * order.samples_per_unit > order.samples)
    units = slots.copy()
    units[slots < full] = _permute(slots[slots < full], full, order._key(epoch, "units", window.start))
    units += window.start
    units.setflags(write=False)
    return Span(epoch, start, stop), units


def _permute(index: I64, n: int, keys: U64) -> I64:
    """A keyed permutation of range(n) at the given indices.

    A Feistel network on the pairs (a, b) of [0, A) x [0, B) with A * B just above n: each round adds a function of one
    half to the other, which can be undone, so it permutes the pairs. What lands on n or above goes around again until
    it does not (cycle walking); as A * B - n < A, hardly anything does.
    """
    if n <= 1:
        return index
    width = int(np.ceil(np.sqrt(n)))
    height = -(-n // width)
    out, outside = index.copy(), np.arange(len(index))
    while len(outside):
        a, b = np.divmod(out[outside], height)
        for i in range(0, _ROUNDS, 2):
            a = (a + _mix(b, keys[i], width)) % width
            b = (b + _mix(a, keys[i + 1], height)) % height
        walked = a * height + b
        out[outside] = walked
        outside = outside[walked >= n]
    return out


def _mix(value: I64, key: np.uint64, modulus: int) -> I64:
    """A number below `modulus` that depends on every bit of value and key (the finaliser of SplitMix64)."""
    x = value.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)
