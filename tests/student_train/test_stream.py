"""Reading ahead: the right samples at each step, each unit once, errors where they are due, and nothing unbounded."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny_student import write_dump

from storage_schemas.common.errors import DataError
from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row, UnitRows
from student_train.data import stream as streams
from student_train.data.deal import Limit
from student_train.data.follower import Follower
from student_train.data.mix import Mix
from student_train.data.order import Order
from student_train.data.stream import Stream
from student_train.resume import consumed_root

SAMPLES, PER_UNIT = 46, 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed dump of twelve units, the last one short."""
    folder = tmp_path_factory.mktemp("stream")
    write_dump(folder / "dump", samples=SAMPLES, samples_per_unit=PER_UNIT)
    return folder / "dump"


class Counting(Dump):
    """A dump that counts its reads, and how many units were read and not let go."""

    reads: Counter[int]
    hold: threading.Event | None = None
    bad: int | None = None

    @classmethod
    def at(cls, url: Path, **more: Any) -> "Counting":
        """Open."""
        dump = cls.open(str(url))
        assert isinstance(dump, Counting)
        dump.reads = Counter()
        for name, value in more.items():
            setattr(dump, name, value)
        return dump

    def read_unit(self, unit: int) -> UnitRows:
        """Count, and fail or wait if asked to."""
        self.reads[unit] += 1
        if self.hold is not None:
            self.hold.wait(60)
        if unit == self.bad:
            raise DataError(f"unit {unit} is torn")
        return super().read_unit(unit)


def mix(*, samples: int = SAMPLES, batch: int = 6, **changes: int) -> Mix:
    """Three windows of four units, blocks of two."""
    defaults = {"window_units": 4, "block_units": 2, "seed": 3}
    order = Order(samples=samples, samples_per_unit=PER_UNIT, **(defaults | changes))
    return Mix(orders=(order,), shares=(samples,), global_batch_size=batch)


def open_stream(
    dump: Dump, what: Mix, *, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 16, allowed: int = 99
) -> Stream:
    """A stream whose micro-batches are the rows themselves."""
    return streaming([dump], what, rank=rank, world_size=world_size, start=start, stop=stop, allowed=allowed)


def streaming(dumps: Sequence[Dump], what: Mix, **more: int) -> Stream:
    """The same over several dumps."""

    def rows(found: Sequence[Sequence[Row]]) -> Any:
        return [row for dump in found for row in dump]

    return Stream(dumps, what, rows, limit=Limit(2), **more)


