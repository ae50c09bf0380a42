"""Who is which worker, and what is started: pure functions of environment and resources."""

import sys
from typing import Any

import pytest

from pipeline import cli
from pipeline.launch import (
    Nodes,
    Placement,
    device_environment,
    dump_argv,
    dump_placement,
    first_host,
    rank_argv,
    rank_environment,
    thread_environment,
    training_nodes,
)
from storage_schemas.common.errors import MismatchError, UsageError
from teacher_dump.config import TeacherSection

MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        (ARRAY, (3, 8)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (3, 8)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_STEP": "2"}, (7, 8)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "40", "SLURM_ARRAY_TASK_MIN": "3"}, (5, 8)),
        ({**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (7, 16)),
        ({**ARRAY, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 8)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, (2, 3)),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"RANK": "3", "WORLD_SIZE": "8", **ARRAY}, (3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", **ARRAY}, (1, 2)),
        ({"WORLD_SIZE": "4"}, (0, 1)),
        (MPIRUN, (2, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 4)),
        # Inside of a batch script, whose own numbers are inherited, and in each task of an array.
        ({**MPIRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (2, 4)),
        ({**MPIRUN, **ARRAY, "SLURM_PROCID": "0"}, (14, 32)),
    ],
)
def test_a_dump_worker_knows_its_number_from_its_scheduler(env: dict[str, str], expected: tuple[int, int]) -> None:
    assert dump_placement(env) == Placement(*expected)


def test_the_command_line_wins_over_the_environment() -> None:
    assert dump_placement(ARRAY, 1, 2) == Placement(1, 2)


@pytest.mark.parametrize(
    ("env", "rank", "world"),
    [
        ({}, 1, None),
        ({}, None, 2),
        ({}, 2, 2),
        ({}, -1, 2),
        ({}, 0, 0),
        ({"RANK": "1"}, None, None),
        ({"RANK": "one", "WORLD_SIZE": "2"}, None, None),
        ({"JOB_COMPLETION_INDEX": "0"}, None, None),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": ""}, None, None),
    ],
)
def test_half_or_impossible_worker_numbers_are_refused(env: dict[str, str], rank: int, world: int) -> None:
    with pytest.raises(UsageError):
        dump_placement(env, rank, world)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"JOB_COMPLETION_INDEX": "-1", "JOB_COMPLETIONS": "2"}, "rank -1 of 2"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "rank 4 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "0 of 2 by RANK.*1 of 2 by SLURM"),
        ({"RANK": "0", "WORLD_SIZE": "1", **ARRAY}, "0 of 1 by RANK and WORLD_SIZE; 3 of 8 by SLURM_ARRAY_TASK_ID"),
        ({"RANK": "0", "WORLD_SIZE": "4", "JOB_COMPLETION_INDEX": "2"}, "0 of 4 by RANK.*2 of 4 by JOB_COMPLETION"),
    ],
)
def test_variables_that_cannot_be_or_contradict_each_other_are_refused(env: dict[str, str], says: str) -> None:
    """Variables that were inherited would make every worker number 0, and all do the same work."""
    with pytest.raises(MismatchError, match=says):
        dump_placement(env)
    assert dump_placement(env, 0, 1) == Placement(0, 1)


STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "41"}


def test_training_nodes_come_from_slurm_inside_srun() -> None:
    nodes = training_nodes({**STEP, "SLURM_STEP_NODELIST": "gpu[07-08]"})
    assert nodes == Nodes(2, 1, "gpu07:12041")
    assert training_nodes({**STEP, "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a,b"}) == Nodes(2, 0, "a:12041")
    # Another job on the same node meets elsewhere; all nodes of one job at the same place.
    assert training_nodes({**STEP, "SLURM_JOB_ID": "42", "SLURM_STEP_NODELIST": "a,b"}).endpoint == "a:12042"


