"""A writer that can be killed: forks prepared processes on request, so that one costs milliseconds.

Run as a script, it reads one JSON object per line (`start`, `wait`) and answers with one. A child writes a small dump
from prepared rows, under the fault that the request names, and ends with the exit code that a command would have.
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


class Zygote:
    """The test's side: start workers, wait for them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int:
        """Of the process that forks the workers."""
        return self._process.pid

    def start(self, url: Path, *, fault: str = "", log: str = "", order: list[int] | None = None) -> int:
        """Fork a worker; its pid."""
        return self._ask(do="start", url=str(url), fault=fault, log=log, order=order)

    def wait(self, pid: int, *, timeout: float = 30.0) -> int | str:
        """Exit code of a worker, the negative number of the signal that ended it, `stopped` or `hang`."""
        return self._ask(do="wait", pid=pid, timeout=timeout)

    def run(self, url: Path, **options: Any) -> int | str:
        """Start and wait."""
        return self.wait(self.start(url, **options))

    def close(self) -> None:
        """End the zygote."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _work(request: dict[str, Any], rows: list[Any], run: Any) -> int:
    from support.dumps import TOKENIZER

    from storage_schemas.errors import Exit, NeoError
    from storage_schemas.writer import DumpWriter

    os.environ["LLM_NEO_FAULT"], os.environ["LLM_NEO_FAULT_LOG"] = request["fault"], request["log"]
    try:
        writer = DumpWriter.open(request["url"], run)
        writer.put_tokenizer(TOKENIZER)
        for unit in request["order"] or range(run.units):
            if not writer.is_committed(unit):
                writer.commit_unit(unit, rows[unit])
        assert writer.seal()
    except NeoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return Exit.BUG
    return Exit.DONE


def _wait(pid: int, timeout: float) -> int | str:
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


def _serve() -> None:
    from support.dumps import run_info, unit_rows

    run = run_info()
    rows = [unit_rows(run, unit) for unit in range(run.units)]
    from storage_schemas.store import Store
    from storage_schemas.writer import DumpWriter

    # What Arrow does on first use is done here, once. No thread may be started before a fork, but the allocator's own.
    for unit in range(run.units):
        DumpWriter(Store("/nowhere"), run)._encode(unit, rows[unit], "0" * 32)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert len([name for name in threads if not name.startswith("jemalloc")]) == 1, threads

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            answer: Any = _wait(request["pid"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os._exit(_work(request, rows, run))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
