"""A run that begins from a checkpoint of another: with its weights, and with Adam's moments of them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage_schemas.canonical import differences
from storage_schemas.common.errors import MismatchError
from student_train.checkpoint import Checkpoint, Checkpoints
from student_train.model.student import FILES, START
from student_train.resume import as_configured, identity_of
from student_train.training_run import TrainingRun
from student_train.world import World

log = logging.getLogger(__name__)

_MARK = "checkpoint "


def warm_start(world: World, run: TrainingRun) -> Checkpoint | None:
    """The newest checkpoint of `train.warm_start`; None if that is not set. What differs is logged. Collective.

    Raises:
        MismatchError: there is none, or it is of other trained weights than this run's.
    """
    folder = run.train.warm_start
    if folder is None:
        return None
    there = Checkpoints(str(folder / "checkpoints"))
    step = int(world.told(lambda: _newest_step(there, folder, run)))
    checkpoint = world.together(lambda: there.at(step))
    world.on_main(lambda: _compare(checkpoint, run, folder))
    return checkpoint


def begun_from(trained: Checkpoint, *, own: bool) -> str | None:
    """What a checkpoint's identity says that the run began from. A run that goes on needs the other one no more.

    Args:
        trained: where its weights come from.
        own: whether that is a checkpoint of this run.
    """
    if not own:
        return f"{_MARK}{trained.digest}"
    known = trained.state.identity.get(START)
    return known if known and known.startswith(_MARK) else "train.warm_start"


def refuse_other_student(checkpoint: Checkpoint, files: Mapping[str, str], model: str) -> None:
    """Raise MismatchError if its weights belong to another model than that of these files."""
    if other := differences(checkpoint.state.identity.get(FILES, {}), files):
        raise MismatchError(
            "train.warm_start is of another student: " + ", ".join(other.keys),
            got=f"{other.here} in the checkpoint",
            expected=f"{other.there} in {model}",
            fix="set student.model to the one that was trained there, or choose another train.warm_start",
        )


def _newest_step(there: Checkpoints, folder: Path, run: TrainingRun) -> int:
    if folder.resolve() == run.train.output.resolve():
        raise MismatchError(
            "train.warm_start is the directory of this run",
            got=folder,
            expected="that of another run",
            fix="choose another train.output; or train.extend: true without train.warm_start, to go on",
        )
    found = there.newest()
    if found is None or not found.step:
        raise MismatchError(
            f"there is no checkpoint to begin from in {folder}",
            got=f"{len(there.steps())} checkpoints, none of which is complete and of a step that was trained",
            expected="the directory of a run with `checkpoints/`",
            fix="correct train.warm_start",
        )
    return found.step


def _compare(checkpoint: Checkpoint, run: TrainingRun, folder: Path) -> None:
    """Refuse other trained weights, and tell of what else differs."""
    known = {key: value for key, value in checkpoint.state.identity.items() if key not in (FILES, START)}
    wanted = identity_of(run)
    shaping = {key for key in {*known, *wanted} if key.startswith("student.lora.") and key != "student.lora.dropout"}
    if other := differences(_only(known, shaping), _only(wanted, shaping)):
        raise MismatchError(
            f"{folder} has trained other weights: {', '.join(other.keys)}",
            got=other.here,
            expected=other.there,
            fix="give this run the method and student.lora of that one, or choose another train.warm_start",
        )
    changed = differences(as_configured(known), as_configured(wanted))
    log.info("training begins with the weights and moments of step %d in %s", checkpoint.step, folder)
    if changed:
        log.info("there: %s; here: %s", changed.here, changed.there)


def _only(identity: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key in keys}
