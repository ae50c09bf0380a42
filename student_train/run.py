"""A run: what it is made of, what decides its result, and what its directory already holds."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError, exit_code
from storage_schemas.common.frozen import Section
from storage_schemas.config import DumpSection
from storage_schemas.provenance import Provenance, parse_json, validated
from storage_schemas.reader import Dump
from storage_schemas.records import RUN
from storage_schemas.rows import OK, Row
from storage_schemas.stores.store import Store
from student_train.checkpoint import Checkpoint, Checkpoints, Extension, TrainState, choose, refuse_other_run
from student_train.config import LossSection, StudentSection, TrainSection
from student_train.data.order import Order
from student_train.data.stream import consumed_root
from student_train.metrics import EVENTS, refuse_missing_trackers
from student_train.model.losses import refuse_unsupported
from student_train.results.saved import read_record
from student_train.world import World

log = logging.getLogger(__name__)

SUMMARY, FINAL = "summary.json", "final"
LOOK_SECONDS = 2.0
"""Between two looks for a dump that has not begun."""
EXTENDABLE = {
    f"train.{name}"
    for name in (
        "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
        "adam_epsilon", "max_grad_norm", "precision",
    )
}  # fmt: skip
"""What `train.extend` may change, beside the loss: neither the samples of a step nor what is trained."""
PROBE_TOKENS = 64
"""Tokens of the row that the saved student is compared on, at most."""
FILES, WEIGHTS = "student.files", "student.weights"
"""Keys of what identifies the student in a checkpoint's identity, compared once it is loaded: `model_files.identity`,
and in checkpoints of version 1 `student.weights_digest`."""


class Summary(Section):
    """summary.json: a run that is done."""

    arm: str
    """What was trained."""
    steps: int
    """Optimizer steps."""
    epochs: float
    """Passes over the dump."""
    loss: float
    """Of the last logged steps, per supervised token."""
    ce: float
    """Its cross-entropy."""
    kl: float
    """Its divergence."""
    supervised_tokens: int
    """That were trained on, over all starts of this run."""
    tokens_per_second: float
    """Tokens through the student per second of training, over all ranks, since the last start."""
    seconds: float
    """Of training, since the last start."""
    data_wait_seconds: float
    """Of these, waited for data by the slowest rank."""
    peak_rss_bytes: int
    """Largest resident memory of any rank."""
    world_size: int
    """Ranks of the last start."""
    zero_stage: int
    """Of the last start."""
    resumed_from: int | None
    """Step that the last start went on from; null if it was the first."""
    fingerprint: str
    """Of the dump."""
    student: str
    """Where training began."""
    final: str
    """Path of the adapter, or of the model for the full arms."""
    final_record: str | None = None
    """sha256 of its llm-neo.json; null for runs from before there was one."""
    extended: tuple[Extension, ...] = ()
    """Where the run went on under other settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, as far as it is known before the student is loaded."""

    dump: Dump
    order: Order
    steps: int
    identity: dict[str, Any]
    checkpoints: Checkpoints
    student: StudentSection
    loss: LossSection
    train: TrainSection
    extended: tuple[Extension, ...] = ()


def await_dump(world: World, section: DumpSection, *, seconds: float, stop: Callable[[], bool]) -> None:
    """Wait until stage one has begun. Collective.

    Raises:
        TemporaryError: there is no dump after so many seconds, or a stop is asked for.
        MismatchError: there cannot be one: no such bucket, or no access.
    """
    store = world.together(lambda: Store(section.url, options=section.storage_options))
    began, told, stopping = time.monotonic(), False, False
    while True:
        found, error = False, None
        try:
            found = world.main and store.get_if_present(RUN) is not None
            waited = time.monotonic() - began
            if world.main and not found and (waited > seconds or stopping):
                raise TemporaryError(
                    f"there is no dump at {section.url}",
                    got=f"no {RUN} after {waited:.0f} s",
                    expected="a dump that `llm-neo dump` has begun",
                    fix="start stage one or correct dump.url, then run the same command again; "
                    "train.data_wait_seconds says how long to wait",
                )
        except Exception as caught:
            error = caught
        codes, founds, stops = zip(*world.gather([exit_code(error), found, stop()]), strict=True)
        world.leave_together(codes, error)
        if any(founds):
            return
        stopping = any(stops)
        if world.main and not told:
            log.info("there is no dump at %s yet; waiting for stage one, %.0f s at most", section.url, seconds)
        told = True
        time.sleep(min(LOOK_SECONDS, seconds))


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


def weigh(run: Run) -> None:
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
        raise _nothing_usable(run)
    log.warning(
        "only %d of the dump's %d samples can be trained on, fewer than train.global_batch_size (%d): an epoch is %d "
        "optimizer steps, training is %d; lower train.global_batch_size or raise train.epochs",
        usable, run.order.samples, wanted, run.order.steps_per_epoch, run.steps,
    )  # fmt: skip


def refuse_untrained(run: Run, updates: int) -> None:
    """Raise DataError if no step of the run had anything to learn from."""
    if not updates:
        raise _nothing_usable(run)


def _nothing_usable(run: Run) -> DataError:
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
) -> Run:
    """Open the dump and refuse what it cannot serve."""
    refuse_missing_trackers(train.report_to)
    cache = train.cache_dir or train.output / "cache"
    dump = Dump.open(section.url, options=section.storage_options, cache_dir=cache, cache_bytes=train.cache_bytes)
    dump.seal()  # Asked first: records of a sealed dump then come from its manifest, not one by one.
    refuse_contradicted(dump.provenance, stated)
    if train.distils:
        dump.provenance.temperature_index(loss.temperature)
        refuse_unsupported(loss.divergence, loss.temperature, dump.provenance.estimator.draws > 0)
    order = Order(
        samples=dump.provenance.corpus.samples,
        samples_per_unit=dump.provenance.samples_per_unit,
        window_units=train.shuffle_window_units,
        block_units=train.shuffle_block_units,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
    )
    steps = train.max_steps or order.steps_per_epoch * train.epochs
    return Run(
        dump=dump,
        order=order,
        steps=steps,
        identity=_identity(dump, student, loss, train, steps),
        checkpoints=Checkpoints(train.output / "checkpoints"),
        student=student,
        loss=loss,
        train=train,
    )


def _identity(
    dump: Dump, student: StudentSection, loss: LossSection, train: TrainSection, steps: int
) -> dict[str, Any]:
    """What decides the result: all but world size, ZeRO stage, micro-batches, and where and when things happen."""
    decisive = (
        "arm", "precision", "global_batch_size", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "shuffle_window_units", "shuffle_block_units",
        "seed",
    )  # fmt: skip
    found: dict[str, Any] = {f"train.{name}": getattr(train, name) for name in decisive}
    if train.lora:
        lora = student.lora.model_dump(mode="json") | {"alpha": student.lora.scaled_by}
        found |= {f"student.lora.{name}": value for name, value in lora.items()}
    if train.distils:
        found |= {f"loss.{name}": value for name, value in loss.model_dump(mode="json").items()}
    return found | {"dump.fingerprint": dump.fingerprint, "train.max_steps": steps}


def agree_on_checkpoint(world: World, run: Run) -> Checkpoint | None:
    """Rank 0 chooses and verifies; the others open the same one."""
    output = run.train.output
    used = any((output / name).exists() for name in (EVENTS, FINAL, SUMMARY))
    chosen = world.together(lambda: choose(run.checkpoints, resume=run.train.resume, used=used) if world.main else None)
    if chosen is not None and run.checkpoints.steps() == [0] and run.train.resume == "auto":
        chosen = None  # Nothing has been trained that could be lost: the record of the start is made anew.
    step = int(world.gather([-1 if chosen is None else chosen.step])[0][0])
    return world.together(lambda: _open_checkpoint(run, step, verify=world.main) if step >= 0 else None)


def _open_checkpoint(run: Run, step: int, *, verify: bool) -> Checkpoint:
    """The checkpoint, if it is of this run and the dump still holds what it was trained on."""
    checkpoint = run.checkpoints.at(step)
    known = {key: value for key, value in checkpoint.state.identity.items() if key not in (FILES, WEIGHTS)}
    changes = extension(run, checkpoint.state)
    refuse_other_run(known | (changes.after if changes else {}), run.identity)
    if step > run.steps:
        raise MismatchError(
            f"training has done {step} steps already",
            got=f"{run.steps} steps in all",
            expected=f"at least {step}",
            fix="raise train.max_steps or train.epochs",
        )
    if verify and (root := consumed_root(run.dump, run.order, step)) != checkpoint.state.consumed:
        raise DataError(
            "the dump has changed since the checkpoint was written",
            got=f"commit records with the hash {root[:16]}",
            expected=checkpoint.state.consumed[:16],
            fix="restore the dump, or train from the start in a new train.output",
        )
    return checkpoint


def extension(run: Run, state: TrainState) -> Extension | None:
    """What `train.extend` lets a run change on the way, where the configuration and the checkpoint differ in it."""
    wanted = {key: value for key, value in run.identity.items() if key in EXTENDABLE or key.startswith("loss.")}
    changed = {key: value for key, value in wanted.items() if key in state.identity and state.identity[key] != value}
    if not changed or not run.train.extend:
        return None
    return Extension(step=state.step, before={key: state.identity[key] for key in changed}, after=changed)


def finished(run: Run, step: int) -> Summary | None:
    """The summary, if the run is done."""
    data = Store(str(run.train.output)).get_if_present(SUMMARY)
    if data is None or step < run.steps or not (run.train.output / FINAL).is_dir():
        return None
    # Evaluation adds fields of its own.
    found = {name: value for name, value in parse_json(data, name=SUMMARY).items() if name in Summary.model_fields}
    summary = validated(Summary, found, name=SUMMARY)
    return summary if summary.steps == run.steps else None  # Else it is of the time before the run was extended.


def intact(run: Run) -> bool:
    """Whether `final/` of a finished run still is what was written; if not, a warning says what has changed."""
    done = finished(run, run.steps)
    try:
        if done is None or (record := read_record(run.train.output / FINAL)) is None:
            # Without a record it is from before there was one, or it was emptied.
            return done is not None and done.final_record is None and any((run.train.output / FINAL).iterdir())
        return done.final_record in (None, hashlib.sha256(record.sealed()).hexdigest())
    except DataError as error:
        log.warning("`final/` is damaged and is written again from the last checkpoint: %s", error)
        return False


def stored_rows(run: Run) -> list[Row]:
    """The first usable sample that was trained on, and then the others of its unit."""
    for step in range(run.steps):
        for sample in run.order.step_samples(step):
            unit, place = divmod(int(sample), run.dump.provenance.samples_per_unit)
            rows = run.dump.read_unit(unit)
            if rows.status[place] == OK:
                return [rows.row(i) for i in (place, *range(len(rows))) if rows.status[i] == OK]
    return []


def probe_of(rows: Sequence[Row]) -> torch.Tensor:
    """(1, seq) tokens of the first of some rows."""
    if not rows:
        return torch.zeros(1, 1, dtype=torch.int64)
    return torch.from_numpy(rows[0].input_ids[:PROBE_TOKENS].astype("int64"))[None]
