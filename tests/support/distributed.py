"""Run functions on several gloo ranks, each in a process of its own, and bring back what they return."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class RanksFailed(AssertionError):
    """A rank failed or did not end in time; the message holds what the ranks printed."""


class Ranks:
    """Ranks that stay: each call runs on all of them, one after the other; after a failure the next starts anew."""

    def __init__(self, function: str, world_size: int, *, made: bool = True) -> None:
        """They meet at a file, so that no port can be taken by anyone else.

        Args:
            function: `module:name`, importable from the tests directory; called once on each rank, with (rank,
                world_size, rendezvous), it gives the function that takes the arguments.
            world_size: number of ranks.
            made: false if it takes the arguments itself, behind these three.
        """
        self.function, self.world_size, self.made = function, world_size, made
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._calls = 0

    def call(self, *, timeout: float = 240, **arguments: Any) -> list[Any]:
        """What each rank returns for picklable arguments.

        Raises:
            RanksFailed: one has failed, or they have not ended after so many seconds; all are killed.
        """
        if not self._ranks:
            self._start()
        self._calls += 1
        staged, request = self._folder / "staged", self._folder / f"request-{self._calls}"
        staged.write_bytes(pickle.dumps(arguments))
        staged.rename(request)
        results = [self._folder / f"result-{self._calls}-{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + timeout
        while not all(result.exists() for result in results):
            if time.monotonic() > deadline or any(rank.poll() is not None for rank in self._ranks):
                time.sleep(1)
                raise RanksFailed(self._told())
            time.sleep(0.02)
        return [pickle.loads(result.read_bytes()) for result in results]

    def close(self) -> None:
        """End them."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()
        if self._ranks:
            self._scratch.cleanup()
        self._ranks = []

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._folder, self._calls = Path(self._scratch.name), 0
        for rank in range(self.world_size):
            with (self._folder / f"log-{rank}").open("wb") as log:
                given = [self.function, str(rank), str(self.world_size), str(int(self.made))]
                argv = [sys.executable, "-m", "support.distributed", *given]
                self._ranks.append(
                    subprocess.Popen(argv, env=environment(), cwd=self._folder, stdout=log, stderr=subprocess.STDOUT)
                )

    def _told(self) -> str:
        """What the ranks have printed, once they are killed."""
        codes = [rank.poll() for rank in self._ranks]
        logs = [(self._folder / f"log-{rank}").read_text(errors="replace")[-6000:] for rank in range(self.world_size)]
        self.close()
        told = enumerate(zip(codes, logs, strict=True))
        output = "\n".join(f"--- rank {rank}, exit {code}\n{log}" for rank, (code, log) in told)
        return f"{self.function} on {self.world_size} ranks\n{output}"


def run_ranks(function: str, world_size: int, *, timeout: float = 240, **arguments: Any) -> list[Any]:
    """Call `function(rank, world_size, rendezvous, **arguments)` once on every rank; its results, by rank."""
    ranks = Ranks(function, world_size, made=False)
    try:
        return ranks.call(timeout=timeout, **arguments)
    finally:
        ranks.close()


def environment(**more: str) -> dict[str, str]:
    """What a rank's process runs under: the device of the tests, one thread, no network, modules of the tests."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def main(function: str, rank: int, world_size: int, made: bool) -> None:
    """One rank, in the folder that it shares with the others: serves requests until it is killed."""
    module, name = function.split(":")
    given = (rank, world_size, f"file://{Path.cwd()}/rendezvous")
    known = getattr(import_module(module), name)
    call = known(*given) if made else partial(known, *given)
    for number in count(1):
        request = Path(f"request-{number}")
        while not request.exists():
            if os.getppid() == 1:  # The test is gone.
                return
            time.sleep(0.02)
        result = call(**pickle.loads(request.read_bytes()))
        staged = Path(f"staged-{rank}")
        staged.write_bytes(pickle.dumps(result))
        staged.rename(f"result-{number}-{rank}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))
