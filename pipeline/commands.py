"""What commands do inside of their own process that needs torch and is more than one call: freezing, dumps, plans,
recomputing.

Each imports its own stage when it is called, since that takes seconds.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli_options import shown_progress
from pipeline.config import Config, heldout_elsewhere, need
from pipeline.launch import Placement
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.publish import publish
from storage_schemas.reader import Dump
from storage_schemas.stores.address import local_path

if TYPE_CHECKING:
    from teacher_dump.teachers.teacher import Teacher

log = logging.getLogger(__name__)

_BATCH_TOKENS = 4096
"""Of a teacher that no configuration sets up, padding included."""


def run_dumps(
    config: Config, placement: Placement, teacher: "Teacher | None" = None, *, events: Path | None = None
) -> dict[str, Any]:
    """Dump the held-out samples, if there are any, and the corpus, with one loaded teacher.

    The held-out samples come first, so that a student that follows the dump can be evaluated from its first step on.

    A `teacher` is given if the configured one is not to be opened here. To the file `events` one JSON object per event
    is appended. Returns the summary of the corpus's dump, and under `heldout` that of the other.
    """
    from teacher_dump.dump import refuse_unusable, run_dump
    from teacher_dump.teachers.open import opened

    if (said := heldout_elsewhere(config)) is not None:
        log.warning("%s: what trains elsewhere will not find it", said)
    parts = [*([config.heldout_config()] if config.heldout else []), config]
    for part in parts:
        refuse_unusable(part.dump)
    summaries = []
    with opened(teacher or need(config.teacher, "teacher", "dump")) as loaded:
        for part in parts:
            log.info("dumping to %s", part.dump.url)
            summary = run_dump(
                dump=part.dump,
                teacher=loaded,
                corpus=need(part.corpus, "corpus", "dump"),
                estimator=part.estimator,
                temperatures=part.temperatures,
                apart_from=None if part is config else config.corpus,
                rank=placement.rank,
                world_size=placement.world_size,
                events=events,
            )
            summaries.append(summary.model_dump(mode="json"))
    return summaries[-1] | ({"heldout": summaries[0]} if config.heldout else {})


def run_freeze(config: Config) -> dict[str, Any]:
    """Tokenise the held-out samples, if there are any, and the corpus into the cache, where the workers of a dump find
    them. No weights are loaded.

    Returns where the corpus lies and what it holds, and under `heldout` the same of the other.

    Raises:
        NeoError: a dump would refuse them, or they cannot be kept.
    """
    from teacher_dump.corpus.freeze import freeze_corpus
    from teacher_dump.corpus.heldout import refuse_shared
    from teacher_dump.corpus.preview import DescribedTeacher
    from teacher_dump.dump import refuse_too_long

    teacher = DescribedTeacher(need(config.teacher, "teacher", "freeze"))
    corpora, found = [], []
    for part in [*([config.heldout_config()] if config.heldout else []), config]:
        started = time.monotonic()
        section = need(part.corpus, "corpus", "freeze")
        corpus = freeze_corpus(section, teacher.tokenizer, lm_head_rows=teacher.lm_head_rows, must_keep=True)
        refuse_too_long(corpus, teacher)
        corpora.append(corpus)
        found.append(
            {
                "folder": str(corpus.folder),
                "fingerprint": corpus.fingerprint,
                "samples": len(corpus),
                "statuses": corpus.status_counts(),
                "truncated": corpus.truncated,
                "tokens": len(corpus.input_ids),
                "supervised_tokens": int(corpus.loss_mask.sum()),
                "seconds": time.monotonic() - started,
            }
        )
    if config.heldout:
        refuse_shared(corpora[-1], heldout=corpora[0])
    return found[-1] | ({"heldout": found[0]} if config.heldout else {})


def report_training(config: Config) -> None:
    """report.md of a finished training that was evaluated before and after, unless `llm-neo run` has written a fuller
    one."""
    from pipeline.views.report import training_report
    from student_train.summary import read_summary

    output = need(config.train, "train", "train").output
    summary = read_summary(output)
    if summary is None or config.heldout is None or (output / "steps").is_dir():
        return
    if {0, summary.final_step} <= {result.step for result in summary.heldout}:
        publish(output / "report.md", training_report(config, summary), private=True)


def run_plan(config: Config, pilot: Mapping[str, Any], teacher: "Teacher | None" = None) -> dict[str, Any]:
    """What the dump of a configuration will hold, weigh and cost, from a pilot with these arguments of `plan_dump`.

    A `teacher` is given if the configured one is not to be opened here.
    """
    from teacher_dump.plan import plan_dump
    from teacher_dump.teachers.open import open_teacher, under_transformers

    section = need(config.teacher, "teacher", "plan")
    if section.backend == "vllm":
        log.info("the pilot runs under transformers, which knows all estimators; give vLLM's own --tokens-per-second")
        section = under_transformers(section)
    with shown_progress("pilot") as progress:
        found = plan_dump(
            dump=config.dump,
            teacher=teacher or open_teacher(section),
            corpus=need(config.corpus, "corpus", "plan"),
            estimator=config.estimator,
            temperatures=config.temperatures,
            progress=progress,
            **pilot,
        )
    return found.model_dump(mode="json")


def recomputing(
    url: str, options: Mapping[str, str], *, rows: int, seed: int, config: Config | None, model: str | None
) -> Callable[[], dict[str, Any]]:
    """What compares some rows of a dump with what the teacher says now. What can be refused is refused here at once.

    With a `config`, which the dump was made with, its teacher runs and its corpus is compared with the rows. `model`
    says where the teacher lies, if not where `config` or run.json say.

    Raises:
        MismatchError: the teacher is not here or was never in files, or it or the corpus is another one.
    """
    from teacher_dump.config import TeacherSection
    from teacher_dump.corpus.freeze import freeze_corpus
    from teacher_dump.recompute import recompute_rows, refuse_other_corpus, refuse_other_teacher
    from teacher_dump.teachers.teacher import Teacher

    dump = Dump.open(url, options=options)
    named = dump.provenance.origin
    if dump.provenance.imported:
        raise MismatchError(
            f"{url} was imported ({dump.provenance.imported}): run.json has no hash of the teacher that made it",
            got="--recompute",
            expected="a dump made by `llm-neo dump`",
            fix="`llm-neo evaluate --model TEACHER --dump URL` compares it with a model: a KL near 0 proves the import",
        )
    if dump.provenance.teacher.in_memory:
        raise MismatchError(
            f"the teacher of {url} was a model in memory, which no path or hub id leads to",
            got=f"{named.model}, known by a hash of its tensors",
            expected="a teacher that was loaded from files",
            fix="with that model, in Python: recompute_rows(dump, LoadedTeacher(model, tokenizer), rows=20)",
        )
    if config is not None:
        section = need(config.teacher, "teacher", "verify --config")
    else:
        told = {"model": named.model, "revision": named.revision, "dtype": dump.provenance.teacher.dtype}
        section = TeacherSection.model_validate(told | {"batch_tokens": _BATCH_TOKENS})
    if model is not None:
        section = section.model_copy(update={"model": model, "revision": None})
    teacher = Teacher(section)
    try:
        _ = teacher.files
    except MismatchError as error:
        raise MismatchError(
            f"the teacher that made the dump is not here: {error.what}",
            got=error.got,
            expected=f"{named.model}, or a copy of it",
            fix="say where it lies: --model DIR, or --config CONFIG with a section `teacher`",
        ) from error
    refuse_other_teacher(dump.provenance, teacher)
    corpus = None
    if config is not None and config.corpus is not None:
        heldout = config.heldout is not None and _same_place(config.heldout.url, dump.store.url)
        part = config.heldout_config().corpus if heldout else config.corpus
        assert part is not None
        corpus = freeze_corpus(part, teacher.tokenizer, lm_head_rows=teacher.lm_head_rows)
        refuse_other_corpus(dump.provenance, corpus)

    def compare() -> dict[str, Any]:
        with shown_progress(f"recomputing rows of {url}") as progress:
            report = recompute_rows(dump, teacher, rows=rows, seed=seed, corpus=corpus, progress=progress)
        return report.model_dump(mode="json")

    return compare


def _same_place(url: str, other: str) -> bool:
    """Whether two URLs, or paths however they are written, name one place."""
    here, there = local_path(url), local_path(other)
    if here is None or there is None:
        return url.rstrip("/") == other.rstrip("/")
    return here.resolve() == there.resolve()
