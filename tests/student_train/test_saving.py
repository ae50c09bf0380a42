"""Checkpoints that are written while training goes on: what they hold, what training waits for, and what goes wrong."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import Ranks
from support.engine_jobs import train_section
from support.tiny_student import save_student, tiny_llama, write_dump

from storage_schemas.common.errors import TemporaryError
from storage_schemas.stores.store import Store
from student_train import checkpoint, saving
from student_train.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, Checkpoints, TrainState
from student_train.metrics import EVENTS
from student_train.saving import Saver

FILES = 5
"""Of a checkpoint: state, weights, two moments, commit record."""
ALONE: Any = SimpleNamespace(main=True, on_main=lambda work: work(), together=lambda work: work())
"""A world of one rank, where no test process has joined any."""
STAGE_0 = {"zero_stage": 0}
"""Where what is exported would be the live tensors."""


class Trainings:
    """Trainings on two ranks of 6 steps, with a checkpoint after 4 and 6 unless they say otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ranks = folder, Ranks("support.train_jobs:trainer", 2)
        write_dump(folder / "dump")
        save_student(folder / "student")

    def __call__(self, name: str, **job: Any) -> dict[str, Any]:
        """What the main rank says of a training in the directory of that name; both have left with one code."""
        paths = {"dump": str(self.folder / "dump"), "model": str(self.folder / "student")}
        main, other = self._ranks.call(job=paths | {"output": str(self.folder / name)} | job)
        assert main["code"] == other["code"]
        return main | {"unsaved": other["unsaved"]}  # type: ignore[no-any-return]

    def checkpoints(self, name: str) -> Checkpoints:
        """Of a training."""
        return Checkpoints(str(self.folder / name / "checkpoints"))

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("saving"))
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def whole(training: Trainings) -> dict[str, Any]:
    """A training on a store that is fast."""
    return training("whole", train=STAGE_0)


def state_of(step: int) -> TrainState:
    """A state."""
    return TrainState(step=step, updates=step, consumed="", identity={})


def standing(run: dict[str, Any]) -> float:
    """Seconds that training stood still for checkpoints, but for the record of the start and the last one."""
    return sum(event.save_wait_seconds for event in run["events"][1:])  # type: ignore[no-any-return]


