"""Where a model's files lie and what identifies them, without loading a weight."""

import hashlib
import json
import re
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from storage_schemas.common.code import NO_CODE, Code, code_sha256, refuse_foreign_code
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.hashes import file_sha256
from storage_schemas.common.models import absent, is_hub_id
from teacher_dump.corpus.cache import cache_folder

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "*/*.safetensors"]
_INDEX = "model.safetensors.index.json"
_BOOKKEEPING = {"transformers_version", "_name_or_path", "_commit_hash"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine."""

    folder: Path
    """Holds config.json, tokenizer and weights."""
    revision: str | None
    """Commit on the hub; None for a directory."""
    weights: tuple[Path, ...]
    """The safetensors files."""

    def config_file_sha256(self) -> str:
        """Hash of the file config.json."""
        return _sha256(self.folder / "config.json")

    def config_sha256(self) -> str:
        """Hash of what config.json says, less who wrote it and where it lay: neither changes a logit."""
        return content_sha256(json.loads((self.folder / "config.json").read_bytes()))

    def weights_sha256(self) -> dict[str, str]:
        """Hash of each weight file, by name."""
        with ThreadPoolExecutor(4) as pool:
            return dict(zip((path.name for path in self.weights), pool.map(_sha256, self.weights), strict=True))

    def code_sha256(self) -> dict[str, str]:
        """Hash of each file of its code, by name."""
        return code_sha256(self.folder)

    def refuse_torn(self) -> None:
        """Raise DataError if a weight file is not whole: its header says how long it is."""
        for path in self.weights:
            try:
                with safe_open(path, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error, "a whole safetensors file") from error


def find_model(name: str, revision: str | None, code: Code = NO_CODE) -> ModelFiles:
    """The files of a directory or of a hub model, fetched if need be; with `code` those of its code, too.

    Raises:
        MismatchError: no such model, one without safetensors, or whose code is another model's.
        DataError: its index of weight files is damaged.
    """
    folder, commit = Path(name), None
    if not folder.is_dir():
        if not is_hub_id(name):
            raise _no_model(name, *absent(name, None, setting="teacher.model"))
        try:
            wanted = [*_WANTED, "*.py"] if code else _WANTED
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
    return ModelFiles(folder=folder, revision=commit, weights=_weight_files(folder, name))


def _weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values()))
            strange = [file for file in names if Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder / _INDEX, error, "an index of weight files") from error
        if strange:
            raise _no_model(name, f"{_INDEX} leads to {strange[0]}, out of the directory")
    missing = [file for file in names if not (folder / file).is_file()]
    if missing:
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


def _sha256(path: Path) -> str:
    # The hub's cache names large files by their hash; terabytes need not be read to learn it.
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    return file_sha256(path, folder=cache_folder() / "hashes")


def _damaged(path: Path, error: Exception, expected: str) -> DataError:
    return DataError(
        f"{path} is damaged",
        got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        expected=expected,
        fix="fetch or copy the file again",
    )


def _no_model(name: str, got: str, fix: str | None = None) -> MismatchError:
    return MismatchError(
        f"the teacher {name} cannot be loaded",
        got=got,
        expected="a directory or hub id with config.json, a tokenizer and *.safetensors",
        fix=fix or "correct teacher.model or teacher.revision; convert other weight formats to safetensors first",
    )
