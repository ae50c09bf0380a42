"""Stage-one workers in processes of their own that can be killed: forked from one with all imports done.

Run as a script, it reads one JSON object per line (`start`, `wait`) and answers with one.
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


class Workers:
    """The test's side: start workers, wait for them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        )

    def start(self, job: dict[str, Any], *, fault: str = "") -> int:
        """Fork a worker; its pid. `job` holds the sections of `run_dump`, `rank`, `world_size`, `delay`, `ready`."""
        return self._ask(do="start", job=job, fault=fault)

    def wait(self, pid: int, *, timeout: float = 60.0) -> int | str:
        """Exit code of a worker, the negative number of the signal that ended it, or `hang`."""
        return self._ask(do="wait", pid=pid, timeout=timeout)

    def run(self, job: dict[str, Any], *, fault: str = "") -> int | str:
        """Start and wait."""
        return self.wait(self.start(job, fault=fault))

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


def main() -> None:
    """Answer requests until standard input ends."""
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import teacher_dump.dump
    import teacher_dump.teacher  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(request) if request["do"] == "start" else _wait(request["pid"], request["timeout"])
        print(json.dumps(answer), flush=True)


def _start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(2, 1)  # The answers' pipe belongs to the parent.
    code = 70
    try:
        os.environ["LLM_NEO_FAULT"] = request["fault"]
        code = _work(request["job"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(job: dict[str, Any]) -> int:
    from storage_schemas.config import DumpSection, TopK
    from storage_schemas.errors import NeoError
    from teacher_dump.config import CorpusSection, TeacherSection
    from teacher_dump.dump import run_dump
    from teacher_dump.teacher import Teacher

    class SlowTeacher(Teacher):
        def targets(self, samples: Any, **options: Any) -> Any:
            if job.get("ready"):
                Path(job["ready"]).touch()
            time.sleep(job.get("delay", 0.0))
            return super().targets(samples, **options)

    try:
        summary = run_dump(
            dump=DumpSection.model_validate(job["dump"]),
            teacher=SlowTeacher(TeacherSection.model_validate(job["teacher"])),
            corpus=CorpusSection.model_validate(job["corpus"]),
            estimator=TopK(k=8),
            rank=job.get("rank", 0),
            world_size=job.get("world_size", 1),
        )
    except NeoError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    if job.get("summary"):
        Path(job["summary"]).write_text(summary.model_dump_json())
    return 0


def _wait(pid: int, timeout: float) -> int | str:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


if __name__ == "__main__":
    main()
