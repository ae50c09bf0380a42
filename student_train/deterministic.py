"""Sums in a fixed order: whether torch may choose a faster kernel that adds as its threads come."""

import os

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What cuBLAS and transformers ask the environment for; the first is read once, when cuBLAS is first used."""


def set_deterministic(wanted: bool) -> None:
    """Let this process's kernels add up in an order that is always the same, or not. Before the first of them runs.

    From then on torch raises a RuntimeError at an operation that has no such kernel, see `errors.explained`.
    """
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Filling what is written anyway costs a pass over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
