"""SkyPilot's files: their `run` sections under the variables that SkyPilot sets, with a pretended `llm-neo`.

Whether SkyPilot itself reads the files is for `make test-skypilot`.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_lines import parameters

from pipeline.config import load_config
from pipeline.launch import Nodes, Placement, dump_placement, training_nodes
from storage_schemas.common.exits import Exit

ROOT = Path(__file__).parents[2]
STAGES = ("dump", "train")
# SkyPilot runs under Slurm, too, whose own numbers must not win.
NODES = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "3", "SLURM_JOB_ID": "7"}


def task(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"examples/skypilot/{stage}.sky.yaml").read_text())
    return found


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """What `workdir: .` and `setup` leave on a node: an `llm-neo` that pretends, and writes down how it was called."""
    command = tmp_path / ".venv/bin/llm-neo"
    command.parent.mkdir(parents=True)
    body = 'printf "%s\\n" "$@" > calls\ntrap "exit 75" TERM\n[ -n "$SLEEP" ] && { sleep 30 & wait; }\nexit "$CODE"\n'
    command.write_text(f"#!/bin/bash\n{body}")
    command.chmod(0o755)
    return tmp_path


def environment(stage: str, workdir: Path, rank: int, **more: str) -> dict[str, str]:
    envs = {name: str(value) for name, value in task(stage)["envs"].items()}
    sky = NODES | {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    return {**os.environ, "HOME": str(workdir), "CODE": "0", "SLEEP": "", **envs, **sky, **more}


def called(stage: str, workdir: Path, rank: int, **more: str) -> dict[str, Any]:
    """What `run` calls `llm-neo` with on a node."""
    env = environment(stage, workdir, rank, **more)
    subprocess.run(["bash", "-c", task(stage)["run"]], cwd=workdir, env=env, check=True, timeout=20)
    words = (workdir / "calls").read_text().splitlines()
    assert words[0] == stage
    return parameters(words)


def test_nodes_are_the_workers_of_one_dump(workdir: Path) -> None:
    found = [called("dump", workdir, rank) for rank in range(3)]
    assert [dump_placement(NODES, given["rank"], given["world_size"]) for given in found] == [
        Placement(rank, 3) for rank in range(3)
    ]
    # Several jobs of one node each.
    given = called("dump", workdir, 0, SKYPILOT_NUM_NODES="1", WORKER="2", WORKERS="4")
    assert dump_placement(NODES, given["rank"], given["world_size"]) == Placement(2, 4)


def test_nodes_of_a_training_meet_at_the_first(workdir: Path) -> None:
    for rank in range(3):
        given = called("train", workdir, rank)
        nodes = training_nodes(NODES, given["nnodes"], given["node_rank"], given["rdzv_endpoint"])
        assert nodes == Nodes(3, rank, "10.0.0.4:29500")
        assert given["nproc"] == 8


@pytest.mark.parametrize("stage", STAGES)
def test_the_configuration_is_there_and_valid(stage: str, workdir: Path) -> None:
    given = called(stage, workdir, 0)
    config = load_config(ROOT / given["config"], given["overrides"])
    if stage == "train":
        assert config.train is not None
        (volume,) = task("train")["volumes"]
        assert config.train.output == Path("/runs/llama-8b-to-1b")
        assert config.train.output.is_relative_to(volume)
        assert config.train.cache_dir == workdir / "shards"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", [0, 65, 75, 78])
def test_exit_codes_and_signals_pass_through(stage: str, code: int, workdir: Path) -> None:
    env = environment(stage, workdir, 0, CODE=str(code))
    done = subprocess.run(["bash", "-c", task(stage)["run"]], cwd=workdir, env=env, check=False, timeout=20)
    assert done.returncode == code
    env = environment(stage, workdir, 0, SLEEP="yes")
    (workdir / "calls").unlink()
    process = subprocess.Popen(["bash", "-c", task(stage)["run"]], cwd=workdir, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (workdir / "calls").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("stage", STAGES)
def test_only_75_recovers_and_secrets_have_no_values(stage: str) -> None:
    found = task(stage)
    assert found["resources"]["job_recovery"] == {"recover_on_exit_codes": [int(Exit.TEMPORARY)]}
    assert set(found["secrets"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}
    assert set(found["secrets"].values()) == {None}
    subprocess.run(["bash", "-n", "-c", found["setup"]], check=True)


def test_the_volume_is_the_one_that_training_mounts() -> None:
    volume = yaml.safe_load((ROOT / "examples/skypilot/runs.volume.yaml").read_text())
    assert list(task("train")["volumes"].values()) == [volume["name"]]
    assert volume["config"]["access_mode"] == "ReadWriteMany"
