"""Processes: exit codes add up, signals reach the workers, and nothing is left behind."""

import io
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
    SAME_SECONDS,
    Command,
    dump_workers,
    refuse_unknown_host,
    run_together,
    train_workers,
)
from storage_schemas.common.errors import MismatchError, NeoError, TemporaryError
from storage_schemas.common.exits import combined, tell_deaths
from storage_schemas.common.ranks import ExitCodes
from storage_schemas.common.signals import forwarded

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
        ([-9, 78], 78),
        ([-signal.SIGILL, 78], 70),
        ([-signal.SIGSEGV, 75], 75),
        ([-15, 0], 75),
        ([143], 75),
        ([-6] * 8, 75),  # NCCL's watchdogs, once a collective hangs: every rank dies without a word.
        ([134, 137], 75),
        ([-2, 65], 65),
    ],
)
def test_one_code_for_many(codes: list[int], expected: int) -> None:
    assert combined(codes) == expected


def python(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body)]


SUMMARY = {
    "units": 4, "units_done_here": 2, "units_lost_here": 0,
    "tokens_here": 100, "seconds": 2.0, "tokens_per_second": 50.0,
}  # fmt: skip


def fake_worker(monkeypatch: pytest.MonkeyPatch, body: str) -> list[Placement]:
    """`llm-neo dump` becomes `body`, which knows `rank` and where its `result` goes."""
    seen: list[Placement] = []

    def argv(config: Path, overrides: Sequence[str], placement: Placement, **options: object) -> list[str]:
        seen.append(placement)
        known = f"import json, pathlib\nrank, result = {placement.rank}, pathlib.Path({str(options['result'])!r})\n"
        return python(known + textwrap.dedent(body))

    monkeypatch.setattr(processes, "dump_argv", argv)
    return seen


def test_workers_of_stage_one_are_numbered_over_all_nodes_and_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"""
    import os
    summary = {SUMMARY} | {{"seconds": 2.0 + rank, "threads": os.environ["OMP_NUM_THREADS"]}}
    result.write_text(json.dumps(summary | {{"heldout": {SUMMARY}}}))
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
    assert summary["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_nothing_left_to_do_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SUMMARY | {"tokens_here": 0, "seconds": 0.0, "tokens_per_second": None}
    fake_worker(monkeypatch, f"result.write_text(json.dumps({nothing}))")
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


def test_a_killed_worker_is_told_and_its_work_done_by_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = f"""
    import os, signal
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    result.write_text(json.dumps({SUMMARY}))
    """
    fake_worker(monkeypatch, body)
    code, summary = dump_workers(Path("c"), [], 3, node=Placement(0, 1))
    assert (code, summary["tokens_here"]) == (0, 200)
    told = capfd.readouterr().err
    assert "worker 1 was ended by SIGKILL" in told
    assert "the dump is complete" in told
    fake_worker(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert dump_workers(Path("c"), [], 2, node=Placement(0, 1)) == (75, {})


def test_a_worker_that_has_ended_is_told_at_once_without_its_progress(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other one works until that is told. What was left is done by it, and the dump is complete."""

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            if "worker 1 has ended with 75" in text:
                (tmp_path / "told").touch()
            return super().write(text)

    body = f"""
    import sys, time
    if rank == 1:
        sys.stderr.write("12:00:00 dump: 1/9 units, 5 tokens/s\\nllm-neo: a GPU is gone\\n")
        sys.exit(75)
    deadline = time.monotonic() + 20
    while not pathlib.Path({str(tmp_path / "told")!r}).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if time.monotonic() >= deadline:
        sys.exit(70)
    result.write_text(json.dumps({SUMMARY}))
    """
    fake_worker(monkeypatch, body)
    monkeypatch.setattr(sys, "stderr", told := Told())
    code, summary = dump_workers(Path("c"), [], 2, node=Placement(0, 1))
    assert (code, summary["units_done_here"]) == (0, 2)
    assert (tmp_path / "told").exists()
    assert told.getvalue().startswith("llm-neo: a GPU is gone\nllm-neo: worker 1 has ended with 75\n")
    assert "the dump is complete" in told.getvalue()


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
    got: list[None] = []
    with forwarded(lambda: got.append(None)):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert len(got) == 3
    assert {number: signal.getsignal(number) for number in before} == before


