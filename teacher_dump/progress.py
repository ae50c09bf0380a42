"""Live progress: a bar on a terminal, else a log line every few seconds, and one JSON object per event."""

import json
import logging
import time
from collections.abc import Mapping, Set
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from storage_schemas.common.errors import MismatchError
from storage_schemas.records import CommitRecord
from storage_schemas.targets import I64

log = logging.getLogger(__name__)

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.5


class EventLog:
    """Appends JSON objects to a file, one a line; without a file it does nothing."""

    def __init__(self, path: Path | None, *, rank: int) -> None:
        self.rank = rank
        self._file = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8")
            except FileNotFoundError as error:  # A link to nowhere; other errors say by themselves what they are.
                raise MismatchError(f"cannot write {path}", got=error.strerror, fix="correct --events") from error

    def write(self, event: str, **values: Any) -> None:
        """Append one event, with the time in seconds since 1970 and this worker's number.

        A line is written at once, so that several workers can share a file.
        """
        if self._file is not None:
            line = json.dumps({"event": event, "time": round(time.time(), 3), "rank": self.rank, **values})
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class DumpProgress:
    """What a worker shows while it runs. Speeds are this worker's; units are those of all workers."""

    def __init__(self, *, unit_tokens: I64, world_size: int, events: EventLog, console: Console | None = None) -> None:
        """`unit_tokens` (units,) are the tokens of each unit."""
        self.unit_tokens, self.world_size, self.events = unit_tokens, world_size, events
        self.units = len(unit_tokens)
        self.tokens = 0
        """Tokens that went through the teacher here."""
        self.units_done = 0
        self.tokens_left = int(unit_tokens.sum())
        """Of the units that nobody has committed, those that have not gone through the teacher here."""
        self._computed = np.zeros_like(unit_tokens)
        self.started = time.monotonic()
        self._shown = self.started
        console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("dump"), BarColumn(), MofNCompleteColumn(), TextColumn("units  {task.fields[text]}"),
            console=console, transient=False,
        ) if console.is_terminal else None  # fmt: skip
        self._task = self._bar.add_task("dump", total=self.units, text="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, unit: int, tokens: int) -> None:
        """Tokens of a unit have gone through the teacher."""
        self.tokens += tokens
        self._computed[unit] += tokens

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
        done = list(committed | records.keys())
        left = np.maximum(self.unit_tokens - self._computed, 0)
        left[done] = 0
        self.units_done, self.tokens_left, self._shown = len(done), int(left.sum()), now
        self._show(records)

    @property
    def seconds(self) -> float:
        """Since the first batch could start."""
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Of this worker."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left if every worker is as fast as this one."""
        return self.tokens_left / (self.tokens_per_second * self.world_size) if self.tokens else None

    def _show(self, records: Mapping[int, CommitRecord]) -> None:
        supervised = sum(record.supervised_tokens for record in records.values())
        size = sum(record.bytes for record in records.values())
        mass = sum(record.mean_kept_mass * record.supervised_tokens for record in records.values())
        values = {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "eta_seconds": None if self.eta_seconds is None else round(self.eta_seconds, 1),
            "bytes_per_supervised_token": size / supervised if supervised else None,
            "mean_kept_mass": mass / supervised if supervised else None,
        }
        self.events.write("progress", units_done=self.units_done, units=self.units, tokens=self.tokens, **values)
        text = f"{self.tokens_per_second:,.0f} tokens/s"
        if self.eta_seconds is not None:
            text += f", {timedelta(seconds=round(self.eta_seconds))} left"
        if supervised:
            text += f", {size / supervised:.1f} bytes/supervised token, kept mass {mass / supervised:.4f}"
        if self._bar is None or self._task is None:
            log.info("dump: %d/%d units, %s", self.units_done, self.units, text)
        else:
            self._bar.update(self._task, completed=self.units_done, text=text)
