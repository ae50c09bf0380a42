"""A run: what it is made of, and what can be refused before its student is loaded."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from storage_schemas.common.devices import refuse_no_compiler
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.config import DumpSection
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import RUN, SEAL
from storage_schemas.rows import OK, Row
from storage_schemas.stores.store import Store
from student_train.checkpoint import Checkpoint, Checkpoints, Extension
from student_train.config import LossSection, StudentSection, TrainSection
from student_train.data.order import Order
from student_train.heldout import Heldout, best
from student_train.metrics import HeldoutResult, refuse_missing_trackers
from student_train.model.load import refuse_unloadable
from student_train.model.losses import refuse_biased
from student_train.model.quantised import refuse_unfit_quantisation
from student_train.results.saved import refuse_other_base
from student_train.schedule import learning_rate, warmup_of
from student_train.world import World
from student_train.zero import deepspeed_config

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks for a dump that has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run, as far as it is known before the student is loaded."""

    dump: Dump
    order: Order
    steps: int
    checkpoints: Checkpoints
    student: StudentSection
    loss: LossSection
    train: TrainSection
    heldout: Heldout | None = None
    """What it is evaluated on meanwhile."""
    extended: tuple[Extension, ...] = ()
    """Where it went on under other settings."""

    def comparable(self, results: Sequence[HeldoutResult]) -> list[HeldoutResult]:
        """Those on the same held-out samples at the same temperature as now."""
        here = self.heldout
        return [r for r in results if here and (r.dump, r.temperature) == (here.dump.fingerprint, here.temperature)]

    def exported(self, step: int, results: Sequence[HeldoutResult]) -> int:
        """The step whose weights go into `final/` if the run ends after `step` with these results."""
        found = best(self.comparable(results), self.train.metric_for_best_model)
        return found.step if found and self.train.load_best_model_at_end else step

    def left_behind(self, step: int, results: Sequence[HeldoutResult]) -> Checkpoint:
        """The checkpoint of that step. Raises MismatchError if it has not been kept."""
        exported, there = self.exported(step, results), self.checkpoints.steps()
        if exported not in there:
            raise MismatchError(
                f"the checkpoint of the best evaluation, that of step {exported}, is not there",
                got=f"checkpoints of the steps {', '.join(map(str, there))}",
                expected="train.load_best_model_at_end: true from the start of training",
                fix="unset it to have the last step in `final/`, or train in a new train.output",
            )
        return self.checkpoints.at(exported)


def refuse_early(student: StudentSection, train: TrainSection) -> None:
    """Raise what training would end in whatever the dump is, before anybody waits or pays for one."""
    refuse_missing_trackers(train.report_to)
    deepspeed_config(train)
    if train.compile:
        refuse_no_compiler("train.compile", os.environ)
    refuse_unloadable(student.model, student.revision, student.attn_implementation, student.trust_remote_code)
    refuse_unfit_quantisation(student, train)
    refuse_unfit_adapter(student, train)
    refuse_unfit_schedule(train, train.max_steps or 1000)


def rate_of(train: TrainSection, step: int, *, total_steps: int) -> float:
    """Learning rate of an optimizer step. Raises MismatchError if the schedule does not take its arguments."""
    return learning_rate(
        step,
        total_steps=total_steps,
        warmup_steps=warmup_of(total_steps, ratio=train.warmup_ratio, steps=train.warmup_steps),
        kind=train.lr_scheduler_type,
        peak=train.learning_rate,
        arguments=train.lr_scheduler_kwargs,
    )


def refuse_unfit_schedule(train: TrainSection, steps: int) -> None:
    """Raise MismatchError if the schedule does not take its arguments, which some tell after the warm-up alone."""
    warmup = warmup_of(steps, ratio=train.warmup_ratio, steps=train.warmup_steps)
    for step in {0, min(warmup, steps - 1), steps - 1}:
        rate_of(train, step, total_steps=steps)


