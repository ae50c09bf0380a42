"""From a stage and its resources to command lines. Pure functions: what starts processes is `pipeline/processes.py`."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage_schemas.common.errors import MismatchError, UsageError

_MPIRUN = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
"""Number of a process and how many there are, by mpirun: Open MPI; MPICH and Intel MPI, and srun --mpi=pmi2 alike."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of how many workers this one is."""

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            got = f"rank {self.rank} of {self.world_size}"
            raise UsageError("impossible worker number", got=got, expected="0 <= rank < world size")


def dump_placement(env: Mapping[str, str], rank: int | None = None, world_size: int | None = None) -> Placement:
    """Which worker of stage one this process is: as said on the command line, else as its scheduler says.

    torchrun sets RANK and WORLD_SIZE; Slurm numbers array tasks and, within each, the tasks of a step, or mpirun what
    it starts there; a Kubernetes indexed job sets JOB_COMPLETION_INDEX, and its manifest must pass the number of
    completions along. The number only says where a worker starts: units left over by others are taken by whoever is
    free.

    Raises:
        UsageError: only one of rank and world size is known, or they are no possible pair.
        MismatchError: the environment's are no possible pair, or two schedulers name different ones.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            got = f"--rank {rank}, --world-size {world_size}"
            raise UsageError(
                "--rank needs --world-size, and --world-size needs --rank", got=got, expected="both, or neither"
            )
        return Placement(rank, world_size)
    by_name = dict(_placements(env))
    # torchrun numbers what it starts, in each task of a step or an array too.
    if "TORCHELASTIC_RUN_ID" not in env and len(set(by_name.values())) > 1:
        raise MismatchError(
            "two schedulers number this worker differently",
            got="; ".join(f"{place.rank} of {place.world_size} by {names}" for names, place in by_name.items()),
            expected="one number per worker",
            fix="pass --rank and --world-size, or unset the variables that were inherited",
        )
    return next(iter(by_name.values()), Placement(0, 1))


def _placements(env: Mapping[str, str]) -> Iterator[tuple[str, Placement]]:
    """(names of variables, placement by them) for every scheduler that has numbered this process."""
    if "RANK" in env:
        yield _told("RANK and WORLD_SIZE", _int(env, "RANK"), _int(env, "WORLD_SIZE"))
    # In a batch script, what mpirun starts inherits the script's own numbers.
    number, count = next((pair for pair in _MPIRUN if pair[0] in env), ("SLURM_PROCID", "SLURM_NTASKS"))
    if "SLURM_ARRAY_TASK_ID" in env or number in env:
        tasks = _int(env, "SLURM_ARRAY_TASK_COUNT", 1)
        step, first = max(1, _int(env, "SLURM_ARRAY_TASK_STEP", 1)), _int(env, "SLURM_ARRAY_TASK_MIN", 0)
        # An array may have gaps (`--array=3,7,40`); the modulus keeps the number possible.
        task = (_int(env, "SLURM_ARRAY_TASK_ID", first) - first) // step % tasks
        processes = _int(env, count, 1)
        names = [name for name in ("SLURM_ARRAY_TASK_ID", number) if name in env]
        yield _told(" and ".join(names), task * processes + _int(env, number, 0), tasks * processes)
    if "JOB_COMPLETION_INDEX" in env:
        count = "WORLD_SIZE" if "WORLD_SIZE" in env else "JOB_COMPLETIONS"
        yield _told(f"JOB_COMPLETION_INDEX and {count}", _int(env, "JOB_COMPLETION_INDEX"), _int(env, count))


def _told(names: str, rank: int, size: int) -> tuple[str, Placement]:
    if 0 <= rank < size:
        return names, Placement(rank, size)
    raise MismatchError(
        f"the environment names a worker that there cannot be: {names}",
        got=f"rank {rank} of {size}",
        expected="0 <= rank < world size",
        fix="correct these variables, or pass --rank and --world-size",
    )


def _int(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UsageError(
            f"the environment variable {name} does not say which worker this is",
            got=env.get(name, "not set"),
            expected="an integer",
            fix="set it, or pass the number on the command line",
        ) from None


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of one training."""

    count: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    """HOST:PORT on node 0 where all nodes meet; None on a single node."""


