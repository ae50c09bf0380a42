"""The two things the command line does inside its own process that need torch: stage one, and evaluation.

Each imports its own stage when it is called, since peft alone takes seconds.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from pipeline.config import Config, need
from pipeline.launch import Placement
from storage_schemas.reader import Dump

log = logging.getLogger(__name__)

_LINE_SECONDS = 5.0


def run_dumps(config: Config, placement: Placement, *, events: Path | None = None) -> dict[str, Any]:
    """Dump the corpus, and the held-out samples if there are any, with one loaded teacher.

    Args:
        config: with `teacher` and `corpus`.
        placement: which worker this is.
        events: file that one JSON object per event is appended to.

    Returns:
        The summary of the corpus's dump, and under `heldout` that of the other.
    """
    from teacher_dump.dump import run_dump
    from teacher_dump.teacher import Teacher

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
            events=events,
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
    from student_train.evaluate import evaluate

    dump = Dump.open(url, options=options)
    with shown_progress(f"evaluating {model}") as progress:
        found = evaluate(
            model,
            dump,
            temperature=temperature,
            batch_tokens=batch_tokens,
            device=device,
            limit=limit,
            progress=progress,
        )
    return found.model_dump(mode="json")


@contextmanager
def shown_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, all): a bar on a terminal, else a log line every few seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), console=console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = shown = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _LINE_SECONDS or done == total:
            shown = now
            left = timedelta(seconds=round((now - started) / max(1, done) * (total - done)))
            log.info("%s: %d/%d, %s left", title, done, total, left)

    yield line
