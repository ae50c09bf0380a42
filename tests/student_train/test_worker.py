"""The processes that torchrun starts: how they stop, and how they leave when one of them fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import environment, start
from support.tiny_student import save_student

from storage_schemas.common.ranks import ExitCodes, read_codes
from student_train.checkpoint import Checkpoints
from student_train.config import TrainSection
from student_train.metrics import read_events
from student_train.worker import main, read_config, run


def resolved(folder: Path, output: Path, **train: Any) -> Path:
    """resolved.json of a small run."""
    defaults = {
        "output": output, "precision": "fp32", "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    section = TrainSection(**(defaults | train))
    path = output.with_suffix(".json")
    path.write_text(
        json.dumps(
            {
                "dump": {"url": str(folder / "dump")},
                "student": {"model": str(folder / "student"), "lora": {"r": 4}},
                "loss": {},
                "train": section.model_dump(mode="json"),
            }
        )
    )
    return path


class Ranks:
    """Two workers, under the variables of torchrun, but each with a log and an environment of its own."""

    def __init__(self, config: Path, output: Path, *, faults: Mapping[int, str] | None = None) -> None:
        self.output = output
        self._logs = [output.with_suffix(f".log-{rank}") for rank in range(2)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(2):
            more = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if faults and rank in faults:
                more["LLM_NEO_FAULT"] = faults[rank]
            argv = ["--config", str(config)]
            self.processes.append(start(main, argv, log=self._logs[rank], env=environment(**more)))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait while both are alive."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs
            assert all(process.is_alive() for process in self.processes), self.logs
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; fails if they are not there in time."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0.1, deadline - time.monotonic()))
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    @property
    def logs(self) -> str:
        """What both have printed."""
        return "\n".join(log.read_text(errors="replace") for log in self._logs)

    def steps(self) -> int:
        """Steps that were logged."""
        return len(read_events(self.output / "events.jsonl"))


def test_sigterm_on_one_rank_stops_all(folder: Path, tmp_path: Path) -> None:
    """A checkpoint, and 75 on both; torchrun's own 1 never shows. The same command then finishes."""
    output = tmp_path / "run"
    config = resolved(folder, output, epochs=400)
    ranks = Ranks(config, output)
    ranks.wait_for(lambda: ranks.steps() >= 3)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(30) == [75, 75], ranks.logs
    assert read_codes(output) == {0: 75, 1: 75}
    assert ranks.logs.count("was asked to stop") == 1
    steps = ranks.steps()
    assert (output / "checkpoints" / f"step-{steps:08d}" / "COMMIT.json").is_file()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        # A bug in the middle of a step, where the other rank waits for it in a collective.
        ("train:step:3:thread", 70, "injected failure at train:step"),
        # A rank that is gone without a word, as when memory runs out.
        ("train:step:3:kill", 75, "has lost another rank"),
    ],
)
def test_failing_rank_ends_all(folder: Path, tmp_path: Path, fault: str, code: int, message: str) -> None:
    """Within 30 seconds and with the same code, and the message is printed once."""
    output = tmp_path / "run"
    ranks = Ranks(resolved(folder, output, epochs=400), output, faults={1: fault})
    ranks.wait_for(lambda: ranks.steps() >= 2)
    found = ranks.wait(30)
    killed = fault.endswith("kill")
    assert found == [code, -signal.SIGKILL if killed else code], ranks.logs
    assert read_codes(output) == ({0: code} if killed else {0: code, 1: code})
    assert ranks.logs.count(message) == 1, ranks.logs
    assert "Traceback" not in ranks.logs or not killed


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (lambda: torch.empty(2**60), 78, ("out of memory", "micro_batch_size", "gradient_checkpointing", "zero_stage")),
        (lambda: ecc_error(), 75, ("a device has failed", "take this machine or GPU out of the job")),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_told_with_what_to_change(
    fails: Callable[[], object], code: int, says: Sequence[str], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("student_train.engine.join", lambda *_, **__: None)
    monkeypatch.setattr("student_train.train.train", lambda *_, **__: fails())
    config = read_config(resolved(folder, tmp_path / "run"))
    place = {"rank": 0, "world_size": 1, "local_rank": 0}
    left = run(config, ExitCodes(tmp_path, 0, 1), **place, rendezvous="", stop=threading.Event())
    told = capfd.readouterr().err
    assert left == code, told
    for words in says:
        assert words in told
    assert "Traceback" not in told


def ecc_error() -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def test_a_bug_while_a_checkpoint_is_written_ends_all(folder: Path, tmp_path: Path) -> None:
    """On the thread of the main rank: 70 on both, told once, with the lines that it is in, long before the next one."""
    output = tmp_path / "run"
    ranks = Ranks(resolved(folder, output, epochs=400, save_steps=20), output, faults={0: "put:step:before:4:thread"})
    assert ranks.wait(120) == [70, 70], ranks.logs
    assert read_codes(output) == {0: 70, 1: 70}
    assert ranks.logs.count("injected failure at put:step:before") == 1, ranks.logs
    assert "in put_new" in ranks.logs
    assert 20 <= ranks.steps() < 40


@pytest.mark.slow
def test_death_while_a_checkpoint_is_written(folder: Path, tmp_path: Path) -> None:
    """The main rank is killed in the middle of the second one; the same command goes on from the first, to the bit."""

    def trained(name: str, *codes: int, **more: Any) -> list[float]:
        output = tmp_path / name
        ranks = Ranks(resolved(folder, output, max_steps=6, epochs=9, save_steps=2), output, **more)
        assert ranks.wait(120) == list(codes), ranks.logs
        return [event.loss for event in read_events(output / "events.jsonl")]

    trained("killed", -signal.SIGKILL, 75, faults={0: "put:step:before:9:kill"})
    assert Checkpoints(str(tmp_path / "killed" / "checkpoints")).newest().step == 2
    assert trained("killed", 0, 0) == trained("whole", 0, 0)
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        one, other = (tmp_path / run / "final" / name for run in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_failing_final_check_ends_all(folder: Path, tmp_path: Path) -> None:
    """A base that changes on disk while its adapter is trained: `final/` is refused, 65 on both, and nobody waits."""
    own, output = tmp_path / "own", tmp_path / "run"
    shutil.copytree(folder, own)
    ranks = Ranks(resolved(own, output, epochs=4), output)
    # Written once the student is loaded; all steps are to come.
    ranks.wait_for((output / "checkpoints" / "step-00000000" / "COMMIT.json").is_file)
    other = save_student(tmp_path / "other", seed=2)
    os.replace(other / "model.safetensors", own / "student" / "model.safetensors")
    assert ranks.wait(60) == [65, 65], ranks.logs  # All steps included; collectives wait for ten minutes and more.
    assert read_codes(output) == {0: 65, 1: 65}
    assert ranks.logs.count("has changed since it was loaded") == 1, ranks.logs
    assert not (output / "final").exists()
    assert not (output / "summary.json").exists()


@pytest.mark.slow
def test_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """As users start it: the code of a data error, which torchrun itself turns into 1; a rerun after a stop request."""
    output = tmp_path / "run"
    config = resolved(folder, output, epochs=400, zero_stage=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [*torchrun, "-m", "student_train.worker", "--config", str(config)],
            env=environment(), stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while len(read_events(output / "events.jsonl")) < 2:
                assert job.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (output / "exit" / "stop").parent.mkdir(exist_ok=True)
            (output / "exit" / "stop").touch()
            assert job.wait(40) == 1
        finally:
            job.kill()
    assert read_codes(output) == {0: 75, 1: 75}


def test_wrong_configuration_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before anything heavy is imported, on rank 0 alone."""
    (tmp_path / "resolved.json").write_text('{"train": {"otput": "x"}}')
    for rank in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "student_train.worker", "--config", str(tmp_path / "resolved.json")],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 78
        assert ("otput" in done.stderr) == (rank == 0)
