"""What a run says: means weigh by tokens, events.jsonl survives everything, and no terminal is needed."""

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.engine_jobs import some_event, some_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from storage_schemas.common import extras
from storage_schemas.common.errors import MismatchError, TemporaryError
from student_train import metrics
from student_train.metrics import (
    EVENTS,
    Event,
    Meter,
    Part,
    Step,
    bar,
    event_log,
    lines,
    read_events,
    refuse_missing_trackers,
    reporting,
    tracker,
)


def step(**changes: Any) -> Step:
    """A step without anything in it."""
    values = {"loss": 0.0, "parts": [], "supervised": 0, "tokens": 0, "padded": 0, "memory": 0, "wait": 0.0}
    return Step(**(values | {"learning_rate": 0.0, "grad_norm": 0.0} | changes))


def log_events(path: Path, *events: Event, after: int = 0) -> None:
    """Write some events to a log, which is closed again."""
    with event_log(path, after=after) as write:
        for one in events:
            write(one)


def test_means_weigh_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 10 and 30 tokens: sums over sums, not a mean of means; then it begins anew."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    meter = Meter(start=4, stop=10, steps_per_epoch=8)
    assert meter.empty
    meter.add(
        step(
            loss=10.0,
            parts=[Part(10, 10.0, 20.0, 5.0)],
            supervised=10,
            tokens=50,
            padded=50,
            wait=0.5,
            learning_rate=9.0,
            grad_norm=9.0,
        )
    )
    meter.wait(0.25)
    last = {"learning_rate": 1e-3, "grad_norm": 2.0}
    meter.add(
        step(loss=90.0, parts=[Part(30, 90.0, 60.0, 15.0)], supervised=30, tokens=150, wait=0.25, memory=7, **last)
    )
    now[0] += 4.0
    found = meter.event(6)
    assert (found.padding, found.peak_device_bytes, found.mfu) == (0.2, 7, None)
    assert (found.loss, found.ce, found.kl) == (2.5, 2.0, 0.5)
    assert (found.learning_rate, found.grad_norm) == (1e-3, 2.0), "of the last step"
    assert found.supervised_tokens == 40
    assert found.tokens_per_second == 50.0
    assert (found.data_wait_seconds, found.save_wait_seconds) == (0.75, 0.25)
    assert found.epoch == 0.75
    assert found.eta_seconds == 8.0, "4 of 10 steps are left, 2 s each"
    assert meter.empty
    assert (meter.total_tokens, meter.total_wait, meter.total_save_wait) == (200, 0.75, 0.25)
    meter.add(step())
    assert meter.event(7).save_wait_seconds == 0


def test_means_of_several_dumps(tmp_path: Path) -> None:
    """Each by its own tokens, in the line and in what trackers get; a dump that had none is 0 and not left out."""
    meter = Meter(start=0, stop=10, steps_per_epoch=5, dumps=["a", "b", "c"])
    none = Part(0, 0.0, 0.0, 0.0)
    meter.add(step(parts=[Part(10, 10.0, 20.0, 5.0), Part(2, 8.0, 6.0, 4.0), none], loss=18.0, supervised=12))
    meter.add(step(parts=[Part(30, 50.0, 60.0, 15.0), none, none], loss=50.0, supervised=30))
    meter.add(step())
    found = meter.event(3)
    assert found.dumps is not None
    assert {name: tuple(of.model_dump().values()) for name, of in found.dumps.items()} == {
        "a": (1.5, 2.0, 0.5, 40), "b": (4.0, 3.0, 2.0, 2), "c": (0.0, 0.0, 0.0, 0),
    }  # fmt: skip
    assert (found.loss, found.ce) == (68 / 42, 86 / 42)
    log_events(tmp_path / EVENTS, found, some_event(4))
    assert read_events(tmp_path / EVENTS) == [found, some_event(4)]
    taken: list[dict[str, float]] = []
    with tracker("t", lambda: (lambda values, step: taken.append(values), lambda: None)) as write:
        write(found)
    assert taken[0]["train/b/kl"] == 2.0
    assert taken[0]["train/loss"] == 68 / 42
    assert all(isinstance(value, float | int) for value in taken[0].values())


def test_a_step_without_supervised_tokens_is_no_division_by_zero() -> None:
    """Its means are 0."""
    meter = Meter(start=0, stop=2, steps_per_epoch=2)
    meter.add(step())
    assert meter.event(1).loss == 0


def test_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    """Steps beyond it are trained again, so their lines go; a torn last line goes too."""
    path = tmp_path / EVENTS
    log_events(path, *map(some_event, (1, 2, 3, 4)))
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [e.step for e in read_events(path)] == [1, 2, 3, 4]
    log_events(path, some_event(3, loss=9.0), after=2)
    assert [(e.step, e.loss) for e in read_events(path)] == [(1, 1.5), (2, 1.5), (3, 9.0)]
    assert len(path.read_text().splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == [EVENTS]


def test_a_damaged_line_costs_that_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One flipped bit in a key or a number ended every later start with 70; and what is not finite was logged so."""
    path = tmp_path / EVENTS
    log_events(path, *(some_event(number, grad_norm=float("inf") if number == 5 else 0.3) for number in range(1, 7)))
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"loss"', '"lnss"')
    lines[1] = lines[1].replace("1.5", '"1.5 or so"')
    lines[2] = "[" * 50_000
    lines[3] = lines[3].replace('"step": 4', '"step": "x"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [(e.step, e.grad_norm) for e in read_events(path)] == [(5, float("inf")), (6, 0.3)]
    assert caplog.text.count("is torn or damaged") == 4
    log_events(path, after=6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 6]


def test_lines_can_be_followed(tmp_path: Path) -> None:
    """Each is there as soon as it is written."""
    with event_log(tmp_path / EVENTS, after=0) as write:
        write(some_event(1))
        assert json.loads((tmp_path / EVENTS).read_text())["step"] == 1


def test_no_file_is_no_events(tmp_path: Path) -> None:
    """A run that has not begun."""
    assert read_events(tmp_path / EVENTS) == []


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    """Exit 75, with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TemporaryError, match="cannot write"):
        log_events(tmp_path / "file" / EVENTS)


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, then no more than one in five seconds, and the last in any case."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    write = lines(Console(file=out, force_terminal=False, width=40), stop=9, divergence="jsd")
    for number in range(1, 10):
        now[0] += 1.0
        write(some_event(number))
    printed = out.getvalue().splitlines()
    assert [line.split()[2] for line in printed] == ["1/9", "6/9", "9/9"]
    assert printed[0] == ("train step 1/9  loss 1.5000  ce 2.0000  jsd 1.0000  lr 1.00e-04  100 tokens/s  eta 1:01:01")


