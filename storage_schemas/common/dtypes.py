"""Names of data types: torch's own, and the short ones that trainers use."""

from typing import Literal

Wide = Literal["bfloat16", "bf16", "torch.bfloat16", "float32", "fp32", "torch.float32"]
"""Every spelling of the types that are as wide as float32 in range."""
Spelling = Literal[Wide, "float16", "fp16", "half", "torch.float16"]
"""Every spelling that is read."""
_FULL = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def dtype_name(given: object) -> object:
    """`bfloat16` of `bf16`, `bfloat16` and `torch.bfloat16`, and so on; what is no such name is returned as it is."""
    if not isinstance(given, str):
        return given
    name = given.removeprefix("torch.")
    return _FULL.get(name, name)
