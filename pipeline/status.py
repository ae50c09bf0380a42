"""How far a dump and a run are. Nothing is written to either, and to read is all that the credentials need to allow.

Workers, the store and this machine may disagree about the time by hours. So speeds come from differences between the
times at which the store dated commit records, and "ago" is told by the clock that dated them: that of the store, or of
the file system. This machine's clock is never asked.
"""

import json
import os
import re
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import obstore
from pydantic import ValidationError

from storage_schemas.common.errors import DataError, TemporaryError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import DumpSection
from storage_schemas.reader import Dump
from storage_schemas.records import RUN, CommitRecord, totals, unit_of_record
from storage_schemas.stores.requests import object_store
from storage_schemas.stores.store import Store
from student_train.metrics import EVENTS, DumpLosses, Event

WINDOW_SECONDS = 600.0
"""Speeds are those of so long before the newest unit."""
FEWEST_UNITS = 3
"""And of so many units at least, however long they took."""
READ_RECORDS = 256
"""Commit records that are read at most; of a dump with more units, tokens and bytes are estimated from these."""
_CLOCK_SECONDS = 10.0
"""How long the store is asked for its time."""
_LAST_EVENTS_BYTES = 2**16
_SUMMARY, _CHECKPOINTS = "summary.json", "checkpoints"
"""Names in a run directory. The modules that own them import torch, for which nobody who only looks should wait."""
_COMMIT = re.compile(r"step-\d{8}/COMMIT\.json")
"""Of a complete checkpoint, see `student_train/checkpoint.py`."""


class DumpStatus(FrozenModel):
    """How far a dump is, whoever works on it."""

    url: str
    begun: bool
    """Whether there is a dump; else nothing of what follows is known."""
    sealed: bool = False
    """Whether it is complete."""
    fingerprint: str | None = None
    units: int | None = None
    """Units in all."""
    units_done: int = 0
    """Units that are committed, by all workers."""
    samples: int | None = None
    """Samples in all."""
    samples_done: int = 0
    """Samples of the committed units."""
    tokens: int = 0
    """Tokens of the committed units."""
    supervised_tokens: int = 0
    """Of these, those with a target."""
    bytes: int = 0
    """Of the committed data files."""
    estimated: bool = False
    """Whether tokens and bytes are estimated, from the records of some of the units."""
    units_per_minute: float | None = None
    """Over the last minutes before the newest unit; null if sealed, or if too few units tell."""
    tokens_per_second: float | None = None
    """Of all workers, over the same minutes."""
    eta_seconds: float | None = None
    """Time left at this speed; null if it is not known, or if the dump has stalled."""
    seconds_since_last_unit: float | None = None
    """By the store's own clock; null if that cannot be asked, or if the dump is sealed."""
    stalled: bool = False
    """Whether that is three times as long as any pause between units before."""


class RunStatus(FrozenModel):
    """How far a training is."""

    output: str
    """The run directory."""
    begun: bool
    """Whether training has left anything there; else nothing of what follows is known."""
    finished: bool = False
    """Whether summary.json says that all is done."""
    step: int = 0
    """Optimizer steps that are logged, or saved in the last checkpoint."""
    steps: int | None = None
    """Steps in all, as the last checkpoint knows them; null if it is of before the run was extended."""
    epoch: float | None = None
    loss: float | None = None
    """Of the last logged steps, like all that follows."""
    ce: float | None = None
    kl: float | None = None
    dumps: dict[str, DumpLosses] | None = None
    """The losses by dump, if there are several."""
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    """As training itself has estimated it at its last logged step."""
    seconds_since_last_step: float | None = None
    """By the clock of the file system; null if that cannot be asked, or if the run is finished."""
    checkpoint_step: int | None = None
    """Of the last checkpoint; null before the first."""
    seconds_since_checkpoint: float | None = None
    """By the clock of the file system, or of the store where checkpoints lie; null if that cannot be asked."""


class Status(FrozenModel):
    """All that was asked for."""

    dump: DumpStatus
    others: list[DumpStatus] = []
    """The other dumps of `train.dumps`."""
    heldout: DumpStatus | None = None
    """The held-out dump; null if the configuration has none."""
    run: RunStatus | None = None
    """Null if none was asked for."""

    @property
    def done(self) -> bool:
        """Whether nothing of it will change: the dumps are sealed, and the run is finished if there is one."""
        sealed = all(dump.sealed for _, dump in self.dumps())
        return sealed and (self.run is None or self.run.finished or not self.run.begun)

    def dumps(self) -> list[tuple[str, DumpStatus]]:
        """What each dump is called, and the dump."""
        heldout = [] if self.heldout is None else [("held-out dump", self.heldout)]
        return [("dump", self.dump), *(("dump", other) for other in self.others), *heldout]


