"""A cheaper order of operations in peft's LoRA layers: the factor alpha / r on the r columns between A and B."""

from typing import Any

from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from student_train.model.adapter import ADAPTER


class _ScaledBetween(LoraVariant):  # type: ignore[misc]
    """x W + ((x A) s) B in place of peft's x W + ((x A) B) s, which walks over all output columns twice per layer and
    step only to multiply by a constant: 6 % of the student's forward and backward at r = 16. Equal bit for bit where s
    is a power of two, as in the default alpha = 2 r. Through the modules of A and B, so that ZeRO-3 gathers them."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """What peft's layer does after its base layer."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        between = a(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter]
        # In place: no linear layer keeps its output for the backward pass.
        scaled: Tensor = result.add_(b(between))
        return scaled


def scale_between(model: nn.Module) -> None:
    """Change the order in all plain LoRA layers of a model that is trained, not merged.

    Layers of another kind, DoRA for one, and a B with a bias, which peft scales too, stay as they are.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and not layer.lora_variant and layer.lora_B[ADAPTER].bias is None:
            layer.lora_variant[ADAPTER] = _ScaledBetween()
