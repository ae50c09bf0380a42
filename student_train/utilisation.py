"""How much of its devices a run uses: FLOP of a step over what they could do, and their memory."""

import math
from typing import NamedTuple, Self

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

PEAK = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "MI300X": 1307e12,
}  # fmt: skip
"""Part of a GPU's name -> FLOP/s of dense 16-bit matrix products, by its data sheet."""


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None if it is not known here."""
    words = name.replace("-", " ").split()
    known = [part for part in PEAK if all(word in words for word in part.split())]
    return PEAK[max(known, key=len)] if known else None


class Work(NamedTuple):
    """FLOP that a step cannot do without, by its tokens. Attention's products are left out, 1 or 2 % at 1,000 tokens;
    so is what gradient checkpointing computes twice."""

    per_token: float
    per_supervised_token: float
    """Of the head."""
    peak: float
    """FLOP/s of the device."""

    @classmethod
    def of(cls, student: nn.Module, device: torch.device) -> Self | None:
        """Of a causal language model that is trained on a device.

        A weight takes 2 FLOP forward, 2 for the gradient of what came in, and 2 for its own gradient if it is trained.
        None where this is not known: no GPU of `PEAK`, or weights that are not those of dense linear layers.
        """
        peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return None if peak is None else cls.with_peak(student, peak)

    @classmethod
    def with_peak(cls, student: nn.Module, peak: float) -> Self | None:
        """As `of`, at a known FLOP/s."""
        head = set(student.get_output_embeddings().modules())  # type: ignore[operator]
        saved = [module for module in student.modules() if isinstance(module, ModulesToSaveWrapper)]
        unused = {module for wrapper in saved for module in wrapper.original_module.modules()}
        flop = {True: 0.0, False: 0.0}
        for module in set(student.modules()) - unused:
            for parameter in module.parameters(recurse=False):
                # Under ZeRO-3 a parameter holds nothing of itself here.
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) < 2 or isinstance(module, nn.Embedding):
                    continue
                if not isinstance(module, nn.Linear | Conv1D) or parameter.dtype == torch.uint8:
                    return None
                flop[module in head] += (6 if parameter.requires_grad else 4) * math.prod(shape)
        return cls(per_token=flop[False], per_supervised_token=flop[True], peak=peak)

    def utilisation(self, tokens: int, supervised: int, *, seconds: float, devices: int) -> float:
        """Model FLOP utilisation (MFU, arXiv 2204.02311, appendix B) of steps with so many tokens."""
        flop = tokens * self.per_token + supervised * self.per_supervised_token
        return flop / (seconds * devices * self.peak)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors had on a GPU at most, since this process began; 0 without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
