"""Run a function on several gloo ranks, each in a process of its own, and bring back what it returns."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class RanksFailed(AssertionError):
    """A rank failed or did not end in time; the message holds what the ranks printed."""


def run_ranks(function: str, world_size: int, *, timeout: float = 240, **arguments: Any) -> list[Any]:
    """Call `function(rank, world_size, rendezvous, **arguments)` on every rank; its results, by rank.

    The ranks meet at a file, so that no port can be taken by anyone else.

    Args:
        function: `module:name`, importable from the tests directory.
        world_size: number of ranks.
        timeout: seconds until all are killed.
        **arguments: picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        (job / "call.pickle").write_bytes(pickle.dumps((function, world_size, arguments)))
        logs = [(job / f"log-{rank}").open("wb") for rank in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "support.distributed", folder, str(rank)],
                env=environment(),
                cwd=folder,
                stdout=logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in ranks):
                if time.monotonic() > deadline or any(rank.poll() not in (None, 0) for rank in ranks):
                    break
                time.sleep(0.05)
            if any(rank.poll() != 0 for rank in ranks):
                time.sleep(1)
                codes = [rank.poll() for rank in ranks]
                output = "\n".join(
                    f"--- rank {rank}, exit {codes[rank]}\n{(job / f'log-{rank}').read_text(errors='replace')[-6000:]}"
                    for rank in range(world_size)
                )
                raise RanksFailed(f"{function} on {world_size} ranks\n{output}")
            return [pickle.loads((job / f"result-{rank}").read_bytes()) for rank in range(world_size)]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            for log in logs:
                log.close()


def environment(**more: str) -> dict[str, str]:
    """What a rank's process runs under: the CPU, one thread, no network, modules of the tests."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def main(folder: str, rank: int) -> None:
    """One rank."""
    job = Path(folder)
    function, world_size, arguments = pickle.loads((job / "call.pickle").read_bytes())
    module, name = function.split(":")
    call = getattr(import_module(module), name)
    result = call(rank, world_size, f"file://{job}/rendezvous", **arguments)
    (job / f"result-{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
