"""The run directory: one training at a time, and never a directory that is something else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.distributed import environment

from storage_schemas.common.errors import MismatchError, TemporaryError
from student_train import run_directory as directory
from student_train.run_directory import LAUNCHER, TRAINING, held, refuse_foreign

HOLD = """
import pathlib, sys, time
from student_train.run_directory import held
with held(pathlib.Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def holder(output: Path, name: str, seconds: float = 60.0) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a lock."""
    argv = [sys.executable, "-c", HOLD, str(output), name, str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_launcher_leaves_at_once_and_a_killed_one_frees_the_directory(tmp_path: Path) -> None:
    with holder(tmp_path / "run", LAUNCHER) as other:
        began = time.monotonic()
        with (
            pytest.raises(TemporaryError, match=f"pid {other.pid}, since 20") as refused,
            held(tmp_path / "run", LAUNCHER),
        ):
            pass
        assert time.monotonic() - began < 1.0
        assert "host " in str(refused.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with held(tmp_path / "run", LAUNCHER):
            pass


def test_a_launcher_waits_for_the_ranks_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be writing a checkpoint; who does not end is told of."""
    with holder(tmp_path, TRAINING, 2.0), held(tmp_path, LAUNCHER):
        pass
    monkeypatch.setattr(directory, "DYING_SECONDS", 0.3)
    with holder(tmp_path, TRAINING) as other:
        with pytest.raises(TemporaryError, match=f"pid {other.pid}"), held(tmp_path, LAUNCHER):
            pass
        # It was given back.
        other.kill()
        other.wait()
        with held(tmp_path, LAUNCHER), held(tmp_path, TRAINING):
            pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(directory.fcntl, "flock", absent)
    with held(tmp_path, LAUNCHER):
        pass
    assert "has no locks" in caplog.text


@pytest.mark.parametrize(
    "names", [(), ("dump", "corpus", "a.yaml", "slurm-7.log"), ("final", "events.jsonl"), (".git",)]
)
def test_what_may_be_there(tmp_path: Path, names: tuple[str, ...]) -> None:
    """New, with the dump in it, or left by a run of an earlier version."""
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    dump = tmp_path / "run" / "dump"
    refuse_foreign(tmp_path / "run", dump=dump, named=[dump, tmp_path / "run" / "corpus" / "a.jsonl"])


def test_a_used_directory_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with held(tmp_path, LAUNCHER):
        pass
    refuse_foreign(tmp_path, dump=None)


@pytest.mark.parametrize("where", ["dump", "dump/run", "elsewhere/run"])
def test_a_dump_is_no_run_directory(tmp_path: Path, where: str) -> None:
    """Neither the configured one, be it written or not, nor another one, nor what lies in them."""
    (tmp_path / "elsewhere" / "commits").mkdir(parents=True)
    (tmp_path / "elsewhere" / "run.json").touch()
    with pytest.raises(MismatchError, match=r"train.output lies in the dump"):
        refuse_foreign(tmp_path / where, dump=tmp_path / "dump")


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    for name in ("src", "model.safetensors", "exit"):
        (tmp_path / name).mkdir()
    with pytest.raises(MismatchError, match=r"got: +model.safetensors, src"):
        refuse_foreign(tmp_path, dump=None)


def test_a_link_is_not_followed_to_what_would_be_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit").symlink_to(tmp_path / "mine")
    with pytest.raises(MismatchError, match="exit is a link"):
        refuse_foreign(tmp_path / "run", dump=None)


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "loop", "long name"])
def test_what_cannot_be_a_directory(tmp_path: Path, kind: str) -> None:
    """78 without a traceback."""
    output = tmp_path / "run"
    match kind:
        case "file":
            output.touch()
        case "below a file":
            output.touch()
            output = output / "a"
        case "dangling link":
            output.symlink_to(tmp_path / "nowhere" / "at all")
        case "loop":
            output.symlink_to(output)
        case "long name":
            output = tmp_path / ("x" * 300)
    with pytest.raises(MismatchError, match="cannot be used"), held(output, LAUNCHER):
        pass
    if kind != "below a file":
        with pytest.raises(MismatchError, match="cannot be used"):
            refuse_foreign(output, dump=None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(MismatchError, match="cannot be used"), held(tmp_path, LAUNCHER):
        pass
    tmp_path.chmod(0o755)
