"""The factor between A and B: the same function as peft's, and only where it is."""

from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from support.engine_jobs import leave_start
from support.tiny_student import tiny_llama
from torch import Tensor

from student_train.config import LoraSection
from student_train.model.adapter import ADAPTER, attach
from student_train.model.scaling import scale_between

IDS = torch.arange(20)[None]


def trained_like(lora: LoraSection) -> Any:
    """A student whose adapter does something."""
    model = attach(tiny_llama(1).double(), lora, seed=0).double()
    leave_start(model, std=0.3)
    return model


def logits_and_gradients(model: Any) -> list[Tensor]:
    """Logits, and the gradient of every trained parameter."""
    torch.manual_seed(2)  # Of dropout.
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().sum().backward()
    found = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def changed(model: Any) -> list[bool]:
    """For each LoRA layer, whether its order was changed."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return [type(layer.lora_variant.get(ADAPTER)).__name__ == "_ScaledBetween" for layer in layers]


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"alpha": 8}, True),
        ({"alpha": 5}, True),
        ({"variant": "rslora", "dropout": 0.3}, True),
        ({"variant": "pissa"}, True),
        ({"variant": "dora"}, False),
        ({"alpha": 5, "extra": {"lora_bias": True}}, False),
    ],
    ids=str,
)
def test_it_is_peft_s_function(changes: dict[str, Any], ours: bool) -> None:
    model = trained_like(LoraSection(**({"r": 4} | changes))).train()
    expected = logits_and_gradients(model)
    scale_between(model)
    assert len(changed(model)) == 14
    assert all(found is ours for found in changed(model))
    got = logits_and_gradients(model)
    assert len(got) == len(expected) > 14
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        if changes.get("alpha") == 8:
            assert torch.equal(a, b)
