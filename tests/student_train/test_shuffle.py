"""Mixing over a whole dump: how much of it a step draws from, what that takes of memory, and that it is a run's own."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.distributed import Ranks
from support.dumps import ESTIMATORS, make_dump, some_provenance
from support.engine_jobs import train_section
from support.rounding import FORWARD, update_excess
from support.tiny_student import save_student, write_dump
from test_mix import located, mix_of, names
from test_stream import streaming
from test_train import Trainings, assert_refused, largest_difference

from storage_schemas.config import Estimator
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from student_train.checkpoint import TrainState
from student_train.config import Resolved
from student_train.data.blocks import READERS, SPARE, block_bytes, decoded_bytes, units_within
from student_train.data.mix import Mix
from student_train.resume import identity_of, known
from student_train.training_run import TrainingRun, open_run, weigh

PER_UNIT, BATCH = 512, 64
DEFAULT, WHOLE = (1024, 8), 10**6
"""Units of a window and of a block by default; and a window that holds all."""


def shuffled(samples: int, window: int, block: int) -> Mix:
    """One dump with units of ordinary size."""
    return mix_of([(samples, PER_UNIT, window, block, samples)], BATCH)


def topics(mix: Mix, count: int = 100) -> float:
    """Topics in a step, on average, if samples are sorted by topic."""
    steps = range(0, mix.steps_per_epoch - 1, max(1, mix.steps_per_epoch // 200))
    found = [len(set((mix.step_samples(step) * count // mix.samples).tolist())) for step in steps]
    return float(np.mean(found))


@pytest.mark.parametrize(("samples", "window", "block", "least", "most"), [
    (100_000, *DEFAULT, 10, 11.5),  # What a dump of 196 units is mixed like in windows.
    (100_000, WHOLE, 8, 10, 11.5),
    (100_000, WHOLE, 25, 24, 27),  # 2 GiB at 450 supervised tokens a sample and 34 entries.
    (100_000, WHOLE, 64, 37, 40),  # 4.5 GiB; 8 ranks hold nearly as much in the memory of windows.
    (100_000, WHOLE, 128, 42, 45),  # The same at 90 supervised tokens.
    (100_000, WHOLE, WHOLE, 46, 49),  # A full shuffle.
    (1_000_000, WHOLE, 25, 20, 23),
])  # fmt: skip
def test_topics_that_a_step_sees(samples: int, window: int, block: int, least: float, most: float) -> None:
    """Of 100 topics, one after the other in the corpus, in a batch of 64; a full shuffle has 47."""
    assert least <= topics(shuffled(samples, window, block)) <= most


@pytest.mark.parametrize(("window", "block", "whole"), [(*DEFAULT, False), (WHOLE, 8, True), (WHOLE, 25, True)])
def test_sources_that_follow_each_other_are_mixed(window: int, block: int, whole: bool) -> None:
    """Two sources of a million samples each: in windows they are trained on one after the other."""
    mix = shuffled(2_000_000, window, block)
    second = np.array([(mix.step_samples(step) >= 1_000_000).mean() for step in range(0, mix.steps_per_epoch, 50)])
    both, fifth = np.mean((second > 0) & (second < 1)), len(second) // 5
    parts = second[:fifth].mean(), second[-2 * fifth :].mean()
    if whole:
        assert both > 0.97
        assert parts == pytest.approx((0.5, 0.5), abs=0.06)
    else:
        assert both < 0.2
        assert parts == (0.0, 1.0)


def held_bytes(rows: list[Row | None]) -> int:
    """Of the rows that are not used yet, entries that other rows hold not counted."""
    total = 0
    for row in rows:
        if row is not None:
            total += row.input_ids.nbytes + row.loss_mask.nbytes
            targets = row.targets
            for name in targets.__slots__ if targets is not None else ():
                array = getattr(targets, name)
                total += 0 if array is None else array.nbytes
    return total


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.kind)
def test_memory_of_a_unit_is_known_from_its_record(estimator: Estimator, tmp_path: Path) -> None:
    """Never less than its rows take, and not much more than that but for what each row costs by itself."""
    provenance = some_provenance(samples=20, samples_per_unit=10, estimator=estimator, temperatures=(1.0,))
    make_dump(tmp_path / "dump", provenance)
    dump = Dump.open(str(tmp_path / "dump"))
    for unit, record in dump.read_records().items():
        rows = dump.read_unit(unit)
        found = held_bytes([rows.row(i, own=True) for i in range(len(rows))])
        claimed = decoded_bytes(record, provenance) - 2048 * len(rows)
        assert claimed * 0.95 <= found <= claimed + 8 * len(rows)  # One more offset than it has tokens.


def test_units_that_fit(tmp_path: Path) -> None:
    """By the largest unit; one at least, and no more than there are."""
    make_dump(tmp_path / "dump", some_provenance(samples=40, samples_per_unit=4))
    dump = Dump.open(str(tmp_path / "dump"))
    largest = max(decoded_bytes(record, dump.provenance) for record in dump.read_records().values())
    assert units_within(dump, (SPARE + READERS + 5) * largest) == 5
    assert units_within(dump, (SPARE + READERS + 5) * largest - 1) == 4
    assert (units_within(dump, 1), units_within(dump, 2**40)) == (1, 10)


def test_windows_that_take_much_memory_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two blocks of the largest units, against the bound of `shuffle: epoch`."""
    run = opened(folder, {"shuffle_block_units": 1})
    dump = run.dump
    sizes = sorted(decoded_bytes(record, dump.provenance) for record in dump.read_records().values())
    held = block_bytes(dump, run.mix.orders[0])
    assert held == sum(sizes[-2:])
    for bound, told in ((held, 0), (held - 1, 1)):
        caplog.clear()
        weigh(replace(run, train=run.train.model_copy(update={"shuffle_bytes": bound})))
        assert len([line for line in caplog.messages if "two blocks of 1 units" in line]) == told


