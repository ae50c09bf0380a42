"""Where a model's files lie and what identifies them, without loading a weight."""

import hashlib
import json
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from storage_schemas.common.code import NO_CODE, Code, refuse_foreign_code
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.hashes import file_sha256
from storage_schemas.common.models import INDEX, WEIGHTS, absent, hashes_of, is_hub_id, named_in
from teacher_dump.corpus.cache import cache_folder

_WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "*/*.safetensors"]
_BOOKKEEPING = {"transformers_version", "_name_or_path", "_commit_hash"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine."""

    folder: Path
    """Holds config.json, tokenizer and weights."""
    revision: str | None
    """Commit on the hub; None for a directory."""
    weights: tuple[Path, ...]
    """The safetensors files, if they were asked for."""

    def config_file_sha256(self) -> str:
        """Hash of the file config.json."""
        return file_sha256(self.folder / "config.json", folder=cache_folder() / "hashes")

    def config_sha256(self) -> str:
        """Hash of what config.json says, less who wrote it and where it lay: neither changes a logit."""
        return content_sha256(json.loads((self.folder / "config.json").read_bytes()))

    def weights_sha256(self) -> dict[str, str]:
        """Hash of each weight file, by name."""
        return hashes_of(self.weights, partial(file_sha256, folder=cache_folder() / "hashes"))


def find_model(name: str, revision: str | None, code: Code = NO_CODE, *, weights: bool = True) -> ModelFiles:
    """The files of a directory or of a hub model, fetched if need be; with `code` those of its code, without `weights`
    neither these nor a look whether they are there.

    Raises:
        MismatchError: no such model, one without safetensors, or whose code is another model's.
        DataError: its index of weight files is torn, or leads out of the model.
    """
    folder, commit = Path(name), None
    if not folder.is_dir():
        if not is_hub_id(name):
            raise _no_model(name, *absent(name, None, setting="teacher.model"))
        try:
            wanted = [*_WANTED, *(["*.py"] if code else []), *(["*.safetensors"] if weights else [])]
            found = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        except (OSError, ValueError) as error:
            raise _no_model(name, *absent(name, error, setting="teacher.model")) from error
        folder = Path(found)
        commit = folder.name
    elif revision is not None:
        raise MismatchError(
            f"{name} is a directory, which has no revisions",
            got=f"teacher.revision = {revision}",
            expected="null",
            fix="remove teacher.revision, or give a hub id as teacher.model",
        )
    if not (folder / "config.json").is_file():
        raise _no_model(name, "no config.json")
    if code:
        refuse_foreign_code(json.loads((folder / "config.json").read_bytes()), name)
    return ModelFiles(folder=folder, revision=commit, weights=_weight_files(folder, name) if weights else ())


def _weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    names = named_in(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise _no_model(name, f"no {', '.join(missing[:5])}")
    return tuple(folder / file for file in names)


def content_sha256(config: Any, *, without: Set[str] = frozenset()) -> str:
    """Hash of what a config says, less who wrote it, where it lay and what is called as in `without`."""
    content = _without(config, _BOOKKEEPING | without)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without(value: Any, names: Set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def _no_model(name: str, got: str, fix: str | None = None) -> MismatchError:
    return MismatchError(
        f"the teacher {name} cannot be loaded",
        got=got,
        expected="a directory or hub id with config.json, a tokenizer and *.safetensors",
        fix=fix or "correct teacher.model or teacher.revision; convert other weight formats to safetensors first",
    )
