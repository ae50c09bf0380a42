"""Stage-one workers in processes of their own that can be killed: forked from one with all imports done.

Run as a script, it reads one JSON object per line (`start`, `wait`) and answers with one.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from support.forks import ForkServer, wait_for


class Workers(ForkServer):
    """The test's side: start workers, wait for them."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def start(self, job: dict[str, Any], *, fault: str = "") -> int:
        """Fork a worker; its pid. `job` holds the sections of `run_dump`, `rank`, `world_size`, `delay`, `ready`."""
        return self._ask(do="start", job=job, fault=fault)

    def run(self, job: dict[str, Any], *, fault: str = "") -> int | str:
        """Start and wait."""
        return self.wait(self.start(job, fault=fault))


def main() -> None:
    """Answer requests until standard input ends."""
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import teacher_dump.dump
    import teacher_dump.teachers.teacher  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(request) if request["do"] == "start" else wait_for(request["pid"], request["timeout"])
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
    from storage_schemas.common.errors import NeoError
    from storage_schemas.config import DumpSection, TopK
    from teacher_dump.config import CorpusSection, TeacherSection
    from teacher_dump.dump import run_dump
    from teacher_dump.teachers.teacher import Teacher

    class SlowTeacher(Teacher):
        def launch(self, samples: Any, recipe: Any) -> Any:
            if job.get("ready"):
                Path(job["ready"]).touch()
            time.sleep(job.get("delay", 0.0))
            return super().launch(samples, recipe)

    try:
        summary = run_dump(
            dump=DumpSection.model_validate(job["dump"]),
            teacher=SlowTeacher(TeacherSection.model_validate(job["teacher"])),
            corpus=CorpusSection.model_validate(job["corpus"]),
            estimator=TopK(k=8),
            rank=job.get("rank", 0),
            world_size=job.get("world_size", 1),
            events=Path(job["events"]) if job.get("events") else None,
        )
    except NeoError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    if job.get("summary"):
        Path(job["summary"]).write_text(summary.model_dump_json())
    return 0


if __name__ == "__main__":
    main()
