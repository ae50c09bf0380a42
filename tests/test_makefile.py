"""The doors of the Makefile, with stand-ins for `llm-neo` and Python: what is tried here is what `make` does."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from storage_schemas.common.exits import Exit

ROOT = Path(__file__).parent.parent
LLM_NEO = """#!/bin/sh
# Notes its arguments, and leaves with the next of the codes in the file `codes`.
printf '<%s>' "$@" >> "$HERE/calls"; echo >> "$HERE/calls"
read -r code rest < "$HERE/codes"
echo "$rest" > "$HERE/codes"
exit "${code:-0}"
"""
STOPS = """#!/bin/sh
# As `llm-neo` does: a signal ends it with 75, in its own time.
trap 'echo TERM >> "$HERE/calls"; sleep 0.2; exit 75' TERM
echo begun >> "$HERE/calls"
while :; do sleep 0.05; done
"""
PYTHON = """#!/bin/sh
# `python -m venv DIR` puts this file into DIR, and `python -m pip install ...` takes its time.
case "$2 $3" in
"pip --version") exit 0 ;;
"pip install") echo "$*" >> "$HERE/installed"; sleep 0.4 ;;
venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$HERE/llm-neo" "$3/bin/llm-neo" ;;
esac
"""
STAGE_ONE = ("-m pip install --quiet --constraint constraints.txt --editable .",)
STAGE_TWO = ("-m pip install --quiet --constraint constraints.txt --editable .[train]",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a virtual environment in which everything is installed."""
    for name, text in {"llm-neo": LLM_NEO, "python": PYTHON}.items():
        write(tmp_path / name, text)
    (tmp_path / "codes").write_text("0\n")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "llm-neo", tmp_path / "venv" / "bin" / "llm-neo")
    for stamp in (".installed-teacher", ".installed-train"):
        (tmp_path / "venv" / stamp).touch()
    return tmp_path