def refuse_unfit_adapter(student: StudentSection, train: TrainSection) -> None:
    """Raise MismatchError if training cannot begin from `student.adapter`, and DataError if that is damaged."""
    if student.adapter is None:
        return
    if train.warm_start is not None:
        raise MismatchError(
            "student.adapter and train.warm_start both say what training begins from",
            got=f"student.adapter: {student.adapter}; train.warm_start: {train.warm_start}",
            expected="one of them",
            fix="leave one out: a checkpoint has Adam's moments, too",
        )
    if not train.lora:
        raise MismatchError(
            f"the method {train.method} trains all weights, and student.adapter names an adapter",
            got=f"train.method: {train.method}; student.adapter: {student.adapter}",
            expected="the method lora_sft or lora_kd",
            fix="merge the adapter and set student.model to the result, or choose another method",
        )
    refuse_other_base(student.adapter, student.model, student.revision)


def await_dump(
    world: World,
    section: DumpSection,
    *,
    seconds: float,
    stop: Callable[[], bool],
    early: Callable[[], None],
    sealed: bool = False,
) -> None:
    """Wait until stage one has begun, or ended, if there is nothing to refuse before. Collective.

    `stop` is asked again and again. `early` is called once if there is something to wait for: it raises what waiting
    would not mend. `sealed` waits until the dump is complete.

    Raises:
        TemporaryError: it is not there after so many seconds, or a stop is asked for.
        MismatchError: there cannot be one: no such bucket, or no access.
    """
    file, what = (SEAL, "complete held-out dump") if sealed else (RUN, "dump")
    store = world.together(lambda: Store(section.url, options=section.storage_options))
    began, waiting = time.monotonic(), False
    while True:
        stopping = any(asked for (asked,) in world.gather([stop()]))
        deadline = began if stopping else began + seconds
        if world.told(partial(_is_there, store, began, deadline, what=what, file=file)):
            return
        if not waiting:
            world.on_main(early)
            if world.main:
                log.info("there is no %s at %s yet; waiting for stage one, %.0f s at most", what, section.url, seconds)
        waiting = True
        time.sleep(min(LOOK_SECONDS, seconds))


def _is_there(store: Store, began: float, deadline: float, *, what: str, file: str) -> bool:
    """Whether stage one has written a file. Raises TemporaryError if it has not by the deadline."""
    if store.get_if_present(file) is not None:
        return True
    if time.monotonic() > deadline:
        raise TemporaryError(
            f"there is no {what} at {store.url}",
            got=f"no {file} after {time.monotonic() - began:.0f} s",
            expected="what `llm-neo dump` writes there",
            fix="start stage one or correct the URL, then run the same command again; "
            "train.data_wait_seconds says how long to wait",
        )
    return False


def refuse_contradicted(run: Provenance, stated: Mapping[str, Any]) -> None:
    """Raise MismatchError if the configuration states an estimator or temperatures that are not the dump's."""
    made = {f"estimator.{name}": value for name, value in run.estimator.model_dump().items()}
    made["temperatures"] = list(run.temperatures)
    different = [key for key, value in stated.items() if made.get(key) != value]
    if "estimator.kind" in different:
        different = ["estimator.kind"]
    if different:
        raise MismatchError(
            f"the dump was made with other settings: {', '.join(different)}",
            got="; ".join(f"{key} = {stated[key]}" for key in different),
            expected="; ".join(f"{key} = {made.get(key)}, as in run.json" for key in different),
            fix="correct dump.url, or take these settings out of the configuration: training has them from the dump",
        )


def weigh(run: TrainingRun) -> None:
    """Refuse a sealed dump that nothing can be learned from, and tell of one that fills no step.

    Raises:
        DataError: no sample has a target.
    """
    if not run.dump.sealed():
        return
    usable, wanted = 0, run.train.global_batch_size
    for record in run.dump.records().values():
        usable += record.statuses.get(OK, 0)
        if usable >= wanted:
            return
    if not usable:
        raise nothing_usable(run)
    log.warning(
        "only %d of the dump's %d samples can be trained on, fewer than train.global_batch_size (%d): an epoch is %d "
        "optimizer steps, training is %d; lower train.global_batch_size or raise train.epochs",
        usable, run.order.samples, wanted, run.order.steps_per_epoch, run.steps,
    )  # fmt: skip


