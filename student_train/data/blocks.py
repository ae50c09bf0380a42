"""The units of a dump that are open while its order is read, and their rows until each is used.

One block is read, and of the next one as many units are fetched as this one has used up. If a rank knows which rows
will be its own, it keeps these alone, in memory of their own, which costs a copy of each: both blocks together then
hold little more than the rank's share of one. Else a unit stays open until its block is read, and there are two blocks
at most. Where ranks share units, an open one is an index, and its rows are read when they are used; else it is whole.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord
from storage_schemas.rows import Row
from student_train.data.order import I64, Order

READERS = 2
"""Threads that fetch and decode units."""
WAITING = 2
"""More of them where ranks share units: one that another rank decodes keeps a thread waiting."""
SPARE = 4
"""Units that are fetched before the block that is read has made room for them."""
_ROW_BYTES = 2048
"""Of a row as objects of Python and numpy, beside what it holds."""


class Held(NamedTuple):
    """A unit that is open."""

    dump: int
    """Number of its dump."""
    tokens: list[int]
    """Of each sample, what it costs; 0 if it is not used."""
    row: Callable[[int], Row]
    """A sample of it. One of a rank's own is let go with that, so that it is there once."""
    own: dict[int, Row] | None
    """What is left of the rank's own samples; None where they are not known."""


Sample = tuple[int, Held, int]
"""What a sample costs, the unit that it is of, and its place there."""


class Block(NamedTuple):
    """A block of the order, its positions counted on over all epochs."""

    first: int
    last: int
    """The position behind it."""
    units: I64


class Blocks:
    """Reads one dump in its order, forward only."""

    def __init__(
        self,
        number: int,
        dump: Dump,
        order: Order,
        readers: ThreadPoolExecutor,
        own: Callable[[int, int], I64] | None,
    ) -> None:
        """Nothing is asked for yet. `own` tells which positions of a range are the rank's; None: all may be."""
        self._number, self._dump, self._order, self._readers, self._own = number, dump, order, readers, own
        self._rest: dict[int, set[int] | None] = {}
        """Of the blocks that are open, by their beginning, the rank's samples; None: any may be."""
        self._current: list[Block] = []
        self.units: dict[tuple[int, int], Future[Held]] = {}
        """Those that are open, by the beginning of their block and their number: one may be in the next epoch's too."""

    def open(self, start: int, stop: int) -> None:
        """Ask for all units that positions start:stop come from, and let go of the blocks before."""
        here = self._block(start)
        # A block that was begun stays, even if nothing is taken of it this time.
        self._current = list(self._blocks(start, stop)) or ([here] if here.first < start else [])
        for key in [key for key in self.units if key[0] < here.first]:
            self.units.pop(key).cancel()
        self._rest = {first: samples for first, samples in self._rest.items() if first >= here.first}
        for block in self._current:
            self._ask(block, block.units, after=start)

    def read_ahead(self, stop: int, *, end: int, windows: int) -> None:
        """Ask for some units of the next block, if it begins before the position `end` and in the first windows.

        Args:
            stop: as in the last `open`.
            end: where the run ends.
            windows: that may be read.
        """
        position, used, of = stop, 1, 1
        if self._current:
            first, position, _ = self._current[-1]
            used, of = min(stop, position) - first, position - first
        if position >= end or self._order.window_of_position(position % self._order.samples) >= windows:
            return
        block = self._block(position)
        self._ask(block, block.units[: len(block.units) * used // of + SPARE])

    def take(self, start: int, stop: int, result: Callable[[Future[Held]], Held]) -> list[Sample]:
        """The rank's samples at positions start:stop, once. `result` waits for a unit.

        Raises:
            NeoError: a unit is missing, torn or out of range, or the store is away.
        """
        taken: list[Sample] = []
        for block in self._current:
            samples = self._samples(max(start, block.first), min(stop, block.last))
            units, places = (part.tolist() for part in np.divmod(samples, self._order.samples_per_unit))
            there = {unit: result(self.units[block.first, unit]) for unit in set(units)}
            held = [there[unit] for unit in units]
            tokens = [unit.tokens[place] for unit, place in zip(held, places, strict=True)]
            taken += zip(tokens, held, places, strict=True)
        return taken

    def _block(self, position: int) -> Block:
        """The one that a position lies in."""
        epoch, within = divmod(position, self._order.samples)
        span, units = self._order.block_at(epoch, within)
        first = position - within + span.start
        return Block(first, first + span.stop - span.start, units)

    def _blocks(self, start: int, stop: int) -> Iterator[Block]:
        while start < stop:
            yield (block := self._block(start))
            start = block.last

    def _samples(self, start: int, stop: int) -> I64:
        """The rank's samples at positions start:stop, counted on over all epochs."""
        samples = self._order.samples_of(start, stop)
        return samples if self._own is None else samples[self._own(start, stop) - start]

    def _ask(self, block: Block, units: I64, *, after: int = 0) -> None:
        """For some units of a block; of the rank's samples, if they are known, for those after a position."""
        missing = [unit for unit in units.tolist() if (block.first, unit) not in self.units]
        if missing and block.first not in self._rest:
            start = max(after, block.first)
            rest = None if self._own is None else set(self._samples(start, block.last).tolist())
            self._rest[block.first] = rest
        for unit in missing:
            self.units[block.first, unit] = self._readers.submit(self._load, unit, self._rest[block.first])

    def _load(self, unit: int, samples: Collection[int] | None) -> Held:
        """The rows of a unit that are among some samples of the dump; None: all of them."""
        opened, first = self._dump.open_unit(unit), unit * self._order.samples_per_unit
        tokens = opened.used_tokens.tolist()
        if samples is None:  # It may be another rank's: it is made a row only when it is used.
            return Held(self._number, tokens, opened.row, None)
        own = {i: opened.row(i, own=True) for i in range(len(tokens)) if first + i in samples}
        return Held(self._number, tokens, own.pop, own)


def decoded_bytes(record: CommitRecord, provenance: Provenance) -> int:
    """Memory that the rows of a unit take, decoded."""
    draws, values = provenance.estimator.draws > 0, len(provenance.temperatures) * (1 + provenance.logsumexp)
    targets = record.entries * (12 if draws else 8) + record.supervised_tokens * (12 + 4 * values)
    return targets + record.tokens * 5 + record.rows * _ROW_BYTES


def units_within(dump: Dump, budget: int) -> int:
    """Units of a block whose rows, with all that is fetched beside it, take no more memory than `budget` bytes over all
    ranks; one at least. The dump is sealed."""
    assert dump.is_sealed()
    largest = max(decoded_bytes(record, dump.provenance) for record in dump.read_records().values())
    # Of those that are decoded right now there is a second copy.
    return max(1, min(dump.provenance.units, budget // largest - SPARE - READERS))


def block_bytes(dump: Dump, order: Order) -> int:
    """Memory that the two blocks of whole units take that a rank may have open, at most. The dump is sealed."""
    sizes = sorted((decoded_bytes(record, dump.provenance) for record in dump.read_records().values()), reverse=True)
    return sum(sizes[: 2 * order.block_units])
