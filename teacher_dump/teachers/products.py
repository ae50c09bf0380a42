"""Products of 16-bit tensors whose results are float32: what the LM head sums up is not rounded to 16 bits again.

bfloat16 has 8 significant bits: a logit of 30 would be off by up to 0.06, and half of the neighbours among the largest
would be equal. The factors stay as they are; their products are exact in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LINEAR = torch._C._nn.linear  # DeepSpeed puts a function of its own into torch.nn.functional, for good.
_BLOCK_BYTES = 16 * 2**20
"""Of the weight that are float32 at a time where the device cannot do it by itself."""


class Float32Results(TorchFunctionMode):
    """While it is active, the linear layers of this thread give float32, whatever fetches and spreads their weights.

    A quantised layer has operations of its own, and keeps the dtype that it gives.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _LINEAR:
            return linear(*args, **kwargs or {})
        # What DeepSpeed's stage 3 makes of a linear layer.
        if func is Tensor.matmul and args[0].dtype == args[1].dtype and not kwargs:
            return linear(args[0], args[1].t())
        if func is torch.addmm and not kwargs:
            return linear(args[1], args[2].t(), args[0])
        return func(*args, **kwargs or {})


def linear(
    inputs: Float[Tensor, "*n hidden"],
    weight: Float[Tensor, "V hidden"],
    bias: Float[Tensor, " V"] | None = None,
    *,
    out: Float32[Tensor, "rows V"] | None = None,
) -> Float32[Tensor, "*n V"]:
    """inputs @ weight.T + bias as float32.

    On CUDA the product itself gives float32, from torch 2.8 on. Elsewhere the weight becomes float32 in blocks of its
    rows, so that never more than a block has a copy; of a weight that is spread over processes as a DTensor, this
    process's share.

    Args:
        inputs: of the weight's dtype.
        out: memory for the product of 2-D inputs, at least as many rows.
    """
    flat = inputs.flatten(0, -2)
    out = None if out is None else out[: len(flat)]
    result: Tensor
    if type(weight.data) is not Tensor or type(flat) is not Tensor:
        result = functional.linear(flat.float(), weight.float())
    elif flat.dtype == weight.dtype == torch.float32:
        result = torch.mm(flat, weight.t(), out=out)
    elif flat.is_cuda and flat.dtype == weight.dtype and hasattr(torch.ops.aten.mm, "dtype"):
        result = torch.mm(flat, weight.t(), out_dtype=torch.float32, out=out)
    else:
        result = flat.new_empty(len(flat), len(weight), dtype=torch.float32) if out is None else out
        wide, rows = flat.float(), max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            result[:, block] = wide @ weight[block].float().t()
    if bias is not None:
        result += bias
    return result.view(*inputs.shape[:-1], result.shape[-1])
