"""What to say of a model that is not where its name leads."""

import re
from pathlib import Path

from storage_schemas.common.errors import first_line

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


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
