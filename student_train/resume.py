"""Where a start goes on: from which checkpoint, whether that is of this run, what may have changed, what is done.

Which samples come next needs no deciding: the order is a function of the step.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from storage_schemas.canonical import differences
from storage_schemas.common.errors import DataError, MismatchError, NothingToResumeError
from storage_schemas.provenance import refuse_differences
from storage_schemas.reader import Dump
from student_train.checkpoint import Checkpoint, Checkpoints, Extension, TrainState
from student_train.config import METHODS, TrainSection
from student_train.data.mix import Mix
from student_train.heldout import stops_early
from student_train.metrics import EVENTS, HeldoutResult
from student_train.model.student import FILES, START
from student_train.model.student_files import sha256
from student_train.results.saved import RECORD, read_record
from student_train.summary import FINAL, SUMMARY, Summary, read_summary
from student_train.training_run import TrainingRun, refuse_impossible_schedule
from student_train.world import World

log = logging.getLogger(__name__)

DECISIVE = (
    "arm", "precision", "global_batch_size", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "shuffle_window_units", "shuffle_block_units", "seed",
)  # fmt: skip
"""Of the section `train`, what decides the result: all but world size, ZeRO stage, micro-batches, and where and when
things happen."""
LATER = ("lr_scheduler_kwargs", "warmup_steps", "loraplus_lr_ratio", "neftune_noise_alpha", "shuffle")
"""The same; checkpoints of before do not know them, and have the default."""
FIXED = {
    f"train.{name}"
    for name in (
        "arm", "global_batch_size", "shuffle", "shuffle_bytes", "shuffle_window_units", "shuffle_block_units", "seed"
    )
}  # fmt: skip
"""What `train.extend` may not change: the samples of a step and what is trained."""
MIXED = "train.dumps"
"""Of several dumps, fingerprint and weight are fixed as well; each has its alpha."""


class Start(NamedTuple):
    """What the ranks go on from."""

    run: TrainingRun
    """With what has changed on the way."""
    checkpoint: Checkpoint | None
    """None: nothing has been trained."""
    done: Summary | None
    """Of a run that is finished."""


def decide(world: World, run: TrainingRun) -> Start:
    """What is there to go on from. Rank 0 chooses and verifies; the others open the same checkpoint. Collective.

    Raises:
        NothingToResumeError: a checkpoint is asked for, or was there once, and none is valid.
        MismatchError: the checkpoint is of another run, or is to go on under other settings with nothing left to train;
            or a new run cannot have its schedule.
        DataError: the dump is not the one that was trained on.
    """
    step = int(world.told(lambda: _chosen_step(run)))
    if step < 0:
        world.on_main(lambda: refuse_impossible_schedule(run.train, run.steps))
        return Start(run, None, None)
    checkpoint = world.together(lambda: open_checkpoint(run, step, verify=world.main))
    state, changes = checkpoint.state, _extension(run, checkpoint.state)
    is_done = world.told(lambda: _is_done(run, state))
    if changes:
        world.on_main(lambda: _refuse_idle(run, state, changes, done=bool(is_done)))
    if is_done and (done := world.together(lambda: finished(run, state))):
        if world.main:
            log.info("%s is finished: %d steps; nothing to do", run.train.output, done.steps)
        return Start(run, checkpoint, done)
    world.on_main(lambda: run.left_behind(step, state.heldout) if step else None)
    if changes and world.main:
        log.info("from step %d on under other settings: %s; until then: %s", step, changes.after, changes.before)
    extended = state.extended + ((changes,) if changes else ())
    return Start(replace(run, extended=extended), checkpoint, None)


def identity_of(run: TrainingRun) -> dict[str, Any]:
    """What decides the result of a run: dotted name -> value."""
    found: dict[str, Any] = {f"train.{name}": getattr(run.train, name) for name in (*DECISIVE, *LATER)}
    if run.train.lora:
        lora = run.student.lora.model_dump(mode="json") | {"alpha": run.student.lora.scaled_by}
        if not lora["modules_to_save"]:  # Checkpoints of before do not know it.
            del lora["modules_to_save"]
        found |= {f"student.lora.{name}": value for name, value in lora.items()}
    if run.student.quantization is not None:  # The same.
        found["student.quantization"] = run.student.quantization
    if run.train.distils:
        found |= {f"loss.{name}": value for name, value in run.loss.model_dump(mode="json").items()}
    found |= {"train.max_steps": run.steps}
    if run.train.shuffle == "epoch":
        blocks = [order.block_units for order in run.mix.orders]
        found |= {"train.shuffle_bytes": run.train.shuffle_bytes, "train.shuffle_block_units": blocks}
        del found["train.shuffle_window_units"]
    if not run.mixed:
        return found | {"dump.fingerprint": run.dump.fingerprint}
    for i, source in enumerate(run.mixed):
        found |= {f"{MIXED}.{i}.fingerprint": source.dump.fingerprint, f"{MIXED}.{i}.weight": source.weight}
        found |= {f"{MIXED}.{i}.alpha": source.loss.alpha} if run.train.distils else {}
    return found


def choose(checkpoints: Checkpoints, *, resume: str, used: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None to start at the beginning.

    `resume` is `auto`, `must` or `never`; `used` says whether the run directory holds anything else that training has
    left there.

    Raises:
        NothingToResumeError: a checkpoint is asked for, or was there once, and none is valid.
        MismatchError: the directory is used and `resume` is `never`.
    """
    steps = checkpoints.steps()
    if resume == "never":
        if used or steps:
            raise MismatchError(
                "the run directory has been used, and train.resume is `never`",
                got=checkpoints.url,
                expected="an empty or new directory",
                fix="choose another train.output, or set train.resume: auto",
            )
        return None
    found = checkpoints.newest()
    # A start that was cut short while it wrote the record of step 0 has trained nothing that could be lost.
    if found is None and (used or any(steps) or resume == "must"):
        raise NothingToResumeError(
            "there is no valid checkpoint to resume from",
            got=f"{len(steps)} checkpoints in {checkpoints.url}, none of them complete",
            expected="a checkpoint whose COMMIT.json and files agree",
            fix="restore the checkpoints, or train from the start in a new train.output",
        )
    # Where nothing has been trained that could be lost, the record of the start is made anew.
    return None if resume == "auto" and steps == [0] else found


