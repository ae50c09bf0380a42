"""The model card: README.md of what a run leaves behind, with what was trained from what, how, and what came out."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

from storage_schemas.reader import Dump
from student_train.config import LoraSection, LossSection, StudentSection, TrainSection
from student_train.metrics import Event

CARD = "README.md"
CURVE_POINTS = 10
"""Rows of the training curve, at most."""
PACKAGES = ("llm-neo", "torch", "transformers", "peft", "deepspeed")
SAVED_AS = {"pissa": ", saved as a plain LoRA of twice the rank", "moslora": ", saved as a plain LoRA"}
"""What became of the variants that peft would not load as they were trained."""

_USE = "## Use"
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, {folder})
model.generation_config = GenerationConfig.from_pretrained({folder})  # stops at the learned end of turn
tokenizer = AutoTokenizer.from_pretrained({folder})
```

```sh
llm-neo merge {word} merged  # for vLLM and llama.cpp; docs/serving.md of LLM-Neo says when it can be left out
```"""
_USE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder})
```

```sh
vllm serve {word}
python convert_hf_to_gguf.py {word} --outfile model.gguf  # of llama.cpp
```"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `llm-neo evaluate --json` printed for the student before and after training."""

    url: str
    """The dump that it was evaluated on."""
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def model_card(
    dump: Dump,
    student: StudentSection,
    loss: LossSection,
    train: TrainSection,
    events: Sequence[Event],
    *,
    folder: Path,
    evaluation: Evaluation | None = None,
) -> str:
    """The card of a run's adapter, or of its model for the full arms, with front matter for the hub.

    Args:
        dump: that it was trained on.
        student: where it started.
        loss: as configured.
        train: as configured.
        events: all of the run, at least one.
        folder: where it lies.
        evaluation: if there was one.
    """
    teacher = dump.provenance.origin.model
    base = f"{student.model!r}, revision={student.revision!r}" if student.revision else repr(student.model)
    lines = [
        f"# {Path(student.model).name}: {train.arm} from {Path(teacher).name}",
        "",
        f"`{student.model}`, distilled from stored distributions of `{teacher}` with LLM-Neo"
        if train.distils
        else f"`{student.model}`, trained on the corpus of a dump of `{teacher}` with LLM-Neo",
        "([arXiv 2411.06839](https://arxiv.org/abs/2411.06839)). The teacher was not there during training.",
        "",
        "| | |",
        "|---|---|",
        *[f"| {name} | {text} |" for name, text in _facts(dump, student, loss, train, events)],
        "",
        "## Training",
        "",
        "Means per supervised token since the row before, in nats.",
        "",
        "| step | loss | cross-entropy | divergence | learning rate |",
        "|---|---|---|---|---|",
        *_curve(events, distils=train.distils),
        "",
        *(_evaluated(evaluation) if evaluation else ()),
        _USE,
        "",
        (_USE_ADAPTER if train.lora else _USE_MODEL).format(base=base, **_written(folder)),
    ]
    return _front(student, train) + "\n".join(lines) + "\n"


def merged_card(card: str, folder: Path) -> str | None:
    """The card of an adapter, as that of the model it was folded into; None if it is not a card with front matter.

    Args:
        card: README.md of the adapter; what its owner has added before the last section stays.
        folder: where the merged model lies.
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
    before = card[found.end() :].partition(f"\n{_USE}\n")[0].rstrip()
    use = f"The adapter is folded into the weights.\n\n{_USE_MODEL.format(**_written(folder))}"
    return f"{_yaml(front)}{before}\n\n{_USE}\n\n{use}\n"


def _written(folder: Path) -> dict[str, str]:
    """A directory as Python and as a shell read it."""
    return {"folder": repr(str(folder)), "word": shlex.quote(str(folder))}


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


def _facts(
    dump: Dump, student: StudentSection, loss: LossSection, train: TrainSection, events: Sequence[Event]
) -> Iterator[tuple[str, str]]:
    """(name, text) of what the run was made of."""
    run, last = dump.provenance, events[-1]
    yield "student", _named(student.model, student.revision)
    yield "teacher", f"{_named(run.origin.model, run.origin.revision)}, {run.teacher.dtype}"
    yield "dump", f"`{dump.store.url}`, fingerprint `{dump.fingerprint}`"
    yield "targets", ", ".join(f"{name} {value}" for name, value in run.estimator.model_dump().items())
    yield "arm", f"`{train.arm}`"
    yield "loss", _objective(loss) if train.distils else "cross-entropy"
    if train.lora:
        yield "adapter", _adapter(student.lora)
    supervised = sum(event.supervised_tokens for event in events)
    steps = f"{last.step} steps of {train.global_batch_size} samples, {last.epoch:.2f} epochs"
    yield "training", f"{steps}, {supervised:,} supervised tokens"
    schedule = f"{train.lr_scheduler_type} with {100 * train.warmup_ratio:g} % warm-up"
    clip = f"gradient norm clipped at {train.max_grad_norm:g}" if train.max_grad_norm else "no clipping"
    yield "optimizer", f"AdamW, {train.learning_rate:g}, {schedule}, weight decay {train.weight_decay:g}, {clip}"
    yield "precision", f"{train.precision}, DeepSpeed ZeRO-{train.zero_stage}"
    yield "seed", str(train.seed)
    yield "versions", ", ".join(f"{name} {package_version(name)}" for name in PACKAGES)


def _named(model: str, revision: str | None) -> str:
    return f"`{model}`, revision `{revision}`" if revision else f"`{model}`"


def _objective(loss: LossSection) -> str:
    beta = f", beta = {loss.beta:g}" if loss.divergence in ("jsd", "skewed_kl", "skewed_reverse_kl") else ""
    divergence = f"D = `{loss.divergence}` at T = {loss.temperature:g}{beta}"
    return f"(1 - alpha) CE + alpha T^2 D, alpha = {loss.alpha:g}, {divergence}"


def _adapter(lora: LoraSection) -> str:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    numbers = f"r = {lora.r}, alpha = {lora.scaled_by:g}, dropout {lora.dropout:g}"
    return f"`{lora.variant}`, {numbers}, on `{targets}`{SAVED_AS.get(lora.variant, '')}"


def _curve(events: Sequence[Event], *, distils: bool) -> Iterator[str]:
    """Rows with the means of at most CURVE_POINTS spans of steps, in which each token weighs the same."""
    rows = min(CURVE_POINTS, len(events))
    for i in range(rows):
        part = events[i * len(events) // rows : (i + 1) * len(events) // rows]
        tokens = max(1, sum(event.supervised_tokens for event in part))
        loss, ce, kl = (
            sum(getattr(event, name) * event.supervised_tokens for event in part) / tokens
            for name in ("loss", "ce", "kl")
        )
        divergence = f"{kl:.4f}" if distils else "-"
        yield f"| {part[-1].step} | {loss:.4f} | {ce:.4f} | {divergence} | {part[-1].learning_rate:.2e} |"


def _evaluated(found: Evaluation) -> Iterator[str]:
    yield from ("## Evaluation", "")
    yield f"Against the teacher, on {found.after['supervised_tokens']:,} supervised tokens of `{found.url}`."
    yield from ("KL is over the stored entries and one tail bucket.", "", "| | before | after |", "|---|---|---|")
    for name, key, form in (
        ("KL(teacher, student), nats per token", "kl_mean", "{:.4f}"),
        ("cross-entropy, nats per token", "ce", "{:.4f}"),
        ("same most likely token", "top1_agreement", "{:.1%}"),
    ):
        before, after = found.before[key], found.after[key]
        if before is not None and after is not None:
            yield f"| {name} | {form.format(before)} | {form.format(after)} |"
    yield ""


def package_version(name: str) -> str:
    """Of an installed package; a dash for one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
