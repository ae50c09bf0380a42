"""From an adapter to a model that needs no peft."""

import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from storage_schemas.errors import MismatchError, TemporaryError, UsageError
from student_train.card import CARD, merged_card
from student_train.evaluate import is_adapter, source_of
from student_train.final import refuse_other_logits, save_model
from student_train.student import load_model

PROBE_TOKENS = 16
"""Tokens that adapter and merged model are compared on."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@torch.no_grad()
def merge(adapter_dir: Path, output: Path, dtype: str | None = None) -> str:
    """Fold an adapter into its base model, prove it, and save it with tokenizer and generation config.

    The sum is made in fp32, must give the adapter's logits there, and is rounded once. What was saved is loaded again
    and must hold the rounded weights, bit for bit.

    Args:
        adapter_dir: directory of a peft adapter.
        output: directory of the model; it must not exist, or be empty.
        dtype: `bfloat16`, `float16` or `float32`; None: as the base model is stored.

    Returns:
        The dtype that it was saved in, as above.

    Raises:
        UsageError: `output` is not empty, or no such dtype.
        MismatchError: there is no adapter, or it does not fit its base.
        DataError: the merged model gives other logits, or was not saved as it is.
        TemporaryError: it cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("no such dtype", got=dtype, expected=f"one of {', '.join(DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"{output} is not empty", got="a file, or a directory with content", expected="a new directory",
            fix="choose another output, or remove it",
        )  # fmt: skip
    if not is_adapter(adapter_dir):
        raise MismatchError(
            f"{adapter_dir} is not an adapter", got="no adapter_config.json", expected="the `final/` of an adapter run",
            fix="give the directory of a peft adapter; the arms sft and kd save whole models",
        )  # fmt: skip
    source, revision = source_of(adapter_dir)
    stored = load_model(source, revision, dtype="auto").dtype
    wanted = stored if dtype is None else DTYPES[dtype]

    base = load_model(source, revision, dtype=torch.float32)
    generation = getattr(base, "generation_config", None)
    try:
        adapted = PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    except (RuntimeError, ValueError) as error:
        raise MismatchError(
            f"the adapter in {adapter_dir} does not fit its base model", got=str(error)[:500], expected=source,
            fix="correct base_model_name_or_path in adapter_config.json",
        ) from error  # fmt: skip
    probe = torch.arange(PROBE_TOKENS)[None] * 7 % base.get_input_embeddings().weight.shape[0]
    expected = adapted(input_ids=probe, use_cache=False).logits
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise MismatchError(
            f"the adapter in {adapter_dir} cannot be folded into its base model", got=str(error)[:500],
            expected="finite weights, and biases only where the base model has them", fix="use it with peft, as it is",
        ) from error  # fmt: skip
    refuse_other_logits(adapter_dir, merged(input_ids=probe, use_cache=False).logits, expected)

    staged = output.with_name(f".{output.name}.staged")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_model(staged, merged, wanted, probe)
        if generation is not None:
            generation.save_pretrained(str(staged))
        _save_tokenizer(adapter_dir, source, revision, staged)
        _save_card(adapter_dir / CARD, staged / CARD, output)
        if output.is_dir():
            output.rmdir()
        os.replace(staged, output)
    except OSError as error:
        raise TemporaryError(
            f"cannot write {output}", got=str(error), fix="free space, then run the same command again"
        ) from error
    return str(wanted).removeprefix("torch.")


def _save_card(own: Path, target: Path, output: Path) -> None:
    """The adapter's card, if it has one, as the model's."""
    card = merged_card(own.read_text(encoding="utf-8"), output) if own.is_file() else None
    if card is not None:
        target.write_text(card, encoding="utf-8")


def _save_tokenizer(adapter_dir: Path, source: str, revision: str | None, folder: Path) -> None:
    """The adapter's own tokenizer, else its base's."""
    own = (adapter_dir / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter_dir) if own else source, revision=None if own else revision)
    tokenizer.save_pretrained(str(folder))
