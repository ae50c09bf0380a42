"""The training Job of examples/kubernetes with real `llm-neo` processes as its pods; the Job's controller is played.

The controller starts an index again on its own, after 10 s and then twice as long each time, however the others are:
so pods of two starts may meet, which a scheduler that starts a job as a whole never lets happen.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.kubernetes_jobs import action, objects
from support.tiny_student import save_student, write_dump

from student_train.metrics import read_events

ROOT = Path(__file__).parents[2]
BACKOFF_SECONDS = 10.0
"""The controller's first delay."""


class Pod:
    """One start of one index."""

    def __init__(self, command: list[str], folder: Path, log: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.entry", *command],
                cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.conditions: tuple[str, ...] = ()

    def preempt(self) -> None:
        """What a preemption does: a condition of the pod, and SIGTERM."""
        self.conditions = ("DisruptionTarget",)
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """What the end of a node does: all processes at once."""
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.process.pid)
            for process in [*whole.children(recursive=True), whole]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


class Job:
    """An Indexed Job and its controller."""

    def __init__(self, folder: Path) -> None:
        text = (ROOT / "examples/kubernetes/train.yaml").read_text()
        self.spec: dict[str, Any] = objects(text)["Job/llm-neo-train"]["spec"]
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.counted = dict.fromkeys(range(self.spec["completions"]), 0)
        self.ignored = dict(self.counted)
        self.pods: dict[int, Pod] = {}
        self.due = dict.fromkeys(self.counted, 0.0)
        self.codes: list[tuple[int, int, str]] = []
        """(index, exit code, action) of all pods that have failed."""

    def command(self, index: int) -> list[str]:
        """The container's, on this machine."""
        (container,) = self.spec["template"]["spec"]["containers"]
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        words = [word.replace("/config/config.yaml", "config.yaml") for word in words]
        return [re.sub(r"(--rdzv-endpoint=).*", rf"\g<1>{self.host}", word) for word in words] + ["--nproc=1"]

    def sync(self) -> bool:
        """Start what is due and judge what has ended; whether the Job goes on."""
        for index, due in list(self.due.items()):
            if time.monotonic() >= due:
                del self.due[index]
                start = self.counted[index] + self.ignored[index]
                self.pods[index] = Pod(self.command(index), self.folder, self.folder / f"pod-{index}-{start}.log")
        for index, pod in list(self.pods.items()):
            code = pod.process.poll()
            if code is None:
                continue
            del self.pods[index]
            if code == 0:
                continue
            done = action(self.spec["podFailurePolicy"], code if code > 0 else 128 - code, pod.conditions)
            self.codes.append((index, code, done))
            if done == "FailJob":
                return False
            (self.ignored if done == "Ignore" else self.counted)[index] += 1
            assert self.counted[index] <= self.spec["backoffLimitPerIndex"]
            failures = self.counted[index] + self.ignored[index]
            self.due[index] = time.monotonic() + BACKOFF_SECONDS * 2 ** (failures - 1)
        return bool(self.pods or self.due)

    def until(self, condition: Callable[[], object], *, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.sync(), self.story()
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.05)

    def finish(self, *, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while self.sync():
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.05)

    def story(self) -> str:
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("pod-*.log")))
        return f"{self.codes}\n{logs}"


@contextmanager
def job_in(folder: Path) -> Iterator[Job]:
    job = Job(folder)
    try:
        yield job
    finally:
        for pod in job.pods.values():
            pod.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dump, a student and a configuration, for some seconds of training."""
    write_dump(tmp_path / "dump", bad_samples=False)
    save_student(tmp_path / "student")
    train = {
        "output": "run", "precision": "fp32", "global_batch_size": 4, "micro_batch_size": 2, "epochs": 40,
        "lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_steps": 50,
    }  # fmt: skip
    config = {"dump": {"url": "dump"}, "student": {"model": "student", "lora": {"r": 4}}, "train": train}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def steps(folder: Path) -> list[int]:
    events = folder / "run/events.jsonl"
    return [event.step for event in read_events(events)] if events.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize(("incident", "index"), [("kill", 0), ("kill", 1), ("preempt", 1)])
def test_pods_leave_together_and_meet_again(folder: Path, incident: str, index: int) -> None:
    with job_in(folder) as job:
        job.until(lambda: len(steps(folder)) >= 60)
        getattr(job.pods[index], incident)()
        job.finish()
        story = job.story()
    assert steps(folder) == list(range(1, 241)), story
    # More than one failure per index would be pods that do not find each other again.
    itself = (index, -9, "Count") if incident == "kill" else (index, 75, "Ignore")
    assert sorted(job.codes) == sorted([itself, (1 - index, 75, "Count")]), story


def test_a_configuration_that_cannot_be_ends_the_job_at_once(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("r: 4", "r: 4\n    rank: 4"))
    with job_in(folder) as job:
        job.finish(seconds=60)
    assert {(code, done) for _, code, done in job.codes} == {(78, "FailJob")}
