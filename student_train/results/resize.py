"""A student with rows for the tokens that a dump's tokenizer has and its own has not."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.publish import publishing
from storage_schemas.reader import Dump
from storage_schemas.tokenizer import new_tokens, refuse_other_tokenizer
from student_train.model.load import load_model
from student_train.model.student import vocab_rows
from student_train.model.tokenizers import has_tokenizer, load_tokenizer, tokenizer_in, write_files
from student_train.results.end_of_turn import generation_of
from student_train.results.final import save_model
from student_train.results.merge import PROBE_TOKENS, refuse_used
from student_train.results.model_card import CARD

MULTIPLE = 64
"""Rows are padded to a multiple of this: products of other widths are slower on GPUs."""


@torch.no_grad()
def resize(model: str, output: Path, dump: Dump, *, revision: str | None = None) -> tuple[int, int]:
    """Write a copy of a model with room for all tokens of a dump, and the dump's tokenizer beside it.

    New rows of embeddings and head begin near the mean of the others, as transformers draws them (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"); the others keep every bit. What was saved is
    loaded again and compared.

    Args:
        output: directory of the copy; it must not exist, or be empty.
        dump: whose targets it shall learn.

    Returns:
        Rows before and after.

    Raises:
        UsageError: `output` is not empty.
        MismatchError: the model's tokenizer means other tokens by the ids that both have, or it has room already.
        DataError: it was not saved as it is. TemporaryError: it cannot be written.
    """
    refuse_used(output)
    with publishing(output, setting="OUT") as staged:
        write_files(staged, dump.read_tokenizer())
        theirs = load_tokenizer(str(staged), None, fix="dump with another teacher").get_vocab()
        needed = max(theirs.values()) + 1
        if has_tokenizer(model, revision):
            ours = load_tokenizer(model, revision, fix="correct it, or remove it from the directory").get_vocab()
            refuse_other_tokenizer(theirs, ours, student_head=needed)
        whole = load_model(model, revision, dtype="auto")
        before, dtype = vocab_rows(whole), whole.dtype
        if before >= needed:
            raise MismatchError(
                f"{model} has a row for each token of the dump already",
                got=f"{before} rows for {needed} tokens",
                expected="fewer rows than tokens",
                fix="use it as it is; student.lora.modules_to_save trains rows that no token had",
            )
        whole = whole.float()
        old = [weight.clone() for weight in _ends(whole)]
        torch.manual_seed(0)
        whole.resize_token_embeddings(needed, pad_to_multiple_of=MULTIPLE, mean_resizing=True)
        assert all(torch.equal(weight[:before], rows) for weight, rows in zip(_ends(whole), old, strict=True))
        probe = torch.arange(PROBE_TOKENS)[None] * 7 % needed
        save_model(staged, whole, dtype, probe, generation_of(whole, tokenizer_in(staged), {}))
        after = vocab_rows(whole)
        added = len(new_tokens(theirs, before))
        (staged / CARD).write_text(
            f"# {Path(model).name}, resized\n\nThe rows of {model} ({before}), and {after - before} more, for {added} "
            "new tokens and padding. They begin near the mean of the others and have learned nothing: this is a "
            "student to train, not a model to use.\n"
        )
    return before, after


def _ends(model: Any) -> list[Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
