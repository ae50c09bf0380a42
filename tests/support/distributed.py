"""Run functions on several gloo ranks, each in a process of its own, and bring back what they return.

The processes are forked from one that has imported torch and both stages, so that a rank costs milliseconds. A GPU does
not survive a fork: there each process imports anew.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from storage_schemas.common.ranks import end

TESTS = Path(__file__).parents[1]
_IMPORTED = ["student_train.train", "teacher_dump.teachers.group", "transformers.models.llama.modeling_llama"]
"""What forked processes need not import."""


class RanksFailed(AssertionError):
    """A rank failed or did not end in time; the message holds what the ranks printed."""


class Ranks:
    """Ranks that stay: each call runs on all of them, one after the other; after a failure the next starts anew."""

    def __init__(self, function: str, world_size: int, *, made: bool = True, anew: bool = False) -> None:
        """They meet at a file, so that no port can be taken by anyone else.

        Args:
            function: `module:name`, importable from the tests directory; called once on each rank, with (rank,
                world_size, rendezvous), it gives the function that takes the arguments.
            world_size: number of ranks.
            made: false if it takes the arguments itself, behind these three.
            anew: see `start`.
        """
        self.function, self.world_size, self.made, self.anew = function, world_size, made, anew
        self._ranks: list[Any] = []
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
            if time.monotonic() > deadline or not all(rank.is_alive() for rank in self._ranks):
                time.sleep(1)
                raise RanksFailed(self._told())
            time.sleep(0.02)
        return [pickle.loads(result.read_bytes()) for result in results]

    def close(self) -> None:
        """End them."""
        for rank in self._ranks:
            rank.kill()
            rank.join()
        if self._ranks:
            self._scratch.cleanup()
        self._ranks = []

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._folder, self._calls = Path(self._scratch.name), 0
        for rank in range(self.world_size):
            given = (self._folder, self.function, rank, self.world_size, self.made)
            self._ranks.append(start(_serve, *given, log=self._folder / f"log-{rank}", anew=self.anew))

    def _told(self) -> str:
        """What the ranks have printed, once they are killed."""
        codes = [rank.exitcode for rank in self._ranks]
        logs = [(self._folder / f"log-{rank}").read_text(errors="replace")[-6000:] for rank in range(self.world_size)]
        self.close()
        told = enumerate(zip(codes, logs, strict=True))
        output = "\n".join(f"--- rank {rank}, exit {code}\n{log}" for rank, (code, log) in told)
        return f"{self.function} on {self.world_size} ranks\n{output}"


def run_ranks(
    function: str, world_size: int, *, timeout: float = 240, anew: bool = False, **arguments: Any
) -> list[Any]:
    """Call `function(rank, world_size, rendezvous, **arguments)` once on every rank; its results, by rank."""
    ranks = Ranks(function, world_size, made=False, anew=anew)
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


def start(
    call: Callable[..., int | None], *given: Any, log: Path, env: Mapping[str, str] | None = None, anew: bool = False
) -> Any:
    """A process that leaves with the exit code that a function gives.

    Args:
        call: of a module that it can import.
        given: what the function is given.
        log: file for all that is printed.
        env: its environment; `environment()` if not given.
        anew: not forked, for variables that are read when a process begins, or when it imports a library.
    """
    forked = not anew and os.environ["DS_ACCELERATOR"] == "cpu"
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    context.set_forkserver_preload(_IMPORTED)
    log.touch()
    process = context.Process(target=_run, args=(call, given, log, env or environment()), daemon=True)
    process.start()
    return process


def _run(call: Callable[..., int | None], given: tuple[Any, ...], log: Path, env: Mapping[str, str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ |= env
    end(call(*given) or 0)


def _serve(folder: Path, function: str, rank: int, world_size: int, made: bool) -> None:
    """One rank, in the folder that it shares with the others: serves requests until it is killed."""
    os.chdir(folder)
    module, name = function.split(":")
    given = (rank, world_size, f"file://{folder}/rendezvous")
    known = getattr(import_module(module), name)
    call = known(*given) if made else partial(known, *given)
    test = multiprocessing.parent_process()
    for number in count(1):
        request = Path(f"request-{number}")
        while not request.exists():
            if test is None or not test.is_alive():
                return
            time.sleep(0.02)
        result = call(**pickle.loads(request.read_bytes()))
        staged = Path(f"staged-{rank}")
        staged.write_bytes(pickle.dumps(result))
        staged.rename(f"result-{number}-{rank}")