def _chosen_step(run: TrainingRun) -> int:
    """Of the checkpoint to go on from; -1 to start at the beginning."""
    used = any((run.train.output / name).exists() for name in (EVENTS, FINAL, SUMMARY))
    chosen = choose(run.checkpoints, resume=run.train.resume, used=used)
    return -1 if chosen is None else chosen.step


def open_checkpoint(run: TrainingRun, step: int, *, verify: bool) -> Checkpoint:
    """The checkpoint, if it is of this run and the dump still holds what it was trained on."""
    checkpoint = run.checkpoints.at(step)
    changes = _extension(run, checkpoint.state)
    refuse_other_run(known(checkpoint.state) | (changes.after if changes else {}), identity_of(run))
    if step > run.steps:
        raise MismatchError(
            f"training has done {step} steps already",
            got=f"{run.steps} steps in all",
            expected=f"at least {step}",
            fix="raise train.max_steps or train.epochs",
        )
    if verify and (root := consumed_root(run.dumps, run.mix, step)) != checkpoint.state.consumed:
        raise DataError(
            "the dump has changed since the checkpoint was written",
            got=f"commit records with the hash {root[:16]}",
            expected=checkpoint.state.consumed[:16],
            fix="restore the dump, or train from the start in a new train.output",
        )
    return checkpoint