@pytest.mark.parametrize(("changes", "shared"), [
    ({}, True),
    ({"shuffle_block_units": 256}, True),
    ({"shuffle_block_units": 257}, False),
    ({"shuffle": "epoch"}, True),
])  # fmt: skip
def test_ranks_share_units_unless_too_many_are_open(changes: dict[str, Any], shared: bool, folder: Path) -> None:
    """In windows a unit stays open for as long as its block, on every rank."""
    run = opened(folder, changes)
    run.share()
    assert run.dump.is_shared == shared


def test_rows_have_memory_of_their_own_only_if_asked(tmp_path: Path) -> None:
    """A view of one row keeps the entries of its whole unit."""
    make_dump(tmp_path / "dump")
    rows = Dump.open(str(tmp_path / "dump")).read_unit(0)
    i = rows.status.index("ok")
    for own in (False, True):
        targets = rows.row(i, own=own).targets
        assert targets is not None
        assert np.shares_memory(targets.ids, rows.targets.ids) != own
        assert np.shares_memory(targets.logprobs, rows.targets.logprobs) != own
        assert np.array_equal(targets.ids, rows.row(i).targets.ids)  # type: ignore[union-attr]


@pytest.mark.parametrize(("start", "world_size"), [(0, 1), (5, 1), (12, 1), (29, 1), (0, 3), (29, 3)])
def test_memory_is_one_block_and_little_more(start: int, world_size: int, tmp_path: Path) -> None:
    """At every step, in the middle of a block that others have begun and over the end of an epoch too: rows that were
    used are let go, the next block comes as this one goes, and a rank holds no rows but its own."""
    write_dump(tmp_path / "dump", samples=90, samples_per_unit=3)
    dump, mix = Dump.open(str(tmp_path / "dump")), mix_of([(90, 3, WHOLE, 12, 90)], 6)
    stop = 2 * mix.steps_per_epoch
    # Its thread has nothing to do: each step is looked at here.
    stream = streaming([dump], mix, rank=1 % world_size, world_size=world_size, start=start, stop=start, allowed=stop,
                       dealt=True)  # fmt: skip
    stream._stop = stop
    largest = 0
    for step in range(start, stop):
        found = [held.row(place).sample_index for _, held, place in stream._take(step)]
        assert found == mix.step_samples(step)[1 % world_size :: world_size].tolist()
        held = sum(len(unit.result().own or ()) for unit in stream.blocks[0].units.values())
        largest = max(largest, held)
    stream.close()
    # Of a unit of 3 rows the rank may have more than one.
    assert largest <= (12 + SPARE) * 3 / world_size * (1.0 if world_size == 1 else 1.15)
    assert len(stream.blocks[0].units) <= 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_rank_has_its_own_samples(world_size: int, folder: Path) -> None:
    """Of two dumps, over two epochs: each sample of a step on one rank, in equally many micro-batches of similar length
    that hold no more than they may; from any step on."""
    mix = mix_of([(24, 5, WHOLE, 2, 24), (17, 3, WHOLE, 3, 34)], 7)
    dumps = [Dump.open(str(folder / name)) for name in ("dump", "other")]
    stop = 2 * mix.steps_per_epoch
    for start in (0, 5):
        ranks = [
            streaming(dumps, mix, rank=rank, world_size=world_size, start=start, stop=stop, allowed=stop, dealt=True)
            for rank in range(world_size)
        ]
        for step in range(start, stop):
            shares: list[Any] = [rank.get(step, timeout=20) for rank in ranks]
            expected = [sample + 100 * dump for dump, sample in located(mix, range(step, step + 1))]
            assert sorted(names(shares)) == sorted(expected)
            assert max(len(share) for share in shares) == -(-len(expected) // (world_size * 2))
            assert max(len(batch) for share in shares for batch in share) <= 2
            sizes = [len(names([share])) for share in shares]
            assert max(sizes) - min(sizes) <= 1
        for rank in ranks:
            rank.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump that is complete and one that is not, and a student."""
    folder = tmp_path_factory.mktemp("shuffle")
    write_dump(folder / "dump")
    write_dump(folder / "other", samples=17, samples_per_unit=3, first=100)
    write_dump(folder / "unsealed", seal=False)
    save_student(folder / "student")
    return folder


def opened(folder: Path, train: dict[str, Any]) -> TrainingRun:
    """A run that is not begun."""
    section = train_section(folder / "opened", **train)
    return open_run(Resolved(dump={"url": str(folder / "dump")}, student={"model": "m"}, loss={}, train=section))


@pytest.fixture(scope="module")
def training(folder: Path) -> Iterator[Trainings]:
    """Runs trainings on two ranks."""
    trainings = Trainings(folder)
    yield trainings
    trainings.close()


EPOCH = {"shuffle": "epoch", "max_steps": 8}


def test_a_run_over_the_whole_dump_is_resumed(training: Trainings, folder: Path) -> None:
    """Bit for bit on as many ranks, of which each knows the lengths of its own samples alone; on one, up to rounding,
    also if the other was cut by tokens; and with another list of dumps beside it."""
    both = {"dumps": [{"url": str(folder / "dump")}, {"url": str(folder / "other")}]}
    for name, cut in {"one": {}, "two": both | {"micro_batch_tokens": 50}}.items():
        train = EPOCH | cut
        whole = training(f"{name} whole", train=train)
        half = training(f"{name} half", train=train, stop_after=3)
        rest = training(f"{name} rest", train=train, copy=f"{name} half")
        assert (whole.codes, half.codes, rest.codes) == ([0, 0], [75, 75], [0, 0]), whole["message"]
        assert rest.losses == whole.losses
        assert largest_difference(rest["state"], whole["state"]) == 0
        alone = Ranks("support.train_jobs:trainer", 1)
        places = {"dump": str(folder / "dump"), "model": str(folder / "student"), "copy": str(half.output)}
        found = alone.call(
            job={"train": train | {"micro_batch_tokens": None}, "output": str(folder / f"{name} alone")} | places
        )[0]
        alone.close()
        assert found["code"] == 0, found["message"]
        assert [event.loss for event in found["events"]] == pytest.approx(whole.losses, rel=20 * FORWARD)
        assert update_excess(found["state"], whole["state"], first=half["state"], rate=1e-2, steps=5) < 1
    windows = training("in windows", train={"max_steps": 8, "shuffle_window_units": 2})
    assert windows.losses != training("one whole").losses


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "windows": ({"shuffle": "windows"}, "train.shuffle = windows"),
    "other memory": ({"shuffle_bytes": 2**24}, "train.shuffle_bytes = 16777216"),
    "extended": ({"shuffle": "windows", "extend": True}, "train.shuffle = windows"),
}


@pytest.mark.parametrize("name", OTHER)
def test_the_order_of_a_run_never_changes(name: str, training: Trainings) -> None:
    changes, says = OTHER[name]
    training("one half", train=EPOCH, stop_after=3)
    run = training(f"changed: {name}", train=EPOCH | changes, copy="one half")
    assert_refused(run, 78, "another run")
    assert says in run["message"]


def test_a_dump_that_is_being_written_is_waited_for(training: Trainings) -> None:
    """And the message says what could follow it; in windows it is followed."""
    run = training("unsealed", dump="unsealed", train=EPOCH | {"data_wait_seconds": 0.5})
    assert_refused(run, 75, "there is no complete dump, which train.shuffle: epoch needs, while `windows` follows one")
    assert training("followed", dump="unsealed", train={"max_steps": 1}).codes == [0, 0]


def test_runs_of_before_go_on_in_windows(folder: Path) -> None:
    """Their checkpoints do not know `train.shuffle`."""
    run = opened(folder, {})
    before = {key: value for key, value in identity_of(run).items() if key != "train.shuffle"}
    state = TrainState(step=1, updates=1, consumed="", identity=before)
    assert known(state) == identity_of(run)
    assert known(state) != identity_of(opened(folder, {"shuffle": "epoch"}))


def test_memory_is_shared_by_what_dumps_have_in_an_epoch(folder: Path) -> None:
    """And the number of open units is part of what a run is."""
    largest = max(decoded_bytes(record, Dump.open(str(folder / "dump")).provenance)
                  for record in Dump.open(str(folder / "dump")).read_records().values())  # fmt: skip
    alone = opened(folder, {"shuffle": "epoch"})
    assert (alone.mix.orders[0].block_units, alone.mix.orders[0].windows) == (5, 1)
    assert identity_of(alone)["train.shuffle_block_units"] == [5]
    dumps = [{"url": str(folder / "dump")}, {"url": str(folder / "other"), "weight": 24 / 17}]
    budget = max(2**20, 2 * (SPARE + READERS + 2) * largest)
    found = opened(folder, {"shuffle": "epoch", "dumps": dumps, "shuffle_bytes": budget})
    assert found.mix.shares == (24, 24)
    expected = [units_within(dump, budget // 2) for dump in found.dumps]
    assert [order.block_units for order in found.mix.orders] == expected
    assert json.dumps(identity_of(found))
