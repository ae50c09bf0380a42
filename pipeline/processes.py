"""Starts what runs as processes of its own: stage one's local workers, and the ranks of stage two or of one teacher.

Ranks are started here and not by torchrun, whose rendezvous on one node keeps pickled state in a store that listens on
all interfaces, and which turns every exit code into 1.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config import Config, need
from pipeline.launch import (
    Nodes,
    Placement,
    device_environment,
    dump_argv,
    rank_argv,
    rank_environment,
    thread_environment,
)
from storage_schemas.common.devices import gpu_variable, usable_cores, visible_gpus
from storage_schemas.common.errors import MismatchError, TemporaryError
from storage_schemas.common.exits import KILLED, STOPPED, Exit, combined, known, tell_deaths
from storage_schemas.common.publish import publish
from storage_schemas.common.ranks import EXIT_FOLDER, STOP, ExitCodes, read_codes
from storage_schemas.common.signals import forwarded
from storage_schemas.stores.address import local_path
from student_train.run_directory import LAUNCHER, held, refuse_foreign

PATIENCE_SECONDS = 45.0
"""How long ranks may go on once one has failed. They notice sooner, see `storage_schemas/common/ranks.py`."""
OWN_NAME_SECONDS, HOST_SECONDS = 10.0, 600.0
"""How long the name of the first node may stay unknown: to that node itself, and to others, where a cluster enters it
into its DNS only once the node is up."""
SAME_SECONDS = 1.0
"""Within which signals are one: Slurm tells every process of a job, and `make` passes on what it was told."""
TELL_SECONDS = 3.0
"""After which a wait is told."""
_PROGRESS = re.compile(r"\d\d:\d\d:\d\d dump: ")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """Variables to set."""
    stdout: int | IO[str] | None = None
    stderr: int | IO[str] | None = None


def dump_workers(
    config: Path, overrides: Sequence[str], workers: int, *, node: Placement, events: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Run several workers of stage one on this machine.

    Args:
        node: which of how many such groups this one is.
        events: file that all append their events to.

    Returns:
        The exit code of all together, and, if it is 0, the sum of their summaries.
    """
    gpus = visible_gpus(os.environ)
    threads = thread_environment(os.environ, workers, usable_cores())
    with ExitStack() as files:
        scratch = Path(files.enter_context(tempfile.TemporaryDirectory()))
        results = [scratch / f"worker-{local}.json" for local in range(workers)]
        # One worker shows the progress of all, since it counts the units that anyone has committed.
        errors: list[IO[str] | None] = [None]
        for _ in range(workers - 1):
            errors.append(files.enter_context(tempfile.TemporaryFile("w+", errors="replace")))
        commands = []
        for local in range(workers):
            placement = Placement(node.rank * workers + local, node.world_size * workers)
            argv = dump_argv(config, overrides, placement, result=results[local], events=events)
            env = device_environment(gpu_variable(os.environ), gpus, local, workers)
            commands.append(Command(argv, threads | env, subprocess.DEVNULL, errors[local]))
        told: set[str] = set()

        def ended(local: int, code: int) -> None:
            """Said at once, with what it has written but for its progress: its GPU is idle from now on."""
            with suppress(OSError, ValueError):  # The others go on, whether anybody hears it or not.
                if (error := errors[local]) is not None:
                    error.seek(0)
                    lines = "".join(line for line in error if not _PROGRESS.match(line))
                    sys.stderr.write("" if lines in told else lines)
                    told.add(lines)
                if code > 0:
                    sys.stderr.write(f"llm-neo: worker {local} has ended with {code}\n")
                elif -code not in STOPPED:
                    tell_deaths([code], [f"worker {local}"])

        codes = run_together(commands, ended=ended)
        if all(-code in STOPPED for code in codes):
            tell_deaths(codes, [f"worker {local}" for local in range(workers)])
        # A worker that ends well leaves a sealed dump: then one that was killed or stopped is not missed.
        if 0 in codes and all(code in (Exit.DONE, Exit.TEMPORARY) or -code in KILLED for code in codes):
            if any(codes):
                sys.stderr.write("llm-neo: the others have done its work; the dump is complete\n")
        elif code := combined(codes):
            return code, {}
        return 0, _sum([json.loads(file.read_text()) for file, code in zip(results, codes, strict=True) if not code])


