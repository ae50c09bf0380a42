"""Opening a run: what it asks the store for, and what it says of a dump that is too small."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.engine_jobs import train_section
from support.tiny_student import write_dump

from storage_schemas.config import DumpSection
from storage_schemas.stores.store import Store
from student_train.config import LossSection, StudentSection
from student_train.data.follower import Follower
from student_train.resume import consumed_root
from student_train.training_run import TrainingRun, open_run, weigh


def opened(url: Path, output: Path, **train: Any) -> TrainingRun:
    section = train_section(output, **train)
    return open_run(DumpSection(url=str(url)), StudentSection(model="m"), LossSection(), section, {})


def test_a_resume_asks_for_the_manifest_and_not_for_each_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json, seal and manifest, at any number of units; 400 requests one after the other before."""
    write_dump(tmp_path / "dump", samples=400, samples_per_unit=1)
    asked: list[str] = []
    get = Store.get_if_present
    monkeypatch.setattr(
        Store, "get_if_present", lambda self, key, **more: [asked.append(key), get(self, key, **more)][1]
    )
    run = opened(tmp_path / "dump", tmp_path / "run")
    consumed_root(run.dumps, run.mix, run.steps)
    weigh(run)
    assert Follower(run.dump, run.mix.orders[0]).windows() == run.mix.orders[0].windows
    assert len(asked) == 3, asked[:10]


def test_a_dump_that_fills_no_step_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dump(tmp_path / "dump", samples=12)
    with caplog.at_level(logging.WARNING):
        weigh(opened(tmp_path / "dump", tmp_path / "run", global_batch_size=10))
        assert not caplog.records
        weigh(opened(tmp_path / "dump", tmp_path / "run", global_batch_size=32))
    assert "only 10 of the dump's 12 samples" in caplog.text
    assert "(32): an epoch is 1 optimizer steps, training is 1" in caplog.text
