"""The files of a model, for both stages: which they are, whether they are whole, and what to say if it is not there."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from storage_schemas.common.errors import DataError, MismatchError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Name of the weights of a model in one file, and of the index of those in several."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no directory may be one of the hub."""
    return bool(_HUB_ID.fullmatch(name))


def absent(name: str, error: BaseException | None, *, setting: str) -> tuple[str, str]:
    """(got, what to do) about a name that is no directory.

    Args:
        name: as the user has written it.
        error: of the hub, which was asked for it if `is_hub_id`.
        setting: where the user has written it.
    """
    tried = f"{Path(name).absolute()} is no directory"
    if error is None or not is_hub_id(name):
        fix = f"correct {setting}; a relative path begins where the command is run"
        return f"{tried}, and this is no hub id", fix
    fix = (
        f"correct {setting}, a path or hub id, or its revision; without network, download it first "
        f"(`hf download {name}`) and set HF_HOME to where it lies"
    )
    return f"{tried}; from the hub: {first_line(error)}", fix


def named_in(index: Path) -> list[str]:
    """The weight files that an index names. Raises DataError if it is damaged, or leads out of the model."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _torn(index, error, "an index of weight files") from error
    if strange:
        raise DataError(
            f"{index} names a file outside of the model",
            got=ascii(strange[0]),
            expected="NAME.safetensors beside it",
            fix="do not use this model",
        )
    return names


def refuse_torn(*files: Path) -> None:
    """Raise DataError unless these are whole safetensors files: their headers say how long they are."""
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise _torn(file, error, "a whole safetensors file") from error


def _torn(file: Path, error: Exception, expected: str) -> DataError:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return DataError(f"{file} is torn", got=got, expected=expected, fix="fetch or copy the file again")


def hashes_of(files: Sequence[Path], read: Callable[[Path], str]) -> dict[str, str]:
    """sha256 of each file by name, by `read` where its name does not say it: the hub's cache calls large files so."""

    def known(file: Path) -> str:
        blob = file.resolve()
        named = file.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name)
        return blob.name if named else read(file)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((file.name for file in files), pool.map(known, files), strict=True))


@contextmanager
def refusing_attention(model: str, attention: str, *, setting: str) -> Iterator[None]:
    """Raise MismatchError where transformers has no such attention for the model, or lacks what it needs."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise MismatchError(
            f"{model} cannot be run with {setting}: {attention}",
            got=first_line(error),
            expected="null, or an attention that is installed and that transformers has for this model, such as eager",
            fix=f"correct {setting}, or install what it needs",
        ) from error
