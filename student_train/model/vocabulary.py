"""What the head does over [tokens, vocabulary]: sums of exponentials outside the entries, and the gradient.

In two ways with the same numbers. `InPlace`, operation by operation, runs wherever torch does. `Fused` is two functions
of a row that torch.compile makes kernels of: they read the matrix product itself, in 16 bits where the weights are, and
write the gradient over it, without a buffer in float32 and without a pass per operation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from storage_schemas.logits import finish_logits
from student_train.data.batch import SparseTargets
from student_train.model.losses import ABSENT


class Logits(NamedTuple):
    """What the loss needs to know of the logits z of n tokens."""

    label: Float[Tensor, "n 1"]
    entries: Float[Tensor, "n K"]
    top: Float[Tensor, " n"]
    """The highest z outside the head; `ABSENT` if nothing is outside."""
    mass: Float[Tensor, " n"]
    """Sum of exp(z - top) outside the head."""
    warm: Float[Tensor, " n"]
    """Sum of exp((z - top) / T) outside the head."""


class Gradient(NamedTuple):
    """The loss's gradient in the logits of n tokens."""

    factor: Float[Tensor, " n"]
    """Outside the head, times exp(z - top)."""
    warm: Float[Tensor, " n"] | None
    """There too, times exp((z - top) / T); None at T = 1."""
    entries: Float[Tensor, "n K"]
    """At the head's entries; at draws, which lie outside of it, it is added."""
    label: float
    """Added at the label."""


class Transform(NamedTuple):
    """From a matrix product x to logits: z = softcap * tanh(scale * (x + bias) / softcap)."""

    bias: Float[Tensor, " vocab"] | None
    scale: float
    softcap: float | None


class InPlace:
    """Operation by operation, in a buffer of the loss's precision, and at a temperature in another one."""

    def __init__(self, product: Tensor, dtype: torch.dtype, transform: Transform, temperature: float) -> None:
        """Make the buffers for products like this one, which they share memory with if they can."""
        self.transform, self.temperature = transform, temperature
        self.z = product if product.dtype == dtype else torch.empty_like(product, dtype=dtype)
        self.warm = None if temperature == 1.0 else torch.empty_like(self.z)

    def read(self, product: Float[Tensor, "n vocab"], targets: SparseTargets, *, slope: bool) -> Logits:
        """What the loss needs of a matrix product, which is spoiled; `slope` if `write` comes next.

        exp(z - top) and exp((z - top) / T) are left in the buffers.
        """
        n, ids = len(product), targets.ids.long()
        z = self.z[:n]
        if z.dtype != product.dtype:
            z.copy_(product)
        if self.transform.bias is not None:
            z.add_(self.transform.bias)
        self.slope = finish_logits(z, scale=self.transform.scale, softcap=self.transform.softcap, slope=slope)
        label, entries = z.gather(1, targets.labels[:, None]), z.gather(1, ids)
        z.scatter_add_(1, ids, torch.where(targets.in_head, ABSENT, 0.0).to(z.dtype))
        top = z.amax(1)
        z.sub_(top[:, None])
        warm = None if self.warm is None else torch.div(z, self.temperature, out=self.warm[:n]).exp_().sum(1)
        mass = z.exp_().sum(1)
        return Logits(label, entries, top, mass, mass if warm is None else warm)

    def write(self, product: Float[Tensor, "n vocab"], targets: SparseTargets, z: Logits, to: Gradient) -> Tensor:
        """The product that was read becomes the gradient in it; returns that as precise as it is known."""
        gradient = self.z[: len(product)].mul_(to.factor[:, None])
        if self.warm is not None and to.warm is not None:
            gradient.addcmul_(self.warm[: len(product)], to.warm[:, None])
        gradient.scatter_add_(1, targets.ids.long(), to.entries)
        gradient.scatter_add_(1, targets.labels[:, None], torch.full_like(z.label, to.label))
        if self.slope is not None:
            gradient.mul_(self.slope)
        if gradient.dtype != product.dtype:
            product.copy_(gradient)
        return gradient


