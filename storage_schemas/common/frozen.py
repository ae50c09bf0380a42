"""The base of every configuration section and of every record that crosses the stage boundary."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A frozen, keyword-only model that refuses unknown keys; the docstring under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
