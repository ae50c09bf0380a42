"""The two things the command line does inside its own process that need torch: stage one, and evaluation."""

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress

from pipeline.config import Config, need
from pipeline.launch import Placement
from storage_schemas.reader import Dump
from student_train.evaluate import evaluate
from teacher_dump.dump import run_dump
from teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)


def run_dumps(config: Config, placement: Placement) -> dict[str, Any]:
    """Dump the corpus, and the held-out samples if there are any, with one loaded teacher.

    Returns:
        The summary of the corpus's dump, and under `heldout` that of the other.
    """
    teacher = Teacher(need(config.teacher, "teacher", "dump"))
    parts = [config] + ([config.heldout_config()] if config.heldout else [])
    summaries = []
    for part in parts:
        log.info("dumping to %s", part.dump.url)
        summary = run_dump(
            dump=part.dump,
            teacher=teacher,
            corpus=need(part.corpus, "corpus", "dump"),
            estimator=part.estimator,
            temperatures=part.temperatures,
            rank=placement.rank,
            world_size=placement.world_size,
        )
        summaries.append(summary.model_dump(mode="json"))
    return summaries[0] | ({"heldout": summaries[1]} if config.heldout else {})


def run_evaluation(
    model: str,
    url: str,
    options: Mapping[str, str],
    *,
    temperature: float,
    batch_tokens: int,
    device: str,
    limit: int | None,
) -> dict[str, Any]:
    """Compare a model with the teacher on a dump."""
    dump = Dump.open(url, options=options)
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"evaluating {model}", total=None)
        found = evaluate(
            model,
            dump,
            temperature=temperature,
            batch_tokens=batch_tokens,
            device=device,
            limit=limit,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return found.model_dump(mode="json")
