"""From an adapter to a model that needs no peft."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.common.publish import publishing
from student_train.model.load import load_model
from student_train.model.tokenizers import FILES, tokenizer_in
from student_train.results.end_of_turn import GENERATION, generation_of
from student_train.results.final import refuse_other_logits, save_model
from student_train.results.model_card import CARD, merged_card
from student_train.results.saved import load_adapter, refuse_no_adapter, source_of

PROBE_TOKENS = 16
"""Tokens that adapter and merged model are compared on."""
DTYPES = ("bfloat16", "float16", "float32")


@torch.no_grad()
def merge(
    adapter_dir: Path, output: Path, dtype: str | None = None, base: Path | None = None, *, trust: bool = False
) -> str:
    """Fold an adapter into its base model, prove it, and save it with tokenizer and generation config.

    The sum is made in fp32, must give the adapter's logits there, and is rounded once. What was saved is loaded again
    and must hold the rounded weights, bit for bit.

    Args:
        adapter_dir: directory of a peft adapter.
        output: directory of the model; it must not exist, or be empty.
        dtype: `bfloat16`, `float16` or `float32`; None: as the base model is stored.
        base: where the base model lies, if not where the adapter says.
        trust: run the code that the base model brings, which `base` must name then.

    Returns:
        The dtype that it was saved in, as above.

    Raises:
        UsageError: `output` is not empty, or no such dtype.
        MismatchError: there is no adapter, or it does not fit its base.
        DataError: the adapter is damaged; the merged model gives other logits, or was not saved as it is.
        TemporaryError: it cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("no such dtype", got=dtype, expected=f"one of {', '.join(DTYPES)}")
    refuse_used(output)
    fix = "give the directory of a peft adapter; the methods full_sft and full_kd save whole models"
    refuse_no_adapter(adapter_dir, expected="the `final/` of an adapter run", fix=fix)
    source, revision = source_of(adapter_dir, base, trust=trust)
    whole = load_model(source, revision, dtype="auto" if dtype is None else torch.float32, trust=trust)
    wanted = whole.dtype if dtype is None else getattr(torch, dtype)
    adapted = load_adapter(whole.float(), adapter_dir)
    probe = torch.arange(PROBE_TOKENS)[None] * 7 % whole.get_input_embeddings().weight.shape[0]
    expected = adapted(input_ids=probe, use_cache=False).logits
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise MismatchError(
            f"the adapter in {adapter_dir} cannot be folded into its base model", got=str(error)[:500],
            expected="finite weights, and biases only where the base model has them", fix="use it with peft, as it is",
        ) from error  # fmt: skip
    refuse_other_logits(adapter_dir, merged(input_ids=probe, use_cache=False).logits, expected)

    with publishing(output, setting="OUT") as staged:
        _copy_tokenizer(adapter_dir, source, revision, staged)
        if (adapter_dir / GENERATION).is_file():
            merged.generation_config = GenerationConfig.from_pretrained(str(adapter_dir))
        generation = generation_of(merged, tokenizer_in(staged), {})
        save_model(staged, merged, wanted, probe, generation, trust=trust)
        own_card = adapter_dir / CARD
        card = merged_card(own_card.read_text(encoding="utf-8"), output) if own_card.is_file() else None
        if card is not None:
            (staged / CARD).write_text(card, encoding="utf-8")
    return str(wanted).removeprefix("torch.")


def refuse_used(output: Path) -> None:
    """Raise UsageError unless this is a new directory, or an empty one."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"{output} is not empty", got="a file, or a directory with content", expected="a new directory",
            fix="choose another output, or remove it",
        )  # fmt: skip


def _copy_tokenizer(adapter_dir: Path, source: str, revision: str | None, folder: Path) -> None:
    """The adapter's own tokenizer, else its base's, file by file."""
    where = adapter_dir
    if not (adapter_dir / "tokenizer_config.json").is_file():
        hub = not Path(source).is_dir()
        where = Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)) if hub else source)
    for file in {file for pattern in FILES for file in where.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
