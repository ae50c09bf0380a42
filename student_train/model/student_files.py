"""The files of the student: where they lie, that they are whole, and what identifies them."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from storage_schemas.canonical import digest, parse_json
from storage_schemas.common.code import code_sha256
from storage_schemas.common.hashes import file_state
from storage_schemas.common.models import INDEX, WEIGHTS, hashes_of, named_in, refuse_torn

UNTOLD = ("_name_or_path", "transformers_version")
"""Keys of config.json that say where and with what a model was saved."""


def weight_files(model: str, revision: str | None) -> list[Path]:
    """The safetensors files that transformers takes of a directory or hub id, fetched if need be, each of them whole.

    Raises:
        DataError: a file is torn, or the index names one outside of the model.
        OSError: there is no such model.
    """
    names = [WEIGHTS]
    if find_file(model, WEIGHTS, revision) is None:
        index = find_file(model, INDEX, revision)
        names = named_in(Path(index)) if index else names
    files = [Path(str(cached_file(model, name, revision=revision))) for name in names]
    refuse_torn(*files)
    return files


def config_file(model: str, revision: str | None) -> dict[str, Any]:
    """Content of its config.json."""
    file = Path(str(cached_file(model, "config.json", revision=revision)))
    return parse_json(file.read_bytes(), name="config.json")


def identity(model: str, revision: str | None, *, code: bool = False) -> dict[str, str]:
    """What decides how a model computes: hashes of its configuration and of its weight files, and with `code` of all
    code that it brings. Free of its path."""
    told = {key: value for key, value in config_file(model, revision).items() if key not in UNTOLD}
    found = {"config": digest(told), "weights": digest(hashes_of(weight_files(model, revision), sha256))}
    return found | {"code": digest(code_sha256(code_folder(model, revision)))} if code else found


def code_folder(model: str, revision: str | None) -> Path:
    """The directory that its code lies in, fetched if need be."""
    folder = Path(model)
    return folder if folder.is_dir() else Path(snapshot_download(model, revision=revision, allow_patterns=["*.py"]))


def sha256(path: Path) -> str:
    """Of a file; read once as long as nobody changes it."""
    return _sha256(path.resolve(), *file_state(path))


@lru_cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file(model: str, name: str, revision: str | None) -> str | None:
    """Path of a file of a directory or hub id, fetched if need be; None if it has no such file."""
    found: str | None = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found
