"""The GPUs of this machine and which of them are this process's, without importing torch."""

import logging
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from storage_schemas.common.errors import MismatchError, first_line

log = logging.getLogger(__name__)

CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
_LOCAL = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
"""Rank among the processes of this machine, and their number: torchrun, Open MPI, MPICH and Intel MPI, srun. Slurm is
last, since what mpirun starts inside of a batch script inherits the script's own numbers."""


def visible_gpus(env: Mapping[str, str], *, root: Path = Path("/")) -> list[str]:
    """Ids of the GPUs that this process may use."""
    return _found(env, root)[1]


def gpu_variable(env: Mapping[str, str]) -> str:
    """Name of the environment variable that says which of these GPUs a process sees."""
    return _found(env)[0]


def _found(env: Mapping[str, str], root: Path = Path("/")) -> tuple[str, list[str]]:
    """The variable that narrows the choice, and the ids that it may name."""
    for name in (HIP, CUDA):
        if name in env:
            return name, _listed(env[name])
    if ROCR in env:  # It numbers those that HIP sees.
        return HIP, [str(i) for i in range(len(_listed(env[ROCR])))]
    if shutil.which("nvidia-smi") is not None:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        if gpus := [line for line in told.splitlines() if line.startswith("GPU ")]:
            return CUDA, [str(i) for i in range(len(gpus))]
    # Slim containers have no tool. What the kernel knows (/proc/driver/nvidia, /sys/class/kfd) shows the whole machine
    # in a container of the CPU too; the files of devices are only there for those that were given to it.
    nvidia = [path for path in root.glob("dev/nvidia[0-9]*") if path.name.removeprefix("nvidia").isdecimal()]
    if nvidia:
        return CUDA, [str(i) for i in range(len(nvidia))]
    nodes = root.glob("sys/class/kfd/kfd/topology/nodes/*/properties") if (root / "dev/kfd").exists() else ()
    minors = [re.search(r"^drm_render_minor (\d+)$", node.read_text(), re.MULTILINE) for node in nodes]
    amd = [minor for minor in minors if minor and (root / f"dev/dri/renderD{minor[1]}").exists()]
    return HIP, [str(i) for i in range(len(amd))]


def _listed(value: str) -> list[str]:
    return [device.strip() for device in value.split(",") if device.strip() not in ("", "-1")]


def local_place(env: Mapping[str, str]) -> tuple[int, int | None] | None:
    """This process's rank among those that a launcher started on this machine, and their number if it is known."""
    for rank, size in _LOCAL:
        if env.get(rank, "").isdecimal():
            return int(env[rank]), _local_size(env.get(size, ""), env.get("SLURM_NODEID", "0"))
    return None


def _local_size(value: str, node: str) -> int | None:
    """`8`, or Slurm's `8(x2),4`: tasks of each node of the step."""
    sizes = [
        int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", value) for _ in range(int(times or 1))
    ]
    return sizes[int(node)] if node.isdecimal() and int(node) < len(sizes) else None


def own_gpus(env: Mapping[str, str]) -> list[str]:
    """Of the GPUs that this process sees, those that are its own beside the others of this machine.

    Each of n processes has an equal share of neighbours; where there are fewer GPUs, they share them, with a warning.
    """
    gpus, place = visible_gpus(env), local_place(env)
    bound = "SLURM_GPUS_PER_TASK" in env or (len(gpus) == 1 and any(name in env for name in (CUDA, HIP, ROCR)))
    if not gpus or place is None or bound:
        return gpus
    rank, size = place
    if size is None:
        return gpus if rank == 0 else [gpus[rank % len(gpus)]]
    if size > len(gpus):
        log.warning("%d processes of this machine share %d GPUs: start fewer, or more", size, len(gpus))
        return [gpus[rank % len(gpus)]]
    share = len(gpus) // size
    return gpus[rank * share : (rank + 1) * share]


def take_own_gpus(env: MutableMapping[str, str]) -> None:
    """Leave in `env` only this process's own GPUs visible, before anything has looked at them.

    Under torchrun, `srun --ntasks-per-node` or mpirun every process sees all of them, and would take the first.
    """
    mine = own_gpus(env)
    if mine != visible_gpus(env):
        env[gpu_variable(env)] = ",".join(mine)


def refuse_idle_gpus(env: Mapping[str, str], *, build: str, fix: str) -> None:
    """Raise MismatchError if this process sees GPUs; called where torch, of version `build`, can use none."""
    if gpus := visible_gpus(env):
        raise MismatchError(
            "this machine has GPUs that torch cannot use",
            got=f"{len(gpus)} visible, torch {build}",
            expected="a build of torch for these GPUs and their driver",
            fix=f"install it (a plain `pip install torch` may have chosen one for the CPU), or {fix}",
        )


def no_such_device(name: str, error: Exception, *, setting: str) -> MismatchError:
    """What to raise for a device that torch has answered with `error`."""
    expected, fix = "auto, cpu, cuda or cuda:N", f"correct {setting}"
    return MismatchError(f"there is no device {name}", got=first_line(error), expected=expected, fix=fix)


def usable_cores() -> int:
    """Cores that this process may run on, which a scheduler may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_no_compiler(setting: str, env: Mapping[str, str]) -> None:
    """Raise MismatchError if what `setting` asks torch to compile could not be: what it writes in C++ needs a compiler
    and Python's headers, on a GPU too."""
    names = (env.get("CXX"), "g++", "clang++", "c++")
    if not any(shutil.which(name, path=env.get("PATH")) for name in names if name):
        raise MismatchError(
            f"{setting} needs a C++ compiler",
            got="none of CXX, g++, clang++ and c++ is there",
            expected="one on the PATH",
            fix=f"install one, such as g++, or set {setting}: false",
        )
    named = [
        part for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH") for part in env.get(name, "").split(":")
    ]
    places = [sysconfig.get_path("include"), *filter(None, named)]
    if not any((Path(place) / "Python.h").is_file() for place in places):
        raise MismatchError(
            f"{setting} needs the header files of Python",
            got=f"no Python.h in {', '.join(places)}",
            expected="those of the Python that runs",
            fix=f"install them, on Debian and Ubuntu as python3-dev, or set {setting}: false",
        )