def write(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def made(folder: Path, *words: str, path: str | None = None, venv: str = "venv") -> subprocess.Popen[str]:
    """`make` itself, in a process group of its own."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CONFIG", "URL", "RETRIES", "PAUSE")
    env = {name: value for name, value in os.environ.items() if name not in outer} | {"HERE": str(folder)}
    command = ["make", *words, f"VENV={folder / venv}", f"PYTHON={folder / 'python'}"]
    env |= {} if path is None else {"PATH": path}
    make = shutil.which("make")
    assert make is not None
    return subprocess.Popen(
        command, executable=make, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def told(folder: Path, *words: str, code: int = 0) -> str:
    """What `make` says on standard error."""
    process = made(folder, *words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return err


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("target", ["dump-teacher", "train-student", "run"])
def test_75_is_tried_again_as_often_as_asked(target: str, folder: Path) -> None:
    (folder / "codes").write_text("75 75 0\n")
    err = told(folder, target, "CONFIG=x.yaml", "RETRIES=2", "PAUSE=0")
    assert len(lines(folder / "calls")) == 3
    command = {"dump-teacher": "dump", "train-student": "train"}.get(target, target)
    assert f"llm-neo {command} left with 75: temporary; running it again in 0 s, RETRIES left: 2" in err


def test_by_default_nothing_is_tried_again_and_the_code_is_told(folder: Path) -> None:
    """Each code in the words of the README, and `make` ends with 2 whatever it was."""
    for code in [*Exit, 137]:
        (folder / "codes").write_text(f"{int(code)} 0\n")
        err = told(folder, "dump-teacher", "CONFIG=x.yaml", code=2 if code else 0)
        assert (f"llm-neo dump left with {int(code)}: " in err) == bool(code), err
        assert ("no code of its own" in err) == (code == 137)
    assert len(lines(folder / "calls")) == len(Exit) + 1
    readme = (ROOT / "README.md").read_text()
    for code in Exit:
        assert f"| {int(code)} | " in readme


def test_only_75_is_tried_again_and_its_last_code_is_told(folder: Path) -> None:
    (folder / "codes").write_text("75 78 0\n")
    err = told(folder, "run", "CONFIG=x.yaml", "RETRIES=9", "PAUSE=0", code=2)
    assert "llm-neo run left with 78: the configuration is invalid" in err
    (folder / "codes").write_text("75 75 75 0\n")
    err = told(folder, "run", "CONFIG=x.yaml", "RETRIES=1", "PAUSE=0", code=2)
    assert "llm-neo run left with 75: temporary; run the same command again" in err
    assert len(lines(folder / "calls")) == 4
    assert "whole numbers" in told(folder, "run", "CONFIG=x.yaml", "RETRIES=many", code=2)


def test_pauses_grow(folder: Path) -> None:
    (folder / "codes").write_text("75 75 75 0\n")
    sleeps = folder / "path"
    sleeps.mkdir()
    write(sleeps / "sleep", '#!/bin/sh\necho "$1" >> "$HERE/slept"\n')
    process = made(folder, "run", "CONFIG=x.yaml", "RETRIES=9", "PAUSE=200", path=f"{sleeps}:{os.environ['PATH']}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert lines(folder / "slept") == ["200", "400", "600"]


def test_doors_pass_on_what_they_were_given(folder: Path) -> None:
    config = "my folder/it's mine.yaml"
    told(folder, "dump-teacher", f"CONFIG={config}", "ARGS=--set 'a.b={c: d}'")
    told(folder, "train-student", f"CONFIG={config}", "NPROC=8")
    told(folder, "plan", f"CONFIG={config}", "ARGS=--json")
    told(folder, "freeze", f"CONFIG={config}", "ARGS=--json")
    told(folder, "preview", f"CONFIG={config}")
    told(folder, "status", f"CONFIG={config}")
    told(folder, "status", "URL=s3://b/a", "ARGS=runs/a --watch")
    told(folder, "verify", "URL=my dump")
    told(folder, "inspect", "URL=s3://b/a", "ARGS=--row 3")
    told(folder, "evaluate", "URL=s3://b/a", "ARGS=--model runs/a/final")
    told(folder, "merge", "ARGS=runs/a/final merged")
    assert lines(folder / "calls") == [
        f"<dump><{config}><--set><a.b={{c: d}}>",
        f"<train><{config}><--nproc><8>",
        f"<plan><{config}><--json>",
        f"<freeze><{config}><--json>",
        f"<preview><{config}>",
        f"<status><{config}>",
        "<status><s3://b/a><runs/a><--watch>",
        "<verify><my dump>",
        "<inspect><s3://b/a><--row><3>",
        "<evaluate><--dump><s3://b/a><--model><runs/a/final>",
        "<merge><runs/a/final><merged>",
    ]


@pytest.mark.parametrize("target", ["dump-teacher", "train-student", "run", "plan", "status", "verify", "merge"])
def test_a_door_without_what_it_needs_says_how_it_is_used(target: str, folder: Path) -> None:
    assert f"usage: make {target}" in told(folder, target, code=2)
    assert not (folder / "calls").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["all of its processes", "make alone"])
def test_a_signal_stops_it_once_and_is_no_reason_to_try_again(whole: bool, folder: Path) -> None:
    """Slurm tells every process of a job, Kubernetes and people `make` alone."""
    write(folder / "venv" / "bin" / "llm-neo", STOPS)
    process = made(folder, "train-student", "CONFIG=x.yaml", "RETRIES=9", "PAUSE=0")
    until(folder / "calls", "begun")
    (os.killpg if whole else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert "llm-neo train left with 75: temporary; run the same command again" in err
    assert process.returncode in (2, -signal.SIGTERM)
    calls = lines(folder / "calls")
    assert calls.count("begun") == 1
    assert whole or calls == ["begun", "TERM"]


def test_a_signal_ends_the_pause(folder: Path) -> None:
    (folder / "codes").write_text("75 0\n")
    process = made(folder, "dump-teacher", "CONFIG=x.yaml", "RETRIES=9", "PAUSE=60")
    until(folder / "calls", "<dump>")
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=20)
    assert len(lines(folder / "calls")) == 1


def until(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not any(text in line for line in lines(file)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("lock", ["flock", "directory"])
def test_tasks_that_begin_at_once_install_once(lock: str, folder: Path) -> None:
    """One installs, the other waits for all of it: for what stage one needs, and then for what stage two needs too."""
    path = None
    if lock == "directory":
        tools = folder / "tools"
        tools.mkdir()
        for name in ("sh", "mkdir", "rmdir", "touch", "mv", "cp", "find"):
            (tools / name).symlink_to(str(shutil.which(name)))
        write(tools / "sleep", f"#!/bin/sh\ntest $1 = 2 && set -- 0.1\nexec {shutil.which('sleep')} $1\n")
        path = str(tools)
    for target, wanted in {"dump-teacher": STAGE_ONE, "train-student": STAGE_ONE + STAGE_TWO}.items():
        tasks = [made(folder, target, "CONFIG=x.yaml", path=path, venv="new") for _ in range(3)]
        said = [task.communicate(timeout=60)[1] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0, 0], said
        waited = [err for err in said if "waiting for another make to install" in err]
        assert waited
        assert ("rmdir" in waited[0]) == (lock == "directory")
        assert tuple(lines(folder / "installed")) == wanted
        assert len(lines(folder / "calls")) == 3
        (folder / "calls").unlink()
    found = {file.name for file in (folder / "new").iterdir()}
    assert found - {".lock"} == {"bin", ".installed-teacher", ".installed-train"}


def test_what_the_larger_set_holds_is_not_installed_again(folder: Path) -> None:
    """`make train-student` first, and then a door of stage one."""
    for target in ("train-student", "dump-teacher"):
        process = made(folder, target, "CONFIG=x.yaml", venv="new")
        assert process.wait(timeout=60) == 0
    assert tuple(lines(folder / "installed")) == STAGE_TWO


def test_an_installation_that_failed_leaves_no_stamp(folder: Path) -> None:
    write(folder / "python", PYTHON.replace("sleep 0.4", "exit 1"))
    process = made(folder, "dump-teacher", "CONFIG=x.yaml", venv="new")
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert not list((folder / "new").glob(".installed*"))
    assert not (folder / "calls").exists()
