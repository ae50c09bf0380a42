"""Starts what runs as processes of its own: stage one's local workers, and torchrun for stage two.

torchrun turns every exit code of a worker into 1, so stage two's workers leave their codes in `exit/` of the run
directory, see `student_train.worker`, and the launcher returns what they say.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config import Config, need
from pipeline.launch import (
    Nodes,
    Placement,
    device_environment,
    dump_argv,
    set_arguments,
    thread_environment,
    torchrun_argv,
)
from storage_schemas.address import local_path
from storage_schemas.errors import Exit
from student_train.directory import LAUNCHER, held, refuse_foreign
from student_train.worker import EXIT_FOLDER, STOP, read_codes

SEVEREST_FIRST = (Exit.BUG, Exit.USAGE, Exit.MISMATCH, Exit.BAD_DATA, Exit.NOTHING_TO_RESUME, Exit.TEMPORARY)
"""Which code a group of processes returns: a stop that others made is no news beside the reason for it."""
STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of a process that was stopped before it could answer signals by itself."""
SUMMARY = "summary.json"
"""What the leader of a group of processes leaves for the one that started them."""
LAUNCH = "LLM_NEO_LAUNCH"
"""Environment variable that marks all processes of one launch."""
_PR_SET_PDEATHSIG = 1
_KILL_SECONDS = 10.0


def combined(codes: Sequence[int]) -> int:
    """One exit code for a group of processes; what is not one of ours is a bug."""
    told = [int(Exit.TEMPORARY) if code in STOPPED else code for code in codes]
    known = [code if code in tuple(Exit) else int(Exit.BUG) for code in told]
    return next((int(code) for code in SEVEREST_FIRST if code in known), 0)


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """Ids of the CUDA devices that this process may use, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [device for device in env["CUDA_VISIBLE_DEVICES"].split(",") if device.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def dump_workers(
    config: Path, overrides: Sequence[str], workers: int, *, node: Placement, events: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Run several workers of stage one on this machine.

    Args:
        config: the configuration file.
        overrides: of the command line.
        workers: how many.
        node: which of how many such groups this one is.
        events: file that all append their events to.

    Returns:
        The exit code of all together, and, if it is 0, the sum of their summaries.
    """
    env, gpus = dict(os.environ), visible_gpus(os.environ)
    started: list[subprocess.Popen[str]] = []

    def forward(number: int, _: int) -> None:
        for process in started:
            process.send_signal(number)

    with ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(workers)]
        # One worker shows the progress of all, since it counts the units that anyone has committed.
        errors = [None, *(files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(workers - 1))]
        with forwarded_signals(forward):
            for local in range(workers):
                placement = Placement(node.rank * workers + local, node.world_size * workers)
                threads = thread_environment(env, workers, os.cpu_count() or 1)
                started.append(
                    subprocess.Popen(
                        dump_argv(config, overrides, placement, events=events),
                        env=env | threads | device_environment(gpus, local),
                        stdout=outputs[local],
                        stderr=errors[local],
                        text=True,
                        start_new_session=True,
                        preexec_fn=end_with_parent,
                    )
                )
            for process in started:
                process.wait()
        code = combined([process.returncode for process in started])
        for process, error in zip(started, errors, strict=True):
            if process.returncode and error is not None:
                error.seek(0)
                sys.stderr.write(error.read())
        if code:
            return code, {}
        for output in outputs:
            output.seek(0)
        return code, _sum([parse_output(output.read()) for output in outputs])


def dump_group(
    config: Path,
    overrides: Sequence[str],
    nproc: int,
    *,
    node: Placement,
    events: Path | None = None,
    stdout: int | None = None,
) -> tuple[int, dict[str, Any]]:
    """Run one worker of stage one whose teacher is spread over several processes of this machine, under torchrun.

    Args:
        config: the configuration file.
        overrides: of the command line.
        nproc: how many processes.
        node: which of how many workers they are together.
        events: file that one JSON object per event is appended to.
        stdout: file descriptor for what they print; standard output by default.

    Returns:
        Their exit code, and, if it is 0, the worker's summary.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / EXIT_FOLDER
        folder.mkdir()
        worker = ["pipeline.dump_group", str(config), "--folder", scratch, *set_arguments(overrides)]
        worker += ["--rank", str(node.rank), "--world-size", str(node.world_size)]
        worker += ["--events", str(events)] if events else []
        returned = run_torchrun(
            torchrun_argv(worker, nproc=nproc, nodes=Nodes()),
            thread_environment(os.environ, nproc, os.cpu_count() or 1),
            stop=(folder / STOP).touch,
            stdout=stdout,
        )
        codes = list(read_codes(Path(scratch)).values())
        if returned or any(codes):
            return combined(codes) or int(Exit.TEMPORARY if codes else Exit.BUG), {}
        return int(Exit.DONE), json.loads((Path(scratch) / SUMMARY).read_text())


def parse_output(text: str) -> dict[str, Any]:
    """The JSON object at the end of a command's standard output; libraries may have printed before it."""
    found: dict[str, Any] = json.loads(text[text.rfind("\n{\n") + 1 :])
    return found


