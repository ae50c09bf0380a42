"""What a run leaves behind: a plain peft adapter, or a model for the full arms, proven by loading it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from storage_schemas.common.errors import DataError
from storage_schemas.common.publish import publishing
from storage_schemas.logits import relative_difference
from student_train.config import StudentSection, TrainSection
from student_train.model.adapter import attach, plain_adapter
from student_train.model.load import load_model
from student_train.model.scaling import scale_between
from student_train.model.student import DTYPES, Student
from student_train.model.tokenizers import tokenizer_in, write_files
from student_train.results.end_of_turn import GENERATION, generation_of
from student_train.results.model_card import CARD
from student_train.results.saved import ADAPTER_WEIGHTS, load_adapter, write_record

TOLERANCE = 1e-4
"""By how much two ways to the same logits may differ in fp32 on one CPU, relative to the largest of them. They add the
same numbers in another order, so that they differ by units in the last place (2^-24) and what the model makes of these.
Models with attention sinks make up to 60 of one: 0.24 was seen between bf16 activations, whose unit is 2^-8, and fp32.
In fp32 that is 4e-6. See docs/design/adapters.md."""


def write_final(
    folder: Path,
    student: Student,
    section: StudentSection,
    train: TrainSection,
    *,
    weights: Mapping[str, Tensor],
    tokenizer: Mapping[str, bytes],
    card: str,
    input_ids: Int64[Tensor, "1 seq"],
    ends: Mapping[int, int],
) -> str:
    """Write, load again, compare in fp32 on the CPU, and only then give it its name. One rank does this alone.

    Args:
        folder: `final/`; what an interrupted attempt left there is replaced.
        student: the trained student; only its structure is used, its weights may be spread over ranks.
        weights: fp32 weights by parameter name.
        tokenizer: the dump's tokenizer files.
        input_ids: tokens of one stored row.
        ends: how many supervised spans each token ends, see `end_of_turn.span_ends`.

    Returns:
        Hash of the record of what was written.

    Raises:
        DataError: what was written does not give the same logits.
        TemporaryError: it cannot be written now. MismatchError: not ever.
    """
    with publishing(folder, setting="train.output", replace=True) as staged, torch.no_grad():
        write_files(staged, tokenizer)
        if train.lora:
            _save_adapter(staged, student, section, weights)
            expected = _trained_logits(student, section, train, weights, input_ids)
            base = load_model(section.model, section.revision, dtype=torch.float32, trust=section.trust_remote_code)
            generation_of(base, tokenizer_in(staged), ends).to_json_file(str(staged / GENERATION))
            found = load_adapter(base, staged)(input_ids=input_ids, use_cache=False).logits
            refuse_other_logits(staged, found, expected)
        else:
            model = load_model(section.model, section.revision, dtype=torch.float32, trust=section.trust_remote_code)
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
            generation = generation_of(model, tokenizer_in(staged), ends)
            trust = section.trust_remote_code
            save_model(staged, model, DTYPES[train.precision], input_ids, generation, trust=trust)
        (staged / CARD).write_text(card, encoding="utf-8")
        return write_record(staged, (student.files or None) if train.lora else None)


def refuse_other_logits(what: Path, found: Tensor, expected: Tensor) -> None:
    """Raise DataError unless two models gave the same logits in fp32."""
    off = relative_difference(found, expected)
    if not off <= TOLERANCE:
        raise _not_the_same(what, "logits", f"off by {off:.2g} of the largest logit", f"at most {TOLERANCE:.0e}")


@torch.no_grad()
def save_model(
    folder: Path,
    model: Any,
    dtype: torch.dtype,
    input_ids: Int64[Tensor, "1 seq"],
    generation: GenerationConfig,
    *,
    trust: bool = False,
) -> None:
    """Save a model, and prove that what was saved has its weights, rounded once, and with these its logits.

    Args:
        model: in fp32; in `dtype` afterwards.
        input_ids: tokens to compare the logits on, in fp32.
        generation: how it is used; the config's special tokens become the same.
        trust: it brings code, which is saved beside it and may be run.

    Raises:
        DataError: a weight differs in one bit, or a setting was lost.
    """
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    expected = model.eval()(input_ids=input_ids, use_cache=False).logits
    model.config.eos_token_id, model.config.pad_token_id = generation.eos_token_id, generation.pad_token_id
    model.generation_config = GenerationConfig()  # transformers does not save all that it loads.
    model.to(dtype).save_pretrained(str(folder), safe_serialization=True)
    generation.to_json_file(str(folder / GENERATION))
    again = load_model(str(folder), None, dtype=torch.float32, trust=trust).eval()
    own, found = model.state_dict(), again.state_dict()
    different = [name for name in sorted({*own, *found}) if not _equal(own.get(name), found.get(name))]
    if different:
        named = ", ".join(different[:3])
        raise _not_the_same(folder, "weights", f"{len(different)} others, such as {named}", f"{len(own)} equal tensors")
    refuse_other_logits(folder, again(input_ids=input_ids, use_cache=False).logits, expected)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.to(other.dtype), other)


def _not_the_same(what: Path, kind: str, got: str, expected: str) -> DataError:
    return DataError(
        f"{what} does not give the {kind} that it should",
        got=got,
        expected=expected,
        fix="do not use it; if the versions of peft and transformers are as required, report this",
    )


def _trained_logits(
    student: Student,
    section: StudentSection,
    train: TrainSection,
    weights: Mapping[str, Tensor],
    input_ids: Int64[Tensor, "1 seq"],
) -> Float[Tensor, "1 seq vocab"]:
    """Of what was trained, made anew in fp32: the model as training builds it, with the trained weights in it."""
    base = load_model(section.model, section.revision, dtype=torch.float32, trust=section.trust_remote_code)
    model = attach(base, section.lora, seed=train.seed, initial=student.initial)
    scale_between(model)
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)
    return model.eval()(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


def _save_adapter(folder: Path, student: Student, section: StudentSection, weights: Mapping[str, Tensor]) -> None:
    config, state = plain_adapter(student.module.student, weights, student.initial)
    local = Path(section.model)
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else section.model
    config.revision = section.revision
    config.save_pretrained(str(folder))
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    found = load_file(folder / ADAPTER_WEIGHTS)
    if found.keys() != state.keys() or not all(torch.equal(found[name], value) for name, value in state.items()):
        raise _not_the_same(folder / ADAPTER_WEIGHTS, "weights", "others", f"{len(state)} equal tensors")
