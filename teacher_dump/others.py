"""What other workers have committed, as far as this one has seen. Only what is committed first counts, see `writer.py`:
who sees it late computes a unit in vain."""

import random
import time
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from itertools import chain

from storage_schemas.common.interrupt import in_background
from storage_schemas.writer import DumpWriter

LOOK_SECONDS = 10.0
"""A worker looks again so long after it has seen the last answer."""


class Others:
    """The committed units of a dump: all of them at first, and then, from time to time, what is new.

    A look is one or two requests, however many units there are: one page of the listing, which begins with the first
    unit that was not seen yet, the next page at the next look, and whether the unit under way is committed.
    """

    def __init__(self, writer: DumpWriter) -> None:
        self._writer, self._units = writer, writer.provenance.units
        self.committed = writer.committed()
        """Units that were seen."""
        self._from = 0
        """Where the next page begins, or behind it."""
        self._looked = time.monotonic()
        self._answer: Future[set[int]] | None = None
        """What is asked for and not seen yet."""

    def look(self, unit: int) -> None:
        """See what is new, if it is time, as of the `unit` under way. A thread asks: a store may take seconds.

        Raises:
            NeoError: the store cannot be asked.
        """
        if self._answer is None:
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._answer = in_background(partial(self._ask, unit))
        elif self._answer.done():
            answer, self._answer = self._answer, None
            self._looked = time.monotonic()
            self.committed |= answer.result()

    def left(self, units: Iterable[int], *, among: int) -> list[int]:
        """Those of `units` that nobody was seen to commit, in an order in which few workers meet.

        Args:
            units: some of the dump's.
            among: the last ones come first, which their owners come to last, in random order among so many.
        """
        left = sorted((unit for unit in units if unit not in self.committed), reverse=True)
        shuffled = random.Random().sample
        blocks = (left[start : start + among] for start in range(0, len(left), among))
        return [unit for block in blocks for unit in shuffled(block, len(block))]

    def _ask(self, unit: int) -> set[int]:
        places = chain(range(self._from, self._units), range(self._from))
        first = next((place for place in places if place not in self.committed), self._units)
        found, more = self._writer.committed_from(first)
        stop = max(found, default=first) + 1 if more else self._units
        self._from = stop % self._units
        if not first <= unit < stop and self._writer.is_committed(unit):
            found.add(unit)
        return found
