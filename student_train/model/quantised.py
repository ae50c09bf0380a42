"""QLoRA (arXiv 2305.14314): the frozen linear layers under an adapter in 4 bits, while it is trained.

What is saved belongs to the model as it is stored: an adapter is never bound to one rounding of its base.
"""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.extras import refuse_missing
from student_train.config import StudentSection, TrainSection

PACKAGE = "bitsandbytes"
VARIANTS = ("lora", "rslora")
"""Those that take nothing from the base weights but their products."""
LEAST_SHARE = 0.5
"""Of the weights between embeddings and head that must become smaller."""


def refuse_unfit_quantisation(student: StudentSection, train: TrainSection) -> None:
    """Raise MismatchError if `student.quantization` does not go with the rest, or what it needs is not installed."""
    if student.quantization is None:
        return
    wrong = None
    if not train.lora:
        wrong = f"train.arm: {train.arm}", "the arm lora or neo: weights in 4 bits cannot be trained"
    elif train.zero_stage == 3:
        wrong = "train.zero_stage: 3", "stage 0, 1 or 2: ZeRO-3 spreads weights, but not the scales that 4 bits need"
    elif student.lora.variant not in VARIANTS:
        wrong = f"student.lora.variant: {student.lora.variant}", f"one of {', '.join(VARIANTS)}"
    if wrong is not None:
        raise MismatchError(
            f"student.quantization: {student.quantization} does not go with {wrong[0]}",
            got=wrong[0],
            expected=wrong[1],
            fix="change the one or remove the other",
        )
    refuse_missing(f"student.quantization: {student.quantization}", PACKAGE, extra="qlora")


def quantisation(student: StudentSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers is told; products are made in `dtype`."""
    if student.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=student.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def refuse_unquantised(model: PreTrainedModel) -> None:
    """Raise MismatchError if bitsandbytes, which knows linear layers, has left most weights between embeddings and head
    as they were: those of a mixture whose experts are one parameter."""
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    between = {name: p for name, p in model.named_parameters() if id(p) not in ends}
    quantised = sum(p.quant_state.shape.numel() for p in between.values() if hasattr(p, "quant_state"))
    left = {name: p.numel() for name, p in between.items() if not hasattr(p, "quant_state")}
    share = quantised / (quantised + sum(left.values()))
    if share < LEAST_SHARE:
        largest = max(left, key=lambda name: left[name])
        raise MismatchError(
            f"student.quantization would leave most of {type(model).__name__} as it is",
            got=f"{share:.0%} of the weights between embeddings and head in 4 bits; not {largest}",
            expected=f"at least {LEAST_SHARE:.0%}: {PACKAGE} takes linear layers, not experts that are one parameter",
            fix="remove student.quantization (ZeRO-3 spreads such a student over GPUs), or choose another student",
        )


def keep_numbers(model: nn.Module) -> None:
    """Where a CPU has bf16 products, bitsandbytes repacks weights at the first forward pass without gradients, and
    rounds them once more: the trained model would depend on the machine, and on whether it was evaluated."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
