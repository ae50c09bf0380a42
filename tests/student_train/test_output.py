"""Opening a run: what it asks the store for, and what it says of a dump that is too small."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.engine_jobs import train_section
from support.tiny_student import write_dump

from storage_schemas.common.errors import TemporaryError
from storage_schemas.records import RUN, TOKENIZER
from storage_schemas.stores.store import Store
from student_train.config import Resolved
from student_train.data.follower import Follower
from student_train.resume import consumed_root
from student_train.training_run import TrainingRun, _is_there, open_run, weigh


def opened(url: Path, output: Path, **train: Any) -> TrainingRun:
    section = train_section(output, **train)
    return open_run(Resolved(dump={"url": str(url)}, student={"model": "m"}, loss={}, train=section))


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


def test_ranks_without_work_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dump(tmp_path / "dump", samples=12)
    with caplog.at_level(logging.WARNING):
        run = opened(tmp_path / "dump", tmp_path / "run", global_batch_size=8)
        weigh(run, ranks=8)
        assert not caplog.records
        weigh(run, ranks=16)
    assert "8 of the 16 ranks have no sample in any step" in caplog.text


def test_a_dump_has_begun_once_its_tokenizer_is_there(tmp_path: Path) -> None:
    """Between run.json and the first unit training waits; it left with 75, and its job was queued again."""
    write_dump(tmp_path / "dump", units=range(1), seal=False)
    store = Store(str(tmp_path / "dump"))
    asked = partial(_is_there, store, time.monotonic(), what="dump", file=RUN)
    assert asked(time.monotonic() + 60)
    (tmp_path / "dump" / TOKENIZER).rename(tmp_path / "kept")
    assert not asked(time.monotonic() + 60)
    with pytest.raises(TemporaryError, match=r"no TOKENIZER\.json after"):
        asked(time.monotonic() - 1)
    (tmp_path / "dump" / RUN).unlink()
    with pytest.raises(TemporaryError, match=r"no run\.json after"):
        asked(time.monotonic() - 1)
