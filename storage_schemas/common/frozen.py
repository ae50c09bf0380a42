"""The base of every configuration section and of every record that crosses the stage boundary."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A frozen, keyword-only model that refuses unknown keys; the docstring under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def explicit(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The leaves that were set by hand, as `{"a.b": value}`; defaults are not among them."""
    found: dict[str, Any] = {}
    for name in sorted(section.model_fields_set):
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= explicit(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
