"""What a run says while it trains."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from storage_schemas.errors import MismatchError, TemporaryError
from student_train import metrics
from student_train.metrics import EventLog, Lines, Meter, Wandb, open_reporter, read_events, refuse_missing_trackers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when told."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    return clock


def event(step: int, **changes: float) -> metrics.Event:
    """An event."""
    values: dict[str, Any] = dict.fromkeys(metrics.Event.model_fields, 0.5)
    return metrics.Event(**(values | {"step": step, "supervised_tokens": 5} | changes))


def test_means_are_per_token(clock: SimpleNamespace) -> None:
    """A step of 30 tokens counts three times as much as one of 10; rates and times follow the clock."""
    meter = Meter(start=4, stop=10, steps_per_epoch=4)
    assert meter.empty
    clock.now += 2
    meter.add(loss=10.0, ce=20.0, kl=0.0, supervised=10, tokens=100, wait=0.25)
    clock.now += 2
    meter.add(loss=90.0, ce=0.0, kl=30.0, supervised=30, tokens=300, wait=0.5)
    found = meter.event(6, learning_rate=0.1, grad_norm=2.0)
    assert (found.loss, found.ce, found.kl) == (2.5, 0.5, 0.75)
    assert (found.supervised_tokens, found.tokens_per_second, found.data_wait_seconds) == (40, 100.0, 0.75)
    assert found.epoch == 1.5
    # Two of six steps in four seconds.
    assert found.eta_seconds == 8.0
    assert meter.empty
    assert meter.total_tokens == 400


def test_a_step_without_supervised_tokens_is_no_division_by_zero(clock: SimpleNamespace) -> None:
    """It is logged as zeros."""
    meter = Meter(start=0, stop=2, steps_per_epoch=2)
    meter.add(loss=0, ce=0, kl=0, supervised=0, tokens=0, wait=0)
    assert meter.event(1, learning_rate=0.0, grad_norm=0.0).loss == 0


def test_resumed_log_forgets_what_is_trained_again(tmp_path: Path) -> None:
    """Lines beyond the checkpoint go, and so does a line that a kill has torn."""
    path = tmp_path / "events.jsonl"
    first = EventLog(path, after=0)
    for step in (1, 2, 3):
        first.write(event(step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [found.step for found in read_events(path)] == [1, 2, 3]
    second = EventLog(path, after=2)
    second.write(event(3, loss=7.0))
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 7.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_unwritable_log_is_temporary(tmp_path: Path) -> None:
    """75: nothing is wrong with the data."""
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(TemporaryError, match=r"events\.jsonl"):
        EventLog(tmp_path / "events.jsonl", after=0)


def test_a_line_every_few_seconds(clock: SimpleNamespace) -> None:
    """The first step, then what the interval allows, and always the last step."""
    text = io.StringIO()
    lines = Lines(Console(file=text, width=300), stop=9)
    for step in range(1, 10):
        clock.now += 2
        lines.write(event(step, eta_seconds=3661.0))
    shown = text.getvalue().splitlines()
    assert [line.split()[2] for line in shown] == ["1/9", "4/9", "7/9", "9/9"]
    assert "loss 0.5000  ce 0.5000  kl 0.5000" in shown[0]
    assert shown[0].endswith("eta 1:01:01")


def test_bar_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control codes never reach a log file."""
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=160)
        monkeypatch.setattr(metrics, "Console", lambda console=console: console)
        (tmp_path / str(terminal)).mkdir()
        reporter = open_reporter(tmp_path / str(terminal), [], start=0, stop=2, config={}, name="x")
        reporter.write(event(1))
        reporter.close()
        assert ("\x1b[" in text.getvalue()) == terminal
        assert len(read_events(tmp_path / str(terminal) / "events.jsonl")) == 1


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb gets each event at its step, and continues the same run; a missing package is told by its extra."""
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    fake = SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Wandb(tmp_path, {"train.seed": 1}, "neo-7")
    tracker.write(event(3))
    tracker.close()
    assert (calls[0]["id"], calls[0]["resume"]) == ("neo-7", "allow")
    assert calls[1][0] == 3
    assert calls[1][1]["train/kl"] == 0.5
    assert calls[2] == "end"
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    refuse_missing_trackers([])
    with pytest.raises(MismatchError, match=r"llm-neo\[tensorboard\]"):
        refuse_missing_trackers(["tensorboard"])
