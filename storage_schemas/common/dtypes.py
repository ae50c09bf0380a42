"""Names of data types: torch's own, and the short ones that trainers use."""

_FULL = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def dtype_name(given: object) -> object:
    """`bfloat16` of `bf16`, `bfloat16` and `torch.bfloat16`, and so on; what is no such name is returned as it is."""
    if not isinstance(given, str):
        return given
    name = given.removeprefix("torch.")
    return _FULL.get(name, name)