def refuse_other_run(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise MismatchError, naming each field, if a checkpoint's identity is not that of this configuration."""
    refuse_differences(
        "the checkpoint is of another run",
        differences(as_configured(found), as_configured(wanted)),
        fix="restore these settings, or choose another train.output; "
        "train.extend: true goes on under another number of steps, schedule, optimizer, precision or loss",
    )


def as_configured(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity in the words of the configuration: checkpoints hold the method by its old name."""
    found = dict(identity)
    if "train.arm" in found:
        arm = found.pop("train.arm")
        found["train.method"] = METHODS.get(arm, arm)
    return found


def known(state: TrainState) -> dict[str, Any]:
    """A checkpoint's identity, but for what is compared once the student is loaded."""
    defaults = {f"train.{name}": TrainSection.model_fields[name].get_default() for name in LATER}
    return defaults | {key: value for key, value in state.identity.items() if key not in (FILES, START)}


def _extension(run: TrainingRun, state: TrainState) -> Extension | None:
    """What `train.extend` lets a run change on the way, where the configuration and the checkpoint differ in it."""
    before = known(state)
    wanted = {k: v for k, v in identity_of(run).items() if k.startswith(("train.", "loss.")) and not _fixed(k)}
    changed = {key: value for key, value in wanted.items() if key in before and before[key] != value}
    if not changed or not run.train.extend:
        return None
    return Extension(step=state.step, before={key: before[key] for key in changed}, after=changed)


def _fixed(key: str) -> bool:
    return key in FIXED or (key.startswith(MIXED) and not key.endswith(".alpha"))


def consumed_root(dumps: Sequence[Dump], mix: Mix, step: int) -> str:
    """Hash over the data files of all windows that the first `step` steps have read.

    Whether a dump was sealed by then makes no difference. Raises DataError if one of these units is gone.
    """
    digest = hashlib.sha256()
    for i, (dump, order, windows) in enumerate(zip(dumps, mix.orders, mix.windows(step), strict=True)):
        digest.update(f"dump {i}\n".encode() if i else b"")
        for unit in range(order.units_of_window(windows - 1).stop if windows else 0):
            record = dump.read_record(unit)
            if record is None:
                raise DataError(
                    f"unit {unit} of {dump.store.url} was trained on, and is not committed any more",
                    got="no commit record",
                    expected=f"commits/unit-{unit:08d}.json",
                    fix="restore the dump, or train from the start in a new train.output",
                )
            digest.update(f"{unit} {record.sha256}\n".encode())
    return digest.hexdigest()


def over(run: TrainingRun, step: int, results: Sequence[HeldoutResult]) -> bool:
    """Whether nothing is left to train after a step: it was the last one, or early stopping says so."""
    patience = run.train.early_stopping_patience
    return step >= run.steps or stops_early(run.comparable(results), run.train.metric_for_best_model, patience)


def finished(run: TrainingRun, state: TrainState) -> Summary | None:
    """The summary, if the run is done with that state."""
    if not (run.train.output / FINAL).is_dir():
        return None
    summary = read_summary(run.train.output)
    # Of another number it is of the time before the run was extended.
    if summary is None or (summary.steps, summary.planned_steps or summary.steps) != (state.step, run.steps):
        return None
    # An evaluation that was cut short may have been made after the checkpoint was written.
    results = summary.heldout or state.heldout
    if not over(run, state.step, results):
        return None
    return summary if summary.final_step in (None, run.exported(state.step, results)) else None


def _refuse_idle(run: TrainingRun, state: TrainState, changes: Extension, *, done: bool) -> None:
    """Raise MismatchError for other settings that nothing would be trained under; fewer steps may end a run where it
    is."""
    early, changed = state.step < run.steps, as_configured(changes.after)
    if not (done or over(run, state.step, state.heldout)) or (not early and changed.keys() == {"train.max_steps"}):
        return
    named = "train.early_stopping_patience" if early else "train.max_steps or train.epochs"
    raise MismatchError(
        f"train.extend: true changes settings, but {named} leaves nothing to train under them",
        got="; ".join([f"{state.step} steps done", *(f"{key} = {value}" for key, value in changed.items())]),
        expected="steps that are left to train",
        fix=f"raise {named}, or restore these settings",
    )


def _is_done(run: TrainingRun, state: TrainState) -> bool:
    """Whether the run is finished and `final/` is what was written; if it is not, a warning says what has changed."""
    summary, final = finished(run, state), run.train.output / FINAL
    try:
        return summary is not None and read_record(final) is not None and sha256(final / RECORD) == summary.final_record
    except DataError as error:
        log.warning("`final/` is damaged and is written again from the last checkpoint: %s", error)
        return False
