"""The language-model head and the loss as one function: no [tokens, vocabulary] tensor, no gradient for a frozen head.

Per chunk of tokens, z = hidden @ weight.T is made once and turned into dLoss/dz in place. Every divergence depends on
z only through the log-probs of the K entries and of the bucket, log q_k = z_k / T - log Z and log Q = log R - log Z,
where R sums exp(z / T) outside the head. With g = dD/dlog q, g_tail = dD/dlog Q and G = sum g + g_tail,

    dD/dz_k = (g_k - q_k G) / T                      for entries of the head,
    dD/dz_j = s_j (g_tail - Q G) / T                 outside, where s_j = exp(z_j / T) / R,

so that one row factor turns the tail's softmax s into its gradient, and g comes from the small [tokens, K + 1] part. A
draw is an entry outside the head: it adds g_k / T to its column. The cross-entropy adds q everywhere, -1 at the label.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from storage_schemas.logits import LogitTransform
from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.losses import entry_divergence, overlap, ranks_first
from student_train.model.vocabulary import Fused, Gradient, InPlace, Logits, Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """How the student turns x = hidden @ weight.T + bias into logits: softcap * tanh(scale * x / softcap)."""

    valid_vocab: int | None = None
    """Columns from here on are padding and do not exist for the loss. None: all are in use."""
    scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""
    chunk_tokens: int = 512
    """Tokens per pass; peak memory is a small multiple of chunk_tokens * vocabulary."""
    compile: bool = False
    """Whether torch.compile makes two kernels of the operations over the vocabulary."""

    @classmethod
    def of(
        cls, config: Any, *, valid_vocab: int | None = None, chunk_tokens: int = 512, compile: bool = False
    ) -> "HeadSpec":
        """From a transformers model config.

        Raises:
            MismatchError: the model scales its logits in a way that is not known, see `LogitTransform.of`.
        """
        transform = LogitTransform.of(config, role="student")
        return cls(valid_vocab=valid_vocab, chunk_tokens=chunk_tokens, compile=compile, **transform.model_dump())


class HeadLoss(NamedTuple):
    """Sums over the micro-batch's supervised tokens; whoever knows the global batch divides."""

    loss: Float[Tensor, ""]
    """(1 - alpha) * CE + alpha * T^2 * D, differentiable. float32, or float64 for float64 inputs."""
    ce_sum: Float64[Tensor, ""]
    """Detached."""
    divergence_sum: Float64[Tensor, ""]
    """Detached, at T, without T^2. 0 where alpha is 0."""
    agreement: Int64[Tensor, ""]
    """Tokens for which the student ranks nothing above the teacher's most likely token; 0 without an exact head."""
    overlap_least: Float64[Tensor, ""]
    """Detached, at T: the least that sum min(p, q) can be, see `losses.overlap`. 0 where alpha is 0."""
    overlap_most: Float64[Tensor, ""]
    """And the most."""


SUMS = len(HeadLoss._fields)
"""How many sums there are."""


