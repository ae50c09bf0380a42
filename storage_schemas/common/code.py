"""Whether code that a model brings with it is run. Nothing else may say so: transformers is told False, or a `Code`."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NewType

from filelock import FileLock

from storage_schemas.common.errors import MismatchError

Code = NewType("Code", bool)
"""That code is run, or that none is; made here alone."""
NO_CODE = Code(False)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def runs_code(asked: bool, model: str, revision: str | None, *, setting: str) -> Code:
    """What was asked for, if it is known which code that is: of a directory, or of one commit on the hub.

    Args:
        asked: the user has read the code and trusts it.
        setting: where the user says so, such as `student.trust_remote_code`.

    Raises:
        MismatchError: the code could be another one tomorrow.
    """
    if not asked or Path(model).is_dir() or _COMMIT.fullmatch(revision or ""):
        return Code(asked)
    raise MismatchError(
        f"{setting} would run whatever code {model} has on the day of the run",
        got=f"revision: {revision}",
        expected="the revision as a commit of 40 hexadecimal digits, or a directory",
        fix="read the code of one commit and name it, or download the model and give its directory",
    )


def refuse_foreign_code(config: Mapping[str, Any], model: str) -> None:
    """Raise MismatchError if a config.json takes code from another model, of which no commit is named."""
    named = config.get("auto_map")
    places = list(_texts(named.values())) if isinstance(named, Mapping) else []
    if foreign := next((place for place in places if "--" in place), None):
        raise MismatchError(
            f"{model} takes its code from another model",
            got=f"auto_map in config.json: {foreign}",
            expected="files beside config.json",
            fix="copy that code into a directory with the model, and take the name before `--` out of auto_map",
        )


def code_sha256(folder: Path) -> dict[str, str]:
    """Hash of each file of Python in a model's directory, by its path in there."""
    files = sorted(path for path in folder.rglob("*.py") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def importing(folder: str) -> Iterator[None]:
    """Alone on this machine: transformers copies code to `folder`, and another process must not import half a file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / "llm-neo.lock"):
        yield


def _texts(values: Any) -> Iterator[str]:
    for value in values:
        yield from [value] if isinstance(value, str) else _texts(value) if isinstance(value, list | tuple) else ()
