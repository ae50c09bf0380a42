"""Tokenizers on disk: their files, how they are loaded, and whether the student's means what the dump's does."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage_schemas.common.errors import DataError, MismatchError, first_line
from storage_schemas.tokenizer import new_tokens, refuse_other_tokenizer
from student_train.model.student_files import find_file

log = logging.getLogger(__name__)

FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja",
    "*.tiktoken", "spiece.model", "sentencepiece*", "tekken.json",
)  # fmt: skip
"""Names of a tokenizer's files."""

_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm", ".codes", ".tokenizer")
"""What the names of files end in that tokenizers of transformers save."""
SETTINGS = "tokenizer_config.json"
_OF_MODELS = ("config.json", ".index.json", "llm-neo.json")
"""What the names of files end in that say what a model or an adapter is; `SETTINGS` does not."""

NEW_TOKENS = (
    "%d tokens of the dump are new to the student's tokenizer, such as %s; its rows for them are padding, and stay "
    "what they are unless student.lora.modules_to_save trains both embeddings and head"
)
"""What to warn of."""


def has_tokenizer(model: str, revision: str | None) -> bool:
    """Whether a model brings files of a tokenizer, whole or not."""
    folder = Path(model)
    if folder.is_dir():
        return any(True for pattern in FILES for _ in folder.glob(pattern))
    on_hub = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    return any(find_file(model, name, revision) for name in on_hub)


def refuse_tokenizer(model: str, revision: str | None, files: Mapping[str, bytes], *, head_rows: int) -> list[str]:
    """Raise MismatchError unless every id means the same to the student's tokenizer and to the dump's, made of `files`.

    A student without tokenizer files of its own is accepted, with a warning.

    Returns:
        The dump's tokens that are new to the student's tokenizer: behind its last one.
    """
    theirs, ours = vocabulary(files), student_vocabulary(model, revision)
    if ours is None:
        log.warning("%s has no tokenizer; its ids are taken to mean what the dump's mean", model)
        return []
    refuse_other_tokenizer(theirs, ours, student_head=head_rows)
    return new_tokens(theirs, max(ours.values()) + 1)


def student_vocabulary(model: str, revision: str | None) -> dict[str, int] | None:
    """Ids by token of a student's tokenizer; None if it has none. Raises MismatchError, and what a hub says."""
    if not has_tokenizer(model, revision):
        return None
    return dict(
        load_tokenizer(model, revision, fix="correct it, or remove it from the student's directory").get_vocab()
    )


def vocabulary(files: Mapping[str, bytes]) -> dict[str, int]:
    """Ids by token of a dump's tokenizer, made of `files`."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        fix = "dump with a teacher whose tokenizer needs no code of its own"
        return dict(load_tokenizer(folder, None, fix=fix).get_vocab())


def load_tokenizer(model: str, revision: str | None, *, fix: str) -> PreTrainedTokenizerBase:
    """A tokenizer that runs no code of its own.

    Raises:
        MismatchError: it is damaged, or needs such code; `fix` says what to do.
    """
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises nothing more exact.
        raise MismatchError(
            f"the tokenizer in {model} cannot be loaded",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="a tokenizer of transformers, without code of its own",
            fix=fix,
        ) from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the dump's tokenizer files into a directory.

    Raises:
        DataError: one is none of a tokenizer: whoever made the dump would put weights, code or settings beside ours.
    """
    for name in files:
        of_model = name.lower().endswith(_OF_MODELS) and name != SETTINGS
        if of_model or Path(name).name != name or Path(name).suffix not in _SUFFIXES:
            raise DataError(
                "a file among those of the dump's tokenizer is none of a tokenizer",
                got=ascii(name),
                expected=f"names of a tokenizer's files, ending in {', '.join(_SUFFIXES)}",
                fix="do not use this dump",
            )
    for name, content in files.items():
        (folder / name).write_bytes(content)


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory, which runs no code of its own; None if there is none."""
    if not (folder / SETTINGS).is_file():
        return None
    return load_tokenizer(str(folder), None, fix="correct it, or remove its files")
