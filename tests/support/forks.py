"""Workers that can be killed: forked on request from a process with all imports done, so that one costs milliseconds.

The script reads one JSON object per line (`do`: `start` or `wait`) and answers with one.
"""

import json
import os
import signal
import subprocess
import sys
import time
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
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def wait_for(pid: int, timeout: float) -> int | str:
    """The script's side of `ForkServer.wait`: a worker that hangs is killed."""
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
