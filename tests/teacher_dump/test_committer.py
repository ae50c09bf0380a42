"""The committing thread: bounded, never silent, and quick to leave."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

import pytest
from support.dumps import some_provenance, unit_rows

from storage_schemas.common.errors import TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord
from storage_schemas.rows import Row
from storage_schemas.writer import DumpWriter
from teacher_dump.committer import Committer

RUN = some_provenance(samples=20, samples_per_unit=4)


def writer_of(path: Path) -> DumpWriter:
    return DumpWriter.open(str(path), RUN)


class Held(DumpWriter):
    """Commits only once it is let go."""

    def __init__(self, writer: DumpWriter, *, fails: bool = False) -> None:
        super().__init__(writer.store, writer.provenance)
        self.started, self.go, self.fails = threading.Event(), threading.Event(), fails

    def commit_unit(self, unit: int, rows: Sequence[Row]) -> CommitRecord | None:
        self.started.set()
        assert self.go.wait(20)
        if self.fails:
            raise TemporaryError("disk full")
        return super().commit_unit(unit, rows)


class Broken(DumpWriter):
    """Cannot commit anything."""

    def commit_unit(self, unit: int, rows: Sequence[Row]) -> None:
        raise TemporaryError("disk full")


def test_everything_that_was_handed_over_is_committed_on_close(tmp_path: Path) -> None:
    with Committer(writer_of(tmp_path)) as commits:
        for unit in range(RUN.units):
            commits.commit(unit, unit_rows(RUN, unit))
    assert sorted(commits.won) == list(range(RUN.units))
    assert Dump.open(str(tmp_path)).read_records() == commits.won


def test_a_unit_that_somebody_else_committed_is_lost_not_won(tmp_path: Path) -> None:
    writer_of(tmp_path).commit_unit(1, unit_rows(RUN, 1))
    with Committer(writer_of(tmp_path)) as commits:
        for unit in range(2):
            commits.commit(unit, unit_rows(RUN, unit))
    assert (sorted(commits.won), commits.lost) == ([0], {1})


def test_computing_waits_for_writing(tmp_path: Path) -> None:
    held = Held(writer_of(tmp_path))
    commits = Committer(held)
    handed: list[int] = []

    def work() -> None:
        for unit in range(RUN.units):
            commits.commit(unit, unit_rows(RUN, unit))
            handed.append(unit)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.started.wait(20)
    time.sleep(0.5)
    assert len(handed) == 3, "one under way and two waiting"
    held.go.set()
    thread.join(20)
    commits.close()
    assert sorted(commits.won) == list(range(RUN.units))


def hand_over(commits: Committer, units: range) -> None:
    for unit in units:
        commits.commit(unit, unit_rows(RUN, unit))


NEXT = {
    "commit": lambda commits: hand_over(commits, range(1, 2)),
    "check": lambda commits: commits.check(),
    "close": lambda commits: commits.close(),
    "exit": lambda commits: commits.__exit__(None, None, None),
}


@pytest.mark.parametrize("call", NEXT)
def test_the_threads_failure_is_raised_by_whatever_comes_next(tmp_path: Path, call: str) -> None:
    commits = Committer(Broken(writer_of(tmp_path).store, RUN))
    hand_over(commits, range(1))
    wait([commits._done], 20)
    assert commits._done.done()
    with pytest.raises(TemporaryError, match="disk full"):
        NEXT[call](commits)


def test_a_full_queue_of_a_dead_thread_is_no_trap(tmp_path: Path) -> None:
    held = Held(writer_of(tmp_path), fails=True)
    commits = Committer(held)
    threading.Timer(0.3, held.go.set).start()
    started = time.monotonic()
    with pytest.raises(TemporaryError, match="disk full"):
        hand_over(commits, range(RUN.units))
    assert time.monotonic() - started < 5


def test_leaving_after_an_error_finishes_the_unit_under_way_and_drops_the_rest(tmp_path: Path) -> None:
    held = Held(writer_of(tmp_path))
    commits = Committer(held)
    hand_over(commits, range(3))
    assert held.started.wait(20)
    threading.Timer(0.3, held.go.set).start()
    commits.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert sorted(Dump.open(str(tmp_path)).read_records()) == [0]


def test_leaving_does_not_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    held = Held(writer_of(tmp_path))
    commits = Committer(held)
    for unit in range(3):
        commits.commit(unit, unit_rows(RUN, unit))
    started = time.monotonic()
    commits.abandon(seconds=0.3)
    assert time.monotonic() - started < 2
    held.go.set()
