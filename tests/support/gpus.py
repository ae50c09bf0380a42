"""Tests that need GPUs: `make test-gpu` on a machine that has one. Elsewhere each is skipped, and says why."""

import pytest
import torch


def need_gpus(count: int = 1) -> list[pytest.MarkDecorator]:
    """Marks for such a test, or for all of a module."""
    found = torch.cuda.device_count()
    why = f"needs {count} GPU{'s' * (count > 1)} that torch {torch.__version__} can use; it can use {found} here"
    return [pytest.mark.gpu, pytest.mark.skipif(found < count, reason=why)]


def close(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to that of what is expected."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
