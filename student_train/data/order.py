"""Which samples a step trains on: a pure function of (seed, step), and how a step is dealt to ranks. No state, no I/O.

Windows of `window_units` consecutive units follow each other. Inside a window the units are shuffled and cut into
blocks of `block_units`, and the rows of a block are shuffled together: a reader has one block open at a time, and who
follows a dump that is still being written waits for one window. Every shuffle is a keyed permutation that is evaluated
at single points, so that nothing is stored and any position is reached at once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_ROUNDS = 8
_TOGETHER = 1024
"""Samples that are permuted at a time, if a step has fewer."""
_PERSON = b"llm-neo order 1"
"""Part of every key: a change of this file that changes the order must change this too."""


class Span(NamedTuple):
    """Positions start:stop of an epoch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order of a run.

    Position p of an epoch is one sample, and each of the N samples has one position. Step s of an epoch owns positions
    [s * G, (s + 1) * G); an epoch has ceil(N / G) steps, so its last step is short where G does not divide N, and no
    step mixes two epochs.
    """

    samples: int
    """N, samples of the dump."""
    samples_per_unit: int
    """All units hold this many, but the last one may hold fewer."""
    window_units: int
    """Units per window."""
    block_units: int
    """Units per block."""
    global_batch_size: int
    """G, samples per optimizer step."""
    seed: int
    """Of all permutations."""

    def __post_init__(self) -> None:
        sizes = self.samples, self.samples_per_unit, self.window_units, self.block_units, self.global_batch_size
        assert min(sizes) >= 1

    @property
    def units(self) -> int:
        """Units of the dump."""
        return -(-self.samples // self.samples_per_unit)

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.units // self.window_units)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / G)."""
        return -(-self.samples // self.global_batch_size)

    def span_of_step(self, step: int) -> Span:
        """Epoch and positions of an optimizer step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        return Span(epoch, start, min(start + self.global_batch_size, self.samples))

    def step_samples(self, step: int) -> I64:
        """Sample indices of a step's global batch: G of them, fewer in the last step of an epoch."""
        span = self.span_of_step(step)
        steps = max(1, _TOGETHER // self.global_batch_size)
        first, place = divmod(span.start, steps * self.global_batch_size)
        return _samples(self, span.epoch, first * steps, steps)[place : place + span.stop - span.start]

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

    def windows_of_step(self, step: int) -> range:
        """Windows that a step reads from."""
        _, start, stop = self.span_of_step(step)
        return range(self.window_of_position(start), self.window_of_position(stop - 1) + 1)

    def _key(self, epoch: int, purpose: str, index: int) -> U64:
        """(_ROUNDS,) round keys of one permutation."""
        name = f"{self.seed}/{epoch}/{purpose}/{index}".encode()
        return np.frombuffer(hashlib.blake2b(name, digest_size=8 * _ROUNDS, person=_PERSON).digest(), "<u8")


@lru_cache(maxsize=4)
def _samples(order: Order, epoch: int, first: int, steps: int) -> I64:
    """Sample indices of some steps of an epoch; cached, since a permutation takes as long for one step as for all."""
    start, stop = (step * order.global_batch_size for step in (first, first + steps))
    samples = order.samples_at(epoch, start, min(stop, order.samples))
    samples.setflags(write=False)
    return samples


@lru_cache(maxsize=16)
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


def rank_slice(
    samples: I64,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    *,
    lengths: Sequence[int] | I64 | None = None,
) -> list[I64]:
    """Micro-batches of one rank, of at most `micro_batch_size` samples.

    Every rank gets the same number of them, ceil(samples / (world_size * micro_batch_size)), so some may be empty
    (fillers). Over all ranks they hold each sample exactly once.

    Args:
        samples: sample indices of a step's global batch, of any length.
        rank: in [0, world_size).
        world_size: number of ranks.
        micro_batch_size: samples per forward pass, at most.
        lengths: tokens per sample, parallel to `samples` and the same on every rank. Sorts, longest first, so that the
            samples of a micro-batch, and the micro-batches that ranks run at the same time, are of similar length.
            None: keep the order.
    """
    assert 0 <= rank < world_size
    if lengths is not None:
        assert len(lengths) == len(samples)
        samples = samples[np.argsort(-np.asarray(lengths, np.int64), kind="stable")]
    per_rank = -(-len(samples) // (world_size * micro_batch_size))
    if not per_rank:
        return []
    return np.array_split(samples, per_rank * world_size)[rank::world_size]


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
