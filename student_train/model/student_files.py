"""The files of the student: where they lie, that they are whole, what identifies them and what runs them."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from storage_schemas.canonical import digest, parse_json
from storage_schemas.common.code import Code, code_sha256
from storage_schemas.common.errors import DataError, MismatchError, first_line
from storage_schemas.common.hashes import file_state

UNTOLD = ("_name_or_path", "transformers_version")
"""Keys of config.json that say where and with what a model was saved."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weight_files(model: str, revision: str | None) -> list[Path]:
    """The safetensors files that transformers takes of a directory or hub id, fetched if need be, each of them whole.

    Raises:
        DataError: a file is torn, or the index names one outside of the model.
        OSError: there is no such model.
    """
    names = [SAFE_WEIGHTS_NAME]
    if find_file(model, SAFE_WEIGHTS_NAME, revision) is None:
        index = find_file(model, SAFE_WEIGHTS_INDEX_NAME, revision)
        names = sorted(set(_weight_map(index).values())) if index else names
    files = [Path(str(cached_file(model, name, revision=revision))) for name in names]
    for file in files:
        refuse_torn(file)
    return files


def refuse_torn(file: Path) -> None:
    """Raise DataError unless this is a whole safetensors file."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise DataError(
            f"{file} is torn or no safetensors file",
            got=str(error)[:200],
            expected="a header, and as many bytes as it says",
            fix="fetch or copy the file again",
        ) from error


def config_file(model: str, revision: str | None) -> dict[str, Any]:
    """Content of its config.json."""
    file = Path(str(cached_file(model, "config.json", revision=revision)))
    return parse_json(file.read_bytes(), name="config.json")


def identity(model: str, revision: str | None, *, code: bool = False) -> dict[str, str]:
    """What decides how a model computes: hashes of its configuration and of its weight files, and with `code` of all
    code that it brings. Free of its path."""
    told = {key: value for key, value in config_file(model, revision).items() if key not in UNTOLD}
    weights = weight_files(model, revision)
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip((file.name for file in weights), pool.map(sha256, weights), strict=True))
    found = {"config": digest(told), "weights": digest(hashes)}
    return found | {"code": digest(code_sha256(code_folder(model, revision)))} if code else found


def code_folder(model: str, revision: str | None) -> Path:
    """The directory that its code lies in, fetched if need be."""
    folder = Path(model)
    return folder if folder.is_dir() else Path(snapshot_download(model, revision=revision, allow_patterns=["*.py"]))


def sha256(path: Path) -> str:
    """Of a file; read once as long as nobody changes it."""
    # The hub's cache names large files by their hash.
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    return _sha256(target, *file_state(target))


@lru_cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file(model: str, name: str, revision: str | None) -> str | None:
    """Path of a file of a directory or hub id, fetched if need be; None if it has no such file."""
    found: str | None = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found


def _weight_map(index: str) -> dict[str, str]:
    try:
        found = json.loads(Path(index).read_bytes())["weight_map"]
        names = {str(key): str(value) for key, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is torn", got=f"{type(error).__name__}: {error}", fix="fetch it again") from error
    strange = [name for name in names.values() if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise DataError(
            f"{index} names a file outside of the model", got=ascii(strange[0]), expected="NAME.safetensors beside it",
            fix="do not use this model",
        )  # fmt: skip
    return names


def refuse_attention(name: str, config: Any, attention: str, code: Code) -> None:
    """Raise MismatchError if transformers has no such attention for this model, or what it needs is not installed."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=code)
    except (ValueError, ImportError) as error:
        raise MismatchError(
            f"{name} cannot be run with student.attn_implementation: {attention}",
            got=first_line(error),
            expected="null, or an attention that is installed and that transformers has for this model, such as eager",
            fix="correct student.attn_implementation, or install what it needs",
        ) from error
