"""What a run leaves behind: a plain peft adapter, or a model for the full arms, proven by loading it again."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from storage_schemas.errors import DataError, TemporaryError
from student_train.adapter import plain_adapter
from student_train.card import CARD
from student_train.config import StudentSection, TrainSection
from student_train.student import DTYPES, Student, load_model, relative_difference, write_files

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By how much two loads of the same weights may differ, relative to the largest logit."""


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
    logits: Float[Tensor, "1 seq vocab"],
) -> None:
    """Write, load again, compare, and only then give it its name. One rank does this alone.

    Args:
        folder: `final/`; what an interrupted attempt left there is replaced.
        student: the trained student; only its structure is used, its weights may be spread over ranks.
        section: where the student came from.
        train: arm and precision.
        weights: fp32 weights by parameter name.
        tokenizer: the dump's tokenizer files.
        card: the model card.
        input_ids: tokens of one stored row.
        logits: what the trained student makes of them.

    Raises:
        DataError: what was written does not give the same logits.
        TemporaryError: it cannot be written.
    """
    staged = folder.with_name(f"{folder.name}.staged")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        if train.lora:
            _save_adapter(staged, student, section, weights)
        else:
            _save_model(staged, section, train, weights)
        write_files(staged, tokenizer)
        (staged / CARD).write_text(card, encoding="utf-8")
        loaded = load_final(staged, section, train)
        with torch.no_grad():
            found = loaded(input_ids=input_ids, use_cache=False).logits.float()
        refuse_other_logits(staged, found, logits, dtype=DTYPES[train.precision])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staged, folder)
    except OSError as error:
        raise TemporaryError(
            f"cannot write {folder}",
            got=str(error),
            fix="free space or repair the file system, then run the same command again; the checkpoint is intact",
        ) from error


def load_final(folder: Path, section: StudentSection, train: TrainSection) -> Any:
    """The student anew, from what was saved."""
    dtype = DTYPES[train.precision]
    if not train.lora:
        return load_model(str(folder), None, dtype=dtype).eval()
    base = load_model(section.model, section.revision, dtype=dtype)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def refuse_other_logits(what: Path, found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Raise DataError unless two models gave the same logits, as far as `dtype` can tell."""
    tolerance = TOLERANCE.get(dtype, 5e-2)
    off = relative_difference(found, expected)
    if not off <= tolerance:
        raise DataError(
            f"{what} does not give the logits that it should",
            got=f"off by {off:.2g} of the largest logit",
            expected=f"at most {tolerance:.0e}",
            fix="do not use it; if the versions of peft and transformers are as required, report this",
        )


def _save_adapter(folder: Path, student: Student, section: StudentSection, weights: Mapping[str, Tensor]) -> None:
    config, state = plain_adapter(student.module.student, weights, student.initial)
    local = Path(section.model)
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else section.model
    config.revision = section.revision
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_model(folder: Path, section: StudentSection, train: TrainSection, weights: Mapping[str, Tensor]) -> None:
    model = load_model(section.model, section.revision, dtype=DTYPES[train.precision])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.save_pretrained(str(folder), safe_serialization=True)