def ready(folder: Path, then: str) -> list[str]:
    """A process that says that it runs, and its id."""
    head = f"import os, pathlib, signal, sys, time\n(pathlib.Path({str(folder)!r}) / str(os.getpid())).touch()\n"
    return python(head + then)


def pids(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


def test_ranks_whose_peer_has_failed_are_given_time_and_then_killed(tmp_path: Path) -> None:
    hangs = Command(ready(tmp_path, "time.sleep(120)"), {})
    fails = Command(ready(tmp_path, "time.sleep(0.5)\nsys.exit(78)"), {})
    notices = Command(ready(tmp_path, "time.sleep(1)\nsys.exit(65)"), {})
    assert run_together([hangs, fails, notices], patience=2.0) == [75, 78, 65]
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_rank_that_was_killed_is_told_and_means_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dies = Command(ready(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), {})
    aborts = Command(ready(tmp_path, "os.abort()"), {})
    stops = Command(ready(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)"), {})
    codes = run_together([dies, aborts, stops])
    assert codes == [-signal.SIGKILL, -signal.SIGABRT, -signal.SIGTERM]
    tell_deaths(codes, ["rank 0", "rank 1", "rank 2"])
    told = capfd.readouterr().err
    assert "rank 0 was ended by SIGKILL" in told
    assert "out of memory" in told
    assert "rank 1 was ended by SIGABRT" in told
    assert "rank 2" not in told
    assert "before it had begun" not in told
    assert combined(codes) == 75


def test_ranks_that_were_stopped_before_they_could_say_so_are_spoken_for(capfd: pytest.CaptureFixture[str]) -> None:
    tell_deaths([-signal.SIGTERM] * 2, ["rank 0", "rank 1"])
    assert "stopped before it had begun" in capfd.readouterr().err
    tell_deaths([0, 75], ["rank 0", "rank 1"])
    assert not capfd.readouterr().err


def test_the_first_signal_asks_for_a_checkpoint_and_the_second_ends_the_ranks(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    (tmp_path / "ready").mkdir()
    body = f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(asked)!r}).touch())\n"
    body += "time.sleep(0.1)\n" * 600
    went_on: list[bool] = []

    def interrupt() -> None:
        until(lambda: pids(tmp_path / "ready"))
        time.sleep(0.3)  # The handler comes after.
        os.kill(os.getpid(), signal.SIGUSR1)
        until(asked.exists)
        os.kill(os.getpid(), signal.SIGTERM)  # What a scheduler tells all processes, and `make` those that it started.
        time.sleep(SAME_SECONDS + 0.1)
        went_on.append(all(map(alive, pids(tmp_path / "ready"))))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_together([Command(ready(tmp_path / "ready", body), {})], patience=60.0) == [75]
    thread.join()
    assert went_on == [True]
    assert not any(alive(pid) for pid in pids(tmp_path / "ready"))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    body = f"""
    from pipeline.processes import Command, run_together
    run_together([Command({ready(tmp_path, "time.sleep(120)")!r}, {{}})] * 2, patience=60.0)
    """
    launcher = subprocess.Popen(python(body), cwd=ROOT)
    until(lambda: len(pids(tmp_path)) == 2)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(alive(pid) for pid in pids(tmp_path)))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([78, 1], 70),
        ([0, -9], 75),
        ([-9], 75),
        ([-6, -6], 75),
        ([-11], 75),
        ([-15, -15], 75),
        ([0, 65], 65),
    ],
)
def test_training_returns_what_its_ranks_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: list[int], expected: int
) -> None:
    config = Config.model_validate(
        {"dump": {"url": "d"}, "student": {"model": "m"}, "train": {"output": str(tmp_path), "seed": 5}}
    )
    folder = tmp_path / "exit"
    folder.mkdir()
    for stale in ("rank-0", "rank-1", "rank-7", "stop"):
        (folder / stale).write_text("78\n")

    def together(commands: Sequence[Command], *, patience: float) -> list[int]:
        assert list(folder.iterdir()) == []
        argv = commands[0].argv
        resolved = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
        assert sorted(resolved) == ["dump", "loss", "stated", "student", "train"]
        assert resolved["train"]["seed"] == 5
        return left

    monkeypatch.setattr(processes, "run_together", together)
    assert train_workers(config, nproc=len(left), nodes=Nodes()) == expected


