"""Which GPUs there are and whose they are, from tables of environments and files that stand for a machine's."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_schemas.common.devices import (
    gpu_variable,
    own_gpus,
    refuse_idle_gpus,
    refuse_no_compiler,
    take_own_gpus,
    usable_cores,
    visible_gpus,
)
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.exits import Exit

Machine = Callable[[int], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives the machine's nvidia-smi so many GPUs."""

    def of(gpus: int) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {i}: H100'\necho '  MIG 1g: y'\n" for i in range(gpus)))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return of


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, EIGHT),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, "3"),
        ({"LOCAL_RANK": "5"}, "5"),
        ({"SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": "8"}, "5"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2),2", "SLURM_NODEID": "2"}, "4,5,6,7"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2),2", "SLURM_NODEID": "1"}, "1"),
        # A batch script outside of srun is alone, whatever --ntasks-per-node said.
        ({"SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8"}, EIGHT),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_LOCALID": "0"}, "6"),
        ({"MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}, "4,5"),
        ({"LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": "16"}, "1"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,MIG-a"}, "MIG-a"),
        # What was bound to this task is its own.
        ({"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, "0"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "2",
          "CUDA_VISIBLE_DEVICES": "0,1"}, "0,1"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "HIP_VISIBLE_DEVICES": "2,7"}, "7"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "ROCR_VISIBLE_DEVICES": "2,7"}, "1"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)  # fmt: skip
def test_each_process_of_a_machine_has_its_own_gpus(env: dict[str, str], expected: str, machine: Machine) -> None:
    machine(8)
    assert ",".join(own_gpus(env)) == expected
    taken = dict(env)
    take_own_gpus(taken)
    assert ",".join(visible_gpus(taken)) == expected
    variable = "HIP_VISIBLE_DEVICES" if {"HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} & env.keys() else None
    assert {name for name in taken if taken[name] != env.get(name)} <= {variable or "CUDA_VISIBLE_DEVICES"}


def test_processes_that_share_a_gpu_are_told(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine(2)
    env = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    assert own_gpus(env) == ["1"]
    assert "8 processes of this machine share 2 GPUs" in caplog.text
    caplog.clear()
    own_gpus({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    own_gpus(env | {"CUDA_VISIBLE_DEVICES": "0"})
    assert not caplog.text


def test_gpus_are_counted_without_torch(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    machine(2)
    assert visible_gpus({}) == ["0", "1"]


def test_gpus_are_counted_without_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nodes, dri = tmp_path / "sys/class/kfd/kfd/topology/nodes", tmp_path / "dev/dri"
    dri.mkdir(parents=True)
    for node, minor in enumerate((0, 128, 129, 130)):
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(f"cpu_cores_count 4\ndrm_render_minor {minor}\n")
    for minor in (128, 130):
        (dri / f"renderD{minor}").touch()
    assert visible_gpus({}, root=tmp_path) == [], "a container without /dev/kfd"
    (tmp_path / "dev/kfd").touch()
    assert visible_gpus({}, root=tmp_path) == ["0", "1"], "two of three were given to this container"
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert visible_gpus({}, root=tmp_path) == ["0", "1"]
    assert gpu_variable({"ROCR_VISIBLE_DEVICES": "3"}) == "HIP_VISIBLE_DEVICES"


def test_gpus_that_torch_cannot_use_are_no_cpu(machine: Machine) -> None:
    machine(2)
    with pytest.raises(MismatchError, match="GPUs that torch cannot use") as caught:
        refuse_idle_gpus({}, build="2.13.0+cpu", fix="set teacher.device: cpu")
    assert caught.value.exit_code == Exit.MISMATCH
    assert caught.value.got == "2 visible, torch 2.13.0+cpu"
    refuse_idle_gpus({"CUDA_VISIBLE_DEVICES": ""}, build="2.13.0+cpu", fix="")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_cores_that_a_scheduler_keeps_back_are_not_used() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


def test_without_a_compiler_nothing_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MismatchError, match=r"train\.compile needs a C\+\+ compiler"):
        refuse_no_compiler("train.compile", {"PATH": str(tmp_path)})
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    include = tmp_path / "include"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    with pytest.raises(MismatchError, match=r"needs the header files of Python(.|\n)*python3-dev"):
        refuse_no_compiler("train.compile", {"PATH": str(tmp_path)})
    include.mkdir()
    (include / "Python.h").touch()
    refuse_no_compiler("train.compile", {"PATH": str(tmp_path)})
    include.rename(tmp_path / "module")
    refuse_no_compiler("train.compile", {"PATH": str(tmp_path), "CPATH": f":{tmp_path}/module"})