class Watcher:
    """Looks again and again, and reads no commit record twice."""

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, str],
        others: Sequence[DumpSection] = (),
        heldout: str | None = None,
        run: Path | None = None,
        checkpoints: str | None = None,
        must_run: bool = False,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            others: dumps that are trained on beside it.
            heldout: the held-out dump, on the same store.
            checkpoints: where its checkpoints lie on the same store, if not in the directory.
            must_run: whether it is an error that nothing lies there.
        """
        self._dump = _DumpWatcher(url, options)
        self._others = [_DumpWatcher(other.url, other.storage_options) for other in others]
        self._heldout = None if heldout is None else _DumpWatcher(heldout, options)
        self._run, self._must_run = run, must_run
        self._checkpoints, self._options = checkpoints, options

    def look(self) -> Status:
        """How far everything is.

        Raises:
            TemporaryError: there is no dump yet, or no run where one is asked for, or the store does not answer.
            DataError: a commit record is damaged.
        """
        dump = self._dump.look()
        if not dump.begun:
            raise TemporaryError(
                f"there is no dump at {dump.url} yet",
                got=f"no {RUN}",
                expected="a dump that `llm-neo dump` has begun",
                fix="start stage one, or correct the URL; then run the same command again",
            )
        run = None if self._run is None else run_status(self._run, checkpoints=self._checkpoints, options=self._options)
        if run is not None and self._must_run and not run.begun:
            raise TemporaryError(
                f"there is no run in {run.output} yet",
                got=f"neither {EVENTS} nor checkpoints",
                expected="the train.output of a training that has begun",
                fix="start `llm-neo train`, or correct the path; then run the same command again",
            )
        others = [other.look() for other in self._others]
        heldout = None if self._heldout is None else self._heldout.look()
        return Status(dump=dump, others=others, heldout=heldout, run=run)


class _DumpWatcher:
    """One dump, looked at again and again."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self._store, self._options = Store(url, options=options), options
        self._opened: Dump | None = None
        self._records: dict[int, CommitRecord] = {}

    def look(self) -> DumpStatus:
        if self._opened is None:
            if self._store.size(RUN) is None:
                return DumpStatus(url=self._store.url, begun=False)
            self._opened = Dump.open(self._store.url, options=self._options)
        dump, provenance = self._opened, self._opened.provenance
        whole: dict[str, Any] = {
            "url": self._store.url,
            "begun": True,
            "fingerprint": dump.fingerprint,
            "units": provenance.units,
            "samples": provenance.corpus.samples,
        }
        if seal := dump.read_seal():
            sums = seal.model_dump(include={"tokens", "supervised_tokens", "bytes"})
            return DumpStatus(sealed=True, units_done=seal.units, samples_done=seal.rows, **sums, **whole)
        dated = {
            unit: entry["last_modified"].timestamp()
            for entry in self._store.heads("commits")
            if (unit := unit_of_record(entry["path"])) is not None and unit < provenance.units
        }
        samples = sum(len(provenance.unit_range(unit)) for unit in dated)
        whole |= {"units_done": len(dated), "samples_done": samples}
        if not dated:
            return DumpStatus(**whole)
        whole |= self._sums(dump, dated, samples)
        times = np.sort(np.fromiter(dated.values(), float, len(dated)))
        return DumpStatus(**whole, **self._speed(times, provenance.units, whole["tokens"] / len(dated)))

    def _sums(self, dump: Dump, dated: Mapping[int, float], samples: int) -> dict[str, Any]:
        """Tokens and bytes of the committed units, from the records of some, which change little from look to look."""
        chosen = nsmallest(READ_RECORDS, dated, key=lambda unit: zlib.crc32(b"%d" % unit))
        new = [unit for unit in chosen if unit not in self._records]
        self._records |= {record.unit: record for record in dump.fetch_records(new)}
        read = {unit: self._records[unit] for unit in chosen}
        sums = totals(read)
        rows, whole = sums.pop("rows"), len(read) == len(dated)
        return {name: round(value * samples / rows) for name, value in sums.items()} | {"estimated": not whole}

    def _speed(self, times: Sequence[float] | np.ndarray, units: int, tokens: float) -> dict[str, Any]:
        """Speed and time left.

        Args:
            times: at which the committed units were dated, ascending, seconds.
            tokens: of a unit, on average.
        """
        recent, since = recent_pace(times), _ago(store_clock(self._store, self._options), float(times[-1]))
        longest = recent.longest_pause
        if len(times) < FEWEST_UNITS and (run := self._store.head(RUN)) is not None:
            longest = max(longest, float(times[0]) - run["last_modified"].timestamp())
        stalled = since is not None and since > max(60.0, 3 * longest)
        found: dict[str, Any] = {"stalled": stalled, "seconds_since_last_unit": since}
        if recent.units_per_second is not None:
            found["units_per_minute"] = 60 * recent.units_per_second
            found["tokens_per_second"] = tokens * recent.units_per_second
            found["eta_seconds"] = None if stalled else (units - len(times)) / recent.units_per_second
        return found


class Pace(NamedTuple):
    """How units have come lately."""

    units_per_second: float | None
    longest_pause: float
    """Between two units, seconds."""


