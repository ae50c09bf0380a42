"""Stage-one workers in processes of their own that can be killed: a script for `ForkServer`."""

import time
from pathlib import Path
from typing import Any

from support.forks import serve


def _work(job: dict[str, Any]) -> int:
    """`job` holds the sections of `run_dump`, `rank`, `world_size`, `delay`, `ready`, `events`, `summary`."""
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

    summary = run_dump(
        dump=DumpSection.model_validate(job["dump"]),
        teacher=SlowTeacher(TeacherSection.model_validate(job["teacher"])),
        corpus=CorpusSection.model_validate(job["corpus"]),
        estimator=TopK(k=8),
        rank=job.get("rank", 0),
        world_size=job.get("world_size", 1),
        events=Path(job["events"]) if job.get("events") else None,
    )
    if job.get("summary"):
        Path(job["summary"]).write_text(summary.model_dump_json())
    return 0


if __name__ == "__main__":
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import teacher_dump.dump
    import teacher_dump.teachers.teacher  # noqa: F401

    serve(_work)
