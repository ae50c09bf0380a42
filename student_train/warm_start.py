"""A run that begins from a checkpoint of another: with its weights, and with Adam's moments of them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage_schemas.canonical import differences
from storage_schemas.common.errors import MismatchError, NeoError
from storage_schemas.provenance import refuse_differences
from student_train.checkpoint import Beginning, Checkpoint, Checkpoints
from student_train.config import TrainSection
from student_train.model.student import FILES
from student_train.resume import as_configured, identity_of, known
from student_train.training_run import TrainingRun, nothing_to_begin_from, refuse_unfit_start
from student_train.world import World

log = logging.getLogger(__name__)


def begin(world: World, run: TrainingRun, checkpoint: Checkpoint | None) -> tuple[TrainingRun, Checkpoint | None]:
    """Where the weights come from, and the run with what it began from. Collective.

    Args:
        checkpoint: of this run, if there is one. At step 0 nothing has been trained.

    Returns:
        The checkpoint of this run, or the newest one of `train.warm_start`; None if that is not set. What differs there
        is logged.

    Raises:
        MismatchError: there is none, or it is of other trained weights than this run's.
    """
    if checkpoint is not None and checkpoint.step:
        return replace(run, began=checkpoint.state.began), checkpoint
    folder = run.train.warm_start
    if folder is None:
        return run, None
    step = int(world.told(lambda: _newest_step(run.train, folder)))
    found = world.together(lambda: _checkpoints(folder).at(step))
    world.on_main(lambda: _compare(found, run, folder))
    return replace(run, began=Beginning(source=str(folder), step=step, digest=found.digest)), found


def refuse_other_start(train: TrainSection, began: Beginning | None) -> None:
    """Raise MismatchError if a run that goes on began elsewhere than `train.warm_start` says.

    Where it began nothing need be there any more; another name is good if that very checkpoint is found there.
    """
    folder, source = train.warm_start, began.source if began else None
    if (str(folder) if folder else None) == source or (folder and began and _holds(folder, began)):
        return
    raise MismatchError(
        "the run did not begin from train.warm_start",
        got=f"train.warm_start: {folder or 'null'}",
        expected=f"train.warm_start: {source or 'null'}",
        fix="restore this setting, though nothing need be there any more; or choose another train.output",
    )


def refuse_other_student(checkpoint: Checkpoint, files: Mapping[str, str], model: str) -> None:
    """Raise MismatchError if its weights belong to another model than that of these files."""
    if other := differences(checkpoint.state.identity.get(FILES, {}), files):
        raise MismatchError(
            "train.warm_start is of another student: " + ", ".join(other.keys),
            got=f"{other.here} in the checkpoint",
            expected=f"{other.there} in {model}",
            fix="set student.model to the one that was trained there, or choose another train.warm_start",
        )


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(str(folder / "checkpoints"))


def _holds(folder: Path, began: Beginning) -> bool:
    try:
        return _checkpoints(folder).at(began.step).digest == began.digest
    except NeoError:
        return False


def _newest_step(train: TrainSection, folder: Path) -> int:
    refuse_unfit_start(train)
    found = _checkpoints(folder).newest()
    if found is None or not found.step:
        raise nothing_to_begin_from(folder)
    return found.step


def _compare(checkpoint: Checkpoint, run: TrainingRun, folder: Path) -> None:
    """Refuse other trained weights, and tell of what else differs."""
    there, here = known(checkpoint.state), identity_of(run)
    shaping = {key for key in {*there, *here} if key.startswith("student.lora.") and key != "student.lora.dropout"}
    refuse_differences(
        f"{folder} has trained other weights",
        differences(_only(here, shaping), _only(there, shaping)),
        fix="give this run the method and student.lora of that one, or choose another train.warm_start",
    )
    changed = differences(as_configured(there), as_configured(here))
    log.info("training begins with the weights and moments of step %d in %s", checkpoint.step, folder)
    if changed:
        log.info("there: %s; here: %s", changed.here, changed.there)


def _only(identity: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key in keys}
