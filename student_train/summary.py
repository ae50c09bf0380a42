"""summary.json, which says that a run is done: written by its training, and added to by what comes after it."""

from pathlib import Path
from typing import Any

from storage_schemas.canonical import canonical_json, parse_json, validated
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.publish import publish
from student_train.checkpoint import Beginning, Extension
from student_train.config import Arm
from student_train.metrics import DumpLosses, HeldoutResult

SUMMARY, FINAL = "summary.json", "final"
"""Names in the run directory: the summary, and what the run leaves behind."""


class TrainedOn(FrozenModel):
    """One of the dumps that a run was trained on together."""

    url: str
    fingerprint: str
    weight: float
    """How often each of its samples was seen in an epoch."""
    alpha: float
    """Of its loss."""
    samples: int
    """That were taken from it, over all epochs."""
    losses: DumpLosses | None
    """Of the last logged steps."""


class Summary(FrozenModel):
    """summary.json: a run that is done."""

    arm: Arm
    """What was trained."""
    steps: int
    """Optimizer steps."""
    planned_steps: int | None = None
    """More than `steps` where training was stopped early; null for runs from before there was early stopping."""
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
    save_wait_seconds: float = 0.0
    """Of these, stood still for checkpoints, the last one with all that it took to write."""
    peak_rss_bytes: int
    """Largest resident memory of any rank."""
    world_size: int
    """Ranks of the last start."""
    zero_stage: int
    """Of the last start."""
    resumed_from: int | None
    """Step that the last start went on from; null if it was the first."""
    fingerprint: str
    """Of the dump; of several, of the first."""
    dumps: dict[str, TrainedOn] = {}
    """By name, if there are several."""
    student: str
    """The model that was trained."""
    began_from_adapter: str | None = None
    """`student.adapter`."""
    began_from_checkpoint: Beginning | None = None
    """Of `train.warm_start`."""
    final: str
    """Path of the adapter, or of the model for the full arms."""
    final_record: str
    """sha256 of its llm-neo.json."""
    extended: tuple[Extension, ...] = ()
    """Where the run went on under other settings."""
    heldout: tuple[HeldoutResult, ...] = ()
    """All evaluations on held-out samples, oldest first."""
    best_step: int | None = None
    """Of the best of them; null without any."""
    final_step: int | None = None
    """The step whose weights are in `final`: the last one, or with train.load_best_model_at_end the best one."""
    heldout_seconds: float = 0.0
    """Of training, since the last start, spent on evaluations; `seconds` and `tokens_per_second` leave them out."""


def write_summary(output: Path, content: dict[str, Any]) -> None:
    """Write a `Summary`, and what was found out about the finished run since, over what lies in the run directory."""
    publish(output / SUMMARY, canonical_json(content, indent=2))


def read_summary(output: Path) -> Summary | None:
    """What training has written; None where it has not ended. Raises DataError if it is damaged."""
    file = output / SUMMARY
    if not file.is_file():
        return None
    content = parse_json(file.read_bytes(), name=str(file))
    own = {name: value for name, value in content.items() if name in Summary.model_fields}
    return validated(Summary, own, name=str(file))