def recent_pace(times: Sequence[float] | np.ndarray) -> Pace:
    """The pace of the last minutes before the newest unit.

    Several workers commit in bursts, so the time before a burst counts as that in which it was computed. A pause that
    is much longer than any since does not count: the dump was stopped and went on.

    Args:
        times: at which units were dated, ascending, seconds. Only their differences matter.
    """
    times = np.asarray(times, float)
    first = int(np.searchsorted(times, times[-1] - WINDOW_SECONDS))
    first = min(first, max(0, len(times) - FEWEST_UNITS))
    longest = float(np.diff(times[first:]).max(initial=0.0))
    if first and times[first] - times[first - 1] <= 2 * longest:
        first -= 1
    span = float(times[-1] - times[first])
    return Pace((len(times) - 1 - first) / span if span > 0 else None, longest if len(times) > 1 else WINDOW_SECONDS)


def store_clock(store: Store, options: Mapping[str, str]) -> float | None:
    """The time by the clock that dates the files of a store, seconds since 1970; None if it cannot be asked."""
    if store.root is not None:
        return folder_clock(store.root)
    with suppress(Exception):  # Not every kind of credentials can sign, and a proxy may hide the answer.
        signed = obstore.sign(object_store(store.url, options), "HEAD", RUN, timedelta(minutes=1))
        try:
            answer = urllib.request.urlopen(urllib.request.Request(signed, method="HEAD"), timeout=_CLOCK_SECONDS)
            date = answer.headers["Date"]
            answer.close()
        except urllib.error.HTTPError as refused:  # A refusal has a date as well.
            date = refused.headers["Date"]
        return parsedate_to_datetime(date).timestamp()
    return None


def folder_clock(folder: Path) -> float | None:
    """The time by the clock that dates the files of a folder: that of a file without a name, which is gone at once."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"now")
            os.fsync(file.fileno())  # On NFS, only then has the server dated it.
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # Not ours to write to.
        return None


def run_status(output: Path, *, checkpoints: str | None = None, options: Mapping[str, str] | None = None) -> RunStatus:
    """How far the run in a directory is.

    Args:
        output: the directory, which may be lost where checkpoints lie elsewhere.
        checkpoints: where they lie, if not in the directory.

    Raises:
        TemporaryError: that store does not answer.
        MismatchError: it refuses.
    """
    store = Store(checkpoints or str(output / _CHECKPOINTS), options=options, setting="train.checkpoint_url")
    event, (saved, steps, saved_at) = _last_event(output / EVENTS), _last_checkpoint(store)
    summary = _json(output / _SUMMARY)
    if event is None and steps is None and not summary:
        return RunStatus(output=str(output), begun=False)
    step = max(saved or 0, event.step if event else 0)
    finished = summary.get("steps", -1) >= step
    now = folder_clock(output)
    told = {name: getattr(event, name) for name in RunStatus.model_fields.keys() & Event.model_fields.keys() if event}
    steps = None if steps is not None and steps < step else steps  # Of before the run was extended.
    told |= {"step": step, "steps": summary["steps"] if finished else steps}
    return RunStatus(
        output=str(output),
        begun=True,
        finished=finished,
        seconds_since_last_step=None if finished or event is None else _ago(now, (output / EVENTS).stat().st_mtime),
        checkpoint_step=saved or None,
        seconds_since_checkpoint=_ago(store_clock(store, options or {}), saved_at) if saved else None,
        **told,
    )


def _ago(now: float | None, then: float) -> float | None:
    """Seconds since then; None if nobody knows the time, or if somebody else's clock has said when it was."""
    return None if now is None or now < then - _CLOCK_SECONDS else max(0.0, now - then)


def _last_event(file: Path) -> Event | None:
    """The last whole line of events.jsonl; only its end is read."""
    with suppress(FileNotFoundError), file.open("rb") as events:
        events.seek(max(0, events.seek(0, os.SEEK_END) - _LAST_EVENTS_BYTES))
        for line in reversed(events.read().splitlines()):
            with suppress(ValueError, RecursionError, ValidationError):
                return Event.model_validate(json.loads(line))
    return None


def _last_checkpoint(store: Store) -> tuple[int | None, int | None, float]:
    """Step of the last complete checkpoint, steps in all, and when it was written; its tensors are not looked at."""
    commits = [entry for entry in store.heads("") if _COMMIT.fullmatch(entry["path"])]
    for commit in sorted(commits, key=lambda entry: entry["path"], reverse=True):
        with suppress(DataError, LookupError, TypeError, ValueError):  # It is being removed, or damaged.
            files = json.loads(store.get(commit["path"]))["files"]
            (name,) = [record["name"] for record in files if record["kind"] == "state"]
            state = json.loads(store.get(f"{commit['path'].partition('/')[0]}/{name}"))
            return int(state["step"]), int(state["identity"]["train.max_steps"]), commit["last_modified"].timestamp()
    return None, None, 0.0


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or if it is torn."""
    with suppress(FileNotFoundError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}