def test_training_is_on_one_node_unless_told_otherwise() -> None:
    assert training_nodes({}) == Nodes()
    assert training_nodes({"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "a[1-4]"}) == Nodes()
    assert training_nodes({}, 2, 1, "host:1") == Nodes(2, 1, "host:1")
    assert training_nodes({**STEP, "SLURM_STEP_NODELIST": "a,b"}, endpoint="c:5").endpoint == "c:5"


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        (STEP, ()),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "a,b"}, ()),
        ({}, (2, 0)),
        ({}, (2, None, "host:1")),
        ({}, (2, 2, "host:1")),
    ],
)
def test_nodes_that_cannot_meet_are_refused(env: dict[str, str], arguments: tuple[int, int, str]) -> None:
    with pytest.raises(UsageError):
        training_nodes(env, *arguments)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("rack[1-2]node[05,07]", "rack1node05"),
        ("n[1-3]-ib,m1", "n1-ib"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_ranks_of_one_node_meet_at_a_file_and_listen_on_loopback() -> None:
    argv = rank_argv("student_train.worker", ["--config", "c"], rendezvous="file:///t/ranks")
    assert argv == [
        sys.executable,
        "-P",
        "-m",
        "student_train.worker",
        "--config",
        "c",
        "--rendezvous",
        "file:///t/ranks",
    ]
    env = rank_environment({"NCCL_SOCKET_IFNAME": "eth1"}, 1, nproc=2, nodes=Nodes())
    assert {name: env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
    }  # fmt: skip
    assert env["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in env  # The user's own is left alone.
    assert "MASTER_ADDR" not in env


def test_ranks_of_several_nodes_meet_at_node_0() -> None:
    env = rank_environment({}, 3, nproc=8, nodes=Nodes(2, 1, "[fe80::1]:12041"))
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("11", "16", "3")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("fe80::1", "12041")
    assert "GLOO_SOCKET_IFNAME" not in env


@pytest.mark.parametrize(
    ("gpus", "asked", "teacher", "expected"),
    [
        ("0,1,2,3", None, {}, 4),
        ("0,1,2,3", None, {"device": "cuda"}, 4),
        ("0,1,2,3", 2, {}, 2),
        ("", None, {}, 1),
        ("0,1,2,3", None, {"device": "cpu"}, 1),
        ("0,1,2,3", None, {"device": "cuda:2"}, 1),
        ("0,1,2,3", None, {"sharding": "device_map"}, 1),
        ("0,1,2,3", None, {"sharding": "tensor"}, 1),
        ("0,1,2,3", None, {"backend": "vllm"}, 4),
        ("0,1,2,3", None, {"backend": "vllm", "vllm": {"tensor_parallel_size": 2}}, 2),
        ("0,1,2,3", None, {"backend": "vllm", "vllm": {"tensor_parallel_size": 4}}, 1),
        ("0,1,2,3", None, {"backend": "vllm", "vllm": {"tensor_parallel_size": 2, "pipeline_parallel_size": 4}}, 1),
    ],
)
def test_stage_one_has_a_worker_per_gpu_where_each_holds_a_teacher(
    gpus: str, asked: int | None, teacher: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert cli._workers(asked, TeacherSection.model_validate({"model": "m"} | teacher)) == expected


def test_a_worker_of_a_launcher_starts_no_workers_on_the_gpus_of_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not know how many they are sees all GPUs; one that has a node to itself may take them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cli._workers(None, TeacherSection(model="m")) == 1
    assert "--workers 4" in caplog.text, "seven of eight GPUs would be idle without a word"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cli._workers(None, TeacherSection(model="m")) == 4


def test_dump_workers_get_their_number_their_threads_and_their_gpu() -> None:
    from pathlib import Path

    argv = dump_argv(Path("c.yaml"), ["a.b=c"], Placement(1, 3), result=Path("r.json"))
    assert argv[1:5] == ["-P", "-m", "pipeline.entry", "dump"]
    where = ["--rank", "1", "--world-size", "3", "--workers", "1", "--result", "r.json"]
    assert argv[5:] == ["c.yaml", *where, "--set", "a.b=c"]
    argv = dump_argv(Path("c.yaml"), [], Placement(1, 3), result=Path("r.json"), events=Path("e.jsonl"))
    assert argv[argv.index("--events") + 1] == "e.jsonl"
    assert thread_environment({}, 2, 8) == {"OMP_NUM_THREADS": "4"}
    assert thread_environment({}, 16, 8) == {"OMP_NUM_THREADS": "1"}
    assert thread_environment({"OMP_NUM_THREADS": "3"}, 2, 8) == {}
    assert device_environment("A", [], 1, 2) == {}
    assert [device_environment("A", ["4", "6"], worker, 3)["A"] for worker in range(3)] == ["4", "6", "4"]
    assert [device_environment("A", list("0123"), worker, 2)["A"] for worker in range(2)] == ["0,1", "2,3"]
