"""Processes: exit codes add up, signals reach the workers, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline import cli, processes
from pipeline.config import Config
from pipeline.launch import Nodes, Placement
from pipeline.processes import (
    combined,
    dump_workers,
    forwarded_signals,
    parse_output,
    run_torchrun,
    train_workers,
    visible_gpus,
)
from storage_schemas.config import DumpSection
from storage_schemas.errors import MismatchError, TemporaryError

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 66], 66),
        ([66, 65, 75], 65),
        ([65, 78], 78),
        ([78, 64], 64),
        ([78, 70, 0], 70),
        ([1], 70),
        ([-9, 78], 70),
        ([-15, 0], 75),
        ([143], 75),
        ([-2, 65], 65),
    ],
)
def test_one_code_for_many(codes: list[int], expected: int) -> None:
    assert combined(codes) == expected


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: x)'\necho '  MIG 1g: y'\necho 'GPU 1: H100 (UUID: z)'\n")
    tool.chmod(0o755)
    assert visible_gpus({}) == ["0", "1"]


def test_a_commands_object_is_found_behind_what_libraries_print() -> None:
    text = json.dumps({"a": {"b": [1, {"c": 2}]}}, indent=2)
    assert parse_output(text) == parse_output(f"[WARNING] no GPU\n{{}}\n{text}\n") == {"a": {"b": [1, {"c": 2}]}}


def python(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body)]


SUMMARY = {"units": 4, "units_done_here": 2, "tokens_here": 100, "seconds": 2.0, "tokens_per_second": 50.0}


def fake_worker(monkeypatch: pytest.MonkeyPatch, body: str) -> list[Placement]:
    """`llm-neo dump` becomes `body`, which knows `rank`."""
    seen: list[Placement] = []

    def argv(config: Path, overrides: Sequence[str], placement: Placement, **options: object) -> list[str]:
        seen.append(placement)
        return python(f"rank = {placement.rank}\n" + textwrap.dedent(body))

    monkeypatch.setattr(processes, "dump_argv", argv)
    return seen


def test_workers_of_stage_one_are_numbered_over_all_nodes_and_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"""
    import json, os
    summary = {SUMMARY} | {{"seconds": 2.0 + rank, "threads": os.environ["OMP_NUM_THREADS"]}}
    print("a library says something")
    print(json.dumps(summary | {{"heldout": {SUMMARY}}}, indent=2))
    """
    seen = fake_worker(monkeypatch, body)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, summary = dump_workers(Path("c"), [], 2, node=Placement(1, 3))
    assert code == 0
    assert seen == [Placement(2, 6), Placement(3, 6)]
    assert summary["units"] == 4
    assert summary["units_done_here"] == 4
    assert summary["tokens_here"] == 200
    assert summary["tokens_per_second"] == 200 / 5.0
    assert summary["heldout"]["tokens_here"] == 200
    assert summary["threads"] == str(max(1, (os.cpu_count() or 1) // 2))


def test_nothing_left_to_do_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SUMMARY | {"tokens_here": 0, "seconds": 0.0, "tokens_per_second": None}
    fake_worker(monkeypatch, f"import json; print(json.dumps({nothing}, indent=2))")
    code, summary = dump_workers(Path("c"), [], 2, node=Placement(0, 1))
    assert code == 0
    assert summary["tokens_per_second"] is None


def test_the_worst_worker_decides_and_hidden_ones_are_heard_when_they_fail(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_worker(monkeypatch, "import sys; sys.stderr.write(f'worker {rank} speaks'); sys.exit([0, 78, 0][rank])")
    assert dump_workers(Path("c"), [], 3, node=Placement(0, 1)) == (78, {})
    heard = capfd.readouterr().err
    assert "worker 0 speaks" in heard
    assert "worker 1 speaks" in heard
    assert "worker 2 speaks" not in heard


def test_a_signal_reaches_all_workers_of_stage_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = f"""
    import pathlib, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (pathlib.Path({str(tmp_path)!r}) / str(rank)).touch()
    time.sleep(60)
    """
    fake_worker(monkeypatch, body)

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert dump_workers(Path("c"), [], 2, node=Placement(0, 1)) == (75, {})
    thread.join()


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    got: list[tuple[int, int]] = []
    with forwarded_signals(lambda *call: got.append(call)):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert got == [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGTERM, 3)]
    assert {number: signal.getsignal(number) for number in before} == before


DETACHED = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
staged = pathlib.Path({pid!r} + ".staged")
staged.write_text(str(child.pid))
staged.rename({pid!r})
"""
"""What torchrun does with its workers: a session of their own."""


