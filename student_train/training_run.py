"""A run: what it is made of, and what can be refused before its student is loaded."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage_schemas.canonical import differences
from storage_schemas.common.devices import refuse_no_compiler
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.config import DumpSection
from storage_schemas.provenance import Provenance, refuse_differences
from storage_schemas.reader import Dump
from storage_schemas.records import RUN, SEAL, TOKENIZER
from storage_schemas.rows import OK, Row
from storage_schemas.stores.store import Store
from student_train.checkpoint import Beginning, Checkpoint, Checkpoints, Extension
from student_train.config import LossSection, Resolved, StudentSection, TrainSection, sections_of
from student_train.data.blocks import block_bytes, units_within
from student_train.data.mix import Mix
from student_train.data.order import Order
from student_train.heldout import Heldout, best
from student_train.metrics import Event, HeldoutResult, refuse_missing_trackers
from student_train.model.load import refuse_unloadable
from student_train.model.losses import refuse_biased
from student_train.model.quantised import refuse_unfit_quantisation
from student_train.results.saved import refuse_other_base
from student_train.schedule import learning_rate, warmup_of
from student_train.summary import TrainedOn
from student_train.world import World
from student_train.zero import deepspeed_config

log = logging.getLogger(__name__)

FEW_UNITS = 4
"""Fewer that are open at a time mix so little that it is warned of."""
OPEN_UNITS = 512
"""Units that ranks share are open files of each, and a process may have 1,024 by default."""
LOOK_SECONDS = 2.0
"""Between two looks for a dump that has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dump that is trained on."""

    name: str
    """The last part of its URL, or all of it where others end alike."""
    dump: Dump
    weight: float
    """How often each of its samples is seen in an epoch."""
    loss: LossSection
    """With the dump's own alpha."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run, as far as it is known before the student is loaded."""

    sources: tuple[Source, ...]
    """One, or those of `train.dumps`."""
    mix: Mix
    """Which of their samples a step holds."""
    steps: int
    checkpoints: Checkpoints
    student: StudentSection
    loss: LossSection
    train: TrainSection
    heldout: Heldout | None = None
    """What it is evaluated on meanwhile."""
    began: Beginning | None = None
    """Where it began, if with the weights and moments of another run."""
    extended: tuple[Extension, ...] = ()
    """Where it went on under other settings."""

    @property
    def dumps(self) -> list[Dump]:
        """Of all sources."""
        return [source.dump for source in self.sources]

    @property
    def dump(self) -> Dump:
        """The first one, for what all agree on: see `refuse_unlike`."""
        return self.sources[0].dump

    @property
    def mixed(self) -> tuple[Source, ...]:
        """The sources, if there are several."""
        return self.sources if len(self.sources) > 1 else ()

    def share(self) -> None:
        """Have each unit decoded once per node, for all its ranks."""
        # Units that a rank may have open: of each dump all blocks that a step may touch.
        further = self.train.global_batch_size - 1
        units = sum(
            order.block_units * (2 + further // (order.block_units * order.samples_per_unit))
            for order in self.mix.orders
        )
        if self.train.shuffle == "windows" and units > OPEN_UNITS:
            log.info("each rank decodes every unit, since blocks of so many units would be open files on each")
            return
        heldout = [] if self.heldout is None else [self.heldout.dump]
        for dump in (*self.dumps, *heldout):
            dump.share(_cache_dir(self.train) / f"decoded-{socket.gethostname()}")

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
    refuse_unfit_start(train)
    refuse_unfit_schedule(train, train.max_steps or 1000)


def refuse_unfit_schedule(train: TrainSection, steps: int) -> None:
    """Raise MismatchError if the schedule does not take its arguments, which some tell after the warm-up alone."""
    warmup = warmup_of(train, steps)
    for step in {0, min(warmup, steps - 1), steps - 1}:
        learning_rate(train, step, total_steps=steps)


def refuse_impossible_schedule(train: TrainSection, steps: int) -> None:
    """Raise MismatchError if a new run of so many steps cannot have what is set; what has begun may be ended early."""
    arguments = train.lr_scheduler_kwargs
    # (setting, its value, the most that it may be, what that is)
    limits: list[tuple[str, Any, float, str]] = [
        ("warmup_steps", train.warmup_steps, steps, "all steps"),
        ("lr_scheduler_kwargs.num_decay_steps", arguments.get("num_decay_steps"), steps - warmup_of(train, steps),
         "the steps after the warm-up"),
        ("lr_scheduler_kwargs.min_lr", arguments.get("min_lr"), train.learning_rate, "train.learning_rate"),
        ("lr_scheduler_kwargs.min_lr_rate", arguments.get("min_lr_rate"), 1, "all of train.learning_rate"),
        ("lr_scheduler_kwargs.min_lr_ratio", arguments.get("min_lr_ratio"), 1, "all of train.learning_rate"),
    ]  # fmt: skip
    for name, value, most, what in limits:
        if isinstance(value, int | float) and value > most:
            raise MismatchError(
                f"train.{name} is more than the schedule can have",
                got=f"train.{name} = {value}",
                expected=f"at most {most}, {what}",
                fix=f"lower train.{name}",
            )


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


def refuse_unfit_start(train: TrainSection) -> None:
    """Raise MismatchError if `train.warm_start` has no checkpoint, or is the run's own directory. A run that has begun
    goes on without it."""
    if train.warm_start is None:
        return
    if train.warm_start.resolve() == train.output.resolve():
        raise MismatchError(
            "train.warm_start is the directory of this run",
            got=train.warm_start,
            expected="that of another run",
            fix="choose another train.output; or train.extend: true without train.warm_start, to go on",
        )
    own, steps = (Checkpoints(str(run / "checkpoints")).steps() for run in (train.output, train.warm_start))
    if not (any(steps) or any(own) or train.checkpoint_url):
        raise nothing_to_begin_from(train.warm_start)


def nothing_to_begin_from(folder: Path) -> MismatchError:
    """What there is to say of a `train.warm_start` without a complete checkpoint."""
    return MismatchError(
        f"there is no checkpoint to begin from in {folder}",
        got=f"no complete checkpoint of a step that was trained in {folder / 'checkpoints'}",
        expected="the directory of a run with `checkpoints/` on this machine",
        fix="correct train.warm_start; where that run has a train.checkpoint_url, copy what is there to `checkpoints/` "
        "in a directory, and name that",
    )


def await_dump(
    world: World,
    section: DumpSection,
    *,
    seconds: float,
    stop: Callable[[], bool],
    early: Callable[[], None],
    complete: str | None = None,
) -> None:
    """Wait until stage one has begun, or ended, if there is nothing to refuse before. Collective.

    `stop` is asked again and again. `early` is called once if there is something to wait for: it raises what waiting
    would not mend. `complete` waits until the dump is that, and says of which dump, and why.

    Raises:
        TemporaryError: it is not there after so many seconds, or a stop is asked for.
        MismatchError: there cannot be one: no such bucket, or no access.
    """
    file, what = (RUN, "dump") if complete is None else (SEAL, f"complete {complete}")
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
    """Whether stage one has written a file, and its tokenizer, which it writes between run.json and the first unit.

    Raises TemporaryError if it has not by the deadline.
    """
    missing: str | None = file
    if store.get_if_present(file) is not None:
        missing = None if any(store.get_if_present(name) is not None for name in (TOKENIZER, SEAL)) else TOKENIZER
    if missing is not None and time.monotonic() > deadline:
        raise TemporaryError(
            f"there is no {what} at {store.url}",
            got=f"no {missing} after {time.monotonic() - began:.0f} s",
            expected="what `llm-neo dump` writes there",
            fix="start stage one or correct the URL, then run the same command again; "
            "train.data_wait_seconds says how long to wait",
        )
    return missing is None


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


def weigh(run: TrainingRun, *, ranks: int = 1) -> None:
    """Refuse a sealed dump that nothing can be learned from, and tell of dumps that fill no step, and steps no ranks.

    Raises:
        DataError: no sample of a dump has a target.
    """
    usable, wanted = 0, run.train.global_batch_size
    for dump in run.dumps:
        if not dump.is_sealed():
            usable = wanted  # Nobody knows yet.
            continue
        before = usable
        for record in dump.read_records().values():
            usable += record.statuses.get(OK, 0)
            if usable > before and usable >= wanted:
                break
        if usable == before:
            raise nothing_usable(run, dump)
    for source, share in zip(run.mixed, run.mix.shares, strict=False):
        log.info(
            "%s: %d samples of an epoch (%.1f %%), weight %g of %d samples, alpha %g",
            source.name, share, 100 * share / run.mix.samples, source.weight,
            source.dump.provenance.corpus.samples, source.loss.alpha,
        )  # fmt: skip
    for source, order in zip(run.sources, run.mix.orders, strict=True):
        _tell_import(source)
        _tell_shuffle(source, order, run.train)
    if wanted < ranks:
        log.warning(
            "%d of the %d ranks have no sample in any step, which has train.global_batch_size (%d) of them: raise it, "
            "or start fewer ranks",
            ranks - wanted, ranks, wanted,
        )  # fmt: skip
    if usable < wanted:
        log.warning(
            "only %d of the dump's %d samples can be trained on, fewer than train.global_batch_size (%d): an epoch is "
            "%d optimizer steps, training is %d; lower train.global_batch_size or raise train.epochs",
            usable, run.mix.samples, wanted, run.mix.steps_per_epoch, run.steps,
        )  # fmt: skip


def _tell_import(source: Source) -> None:
    """Say that this project did not run the teacher of a dump, and what it may lack."""
    run = source.dump.provenance
    if run.imported:
        lost = (run.engine.arguments or {}).get("tail") == "lost"
        log.info(
            "%s was imported (%s); teacher: %s%s", source.name, run.imported, run.origin.model,
            "; its tails are lost: the teacher gives all probability to the stored entries" if lost else "",
        )  # fmt: skip


def _tell_shuffle(source: Source, order: Order, train: TrainSection) -> None:
    """Say how well a complete dump is mixed, if it could be better, and what its windows take of memory."""
    if train.shuffle == "epoch":
        tell = log.warning if order.block_units < min(FEW_UNITS, order.units) else log.info
        tell(
            "%s: samples of %d of its %d units are mixed at a time; train.shuffle_bytes (%d) decides it",
            source.name, order.block_units, order.units, train.shuffle_bytes,
        )  # fmt: skip
        return
    if not source.dump.is_sealed():
        return
    # Of units that ranks share they hold their own rows alone.
    if not source.dump.is_shared and (held := block_bytes(source.dump, order)) > train.shuffle_bytes:
        log.warning(
            "%s: each rank may hold %.1f GB of decoded samples, two blocks of %d units; train.shuffle: epoch bounds "
            "what all ranks hold, or lower train.shuffle_block_units",
            source.name, held / 1e9, order.block_units,
        )  # fmt: skip
    if order.windows > 1:
        log.info(
            "%s is complete, and is read in %d windows one after the other: train.shuffle: epoch would mix all of it",
            source.name, order.windows,
        )  # fmt: skip


def nothing_usable(run: TrainingRun, dump: Dump | None = None) -> DataError:
    """What there is to say of a run that has nothing to learn from, or has nothing to learn from one of its dumps."""
    return DataError(
        f"nothing can be learned from {' and '.join(one.store.url for one in ([dump] if dump else run.dumps))}",
        got=f"no sample with a target in {run.steps} steps of {run.train.global_batch_size} samples",
        expected="samples of status `ok`",
        fix="`llm-neo inspect` counts the dump's samples by status; correct the corpus, or dump again",
    )


def open_run(config: Resolved) -> TrainingRun:
    """Open the dumps and refuse what they cannot serve."""
    section, loss, train, heldout = config.dump, config.loss, config.train, config.heldout
    refuse_missing_trackers(train.report_to)
    if train.compile:
        refuse_no_compiler("train.compile", os.environ)
    sources = _open_sources(section, loss, train)
    for place, source in zip(sections_of(section, train), sources, strict=True):
        if place.url == section.url:
            refuse_contradicted(source.dump.provenance, config.stated)
    shares = [max(1, round(source.weight * source.dump.provenance.corpus.samples)) for source in sources]
    mix = Mix(
        orders=tuple(
            _order_of(source, train, budget=train.shuffle_bytes * share // sum(shares))
            for source, share in zip(sources, shares, strict=True)
        ),
        shares=tuple(shares),
        global_batch_size=train.global_batch_size,
    )
    steps = train.max_steps or mix.steps_per_epoch * train.epochs
    refuse_unfit_schedule(train, steps)
    return TrainingRun(
        sources=sources,
        mix=mix,
        steps=steps,
        checkpoints=Checkpoints(
            train.checkpoint_url or str(train.output / "checkpoints"),
            options=section.storage_options if train.checkpoint_url else None,
        ),
        student=config.student,
        loss=loss,
        train=train,
        heldout=_open_heldout(heldout, sources, loss, train) if heldout and train.eval_steps else None,
    )


def _open_sources(section: DumpSection, loss: LossSection, train: TrainSection) -> tuple[Source, ...]:
    """The dumps that are trained on, refused if they cannot serve this loss, or not together."""
    weights = [(one.weight, one.alpha) for one in train.dumps] or [(1.0, None)]
    sections = sections_of(section, train)
    names = [place.url.rstrip("/").rpartition("/")[2] for place in sections]
    sources: list[Source] = []
    for place, name, (weight, alpha) in zip(sections, names, weights, strict=True):
        own = loss if alpha is None else loss.model_copy(update={"alpha": alpha})
        dump = _open_dump(place, train)
        sources.append(Source(name=name if names.count(name) == 1 else place.url, dump=dump, weight=weight, loss=own))
        if train.distils:
            dump.provenance.temperature_index(loss.temperature)
            if dump.provenance.estimator.draws:
                refuse_biased(loss.divergence)
        for before in sources[:-1]:
            refuse_unlike(before.dump, dump)
        dump.read_seal()  # Asked first: records of a sealed dump then come from its manifest, not one by one.
    return tuple(sources)


def _open_dump(section: DumpSection, train: TrainSection) -> Dump:
    place, options, limit = _cache_dir(train), section.storage_options, train.cache_bytes
    return Dump.open(section.url, options=options, cache_dir=place, cache_bytes=limit)


def _cache_dir(train: TrainSection) -> Path:
    return train.cache_dir or train.output / "cache"


def refuse_unlike(first: Dump, other: Dump) -> None:
    """Raise MismatchError unless two dumps can be trained on together: other targets, on ids that mean the same."""
    if first.fingerprint == other.fingerprint:
        raise MismatchError(
            f"train.dumps names one dump twice, {first.store.url} and {other.store.url}",
            got=f"fingerprint {first.fingerprint} at both",
            expected="dumps that differ",
            fix="name it once, and say with `weight` how often its samples are seen",
        )
    here, there = (
        {"tokenizer": dump.provenance.tokenizer.model_dump(), "lm_head_rows": dump.provenance.teacher.lm_head_rows}
        for dump in (first, other)
    )
    refuse_differences(
        f"the dump {other.store.url} cannot be mixed with {first.store.url}",
        differences(here, there),
        fix="train on dumps of one tokenizer, whose teachers' heads have as many rows; or one run after the other, "
        "with student.adapter",
    )


def _order_of(source: Source, train: TrainSection, *, budget: int) -> Order:
    """The order of a dump; over all of it, with as much open at a time as fits into `budget` bytes, or in windows."""
    run, whole = source.dump.provenance, train.shuffle == "epoch"
    return Order(
        samples=run.corpus.samples,
        samples_per_unit=run.samples_per_unit,
        window_units=run.units if whole else train.shuffle_window_units,
        block_units=units_within(source.dump, budget) if whole else train.shuffle_block_units,
        seed=train.seed,
    )


def _open_heldout(section: DumpSection, sources: Sequence[Source], loss: LossSection, train: TrainSection) -> Heldout:
    """The held-out dump, which is of the same tokenizer and none of the dumps that are trained on."""
    found = _open_dump(section, train)
    for dump in (source.dump for source in sources):
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
    found.read_seal()  # Asked first: its records then come from its manifest, not one by one.
    # The arms without a divergence have no temperature of their own.
    temperature = loss.temperature
    if not train.distils:
        temperature = min(found.provenance.temperatures, key=lambda stored: stored != 1.0)
    return Heldout(found, temperature=temperature, limit=train.micro_batch)


def trained_on(run: TrainingRun, step: int, event: Event) -> dict[str, TrainedOn]:
    """What the summary says of the dumps after so many steps, if there are several."""
    return {
        source.name: TrainedOn(
            url=source.dump.store.url,
            fingerprint=source.dump.fingerprint,
            weight=source.weight,
            alpha=source.loss.alpha if run.train.distils else 0.0,
            samples=samples,
            losses=(event.dumps or {}).get(source.name),
        )
        for source, samples in zip(run.mixed, run.mix.taken(step), strict=False)
    }


def stored_rows(run: TrainingRun) -> list[Row]:
    """The first usable sample that was trained on, and then the others of its unit."""
    for step in range(run.steps):
        for sample in run.mix.step_samples(step).tolist():
            dump, index = run.mix.locate(sample)
            unit, place = divmod(index, run.mix.orders[dump].samples_per_unit)
            rows = run.dumps[dump].read_unit(unit)
            if rows.status[place] == OK:
                return [rows.row(i) for i in (place, *range(len(rows))) if rows.status[i] == OK]
    return []