def test_a_second_node_clears_its_own_ranks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"dump": {"url": "d"}, "student": {"model": "m"}, "train": {"output": str(tmp_path)}}
    )
    (tmp_path / "exit").mkdir()
    for rank in range(4):
        (tmp_path / "exit" / f"rank-{rank}").write_text("75\n")
    monkeypatch.setattr(processes, "run_together", lambda *_, **__: [0, 0])
    assert train_workers(config, nproc=2, nodes=Nodes(2, 1, "localhost:1")) == 0
    assert sorted(file.name for file in (tmp_path / "exit").iterdir()) == ["rank-0", "rank-1"]


def test_a_first_node_without_a_name_is_told_and_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(processes, "OWN_NAME_SECONDS", 1.0)
    monkeypatch.setattr(processes, "HOST_SECONDS", 1.0)
    endpoint = "no-such-host.invalid:12000"
    with pytest.raises(TemporaryError, match="does not resolve"):
        refuse_unknown_host(Nodes(2, 1, endpoint), tmp_path)
    with pytest.raises(MismatchError, match=r"no-such-host.invalid(.|\n)*--rdzv-endpoint"):
        refuse_unknown_host(Nodes(2, 0, endpoint), tmp_path)
    assert capfd.readouterr().err.count("waiting for the name of the first node") == 2
    # What the last start has left says nothing; once the first node says why it left, the others do not wait.
    with pytest.raises(TemporaryError, match="does not resolve"):
        refuse_unknown_host(Nodes(2, 1, endpoint), tmp_path)
    monkeypatch.setattr(processes, "HOST_SECONDS", 20.0)
    leaving = threading.Timer(0.5, lambda: ExitCodes(tmp_path, 0, 2).write(78))
    leaving.start()
    with pytest.raises(NeoError, match="first node has stopped") as left:
        refuse_unknown_host(Nodes(2, 1, endpoint), tmp_path)
    leaving.join()
    assert left.value.exit_code == 78
    refuse_unknown_host(Nodes(2, 0, "localhost:1"), tmp_path)
    refuse_unknown_host(Nodes(2, 1, "[::1]:1"), tmp_path)
    refuse_unknown_host(Nodes(), tmp_path)


def test_a_second_training_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the configuration, the events or the exit codes of the first one; nor does a start in a dump."""
    output = tmp_path / "run"
    config = Config.model_validate(
        {"dump": {"url": str(tmp_path / "dump")}, "student": {"model": "m"}, "train": {"output": str(output)}}
    )
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    monkeypatch.setattr(processes, "run_together", lambda *_, **__: pytest.fail("it was started"))
    (output / "exit").mkdir(parents=True)
    (output / "exit" / "rank-0").write_text("0\n")
    body = """
    import pathlib, sys, time
    from student_train.run_directory import LAUNCHER, held
    with held(pathlib.Path(sys.argv[1]), LAUNCHER):
        print("held", flush=True)
        time.sleep(60)
    """
    first = subprocess.Popen([*python(body), str(output)], stdout=subprocess.PIPE, cwd=ROOT)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(TemporaryError, match="another training holds"):
        cli.train(written, nproc=1)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    first.kill()
    first.wait()
    with pytest.raises(MismatchError, match="lies in the dump"):
        cli.train(written, [f"dump.url={tmp_path}"], nproc=1)