def test_workers_that_outlive_torchrun_are_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert run_torchrun(python(DETACHED.format(pid=str(pid)) + "sys.exit(3)"), {}, stop=lambda: None) == 3
    assert not alive(int(pid.read_text()))


def test_torchrun_killed_by_somebody_leaves_no_workers(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = DETACHED.format(pid=str(pid)) + "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run_torchrun(python(body), {}, stop=lambda: None) == -signal.SIGKILL
    assert not alive(int(pid.read_text()))


def test_the_first_signal_asks_for_a_checkpoint_and_the_second_ends_torchrun(tmp_path: Path) -> None:
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    body = f"""
    import pathlib, time
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(60)
    """

    def interrupt() -> None:
        until(ready.exists)
        os.kill(os.getpid(), signal.SIGTERM)
        until(asked.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_torchrun(python(body), {}, stop=asked.touch) == -signal.SIGTERM
    thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_torchrun_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    inner = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(120)"
    body = f"""
    import sys
    from pipeline.processes import run_torchrun
    run_torchrun([sys.executable, "-c", {inner!r}], {{}}, stop=lambda: None)
    """
    launcher = subprocess.Popen(python(body), cwd=ROOT)
    until(lambda: pid.exists() and pid.read_text())
    launcher.kill()
    launcher.wait()
    until(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize(
    ("returned", "left", "expected"),
    [
        (0, {0: 0, 1: 0}, 0),
        (1, {0: 75, 1: 75}, 75),
        (1, {0: 78}, 78),
        (1, {0: 75, 1: 70}, 70),
        (1, {}, 70),
        (-9, {0: 0}, 75),
        (0, {0: 0, 1: 65}, 65),
    ],
)
def test_training_returns_what_its_workers_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, returned: int, left: dict[int, int], expected: int
) -> None:
    config = Config.model_validate(
        {"dump": {"url": "d"}, "student": {"model": "m"}, "train": {"output": str(tmp_path), "seed": 5}}
    )
    folder = tmp_path / "exit"
    folder.mkdir()
    for stale in ("rank-0", "rank-1", "rank-7", "stop"):
        (folder / stale).write_text("78\n")

    def torchrun(argv: Sequence[str], env: dict[str, str], *, stop: Callable[[], None], stdout: None) -> int:
        assert list(folder.iterdir()) == []
        resolved = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
        assert sorted(resolved) == ["dump", "loss", "student", "train"]
        assert resolved["train"]["seed"] == 5
        for rank, code in left.items():
            (folder / f"rank-{rank}").write_text(f"{code}\n")
        stop()
        assert (folder / "stop").exists()
        return returned

    monkeypatch.setattr(processes, "run_torchrun", torchrun)
    assert train_workers(config, nproc=2, nodes=Nodes()) == expected


def test_a_second_node_clears_its_own_ranks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"dump": {"url": "d"}, "student": {"model": "m"}, "train": {"output": str(tmp_path)}}
    )
    (tmp_path / "exit").mkdir()
    for rank in range(4):
        (tmp_path / "exit" / f"rank-{rank}").write_text("75\n")
    monkeypatch.setattr(processes, "run_torchrun", lambda *_, **__: 0)
    assert train_workers(config, nproc=2, nodes=Nodes(2, 1, "host:1")) == 0
    assert sorted(file.name for file in (tmp_path / "exit").iterdir()) == ["rank-0", "rank-1"]


def test_a_second_training_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the configuration, the events or the exit codes of the first one; nor does a start in a dump."""
    output = tmp_path / "run"
    config = Config.model_validate(
        {"dump": {"url": str(tmp_path / "dump")}, "student": {"model": "m"}, "train": {"output": str(output)}}
    )
    monkeypatch.setattr(processes, "run_torchrun", lambda *_, **__: pytest.fail("it was started"))
    (output / "exit").mkdir(parents=True)
    (output / "exit" / "rank-0").write_text("0\n")
    body = """
    import pathlib, sys, time
    from student_train.directory import LAUNCHER, held
    with held(pathlib.Path(sys.argv[1]), LAUNCHER):
        print("held", flush=True)
        time.sleep(60)
    """
    first = subprocess.Popen([*python(body), str(output)], stdout=subprocess.PIPE, cwd=ROOT)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(TemporaryError, match="another training holds"):
        cli._train(config, nproc=1, nodes=Nodes())
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    first.kill()
    first.wait()
    inside = config.model_copy(update={"dump": DumpSection(url=str(tmp_path))})
    with pytest.raises(MismatchError, match="lies in the dump"):
        cli._train(inside, nproc=1, nodes=Nodes())
