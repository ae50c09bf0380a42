"""The model card: README.md of what a run leaves behind, with what was trained from what, how, and what came out.

Its text is in `model_card.md.jinja` and `use_model.md.jinja`.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from storage_schemas.reader import Dump
from student_train.config import LossSection, StudentSection, TrainSection
from student_train.metrics import Event, HeldoutResult

CARD = "README.md"
CURVE_POINTS = 10
"""Rows of the training curve, at most."""
PACKAGES = ("llm-neo", "torch", "transformers", "peft", "deepspeed")
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `llm-neo evaluate --json` printed for the student before and after training."""

    url: str
    """The dump that it was evaluated on."""
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @classmethod
    def of(cls, url: str, before: HeldoutResult, after: HeldoutResult) -> "Evaluation":
        """What training itself has found."""
        first, last = ({**result.model_dump(), "kl_mean": result.kl} for result in (before, after))
        return cls(url=url, before=first, after=last)


def model_card(
    dumps: Sequence[Dump],
    student: StudentSection,
    loss: LossSection,
    train: TrainSection,
    events: Sequence[Event],
    *,
    folder: Path,
    evaluation: Evaluation | None = None,
) -> str:
    """The card of a run's adapter, or of its model for the full arms, with front matter for the hub.

    `dumps` are all that it was trained on, in the order of `train.dumps` if there are several; `events` are all of the
    run, at least one; `folder` is where the adapter or model lies.
    """
    return _render(
        "model_card.md.jinja",
        front=_front(student, train),
        dumps=dumps,
        mixed=[{"weight": one.weight, "alpha": loss.alpha if one.alpha is None else one.alpha} for one in train.dumps],
        student=student,
        loss=loss,
        train=train,
        events=events,
        curve=_curve(events),
        packages=PACKAGES,
        evaluation=evaluation,
        folder=str(folder),
    )


def merged_card(card: str, folder: Path) -> str | None:
    """The card of an adapter, as that of the model in `folder` that it was folded into; None if it has no front matter.

    What its owner has added before the last section stays.
    """
    found = _FRONT.match(card)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        front = None
    if found is None or not isinstance(front, dict):
        return None
    front["library_name"] = "transformers"
    if "base_model" in front:
        front["base_model_relation"] = "finetune"
    before = card[found.end() :].partition("\n## Use\n")[0].rstrip()
    use = _render("use_model.md.jinja", folder=str(folder))
    return f"{_yaml(front)}{before}\n\n## Use\n\nThe adapter is folded into the weights.\n\n{use}"


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    # A directory is written as Python and as a shell read it.
    environment.filters |= {
        "repr": repr, "quote": shlex.quote, "name": lambda model: Path(model).name, "version": package_version
    }  # fmt: skip
    return environment.get_template(template).render(**values)


def _front(student: StudentSection, train: TrainSection) -> str:
    front: dict[str, Any] = {}
    # The hub refuses a card that names a directory.
    if _on_hub(student.model):
        front |= {"base_model": student.model, "base_model_relation": "adapter" if train.lora else "finetune"}
    front |= {"library_name": "peft" if train.lora else "transformers", "pipeline_tag": "text-generation"}
    tags = ["llm-neo", "knowledge-distillation"] if train.distils else ["llm-neo"]
    front["tags"] = list(dict.fromkeys([*tags, "lora", student.lora.variant])) if train.lora else tags
    return _yaml(front)


def _yaml(front: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False)}---\n"


def _on_hub(model: str) -> bool:
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not Path(model).is_dir()


def _curve(events: Sequence[Event]) -> Iterator[Event]:
    """The last events of at most CURVE_POINTS spans of steps, with the means of these, in which each token weighs the
    same."""
    rows = min(CURVE_POINTS, len(events))
    for i in range(rows):
        part = events[i * len(events) // rows : (i + 1) * len(events) // rows]
        tokens = max(1, sum(event.supervised_tokens for event in part))
        means = {
            name: sum(getattr(event, name) * event.supervised_tokens for event in part) / tokens
            for name in ("loss", "ce", "kl")
        }
        yield part[-1].model_copy(update=means)


def package_version(name: str) -> str:
    """Of an installed package; a dash for one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
