"""Live progress: a bar on a terminal, else a log line every few seconds, and one JSON object per event."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from storage_schemas.common.errors import MismatchError
from storage_schemas.records import CommitRecord, mean_per_token, totals
from storage_schemas.targets import I64

log = logging.getLogger(__name__)

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.5


@contextmanager
def event_log(path: Path | None, *, rank: int) -> Iterator[Callable[..., None]]:
    """What appends an event and its values to a file as a JSON object, with the time in seconds since 1970 and this
    worker's number; without a file it does nothing. A line is written at once, so that several workers can share one.
    """
    place = path or Path(os.devnull)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a", encoding="utf-8")
    except FileNotFoundError as error:  # A link to nowhere; other errors say by themselves what they are.
        raise MismatchError(f"cannot write {path}", got=error.strerror, fix="correct --events") from error

    def write(event: str, **values: Any) -> None:
        file.write(json.dumps({"event": event, "time": round(time.time(), 3), "rank": rank, **values}) + "\n")
        file.flush()

    with file:
        yield write


class DumpProgress:
    """What a worker shows while it runs. Speeds are this worker's; units are those of all workers."""

    def __init__(
        self, *, unit_tokens: I64, world_size: int, events: Callable[..., None], console: Console | None = None
    ) -> None:
        """`unit_tokens` (units,) are the tokens of each unit."""
        self.unit_tokens, self.world_size, self.events = unit_tokens, world_size, events
        self.tokens = 0
        """Tokens that went through the teacher here."""
        self._computed = np.zeros_like(unit_tokens)
        self.started = self._shown = time.monotonic()
        console = console or Console(stderr=True)
        columns = (TextColumn("dump"), BarColumn(), MofNCompleteColumn(), TextColumn("units  {task.fields[text]}"))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("dump", total=len(unit_tokens), text="") if self._bar else TaskID(0)

    def shown(self) -> AbstractContextManager[Any]:
        """The bar is on the terminal as long as this lasts."""
        return self._bar or nullcontext()

    def count(self, unit: int, tokens: int) -> None:
        """Tokens of a unit have gone through the teacher."""
        self.tokens += tokens
        self._computed[unit] += tokens

    @property
    def seconds(self) -> float:
        """Since the first batch could start."""
        return time.monotonic() - self.started

    def update(self, *, committed: Set[int], records: Mapping[int, CommitRecord], last: bool = False) -> None:
        """Show where the dump is, if it is time.

        Args:
            committed: units that all workers have committed, as far as was seen.
            records: of the units committed here.
            last: it is the end, and so is always time.
        """
        now = time.monotonic()
        if not last and now - self._shown < (_LINE_SECONDS if self._bar is None else _BAR_SECONDS):
            return
        self._shown = now
        records = dict(records)  # The committing thread adds to them meanwhile.
        done, units = list(committed | records.keys()), len(self.unit_tokens)
        left = np.maximum(self.unit_tokens - self._computed, 0)
        left[done] = 0
        speed = self.tokens / max(self.seconds, 1e-9)
        # If every worker is as fast as this one.
        eta = int(left.sum()) / (speed * self.world_size) if self.tokens else None
        sums, mass = totals(records), mean_per_token(records, "mean_kept_mass")
        density = sums["bytes"] / sums["supervised_tokens"] if sums["supervised_tokens"] else None
        self.events(
            "progress",
            units_done=len(done),
            units=units,
            tokens=self.tokens,
            tokens_per_second=round(speed, 1),
            eta_seconds=None if eta is None else round(eta, 1),
            bytes_per_supervised_token=density,
            mean_kept_mass=mass,
        )
        text = f"{speed:,.0f} tokens/s"
        if eta is not None:
            text += f", {timedelta(seconds=round(eta))} left"
        if density is not None:
            text += f", {density:.1f} bytes/supervised token" + (f", coverage {mass:.4f}" if mass else "")
        if self._bar is None:
            log.info("dump: %d/%d units, %s", len(done), units, text)
        else:
            self._bar.update(self._task, completed=len(done), text=text)
