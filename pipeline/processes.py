"""Starts what runs as processes of its own: stage one's local workers, and torchrun for stage two.

torchrun turns every exit code of a worker into 1, so stage two's workers leave their codes in `exit/` of the run
directory, see `student_train.worker`, and the launcher returns what they say.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Config, need
from pipeline.launch import Nodes, Placement, device_environment, dump_argv, thread_environment, torchrun_argv
from storage_schemas.errors import Exit

SEVEREST_FIRST = (Exit.BUG, Exit.USAGE, Exit.MISMATCH, Exit.BAD_DATA, Exit.NOTHING_TO_RESUME, Exit.TEMPORARY)
"""Which code a group of processes returns: a stop that others made is no news beside the reason for it."""


def combined(codes: Sequence[int]) -> int:
    """One exit code for a group of processes; what is not one of ours is a bug."""
    known = [code if code in tuple(Exit) else int(Exit.BUG) for code in codes]
    return next((int(code) for code in SEVEREST_FIRST if code in known), 0)


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """Ids of the CUDA devices that this process may use, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [device for device in env["CUDA_VISIBLE_DEVICES"].split(",") if device.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def dump_workers(config: Path, overrides: Sequence[str], workers: int) -> tuple[int, dict[str, Any]]:
    """Run `workers` workers of stage one on this machine; the exit code and the summary of all together."""
    env, gpus = dict(os.environ), visible_gpus(os.environ)
    with ExitStack() as files:
        started = []
        for rank in range(workers):
            # One worker shows the progress of all, since it counts the units that anyone has committed.
            quiet = None if rank == 0 else files.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                dump_argv(config, overrides, Placement(rank, workers)),
                env=env | thread_environment(env, workers, os.cpu_count() or 1) | device_environment(gpus, rank),
                stdout=(summary := files.enter_context(tempfile.TemporaryFile("w+"))),
                stderr=quiet,
            )
            started.append((process, summary, quiet))
        with forwarded_signals(lambda number: [process.send_signal(number) for process, _, _ in started]):
            for process, _, _ in started:
                process.wait()
        summaries = []
        for process, summary, quiet in started:
            summary.seek(0)
            if process.returncode == 0:
                summaries.append(json.load(summary))
            elif quiet is not None:
                quiet.seek(0)
                sys.stderr.write(quiet.read())
    code = combined([process.returncode for process, _, _ in started])
    return code, {} if code else _sum(summaries)


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


def train_workers(config: Config, *, nproc: int, nodes: Nodes) -> int:
    """Run stage two on this node under torchrun; the exit code that its workers agreed on."""
    train = need(config.train, "train", "train")
    student = need(config.student, "student", "train")
    folder = train.output / "exit"
    folder.mkdir(parents=True, exist_ok=True)
    mine = [folder / f"rank-{nodes.node_rank * nproc + local}" for local in range(nproc)]
    # What the last start left there would end this one. The first node clears for all, since a node may come late.
    for file in folder.iterdir() if nodes.node_rank == 0 else mine:
        file.unlink(missing_ok=True)
    sections: dict[str, Any] = {"dump": config.dump, "student": student, "loss": config.loss, "train": train}
    with tempfile.TemporaryDirectory() as scratch:
        resolved = Path(scratch) / "resolved.json"
        resolved.write_text(json.dumps({name: section.model_dump(mode="json") for name, section in sections.items()}))
        env = dict(os.environ)
        argv = torchrun_argv(["student_train.worker", "--config", str(resolved)], nproc=nproc, nodes=nodes)
        process = subprocess.Popen(
            argv,
            env=env | thread_environment(env, nproc, os.cpu_count() or 1) | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            start_new_session=True,
        )
        try:
            # torchrun would kill its workers half a minute after a signal; the file leaves them time for a checkpoint.
            with forwarded_signals(lambda _: (folder / "stop").touch()):
                returned = process.wait()
        finally:
            _end_group(process.pid)
    codes = [int(file.read_text()) for file in mine if file.is_file()]
    if not returned and not any(codes):
        return int(Exit.DONE)
    # A worker that was killed leaves no code; torchrun then ended the others.
    return combined(codes) or int(Exit.TEMPORARY if len(codes) < nproc else Exit.BUG)


@contextmanager
def forwarded_signals(send: Callable[[int], object]) -> Iterator[None]:
    """Pass SIGTERM, SIGINT and SIGUSR1 on to the processes that were started, and wait for them."""

    def forward(number: int, _: object) -> None:
        # Schedulers warn with whatever signal they were told to; the workers know one way to stop.
        send(signal.SIGTERM if number == signal.SIGUSR1 else number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(group: int) -> None:
    """Kill what is left of a session whose leader has ended."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
