"""How far two right computations may lie apart in float32: bounds from the arithmetic, not from a machine.

Machines add up in different orders: a matrix product of AVX2 and one of AVX-512 differ in the last bits, and so do two
paths of one run that call it with other shapes. A sum of n products errs by at most lambda sqrt(n) u of its terms'
norm, u = 2^-24, but for a probability of 2 exp(-lambda^2 / 2) (Higham and Mary 2019, SIAM J. Sci. Comput. 41, theorem
2.4). Errors of products that follow each other are independent, so their squares add; two computations double them.
"""

import math
from collections.abc import Mapping

from torch import Tensor

UNIT = 2.0**-24
"""Unit roundoff of float32."""


def rounding(terms: int, products: int) -> float:
    """Largest difference to be expected, relative to the values' norm.

    Args:
        terms: of one inner product.
        products: how many follow each other.
    """
    return 4.0 * math.sqrt(2 * terms * products) * UNIT


FORWARD = rounding(64, 24)
"""Of a forward pass of the tiny models here: 2 layers of 7 linear maps, 2 products in attention and 2 norms, and the
head; at most 96 terms each, 64 on average. 1.3e-5."""
GRADIENT = rounding(64, 3 * 24)
"""Of a gradient, relative to its largest element: the backward pass has two products for each forward one. 2.3e-5."""
LOGPROB = 8 * FORWARD
"""Of a log-prob of the tiny models, absolute: a difference of two logits of norm 4 at most. 1.1e-4."""
BELOW_16 = 4 * 16 * UNIT
"""Of a log-prob of given logits below 16, absolute: two roundings of half a unit in the last place, and as much for the
exp and log of the machine. 3.8e-6."""


def update_excess(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, first: Mapping[str, Tensor], rate: float, steps: int
) -> float:
    """Largest difference of trained weights over what rounding of the gradients explains; at most 1 where all is well.

    Adam divides by sqrt(v), so an error d of a gradient moves a weight by up to rate d / sqrt(v) in a step, twice that
    with what it does to v, and by 2 rate at most, where all of a gradient is rounding. Later gradients only add to v:
    bias-corrected, it stays above v_1 / t in step t. Weights that moved add an error of the same size to the gradients
    that follow, hence another factor of 2 and t in place of its root.

    Args:
        found: master weights, as `Engine.export` gives them.
        expected: the same.
        first: state after the first of the steps, with Adam's second moment.
        rate: learning rate.
        steps: how many.
    """
    sizes = {key.split("/", 1)[1]: value.sqrt() for key, value in first.items() if key.startswith("exp_avg_sq/")}
    sizes = {name: size / max(float(size.max()), 1e-30) for name, size in sizes.items()}
    worst = 0.0
    for name, size in sizes.items():
        here, there = found[f"master/{name}"], expected[f"master/{name}"]
        moved = rate * steps * (4 * GRADIENT * steps / size.clamp(min=1e-30)).clamp(max=2.0)
        worst = max(worst, float(((here - there).abs() / (moved + steps * UNIT * there.abs())).nan_to_num().max()))
    return worst
