"""Writers that are killed, stopped or run out of disk at every write step, as enumerated by the code itself.

After any of it a rerun completes the dump with every sample exactly once, nothing hangs, and every process ends with
its documented exit code.
"""

import hashlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import storage_jobs
from support.dumps import TOKENIZER, some_provenance
from support.forks import ForkServer

from storage_schemas.common.errors import TemporaryError
from storage_schemas.common.exits import Exit
from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter

Point = tuple[str, int]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def zygote() -> Iterator[ForkServer]:
    found = ForkServer(storage_jobs.__file__)
    yield found
    found.close()


@pytest.fixture(scope="module")
def points(zygote: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """Every step of one run, as (name, occurrence)."""
    folder = tmp_path_factory.mktemp("points")
    assert zygote.run({"url": folder / "dump"}, log=str(folder / "log")) == Exit.DONE
    seen: dict[str, int] = {}
    found = []
    for name in (folder / "log").read_text().splitlines():
        seen[name] = seen.get(name, 0) + 1
        found.append((name, seen[name]))
    assert len(found) > 100
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: a killed process loses nothing that it wrote, on whatever file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def folders(place: Path) -> Iterator[Path]:
    """A new directory each time; the one before is gone."""
    for i in range(10**6):
        yield place / str(i)
        shutil.rmtree(place / str(i), ignore_errors=True)


def assert_exactly_once(url: Path) -> None:
    """Every sample has one row, and after a clean-up nothing is there that should not be."""
    report = verify(str(url))
    assert report.ok, report.errors
    provenance = some_provenance()
    assert report.rows == provenance.corpus.samples
    dump = Dump.open(str(url))
    found = [int(i) for unit in range(provenance.units) for i in dump.read_unit(unit).sample_index]
    assert found == list(range(provenance.corpus.samples))
    DumpWriter.open(str(url), provenance).clean()
    names = {record.file for record in dump.read_records().values()}
    assert {f"data/{path.name}" for path in (url / "data").iterdir()} == names
    assert not [path for path in url.rglob("*") if path.name.startswith(".staged") or "/probe/" in str(path)]
    assert verify(str(url)).ok


def sample(points: list[Point], n: int) -> list[Point]:
    """Every n-th point, and one of every name."""
    first_of_name = {name: (name, i) for name, i in reversed(points)}
    return sorted({*points[::n], *first_of_name.values()}, key=points.index)


def kill_at(zygote: ForkServer, url: Path, point: Point) -> None:
    name, occurrence = point
    assert zygote.run({"url": url}, fault=f"{name}:{occurrence}:kill") == KILLED, point


def assert_proven_or_absent(url: Path) -> None:
    """What a reader sees between a kill and the rerun."""
    if (url / "run.json").exists():
        dump = Dump.open(str(url))
        for unit in dump.read_records():
            dump.read_unit(unit)
        try:
            assert dump.read_tokenizer() == TOKENIZER
        except TemporaryError:
            assert not dump.read_records(), "the tokenizer is complete before the first unit"


def test_a_sample_of_kills(zygote: ForkServer, points: list[Point], place: Path) -> None:
    for url, point in zip(folders(place), sample(points, 5), strict=False):
        kill_at(zygote, url, point)
        assert_proven_or_absent(url)
        assert zygote.run({"url": url}) == Exit.DONE, point
        assert_exactly_once(url)


@pytest.mark.slow
def test_a_kill_at_every_step(zygote: ForkServer, points: list[Point], place: Path) -> None:
    for url, point in zip(folders(place), points, strict=False):
        kill_at(zygote, url, point)
        assert_proven_or_absent(url)
        assert zygote.run({"url": url}) == Exit.DONE, point
        assert_exactly_once(url)


def double_kills(zygote: ForkServer, points: list[Point], place: Path, n: int) -> None:
    rng = random.Random(0)
    for url in (url for url, _ in zip(folders(place), range(n), strict=False)):
        first, second = rng.choice(points), rng.choice(points)
        kill_at(zygote, url, first)
        # The second worker may have fewer steps left than it would take to reach its point.
        assert zygote.run({"url": url}, fault=f"{second[0]}:{second[1]}:kill") in (KILLED, Exit.DONE), (first, second)
        assert zygote.run({"url": url}) == Exit.DONE, (first, second)
        assert_exactly_once(url)


def test_a_few_double_kills(zygote: ForkServer, points: list[Point], place: Path) -> None:
    double_kills(zygote, points, place, 12)


@pytest.mark.slow
def test_many_double_kills(zygote: ForkServer, points: list[Point], place: Path) -> None:
    double_kills(zygote, points, place, 250)


def snapshot(url: Path) -> dict[str, str]:
    """Hashes of everything that is decided."""
    decided = [url / "run.json", url / "SEALED.json", *(url / "commits").iterdir()]
    decided += [url / CommitRecord.from_json(p.read_bytes(), name="x").file for p in (url / "commits").glob("unit-*")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in decided if "staged" not in path.name}


def zombies(zygote: ForkServer, points: list[Point], place: Path) -> None:
    for url, (name, occurrence) in zip(folders(place), points, strict=False):
        zombie = zygote.start({"url": url}, fault=f"{name}:{occurrence}:stop")
        assert zygote.wait(zombie) == "stopped", name
        try:
            assert zygote.run({"url": url}) == Exit.DONE, "another worker finishes and cleans up meanwhile"
            before = snapshot(url)
        finally:
            os.kill(zombie, signal.SIGCONT)
        assert zygote.wait(zombie) == Exit.DONE, (name, occurrence)
        assert snapshot(url) == before, "a late writer changed what was decided"
        assert_exactly_once(url)


def test_a_sample_of_zombies(zygote: ForkServer, points: list[Point], place: Path) -> None:
    zombies(zygote, sample(points, 20), place)


@pytest.mark.slow
def test_a_zombie_at_every_step(zygote: ForkServer, points: list[Point], place: Path) -> None:
    zombies(zygote, points, place)


def failures(zygote: ForkServer, points: list[Point], place: Path, action: str) -> None:
    expected = Exit.BUG if action == "thread" else Exit.TEMPORARY
    writes = [point for point in points if not point[0].startswith("commit:")]
    for url, (name, occurrence) in zip(folders(place), writes, strict=False):
        # An orphan that cannot be deleted is no reason to stop.
        allowed = {expected, Exit.DONE} if name.startswith("delete:") else {expected}
        assert zygote.run({"url": url}, fault=f"{name}:{occurrence}:{action}") in allowed, (name, occurrence)
        committed = {path.name for path in url.glob("commits/unit-*")}
        assert zygote.run({"url": url}) == Exit.DONE
        assert committed <= {path.name for path in url.glob("commits/unit-*")}
        assert_exactly_once(url)


@pytest.mark.parametrize("action", ["full", "raise", "thread"])
def test_a_sample_of_failures(zygote: ForkServer, points: list[Point], place: Path, action: str) -> None:
    failures(zygote, sample(points, 60), place, action)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["full", "raise", "thread"])
def test_failures_at_every_step(zygote: ForkServer, points: list[Point], place: Path, action: str) -> None:
    failures(zygote, points, place, action)


def test_a_real_full_disk(zygote: ForkServer, place: Path) -> None:
    """No injection: the kernel itself refuses to let the file grow."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    own = ForkServer(storage_jobs.__file__)
    try:
        resource.prlimit(own.pid, resource.RLIMIT_FSIZE, (2000, hard))
        assert own.run({"url": place / "dump"}) == Exit.TEMPORARY
        assert not list((place / "dump").glob("commits/*"))
    finally:
        own.close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)
    assert zygote.run({"url": place / "dump"}) == Exit.DONE
    assert_exactly_once(place / "dump")


def test_workers_race_for_the_same_units(zygote: ForkServer, place: Path) -> None:
    for round_, url in zip(range(4), folders(place), strict=False):
        orders = [random.Random(10 * round_ + i).sample(range(3), 3) for i in range(8)]
        workers = [zygote.start({"url": url, "order": order}) for order in orders]
        assert [zygote.wait(worker) for worker in workers] == [Exit.DONE] * 8
        assert_exactly_once(url)
