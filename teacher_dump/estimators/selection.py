"""Selecting from a row of a large vocabulary without sorting or summing it in double precision.

A row is cut into blocks. What is looked for lies in few of them, which their maxima or sums tell, so that only those
are searched entry by entry.
"""

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

BLOCK = 64


def largest(values: Float32[Tensor, "n V"], k: int) -> tuple[Float32[Tensor, "n {k}"], Int64[Tensor, "n {k}"]]:
    """The k largest entries of each row, descending, ties by the lowest index.

    The k largest entries lie in the k blocks with the largest maxima: an entry in another block has k entries above it.
    Values and indices; k is at most V.
    """
    n, width = values.shape
    blocks = width // BLOCK
    if blocks <= 2 * k:
        index = _first_by_value_then_index(values, k)
        return values.gather(1, index), index
    body = values[:, : blocks * BLOCK].view(n, blocks, BLOCK)
    chosen = _first_by_value_then_index(body.amax(2), k).sort(1).values
    # Ascending blocks, then the columns after the last whole block: candidates stay in the order of their index.
    columns = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, width, device=values.device).expand(n, -1)
    columns = torch.cat([columns, rest], 1)
    candidates = values.gather(1, columns)
    place = _first_by_value_then_index(candidates, k)
    return candidates.gather(1, place), columns.gather(1, place)


def draw_from_weights(
    weights: Float32[Tensor, "n V"], u: Float64[Tensor, "n m"]
) -> tuple[Int64[Tensor, "n m"], Float64[Tensor, "n m"]]:
    """Inverse of the cumulative distribution of each row at `u`.

    Blocks are found in float64 cumulative sums of block sums, entries in float64 cumulative sums inside the block.
    An entry of weight 0 is never drawn, unless the whole row is 0; such a row's result means nothing.

    Args:
        weights: not negative, not normalised; they stay as they are.
        u: in [0, 1).

    Returns:
        Indices and weights of what was drawn.
    """
    n, width = weights.shape
    blocks = -(-width // BLOCK)
    whole = width // BLOCK
    sums = weights[:, : whole * BLOCK].view(n, whole, BLOCK).sum(2)
    if whole < blocks:
        sums = torch.cat([sums, weights[:, whole * BLOCK :].sum(1, keepdim=True)], 1)
    upper = sums.double().cumsum(1)
    point = _below(u * upper[:, -1:], upper[:, -1:])
    block = torch.searchsorted(upper, point, right=True).clamp_max_(blocks - 1)
    high = upper.gather(1, block)
    low = torch.where(block > 0, upper.gather(1, (block - 1).clamp_min(0)), 0.0)
    share = (point - low) / (high - low)

    columns = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    outside = columns >= width
    columns = columns.clamp_max_(width - 1)
    inside = weights.gather(1, columns.flatten(1)).view_as(columns).double().masked_fill_(outside, 0.0)
    cumulative = inside.cumsum(2)
    point = _below(share[:, :, None] * cumulative[:, :, -1:], cumulative[:, :, -1:])
    place = torch.searchsorted(cumulative, point, right=True).clamp_max_(BLOCK - 1)
    return columns.gather(2, place)[:, :, 0], inside.gather(2, place)[:, :, 0]


def _first_by_value_then_index(values: Float32[Tensor, "n width"], k: int) -> Int64[Tensor, "n {k}"]:
    """Indices of the k largest of each row, descending by value, then ascending by index."""
    # Adding 0 turns -0 into 0. Flipping the lower bits of negative floats makes their order that of the integers.
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    last = values.shape[1] - 1
    key = ordered | (last - torch.arange(last + 1, device=values.device))
    return last - (key.topk(k, dim=1).values & 0xFFFFFFFF)


def _below(point: Float64[Tensor, "*n m"], bound: Float64[Tensor, "*n 1"]) -> Float64[Tensor, "*n m"]:
    """`point`, but strictly below `bound`: rounding may not push a draw past the last entry."""
    return torch.minimum(point, torch.nextafter(bound, torch.zeros_like(bound)))