def test_training_goes_on_while_a_slow_store_writes(training: Trainings, whole: dict[str, Any]) -> None:
    """A checkpoint of step 4 takes a second, of which training waits for less than half; it is of step 4, to the bit.
    The last one is waited for."""
    seconds = 0.2
    run = training("slow", train=STAGE_0, slow_saves=seconds)
    assert standing(run) < FILES * seconds / 2
    assert run["summary"]["save_wait_seconds"] > FILES * seconds
    assert [event.loss for event in run["events"]] == [event.loss for event in whole["events"]]
    kinds = (MASTER, EXP_AVG, EXP_AVG_SQ)
    for step in (4, 6):
        found, expected = (dict(training.checkpoints(name).at(step).tensors(kinds)) for name in ("slow", "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_a_slow_store_costs_less_than_2_percent_of_training(tmp_path: Path) -> None:
    """Each file takes 0.3 s, and 50 steps lie between two checkpoints of 672 tensors, as many as LoRA has on a 1B with
    Adam's moments: the ranks put them together in few collectives."""
    training = Trainings(tmp_path)
    student = tiny_llama(1, layers=16)
    for parameter in student.parameters():
        parameter.data.mul_(0.3 if parameter.ndim > 1 else 1.0)  # Or gradients overflow in so many layers.
    student.save_pretrained(tmp_path / "student")
    steps = {"max_steps": 151, "epochs": 100, "save_steps": 50, "micro_batch_size": 1, "learning_rate": 1e-4}
    run = training("slow", train=steps | {"zero_stage": 2}, slow_saves=0.3)
    training.close()
    assert (run["code"], len(run["state"])) == (0, 672), run["message"]
    seconds = sum(event.tokens / event.tokens_per_second for event in run["events"][1:-1])
    share = sum(event.save_wait_seconds for event in run["events"][1:-1]) / seconds
    print(f"{share:.2%} of {seconds:.1f} s")
    assert share < 0.02


def test_a_state_that_is_larger_than_its_copy_may_be_is_waited_for(training: Trainings, whole: dict[str, Any]) -> None:
    seconds = 0.05
    run = training("no copy", train=STAGE_0 | {"snapshot_bytes": 0}, slow_saves=seconds)
    assert standing(run) > FILES * seconds
    assert [event.loss for event in run["events"]] == [event.loss for event in whole["events"]]
    assert all(torch.equal(run["state"][key], tensor) for key, tensor in whole["state"].items())


def test_others_wait_for_one_file_of_such_a_state_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not, in the middle of a collective, for gigabytes that were copied before."""
    log: list[str] = []

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcdef":
            log.append("copied")
            yield f"master/{name}", torch.zeros(2**19)

    put = Store.put_new

    def noting(store: Store, key: str, data: bytes) -> bool:
        log.extend(["written"] if "master" in key else [])
        return put(store, key, data)

    monkeypatch.setattr(Store, "put_new", noting)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 2**20)
    train = train_section(tmp_path, snapshot_bytes=9 * 2**20)
    saver = Saver(ALONE, Checkpoints(str(tmp_path / "checkpoints")), train, waited=lambda seconds: None)
    saver.save(lambda: state_of(3), exported(), {}, size=6 * 2**21, best=None)
    assert log == ["copied", *["copied", "written"] * 5, "written"]  # A file ends where the next tensor begins.


def test_a_newer_state_is_saved_after_one_that_could_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If that is asked for; else the error is raised."""
    checkpoints, put, away = Checkpoints(str(tmp_path / "checkpoints")), Store.put_new, [True]

    def passing(store: Store, key: str, data: bytes) -> bool:
        if away[0]:
            raise TemporaryError("the store is away")
        return put(store, key, data)

    monkeypatch.setattr(Store, "put_new", passing)
    saver = Saver(ALONE, checkpoints, train_section(tmp_path), waited=lambda seconds: None)

    def save(step: int) -> None:
        saver.save(lambda: state_of(step), iter([("master/a", torch.zeros(2))]), {}, size=8, best=None)

    save(3)
    with pytest.raises(TemporaryError, match="is away"):
        save(4)
    away[0] = False
    saver.give_up()
    save(5)
    saver.settle()
    assert checkpoints.steps() == [5]


def test_an_error_while_writing_ends_the_run_on_all_ranks(training: Trainings, whole: dict[str, Any]) -> None:
    """With its own code and message; the same command goes on from the newest state that was written, to the bit."""
    train = STAGE_0 | {"save_steps": 2}
    second = 2 + FILES + 2  # After the record of the start, of two files, and the first one.
    run = training("full disk", train=train, fault=f"put:step:before:{second}:full")
    assert run["code"] == 75
    assert "ENOSPC" in run["message"]
    assert run["step"] in (2, len(run["events"]))  # The newer one, if the error was seen before it was asked for.
    rest = training("full disk", train=train)
    assert (rest["code"], rest["summary"]["resumed_from"]) == (0, run["step"])
    assert [event.loss for event in rest["events"]] == [event.loss for event in whole["events"]]
    assert all(torch.equal(rest["state"][key], tensor) for key, tensor in whole["state"].items())


def test_an_error_while_the_last_one_is_written(training: Trainings) -> None:
    """There is no step after it in which that could be told."""
    run = training("full at the end", train=STAGE_0, fault=f"put:step:before:{2 + FILES + 2}:full")
    assert (run["code"], run["step"]) == (75, 4)
    assert not (training.folder / "full at the end" / "final").exists()


def test_a_store_that_takes_nothing_is_told_before_training(training: Trainings) -> None:
    run = training("full at the start", train=STAGE_0, fault="put:step:before:2:full")
    assert (run["code"], run["step"]) == (75, None)
    assert not (training.folder / "full at the start" / EVENTS).exists()


def test_what_is_being_written_is_finished_before_an_error_of_training(training: Trainings) -> None:
    train = {"learning_rate": 1e20, "save_steps": 1, "max_steps": 9}
    run = training("not finite", train=STAGE_0 | train, slow_saves=0.1)
    assert run["code"] == 65
    assert "is not finite" in run["message"]
    assert run["step"] == len(run["events"]) > 0
    assert not run["unsaved"]  # A rank that stays behind is soon ended by the others' exit codes.


def test_and_before_a_stop(training: Trainings) -> None:
    """Asked for while the checkpoint of the very step is written."""
    run = training("stopped", train=STAGE_0, slow_saves=0.1, stop_after=4)
    assert run["code"] == 75
    assert "was asked to stop" in run["message"]
    assert run["step"] == len(run["events"]) == 4
    assert not run["unsaved"]


@pytest.mark.parametrize("full", [False, True])
def test_what_is_being_written_is_finished_before_a_bug_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    """Or what has kept it from being written is told beside the bug."""
    checkpoints, put = Checkpoints(str(tmp_path / "checkpoints")), Store.put_new

    def slow(store: Store, key: str, data: bytes) -> bool:
        time.sleep(0.05)
        if full:
            raise TemporaryError("the disk is full")
        return put(store, key, data)

    monkeypatch.setattr(Store, "put_new", slow)
    saver = Saver(ALONE, checkpoints, train_section(tmp_path), waited=lambda seconds: None)
    saver.save(lambda: state_of(3), iter([("master/a", torch.zeros(2))]), {}, size=8, best=None)
    with pytest.raises(ZeroDivisionError), saver:
        _ = 1 / 0
    assert [checkpoint.step for checkpoint in [checkpoints.newest()] if checkpoint] == ([] if full else [3])
    assert ("the disk is full" in caplog.text) == full


def test_minutes_make_checkpoints_too(training: Trainings) -> None:
    """By one clock, that of the main rank."""
    often = {"save_steps": 100, "save_minutes": 1e-6, "save_total_limit": 9, "max_steps": 3} | STAGE_0
    assert training("by the minute", train=often, other_clock=True)["code"] == 0
    assert training.checkpoints("by the minute").steps() == [1, 2, 3]


def test_minutes_are_counted_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has asked for that one."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    train = train_section(tmp_path, save_steps=10, save_minutes=2.0)
    saver = Saver(ALONE, Checkpoints(str(tmp_path / "checkpoints")), train, waited=lambda seconds: None)
    assert [saver.due(step) for step in (9, 10, 11)] == [False, True, False]
    now[0] = 119.0
    assert not saver.due(11)
    now[0] = 120.0
    assert saver.due(11)
    saver.save(lambda: state_of(11), iter(()), {}, size=0, best=None)
    assert not saver.due(12)
    now[0] = 240.0
    assert saver.due(12)
