"""Workers that can be killed: forked on request from a process with all imports done, so that one costs milliseconds.

The script calls `serve`, which reads one JSON object per line (`do`: `start` or `wait`) and answers with one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


class ForkServer:
    """The test's side."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int:
        """Of the process that forks the workers."""
        return self._process.pid

    def start(self, job: Any, *, fault: str = "", log: str = "") -> int:
        """Fork a worker, under a fault; its pid. The points that it passes are appended to the file `log`."""
        return self._ask(do="start", job=job, fault=fault, log=log)

    def run(self, job: Any, **options: Any) -> int | str:
        """Start and wait."""
        return self.wait(self.start(job, **options))

    def wait(self, pid: int, *, timeout: float = 60.0) -> int | str:
        """Exit code of a worker, the negative number of the signal that ended it, `stopped` or `hang`."""
        return self._ask(do="wait", pid=pid, timeout=timeout)

    def close(self) -> None:
        """End the process that forks."""
        self._process.kill()
        self._process.wait(10)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve(work: Callable[[Any], int]) -> None:
    """The script's side: answer requests until standard input ends; a `start` is worked on in a fork."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            answer = _wait_for(request["pid"], request["timeout"])
        elif not (answer := os.fork()):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)  # The answers' pipe belongs to the parent.
            code = 70
            try:
                os.environ |= {"LLM_NEO_FAULT": request["fault"], "LLM_NEO_FAULT_LOG": request["log"]}
                code = work(request["job"])
            except Exception as error:
                print(repr(error))
                code = int(getattr(error, "exit_code", code))
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(json.dumps(answer), flush=True)


def _wait_for(pid: int, timeout: float) -> int | str:
    """A worker that hangs is killed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found and os.WIFSTOPPED(status):
            return "stopped"
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"