def test_bar_on_a_terminal() -> None:
    """It shows the step and the loss."""
    out = io.StringIO()
    with bar(Console(file=out, force_terminal=True, width=160), start=2, stop=9, divergence="forward_kl") as write:
        write(some_event(5))
    assert "5/9" in out.getvalue()
    assert "loss 1.5000" in out.getvalue()


def test_reporting_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """events.jsonl and lines."""
    with reporting(tmp_path, [], start=0, stop=2, config={}, name="run", monitors={}) as write:
        write(some_event(1))
    assert "train step 1/2" in capsys.readouterr().out
    assert [e.step for e in read_events(tmp_path / EVENTS)] == [1]


@pytest.mark.parametrize("fails_at", ["open", "write", "close"])
def test_a_failing_tracker_is_told_once_and_costs_nothing(fails_at: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever it fails, it is not asked again."""
    asked: list[str] = []

    def ask(what: str) -> None:
        asked.append(what)
        if what == fails_at:
            raise OSError("the tracker is away")

    def opened() -> Any:
        ask("open")
        return lambda values, step: ask("write"), lambda: ask("close")

    with tracker("broken", opened) as write:
        write(some_event(1))
        write(some_event(2))
    assert [record.message for record in caplog.records if "the tracker is away" in record.message] == [
        f"broken logging failed and is off for this run; metrics continue in {EVENTS}: OSError('the tracker is away')"
    ]
    assert asked.count(fails_at) == 1
    assert asked[-1] == fails_at


def test_missing_trackers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with what to install."""
    monkeypatch.setattr(extras, "installed", lambda _: False)
    refuse_missing_trackers([])
    for name in ("tensorboard", "wandb"):
        with pytest.raises(MismatchError, match=rf"pip install 'llm-neo\[{name}\]'"):
            refuse_missing_trackers([name])


def lost_and_found(output: Path, kind: str) -> None:
    """Three steps, the last of which is after the newest checkpoint, and a run that goes on from there."""
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        config, name = {"alpha": 0.9}, "one-run"
        with reporting(output, [kind], start=start, stop=4, config=config, name=name, monitors={}) as write:
            for number in steps:
                write(some_event(number, loss=number + start / 10, router_aux=1.0, mfu=0.4, peak_device_bytes=9))
        time.sleep(1.1)  # W&B names a start by the second; attempts of a real run never share one.


def test_tensorboard_gets_every_field_of_every_step_once(tmp_path: Path) -> None:
    lost_and_found(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = [f"train/{name}" for name in Event.model_fields if name not in ("step", "dumps")]
    assert found.Tags()["scalars"] == names
    for name in names:
        assert [point.step for point in found.Scalars(name)] == [1, 2, 3, 4], name
    assert [point.value for point in found.Scalars("train/loss")] == pytest.approx([1.0, 2.0, 3.2, 4.2])


def test_evaluations_have_a_group_of_their_own() -> None:
    """In trackers, with numbers alone."""
    told: list[tuple[dict[str, float], int]] = []
    with tracker("kept", lambda: (lambda values, step: told.append((values, step)), lambda: None)) as write:
        write(some_event(1))
        write(some_result(1))
    (train, _), (evaluated, step) = told
    assert {name.split("/")[0] for name in train} == {"train"}
    assert step == 1
    assert set(evaluated) == {
        "eval/kl", "eval/ce", "eval/acceptance_rate_min", "eval/acceptance_rate_max", "eval/supervised_tokens",
        "eval/seconds",
    }  # fmt: skip


def test_wandb_has_the_runs_name_project_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    labels = {"name": "neo", "project": "distil", "tags": ["a", "b"]}
    with reporting(tmp_path, ["wandb"], start=0, stop=1, config={}, name="id", monitors={}, labels=labels) as write:
        write(some_event(1))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    (run,) = [record.run for record in wandb_records(file.read_bytes()) if record.HasField("run")]
    assert (run.display_name, run.project, list(run.tags)) == ("neo", "distil", ["a", "b"])


def test_wandb_gets_every_field_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its server: what `wandb sync` would send."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    lost_and_found(tmp_path, "wandb")
    runs, steps = set(), []
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for record in wandb_records(file.read_bytes()):
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                runs.add((record.run.run_id, config["alpha"]))
            elif record.HasField("history"):
                values = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
                assert {f"train/{name}" for name in Event.model_fields if name not in ("step", "dumps")} <= set(values)
                steps.append((values["_step"], values["train/loss"]))
    assert runs == {("one-run", 0.9)}
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.2), (4, 4.2)]


def wandb_records(data: bytes) -> Iterator[Any]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB, and pieces with checksum, length and kind."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # All of a record, or its last piece.
            yield Record.FromString(whole)
            whole = b""