def _sum(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the workers did, as one: they ran at the same time."""
    total = dict(summaries[0])
    for name in ("units_done_here", "tokens_here"):
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
    named = [path for text in _texts(config.model_dump(mode="json")) if (path := local_path(text)) is not None]
    refuse_foreign(output, dump=local_path(config.dump.url), named=named)
    with held(output, LAUNCHER):
        yield


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def train_workers(config: Config, *, nproc: int, nodes: Nodes, stdout: int | None = None) -> int:
    """Run stage two on this node under torchrun.

    Args:
        config: with `student` and `train`.
        nproc: ranks on this node.
        nodes: all nodes.
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
    sections: dict[str, Any] = {"dump": config.dump, "student": student, "loss": config.loss, "train": train}
    with tempfile.TemporaryDirectory() as scratch:
        resolved = Path(scratch) / "resolved.json"
        resolved.write_text(json.dumps({name: section.model_dump(mode="json") for name, section in sections.items()}))
        returned = run_torchrun(
            torchrun_argv(["student_train.worker", "--config", str(resolved)], nproc=nproc, nodes=nodes),
            thread_environment(os.environ, nproc, os.cpu_count() or 1),
            stop=(folder / STOP).touch,
            stdout=stdout,
        )
    codes = [code for rank, code in read_codes(train.output).items() if rank in mine]
    if not returned and not any(codes):
        return int(Exit.DONE)
    # A worker that was killed leaves no code; the others then say that they have lost it. No code at all: not even
    # the imports worked, and running again would not help.
    return combined(codes) or int(Exit.TEMPORARY if codes else Exit.BUG)


def run_torchrun(
    argv: Sequence[str], env: Mapping[str, str], *, stop: Callable[[], None], stdout: int | None = None
) -> int:
    """Run torchrun to its end and leave nothing of it behind.

    Args:
        argv: its command line.
        env: variables to set.
        stop: asks the workers for a checkpoint and an end. torchrun itself would kill them half a minute after a
            signal, so it gets the second one only.
        stdout: file descriptor for its standard output, if not ours.

    Returns:
        Its exit code.
    """
    launch = uuid.uuid4().hex
    process: subprocess.Popen[bytes] | None = None

    def forward(_: int, count: int) -> None:
        if count == 1:
            stop()
        elif process is not None:
            process.terminate()

    try:
        with forwarded_signals(forward):
            process = subprocess.Popen(
                argv,
                env={**os.environ, **env, "TORCH_CPP_LOG_LEVEL": "ERROR", LAUNCH: launch},
                stdout=stdout,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            return process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        end_launch(launch)


@contextmanager
def forwarded_signals(send: Callable[[int, int], object]) -> Iterator[None]:
    """Pass SIGTERM, SIGINT and SIGUSR1 on to processes that were started, instead of ending.

    Args:
        send: called with the signal and how many there were. SIGUSR1 becomes SIGTERM: schedulers warn with whatever
            signal they were told to, and the workers know one way to stop.
    """
    count = 0

    def forward(number: int, _: object) -> None:
        nonlocal count
        count += 1
        send(signal.SIGTERM if number == signal.SIGUSR1 else number, count)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Called in a new process: SIGTERM as soon as the one that started it is gone, be it by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_launch(launch: str) -> None:
    """Kill what is left of a launch: torchrun's workers have sessions of their own and outlive it if it is killed."""
    marker = f"{LAUNCH}={launch}".encode()
    deadline = time.monotonic() + _KILL_SECONDS
    left = True
    while left and time.monotonic() < deadline:
        left = False
        for folder in Path("/proc").glob("[0-9]*"):
            # What is gone by now, or somebody else's, cannot be read; what is dead has no environment.
            with suppress(OSError):
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    left = True
                    os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.05 if left else 0)
