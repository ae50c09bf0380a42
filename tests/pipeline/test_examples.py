"""The examples: configurations load, and the batch scripts do what they say under a pretended Slurm."""

import os
import re
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
    # To the tasks of srun, not to the script.
    assert options["signal"].startswith("TERM@")
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
        "squeue": f'echo "squeue $*" >> {log}\necho $STATE',
        "scontrol": f'echo "scontrol $*" >> {log}',
    }
    for name, body in bodies.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    return tmp_path


def environment(cluster: Path, **more: str) -> dict[str, str]:
    plain = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7", "SLEEP": "", "CODE": "0", "STATE": "RUNNING"}
    return os.environ | plain | more


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [("75", "0", True), ("75", "50", False), ("78", "0", False), ("0", "0", False)]
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
    assert calls[0].startswith("srun ")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_preempted_job_is_queued_again_and_a_cancelled_one_is_not(
    cluster: Path, path: Path, state: str, requeued: bool
) -> None:
    """Both times script and tasks get SIGTERM."""
    env = environment(cluster, SLEEP="yes", STATE=state)
    script = subprocess.Popen(["bash", path], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (cluster / "calls").exists() or "llm-neo" not in (cluster / "calls").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(script.pid, signal.SIGTERM)
        assert script.wait(timeout=20) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    calls = (cluster / "calls").read_text()
    assert f"llm-neo {path.stem} examples/llama-8b-to-1b.yaml" in calls
    assert ("scontrol requeue 7" in calls) == requeued


def test_one_task_of_an_array_queues_itself_and_not_the_array(cluster: Path) -> None:
    """The id of its last task is the id of the whole array."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", SCRIPTS[0]], env=environment(cluster, CODE="75", **array), check=False, timeout=20)
    assert done.returncode == 75
    calls = (cluster / "calls").read_text().splitlines()
    assert "scontrol requeue 7_3" in calls
    assert "squeue --noheader --jobs=7_3 --format=%T" in calls


def test_a_larger_teacher_is_a_few_settings_away() -> None:
    """The command in the script's head is one that works."""
    head = SCRIPTS[0].read_text().split("#SBATCH")[0]
    settings = dict(re.findall(r"--set (teacher\.\w+)=(\S+)", head))
    assert sorted(settings) == ["teacher.model", "teacher.sharding"]
    overrides = [f"{name}={value}" for name, value in settings.items()]
    found = load_config(ROOT / "examples/llama-8b-to-1b.yaml", overrides)
    assert found.teacher is not None
    assert found.teacher.grouped


def test_the_workers_of_the_array_share_the_dump() -> None:
    """The script passes no worker number: the command takes it from Slurm."""
    from pipeline.launch import Placement, dump_placement

    text = (ROOT / "examples/slurm/dump.sbatch").read_text()
    assert "--rank" not in text
    slurm = {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    found = [dump_placement({**slurm, "SLURM_ARRAY_TASK_ID": str(task)}) for task in range(8)]
    assert found == [Placement(task, 8) for task in range(8)]
