"""The examples: configurations load, and the batch scripts do what they say under a pretended Slurm."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config import load_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid_and_complete(path: Path) -> None:
    config = load_config(path)
    for section in ("teacher", "corpus", "heldout", "student", "train"):
        assert getattr(config, section) is not None


def test_the_scripts_are_there_and_are_bash() -> None:
    assert [path.name for path in SCRIPTS] == ["dump.sbatch", "train.sbatch"]
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_directives_stand_before_the_first_command(path: Path) -> None:
    """Slurm ignores directives after that, without a word."""
    lines = path.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(directives) >= 10
    assert max(directives) < min(commands)
    options = dict(lines[i].removeprefix("#SBATCH --").partition("=")[::2] for i in directives)
    assert "requeue" in options
    assert options["signal"].startswith("B:USR1@")
    assert "dependency" not in options


def test_training_runs_one_command_per_node() -> None:
    text = (ROOT / "examples/slurm/train.sbatch").read_text()
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --ntasks-per-node=1" in text
    assert "#SBATCH --gpus-per-node=8" in text
    assert "srun --ntasks-per-node=1" in text


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A submit directory with a virtual environment whose commands pretend, and write down how they were called."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f'export PATH="{commands}:$PATH"\n')
    log = tmp_path / "calls"
    bodies = {
        "llm-neo": f'echo "llm-neo $*" >> {log}\ntrap "exit 75" TERM\n[ $SLEEP ] && {{ sleep 30 & wait; }}\nexit $CODE',
        "srun": f'echo "srun $*" >> {log}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": f'echo "scontrol $*" >> {log}',
    }
    for name, body in bodies.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    return tmp_path


def environment(cluster: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7", "SLEEP": "", "CODE": "0", **more}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [("0", "0", False), ("75", "0", True), ("75", "50", False), ("78", "0", False)]
)
def test_a_job_is_queued_again_after_75_and_nothing_else(
    cluster: Path, path: Path, code: str, restarts: str, requeued: bool
) -> None:
    env = environment(cluster, CODE=code, SLURM_RESTART_COUNT=restarts)
    done = subprocess.run(["bash", path, "my.yaml", "--set", "a.b=c d"], env=env, check=False, timeout=20)
    assert done.returncode == int(code)
    calls = (cluster / "calls").read_text().splitlines()
    assert f"llm-neo {path.stem} my.yaml --set a.b=c d" in calls
    assert ("scontrol requeue 7" in calls) == requeued
    assert any(call.startswith("srun") for call in calls) == (path.stem == "train")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_warning_before_the_time_limit_stops_and_requeues(cluster: Path, path: Path, number: int) -> None:
    script = subprocess.Popen(["bash", path], env=environment(cluster, SLEEP="yes"), start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (cluster / "calls").exists() or "llm-neo" not in (cluster / "calls").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        script.send_signal(number)
        assert script.wait(timeout=20) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    calls = (cluster / "calls").read_text()
    assert f"llm-neo {path.stem} examples/llama-8b-to-1b.yaml" in calls
    assert "scontrol requeue 7" in calls


def test_the_workers_of_the_array_share_the_dump() -> None:
    """The script passes no worker number: the command takes it from Slurm."""
    from pipeline.launch import Placement, dump_placement

    text = (ROOT / "examples/slurm/dump.sbatch").read_text()
    assert "--rank" not in text
    slurm = {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    found = [dump_placement({**slurm, "SLURM_ARRAY_TASK_ID": str(task)}) for task in range(8)]
    assert found == [Placement(task, 8) for task in range(8)]