def fused_head_loss(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: SparseTargets,
    *,
    loss: LossSection,
    head: HeadSpec,
    bias: Float[Tensor, " vocab"] | None = None,
) -> HeadLoss:
    """Loss sums of n supervised tokens. Gradients are made in the forward; the backward does not read the weight.

    Under ZeRO-3 the weight must be gathered around this call only (a frozen one is not needed in the backward).
    With gradients disabled, only the sums are computed. A trainable weight or bias gets its gradient in the same pass.
    """
    grad = torch.is_grad_enabled()
    needs = tuple(grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    return HeadLoss(*_FusedHead.apply(hidden, weight, bias, targets, loss, head, needs))  # type: ignore[no-untyped-call]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: SparseTargets,
        loss: LossSection,
        head: HeadSpec,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            run = _Pass(hidden.to(weight.dtype), weight, bias, loss, head, needs)
            for start in range(0, len(targets), run.chunk):
                run.add_chunk(slice(start, min(start + run.chunk, len(targets))), targets)
        ctx.save_for_backward(run.d_hidden, run.d_weight, run.d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        total = (1 - loss.alpha) * run.ce + loss.alpha * loss.temperature**2 * run.divergence
        sums = run.ce, run.divergence, run.agreement, run.overlap_least, run.overlap_most
        ctx.mark_non_differentiable(*sums)
        return total.to(run.dtype), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes

        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            # Straight into the result: a wide copy of a trained head's gradient would be the most that is ever held.
            return torch.mul(gradient, d_loss, out=torch.empty_like(gradient, dtype=dtype))

        return (
            scaled(d_hidden, hidden_dtype), scaled(d_weight, weight_dtype), scaled(d_bias, weight_dtype),
            None, None, None, None,
        )  # fmt: skip


class _Rows(NamedTuple):
    """Log-probs of rows of logits at one temperature."""

    log_q: Tensor
    """(rows, K) of the entries."""
    log_q_tail: Tensor
    """(rows,) log Q."""
    log_z: Tensor
    """(rows,) log Z."""
    q: Tensor
    """(rows, K) of the head's entries, 0 elsewhere."""
    factor: Tensor
    """(rows,) Q over the mass outside the head: what makes q of an exponential there."""


class _Pass:
    """One walk over the tokens: buffers of one chunk, running sums, gradients."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: LossSection,
        head: HeadSpec,
        needs: tuple[bool, ...],
    ) -> None:
        vocab = weight.shape[0] if head.valid_vocab is None else head.valid_vocab
        self.hidden, self.weight, self.bias = hidden, weight[:vocab], None if bias is None else bias[:vocab]
        self.loss, self.head, self.needs = loss, head, needs
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        n = len(hidden)
        # Chunks of equal size: a short last one would waste the matrix product.
        self.chunk = max(1, -(-n // max(1, -(-n // head.chunk_tokens))))
        self.product = hidden.new_empty(min(self.chunk, n), vocab)
        self.temperature = loss.temperature if loss.alpha > 0 else 1.0
        transform = Transform(self.bias, head.scale, head.softcap)
        passes: type[Fused | InPlace] = Fused if head.compile else InPlace
        self.passes = passes(self.product, self.dtype, transform, self.temperature)
        self.ce, self.divergence, self.overlap_least, self.overlap_most = (
            torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(4)
        )
        self.agreement = torch.zeros((), dtype=torch.int64, device=hidden.device)
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=self.dtype) if needs[1] else None
        self.d_bias = None if bias is None or not needs[2] else torch.zeros_like(bias, dtype=self.dtype)

    def add_chunk(self, tokens: slice, targets: SparseTargets) -> None:
        """Add the sums and the gradients of some tokens."""
        hidden, targets, needed = self.hidden[tokens], targets[tokens], any(self.needs)
        product = torch.mm(hidden, self.weight.T, out=self.product[: len(hidden)])
        logits = self.passes.read(product, targets, slope=needed)
        to = self._loss(logits, targets)
        if not needed:
            return
        gradient = self.passes.write(product, targets, logits, to)
        vocab, scale = len(self.weight), self.head.scale
        if self.d_hidden is not None:
            d_hidden = torch.mm(product, self.weight, out=self.d_hidden[tokens])
            if scale != 1.0:
                d_hidden.mul_(scale)
        if self.d_weight is not None:
            self.d_weight[:vocab].add_(_wide_product(product.T, hidden, self.dtype), alpha=scale)
        if self.d_bias is not None:
            self.d_bias[:vocab].add_(gradient.sum(0, dtype=self.dtype), alpha=scale)

    def _loss(self, z: Logits, targets: SparseTargets) -> Gradient:
        """Add the rows' losses to the sums; their gradient in the logits."""
        alpha, temperature = self.loss.alpha, self.temperature
        self.agreement += ranks_first(z.entries, z.top, targets).sum()
        plain = _rows(z.entries, z.top, z.mass, targets)
        self.ce += (plain.log_z - z.label[:, 0]).sum(dtype=torch.float64)
        factor, at_entries = (1 - alpha) * plain.factor, (1 - alpha) * plain.q
        if alpha == 0:
            return Gradient(factor, None, at_entries, -1.0)
        rows = plain
        if temperature != 1.0:
            rows = _rows(z.entries / temperature, z.top / temperature, z.warm, targets)
        value, g, g_tail = _entry_gradients(rows, targets, self.loss)
        self.divergence += value
        least, most = overlap(rows.log_q, rows.log_q_tail, targets)
        self.overlap_least += least.sum(dtype=torch.float64)
        self.overlap_most += most.sum(dtype=torch.float64)
        total = g.sum(1) + g_tail
        at_entries = at_entries + alpha * temperature * (g - rows.q * total[:, None])
        warm = alpha * temperature * (g_tail / z.warm - total * rows.factor)
        if temperature == 1.0:
            return Gradient(factor + warm, None, at_entries, alpha - 1)
        return Gradient(factor, warm, at_entries, alpha - 1)


def _rows(entries: Tensor, top: Tensor, mass: Tensor, targets: SparseTargets) -> _Rows:
    """What the entries and the sum outside the head come to.

    Args:
        entries: logits over the temperature at the targets' entries.
        top: highest of them outside the head.
        mass: sum of exp(logit - top) there.
    """
    log_tail = top + mass.log()
    head = torch.where(targets.in_head, entries, -torch.inf)
    log_z = torch.cat([head, log_tail[:, None]], 1).logsumexp(1)
    log_q, log_q_tail = entries - log_z[:, None], log_tail - log_z
    q = torch.where(targets.in_head, log_q.exp(), 0.0)
    return _Rows(log_q=log_q, log_q_tail=log_q_tail, log_z=log_z, q=q, factor=log_q_tail.exp() / mass)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b as `dtype`: rounding the product of each chunk to 16 bits would add up."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _entry_gradients(rows: _Rows, targets: SparseTargets, loss: LossSection) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the rows' divergences, and its gradient in log q and log Q."""
    log_q, log_q_tail = rows.log_q.detach().requires_grad_(), rows.log_q_tail.detach().requires_grad_()
    with torch.enable_grad():
        values = entry_divergence(log_q, log_q_tail, targets, loss)
        g, g_tail = torch.autograd.grad(values.sum(), (log_q, log_q_tail), allow_unused=True, materialize_grads=True)
    return values.detach().sum(dtype=torch.float64), g, g_tail