def training_nodes(
    env: Mapping[str, str], nnodes: int | None = None, node_rank: int | None = None, endpoint: str | None = None
) -> Nodes:
    """The nodes of stage two: as said on the command line, else as Slurm says when one task runs per node.

    Raises:
        UsageError: several nodes without a common endpoint, or an impossible node number.
    """
    if nnodes is None:
        # Within srun. In a batch script outside of it, SLURM_NNODES counts nodes that this process does not start on.
        nnodes = _int(env, "SLURM_STEP_NUM_NODES", 1)
        if nnodes > 1 and _int(env, "SLURM_STEP_NUM_TASKS", nnodes) != nnodes:
            got = f"{env['SLURM_STEP_NUM_TASKS']} tasks on {nnodes} nodes"
            fix = "srun --ntasks-per-node=1; the command starts one process per GPU itself"
            raise UsageError("`llm-neo train` runs once per node", got=got, expected="one task per node", fix=fix)
    if nnodes == 1:
        return Nodes()
    if node_rank is None and "SLURM_NODEID" not in env:
        fix = "--node-rank N, from 0 on, another one on each node"
        raise UsageError("--nnodes needs --node-rank where Slurm does not number the nodes", got="none", fix=fix)
    if node_rank is None:
        node_rank = _int(env, "SLURM_NODEID")
    if not 0 <= node_rank < nnodes:
        raise UsageError("impossible node number", got=f"node {node_rank} of {nnodes}", expected="0 <= rank < nodes")
    if endpoint is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if not nodes:
            fix = "--rdzv-endpoint HOST:PORT, the same on all nodes, where HOST is node 0"
            raise UsageError("multi-node training without a rendezvous endpoint", got="no endpoint", fix=fix)
        # Below the range from which the kernel takes ports, and another one for every job on a shared node.
        endpoint = f"{first_host(nodes)}:{12000 + _int(env, 'SLURM_JOB_ID', 0) % 16000}"
    return Nodes(nnodes, node_rank, endpoint)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[007-010,12],cpu1` is gpu007."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodelist)


def rank_argv(module: str, arguments: Sequence[str], *, rendezvous: str) -> list[str]:
    """The command line of one rank; -P because the working directory may hold a `pipeline.py` of the user's own."""
    return [sys.executable, "-P", "-m", module, *arguments, "--rendezvous", rendezvous]


def rank_environment(env: Mapping[str, str], local: int, *, nproc: int, nodes: Nodes) -> dict[str, str]:
    """Variables of one rank, under the names of torchrun's.

    Ranks of one node meet at a file, and listen on the loopback interface alone. Those of several nodes meet at a
    TCPStore of rank 0, which listens on all of its interfaces; what is in there is never unpickled.

    Args:
        local: number of the rank on this node.
        nproc: ranks on this node, one per GPU.
    """
    rank, size = nodes.node_rank * nproc + local, nodes.count * nproc
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": nproc}
    variables = {name: str(value) for name, value in found.items()} | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if nodes.count > 1:
        host, _, port = str(nodes.endpoint).rpartition(":")
        return variables | {"MASTER_ADDR": host.strip("[]"), "MASTER_PORT": port}
    loopback = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if sys.platform == "linux" else ()
    return variables | {name: "lo" for name in loopback if name not in env}


def dump_argv(
    config: Path, overrides: Sequence[str], placement: Placement, *, result: Path, events: Path | None = None
) -> list[str]:
    """The command line of one worker of stage one, which leaves its summary in `result`."""
    where = ["--rank", str(placement.rank), "--world-size", str(placement.world_size)]
    where += ["--events", str(events)] if events else []
    where += ["--workers", "1", "--result", str(result), *set_arguments(overrides)]
    return [sys.executable, "-P", "-m", "pipeline.entry", "dump", str(config), *where]


def set_arguments(overrides: Sequence[str]) -> list[str]:
    """`a=b` as `--set a=b`, for each."""
    return [word for override in overrides for word in ("--set", override)]


def thread_environment(env: Mapping[str, str], processes: int, cores: int) -> dict[str, str]:
    """Variables that share the cores among processes, unless the user has set the number of threads."""
    return {} if "OMP_NUM_THREADS" in env else {"OMP_NUM_THREADS": str(max(1, cores // processes))}


def device_environment(variable: str, devices: Sequence[str], worker: int, workers: int) -> dict[str, str]:
    """The variable that says which GPUs a process sees, set to this worker's: an equal share of neighbours, or one that
    it has together with others. Nothing to say where there are none."""
    if not devices:
        return {}
    share = len(devices) // workers
    mine = devices[worker * share :][:share] or [devices[worker % len(devices)]]
    return {variable: ",".join(mine)}