def indices(batches: Any) -> list[int]:
    """Sample indices of micro-batches."""
    return [row.sample_index for batch in batches for row in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_world_size_trains_on_the_same_samples(url: Path, world_size: int) -> None:
    """Two epochs: the ranks' shares make up the step, each sample once, in equally many micro-batches."""
    what = mix()
    ranks = [open_stream(Dump.open(str(url)), what, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(2 * what.steps_per_epoch):
        shares = [rank.get(step, timeout=20) for rank in ranks]
        assert sorted(i for share in shares for i in indices(share)) == sorted(what.step_samples(step))
        assert len({len(share or ()) for share in shares}) == 1
    for rank in ranks:
        rank.close()


def test_micro_batches_hold_similar_lengths(url: Path) -> None:
    """They are cut from the step's rows by length; rows that are not used count as empty."""
    stream = open_stream(Dump.open(str(url)), mix(batch=20))
    batches: Any = stream.get(0, timeout=20)
    stream.close()
    lengths = [len(row.input_ids) if row.status == OK else 0 for batch in batches for row in batch]
    assert len(batches) == 10
    assert lengths == sorted(lengths, reverse=True) or lengths == sorted(lengths)


def test_state_is_the_step_alone(url: Path) -> None:
    """A stream that begins at step s gives what the one from the beginning gives there."""
    dump, what = Dump.open(str(url)), mix()
    whole = open_stream(dump, what)
    expected = [indices(whole.get(step, timeout=20)) for step in range(16)]
    whole.close()
    for start in (1, 5, 8, 11, 15):
        part = open_stream(dump, what, start=start)
        assert [indices(part.get(step, timeout=20)) for step in range(start, 16)] == expected[start:]
        part.close()


def test_each_unit_is_read_once_per_epoch(url: Path) -> None:
    """Also those whose block ends in the middle of a step."""
    dump, what = Counting.at(url), mix()
    stream = open_stream(dump, what, stop=what.steps_per_epoch)
    for step in range(what.steps_per_epoch):
        stream.get(step, timeout=20)
    stream.close()
    assert dump.reads == Counter(range(what.orders[0].units))


def test_memory_is_two_blocks_and_a_few_steps(url: Path) -> None:
    """Whatever the size of the dump, and also if nobody takes what is ready."""
    dump, what = Counting.at(url), mix()
    stream = open_stream(dump, what)
    time.sleep(1.0)
    assert len(stream._ready) == streams.AHEAD
    # Steps 0 ... 4 are made of positions 0 ... 29, that is of blocks 0 ... 3; block 4 is asked for.
    assert set(dump.reads) <= {int(u) for p in range(0, 40, 8) for u in what.orders[0].block_at(0, p)[1]}
    largest = 0
    for step in range(16):
        assert stream.get(step, timeout=20) is not None
        largest = max(largest, len(stream.blocks[0].units))
    stream.close()
    assert largest <= 3 * 2, "a step may touch two blocks, and the next one is read ahead"


def test_an_error_is_raised_at_its_step(url: Path) -> None:
    """Not when it happens, which is steps earlier; and again, if one asks again."""
    what = mix()
    bad = int(what.orders[0].block_at(0, 24)[1][0])
    first = min(s for s in range(what.steps_per_epoch) if bad in what.step_samples(s) // PER_UNIT)
    assert first > 2
    stream = open_stream(Counting.at(url, bad=bad), what)
    for step in range(first):
        assert stream.get(step, timeout=20) is not None
    for _ in range(2):
        with pytest.raises(DataError, match=f"unit {bad} is torn"):
            stream.get(first, timeout=20)
    stream.close()


def test_nothing_is_read_beyond_what_is_allowed(url: Path) -> None:
    """A window waits until it may be read; until then there is nothing to get, and no error."""
    dump, what = Counting.at(url), mix()
    inside = range(what.steps_within([1], 16))
    stream = open_stream(dump, what, allowed=len(inside))
    for step in inside:
        assert stream.get(step, timeout=20) is not None
    assert stream.get(len(inside), timeout=0.3) is None
    assert set(dump.reads) == set(what.orders[0].units_of_window(0))
    stream.allow(what.steps_within([2], 16))
    assert stream.get(len(inside), timeout=20) is not None
    stream.allow(1)  # It never falls.
    assert stream.get(len(inside) + 1, timeout=20) is not None
    stream.close()


def test_close_does_not_wait_for_a_store_that_hangs(url: Path) -> None:
    """A stop request must not take as long as the store does."""
    hold = threading.Event()
    stream = open_stream(Counting.at(url, hold=hold), mix())
    assert stream.get(0, timeout=0.2) is None
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 3
    hold.set()
    assert not stream._thread.is_alive()


def test_follower_counts_complete_windows(tmp_path: Path) -> None:
    """From the first on: a later one is of no use before the earlier ones are there."""
    what = mix()

    def windows() -> int:
        return Follower(Dump.open(str(tmp_path / "dump")), what.orders[0]).windows()

    def write(units: range) -> None:
        write_dump(tmp_path / "dump", samples=SAMPLES, samples_per_unit=PER_UNIT, units=units, seal=False)

    write(range(4, 8))
    assert windows() == 0
    write(range(3))
    assert windows() == 0
    write(range(3, 4))
    assert windows() == 2
    write(range(8, 12))
    assert windows() == 3


def test_follower_looks_seldom_and_asks_little(tmp_path: Path) -> None:
    """One request while nothing changes, and none between two looks."""
    write_dump(tmp_path / "dump", samples=SAMPLES, samples_per_unit=PER_UNIT, units=range(2), seal=False)
    dump = Dump.open(str(tmp_path / "dump"))
    asked: list[int] = []
    record = dump.read_record

    def counted(unit: int) -> Any:
        asked.append(unit)
        return record(unit)

    dump.read_record = counted  # type: ignore[method-assign]
    follower = Follower(dump, mix().orders[0], interval=0.2)
    for _ in range(5):
        assert follower.windows() == 0
    assert asked == [0, 1, 2]
    time.sleep(0.3)
    assert follower.windows() == 0
    assert asked == [0, 1, 2, 2]


def test_consumed_root(tmp_path: Path, url: Path) -> None:
    """It covers the windows that were read, sealed or not, and changes with their data."""
    what = mix()
    shutil.copytree(url, tmp_path / "growing")
    (tmp_path / "growing" / "SEALED.json").unlink()
    for unit in range(8, 12):
        (tmp_path / "growing" / "commits" / f"unit-{unit:08d}.json").unlink()
    growing, sealed = Dump.open(str(tmp_path / "growing")), Dump.open(str(url))
    roots = [consumed_root([sealed], what, step) for step in range(17)]
    changes = [step for step in range(1, 17) if roots[step] != roots[step - 1]]
    assert len(changes) == what.orders[0].windows
    assert changes[0] == 1
    assert roots[8] == roots[16], "the second epoch reads nothing new"
    assert consumed_root([growing], what, changes[2] - 1) == roots[changes[2] - 1]
    with pytest.raises(DataError, match="not committed any more"):
        consumed_root([growing], what, changes[2])
    rewritten = tmp_path / "rewritten"
    write_dump(rewritten, samples=SAMPLES, samples_per_unit=PER_UNIT, bad_samples=False)
    assert consumed_root([Dump.open(str(rewritten))], what, 1) != roots[1]