class Fused:
    """In two kernels, on the product itself."""

    def __init__(self, product: Tensor, dtype: torch.dtype, transform: Transform, temperature: float) -> None:
        """As `InPlace`, without buffers."""
        self.dtype, self.transform, self.temperature = dtype, transform, temperature

    def read(self, product: Float[Tensor, "n vocab"], targets: SparseTargets, *, slope: bool) -> Logits:
        """As `InPlace.read`; the head's columns of the product are masked."""
        # Rows of one known length: kernels read them in whole words.
        torch._dynamo.mark_static(product, 1)
        ids, labels = targets.ids.long(), targets.labels[:, None]
        label, entries = self._logits(product, labels), self._logits(product, ids)
        product.scatter_add_(1, ids, torch.where(targets.in_head, ABSENT, 0.0).to(product.dtype))
        return Logits(label, entries, *_compiled(_sums)(product, self.transform, self.temperature, self.dtype))

    def write(self, product: Float[Tensor, "n vocab"], targets: SparseTargets, z: Logits, to: Gradient) -> Tensor:
        """As `InPlace.write`. The terms of one column are summed before they are rounded to the product's precision."""
        ids, labels = targets.ids.long(), targets.labels[:, None]
        hit = ids == labels
        at_entries = self._slope(z.entries) * (self._outside(z, z.entries, targets.in_head, to) + to.entries)
        outside = self._outside(z, z.label, (hit & targets.in_head).any(1, keepdim=True), to)
        at_label = self._slope(z.label) * (outside + (to.entries * hit).sum(1, keepdim=True) + to.label)
        # Padding names column 0, which may be an entry's: it writes what the row's first entry does.
        padding = ~targets.in_head & (targets.weights == 0)
        ids, at_entries = (torch.where(padding, each[:, :1], each) for each in (ids, at_entries))
        _compiled(_to_gradient)(product, z.top, to.factor, to.warm, self.transform, self.temperature, self.dtype)
        product.scatter_(1, ids, at_entries.to(product.dtype))
        return product.scatter_(1, labels, at_label.to(product.dtype))

    def _logits(self, product: Tensor, columns: Tensor) -> Tensor:
        bias = None if self.transform.bias is None else self.transform.bias[columns]
        return _finished(product.gather(1, columns).to(self.dtype), self.transform._replace(bias=bias))

    def _outside(self, z: Logits, at: Tensor, in_head: Tensor, to: Gradient) -> Tensor:
        found = _outside(at - z.top[:, None], to.factor, to.warm, self.temperature)
        return torch.where(in_head, 0.0, found)

    def _slope(self, z: Tensor) -> Tensor | float:
        return 1.0 if self.transform.softcap is None else 1.0 - (z / self.transform.softcap) ** 2


def _sums(x: Tensor, transform: Transform, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = x.to(dtype)
    z = torch.where(x < ABSENT / 2, ABSENT, _finished(x, transform))
    top = z.amax(1)
    below = z - top[:, None]
    mass = below.exp().sum(1)
    return top, mass, mass if temperature == 1.0 else (below / temperature).exp().sum(1)


def _to_gradient(
    product: Tensor, top: Tensor, factor: Tensor, warm: Tensor | None, transform: Transform, temperature: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    x = product.to(dtype)
    z = _finished(x, transform)
    gradient = _outside(z - top[:, None], factor, warm, temperature)
    if transform.softcap is not None:
        gradient = gradient * (1.0 - (z / transform.softcap) ** 2)
    product.copy_(torch.where(x < ABSENT / 2, 0.0, gradient))


def _finished(x: Tensor, transform: Transform) -> Tensor:
    if transform.bias is not None:
        x = x + transform.bias
    x = x * transform.scale
    return x if transform.softcap is None else transform.softcap * torch.tanh(x / transform.softcap)


def _outside(below: Tensor, factor: Tensor, warm: Tensor | None, temperature: float) -> Tensor:
    found = factor[:, None] * below.exp()
    return found if warm is None else found + warm[:, None] * (below / temperature).exp()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