def dump_group(
    config: Path,
    overrides: Sequence[str],
    nproc: int,
    *,
    node: Placement,
    events: Path | None = None,
    pilot: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Run one worker of stage one, or a plan's pilot, whose teacher is spread over several processes of this machine.

    What they print goes to standard error.

    Args:
        node: which of how many workers they are together.
        events: file that one JSON object per event is appended to.
        pilot: of `pipeline.commands.run_plan`, instead of a dump.

    Returns:
        Their exit code, and, if it is 0, the worker's summary or the plan.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "summary.json"
        job = {"config": str(config), "overrides": [*overrides], "rank": node.rank, "world_size": node.world_size}
        job |= {"events": events and str(events), "pilot": pilot, "result": str(result)}
        arguments, told = ["--job", json.dumps(job)], sys.stderr.fileno()
        code = run_ranks("pipeline.dump_group", arguments, nproc=nproc, nodes=Nodes(), stdout=told)
        return code, {} if code else json.loads(result.read_text())


def _sum(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the workers did, as one: they ran at the same time."""
    total = dict(summaries[0])
    for name in ("units_done_here", "units_lost_here", "tokens_here"):
        total[name] = sum(summary[name] for summary in summaries)
    total["seconds"] = max(summary["seconds"] for summary in summaries)
    total["tokens_per_second"] = total["tokens_here"] / total["seconds"] if total["tokens_here"] else None
    if "heldout" in total:
        total["heldout"] = _sum([summary["heldout"] for summary in summaries])
    return total


@contextmanager
def run_directory(config: Config, nodes: Nodes, *, command: str = "train") -> Iterator[None]:
    """Hold `train.output` on the first node: before anything is written there, until all is.

    Raises:
        TemporaryError: another training holds it.
        MismatchError: it is something else than a run directory.
    """
    output = need(config.train, "train", command).output
    if nodes.node_rank:
        yield
        return
    refuse_output(config, output)
    with held(output, LAUNCHER):
        yield


def refuse_output(config: Config, output: Path) -> None:
    """Raise MismatchError if a run directory holds what is not a run's, or cannot be one."""
    named = [path for text in _texts(config.model_dump(mode="json")) if (path := local_path(text)) is not None]
    refuse_foreign(output, dump=local_path(config.dump.url), named=named)


def stated(config: Config) -> dict[str, Any]:
    """What the configuration says of the estimator and the temperatures; training has both from the dump."""
    found: dict[str, Any] = {}
    if "estimator" in config.model_fields_set:
        estimator = config.estimator
        found = {f"estimator.{name}": getattr(estimator, name) for name in sorted(estimator.model_fields_set)}
    return found | ({"temperatures": config.temperatures} if "temperatures" in config.model_fields_set else {})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def train_workers(config: Config, *, nproc: int, nodes: Nodes, stdout: int | None = None) -> int:
    """Run the ranks of stage two on this node.

    Args:
        config: with `student` and `train`.
        stdout: file descriptor for the progress of the workers; standard output by default.

    The caller holds the `run_directory`.

    Returns:
        The exit code that the workers agreed on.
    """
    train = need(config.train, "train", "train")
    student = need(config.student, "student", "train")
    folder = train.output / EXIT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(nodes.node_rank * nproc, (nodes.node_rank + 1) * nproc)
    # What the last start left there would end this one. The first node clears for all, since a node may come late.
    all_left = [*folder.glob("rank-*"), *folder.glob(".rank-*"), folder / STOP]
    for file in all_left if nodes.node_rank == 0 else [folder / f"rank-{rank}" for rank in mine]:
        file.unlink(missing_ok=True)
    refuse_unknown_host(nodes, train.output)
    sections: dict[str, Any] = {"dump": config.dump, "student": student, "loss": config.loss, "train": train}
    if config.heldout is not None and train.eval_steps:
        sections["heldout"] = config.dump.model_copy(update={"url": config.heldout.url})
    given = {name: section.model_dump(mode="json") for name, section in sections.items()} | {"stated": stated(config)}
    with tempfile.TemporaryDirectory() as scratch:
        resolved = Path(scratch) / "resolved.json"
        publish(resolved, json.dumps(given), private=True)
        arguments = ["--config", str(resolved)]
        return run_ranks("student_train.worker", arguments, nproc=nproc, nodes=nodes, stdout=stdout)


def refuse_unknown_host(nodes: Nodes, output: Path) -> None:
    """Return once the name of the first node resolves, and say so if it takes long: no rank can meet there before.

    Args:
        output: the run directory, where the first node leaves its exit code.

    Raises:
        MismatchError: the first node does not know its own name.
        TemporaryError: this one does not know it after `HOST_SECONDS`: perhaps the first node has not come up.
        NeoError: the first node has left meanwhile; with its exit code.
    """
    if nodes.count == 1:
        return
    host, first = str(nodes.endpoint).rpartition(":")[0].strip("[]"), nodes.node_rank == 0
    patience, began, told = OWN_NAME_SECONDS if first else HOST_SECONDS, time.monotonic(), False
    codes = ExitCodes(output, nodes.node_rank, nodes.count)
    last_start = _stamp(output)
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            waited, got = time.monotonic() - began, f"{host}: {error.strerror or error}"
        if not first and _stamp(output) != last_start and (code := read_codes(output).get(0)):
            left = TemporaryError("the first node has stopped; its message says why", got=f"exit code {code}")
            left.exit_code = known(code)
            raise left
        if waited > patience:
            expected = "a name or address of the first node that every node knows"
            fix = "add it to DNS or /etc/hosts, or pass --rdzv-endpoint HOST:PORT, the same on all nodes"
            if first:
                codes.write(Exit.MISMATCH)
            kind = MismatchError if first else TemporaryError
            raise kind("the name of the first node does not resolve", got=got, expected=expected, fix=fix)
        if not told and waited > TELL_SECONDS:
            sys.stderr.write(f"llm-neo: waiting for the name of the first node to resolve, {patience:.0f} s: {got}\n")
            told = True
        time.sleep(0.5)


def _stamp(output: Path) -> tuple[int, int] | None:
    """Tells the file in which the first node leaves its exit code from another one of this name."""
    try:
        found = (output / EXIT_FOLDER / "rank-0").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def run_ranks(module: str, arguments: Sequence[str], *, nproc: int, nodes: Nodes, stdout: int | None = None) -> int:
    """Run the ranks of one job on this node; the exit code that they leave together.

    Args:
        nproc: how many there are on this node.
        stdout: file descriptor for their standard output, if not ours.
    """
    threads = thread_environment(os.environ, nproc, usable_cores())
    with tempfile.TemporaryDirectory() as meeting:
        argv = rank_argv(module, arguments, rendezvous=f"file://{meeting}/ranks" if nodes.count == 1 else "env://")
        environments = [rank_environment(os.environ, local, nproc=nproc, nodes=nodes) for local in range(nproc)]
        codes = run_together([Command(argv, threads | env, stdout) for env in environments], patience=PATIENCE_SECONDS)
    tell_deaths(codes, [f"rank {env['RANK']}" for env in environments])
    return combined(codes)


def run_together(
    commands: Sequence[Command],
    *,
    patience: float | None = None,
    ended: Callable[[int, int], object] = lambda number, code: None,
) -> list[int]:
    """Run processes to their end and leave none of them behind. A signal to this one is passed on as SIGTERM.

    Args:
        ended: called with number and code of each that has failed, at once.
        patience: for ranks, which need each other: seconds for the others to end once one has failed. A second signal,
            later than `SAME_SECONDS`, then kills them. None: they are independent.

    Returns:
        Their exit codes; negative for a signal that ended one, 75 for one that was killed here.
    """
    started: list[subprocess.Popen[str]] = []
    killed: set[int] = set()
    asked: float | None = None

    def kill() -> None:
        for number, process in enumerate(started):
            if process.poll() is None:
                killed.add(number)
                process.kill()

    def forward() -> None:
        nonlocal asked
        now = time.monotonic()
        asked = now if asked is None else asked
        if now - asked > SAME_SECONDS and patience is not None:
            kill()
        for process in started:
            process.terminate()

    deadline: float | None = None
    try:
        with forwarded(forward):
            for command in commands:
                process = subprocess.Popen(
                    command.argv,
                    env=os.environ | command.env,
                    stdout=command.stdout,
                    stderr=command.stderr,
                    text=True,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
                started.append(process)
                if asked is not None:
                    process.terminate()
            failed: set[int] = set()
            while True:
                left = [process.poll() for process in started]
                for number, code in enumerate(left):
                    if code and number not in failed:
                        failed.add(number)
                        ended(number, code)
                if None not in left:
                    break
                if patience is not None and deadline is None and any(left):
                    deadline = time.monotonic() + patience
                if deadline is not None and time.monotonic() > deadline:
                    kill()
                time.sleep(0.05)
    finally:
        kill()
        for process in started:
            process.wait()
    codes = [process.returncode for process in started]
    return [int(Exit.TEMPORARY) if number in killed else code for number, code in enumerate(codes)]


def end_with_parent() -> None:
    """Called in a new process: SIGTERM as soon as the one that started it is gone, be it by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