def nothing_usable(run: TrainingRun) -> DataError:
    """What there is to say of a run that has nothing to learn from."""
    return DataError(
        f"nothing can be learned from {run.dump.store.url}",
        got=f"no sample with a target in {run.steps} steps of {run.train.global_batch_size} samples",
        expected="samples of status `ok`",
        fix="`llm-neo inspect` counts the dump's samples by status; correct the corpus, or dump again",
    )


def open_run(
    section: DumpSection,
    student: StudentSection,
    loss: LossSection,
    train: TrainSection,
    stated: Mapping[str, Any],
    heldout: DumpSection | None = None,
) -> TrainingRun:
    """Open the dumps and refuse what they cannot serve."""
    refuse_missing_trackers(train.report_to)
    if train.compile:
        refuse_no_compiler("train.compile", os.environ)
    cache = train.cache_dir or train.output / "cache"
    dump = Dump.open(section.url, options=section.storage_options, cache_dir=cache, cache_bytes=train.cache_bytes)
    dump.seal()  # Asked first: records of a sealed dump then come from its manifest, not one by one.
    refuse_contradicted(dump.provenance, stated)
    if train.distils:
        dump.provenance.temperature_index(loss.temperature)
        if dump.provenance.estimator.draws:
            refuse_biased(loss.divergence)
    order = Order(
        samples=dump.provenance.corpus.samples,
        samples_per_unit=dump.provenance.samples_per_unit,
        window_units=train.shuffle_window_units,
        block_units=train.shuffle_block_units,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
    )
    steps = train.max_steps or order.steps_per_epoch * train.epochs
    refuse_unfit_schedule(train, steps)
    return TrainingRun(
        dump=dump,
        order=order,
        steps=steps,
        checkpoints=Checkpoints(
            train.checkpoint_url or str(train.output / "checkpoints"),
            options=section.storage_options if train.checkpoint_url else None,
        ),
        student=student,
        loss=loss,
        train=train,
        heldout=_open_heldout(heldout, dump, loss, train) if heldout and train.eval_steps else None,
    )


def _open_heldout(section: DumpSection, dump: Dump, loss: LossSection, train: TrainSection) -> Heldout:
    """The held-out dump, which is of the same tokenizer and not the dump that is trained on."""
    cache = train.cache_dir or train.output / "cache"
    found = Dump.open(section.url, options=section.storage_options, cache_dir=cache, cache_bytes=train.cache_bytes)
    if found.fingerprint == dump.fingerprint:
        raise MismatchError(
            "the held-out dump is of the very samples that are trained on",
            got=f"fingerprint {found.fingerprint} at {section.url} and at {dump.store.url}",
            expected="a dump of other samples",
            fix="correct heldout.url, or heldout.sources and dump again",
        )
    if found.provenance.tokenizer != dump.provenance.tokenizer:
        raise MismatchError(
            "the held-out dump was made with another tokenizer than the dump",
            got=found.provenance.tokenizer,
            expected=dump.provenance.tokenizer,
            fix="correct heldout.url, or dump the held-out samples with the same teacher",
        )
    found.seal()  # Asked first: its records then come from its manifest, not one by one.
    # The arms without a divergence have no temperature of their own.
    temperature = loss.temperature
    if not train.distils:
        temperature = min(found.provenance.temperatures, key=lambda stored: stored != 1.0)
    return Heldout(found, temperature=temperature, micro_batch_size=train.micro_batch_size)


def stored_rows(run: TrainingRun) -> list[Row]:
    """The first usable sample that was trained on, and then the others of its unit."""
    for step in range(run.steps):
        for sample in run.order.step_samples(step):
            unit, place = divmod(int(sample), run.dump.provenance.samples_per_unit)
            rows = run.dump.read_unit(unit)
            if rows.status[place] == OK:
                return [rows.row(i) for i in (place, *range(len(rows))) if rows.status[i] == OK]
    return []
