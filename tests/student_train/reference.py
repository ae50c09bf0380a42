"""Targets and losses in float64, straight from the definitions: no fusion, no masks, no log-space tricks."""

import math

import numpy as np
import torch
from torch import Tensor

from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.head import HeadSpec
from student_train.model.losses import entry_divergence

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "akl", "tvd")
SMOOTH = DIVERGENCES[:-1]


def head_targets(
    teacher_logits: Tensor,
    sizes: list[int],
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> SparseTargets:
    """Exact targets: token i keeps its sizes[i] largest entries, ids ascending, padded to the longest."""
    log_p = (teacher_logits.double() / temperature).log_softmax(1)
    n, vocab = log_p.shape
    width = max(sizes, default=1)
    ids, logprobs = torch.zeros(n, width, dtype=torch.int32), torch.zeros(n, width, dtype=torch.float64)
    in_head, tail = torch.zeros(n, width, dtype=torch.bool), torch.full((n,), -torch.inf, dtype=torch.float64)
    for i, size in enumerate(sizes):
        kept = log_p[i].topk(size).indices.sort().values
        ids[i, :size], logprobs[i, :size], in_head[i, :size] = kept.int(), log_p[i, kept], True
        rest = [j for j in range(vocab) if j not in kept.tolist()]
        if rest:
            tail[i] = log_p[i, rest].logsumexp(0)
    return SparseTargets(
        labels=torch.zeros(n, dtype=torch.int64) if labels is None else labels,
        ids=ids,
        logprobs=logprobs.to(dtype),
        weights=torch.where(in_head, logprobs.exp(), 0.0).to(dtype),
        in_head=in_head,
        tail_logprob=tail.to(dtype),
        has_draws=False,
    )


def drawn_targets(teacher_logits: Tensor, heads: int, draws: Tensor) -> SparseTargets:
    """Targets with draws: token i keeps its `heads` largest entries, and the ids draws[i], which may repeat."""
    log_p = teacher_logits.double().log_softmax(1)
    n = len(log_p)
    order = log_p.argsort(1, descending=True)
    ids, in_head, weights = [], [], []
    for i in range(n):
        head = order[i, :heads].sort().values
        drawn, counts = draws[i].unique(return_counts=True)
        mass = log_p[i, order[i, heads:]].exp().sum()
        ids.append(torch.cat([head, drawn]))
        in_head.append(torch.arange(len(ids[-1])) < heads)
        weights.append(torch.cat([log_p[i, head].exp(), mass * counts / counts.sum()]))
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True)
    used = pad([torch.ones(len(x), dtype=torch.bool) for x in ids], batch_first=True)
    return SparseTargets(
        labels=torch.zeros(n, dtype=torch.int64),
        ids=padded.int(),
        logprobs=torch.where(used, log_p.gather(1, padded), 0.0),
        weights=pad(weights, batch_first=True),
        in_head=pad(in_head, batch_first=True),
        tail_logprob=torch.stack([log_p[i, order[i, heads:]].logsumexp(0) for i in range(n)]),
        has_draws=True,
    )


def systematic_draws(teacher_logits: Tensor, heads: int, draws: int, u: np.ndarray) -> Tensor:
    """(n, draws) ids: points (u + j) / m on the cumulative distribution of what lies outside the head."""
    p = teacher_logits.double().softmax(1).numpy()
    order = np.argsort(-p, axis=1)
    out = np.empty((len(p), draws), np.int64)
    for i in range(len(p)):
        tail = np.sort(order[i, heads:])
        cumulative = np.cumsum(p[i, tail]) / p[i, tail].sum()
        points = (u[i] + np.arange(draws)) / draws
        out[i] = tail[np.minimum(np.searchsorted(cumulative, points, side="right"), len(tail) - 1)]
    return torch.from_numpy(out)


def divergence(p: list[Tensor], q: list[Tensor], kind: str, beta: float) -> Tensor:
    """D of two distributions given outcome by outcome; the last outcome is the bucket if `p` has one."""
    mix = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    match kind:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            return beta * kl(p, mix) + (1 - beta) * kl(q, mix)
        case "skewed_kl":
            return kl(p, mix)
        case "skewed_reverse_kl":
            return kl(q, [(1 - beta) * a + beta * b for a, b in zip(p, q, strict=True)])
        case "tvd":
            return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    raise ValueError(kind)


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    """sum p log(p / q)."""
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def adaptive_kl(p: list[Tensor], q: list[Tensor], bucket: bool) -> Tensor:
    """Weights from the gaps of the head (top half of the mass) and of the rest; the bucket belongs to the rest."""
    entries = range(len(p) - bucket)
    head, mass = [], 0.0
    for i in sorted(entries, key=lambda i: -float(p[i].detach())):
        if mass >= 0.5:
            break
        head.append(i)
        mass += float(p[i])
    gaps = [abs(float(a.detach() - b.detach())) for a, b in zip(p, q, strict=True)]
    head_gap, gap = sum(gaps[i] for i in head), sum(gaps)
    share = head_gap / gap if gap > 0 else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def token_divergence(logits: Tensor, targets: SparseTargets, i: int, loss: LossSection) -> Tensor:
    """D of token i, on its head and one bucket."""
    q = (logits[i].double() / loss.temperature).softmax(0)
    log_p, ids = targets.logprobs[i].double(), targets.ids[i]
    if targets.has_draws:
        return sum(w.double() * (a - q[j].log()) for w, a, j in zip(targets.weights[i], log_p, ids, strict=True))
    head = [k for k in range(len(ids)) if targets.in_head[i, k]]
    p_outcomes, q_outcomes = [log_p[k].exp() for k in head], [q[ids[k]] for k in head]
    bucket = math.isfinite(targets.tail_logprob[i])
    if bucket:
        held = {int(ids[k]) for k in head}
        p_outcomes.append(targets.tail_logprob[i].double().exp())
        q_outcomes.append(sum(q[j] for j in range(len(q)) if j not in held))
    if loss.divergence == "akl":
        return adaptive_kl(p_outcomes, q_outcomes, bucket)
    return divergence(p_outcomes, q_outcomes, loss.divergence, loss.beta)


def head_logits(hidden: Tensor, weight: Tensor, head: HeadSpec, bias: Tensor | None = None) -> Tensor:
    """Final logits of the columns in use."""
    x = hidden @ weight.T
    if bias is not None:
        x = x + bias
    x = head.scale * x[:, : head.valid_vocab]
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def unfused_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    loss: LossSection,
    head: HeadSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the loss, of CE and of D over the tokens; ordinary autograd through the whole [n, vocab] tensor."""
    logits = head_logits(hidden, weight, head, bias)
    ce = -logits.log_softmax(1).gather(1, targets.labels[:, None]).sum()
    d = torch.zeros((), dtype=torch.float64)
    if loss.alpha > 0:
        for i in range(len(logits)):
            d = d + token_divergence(logits, targets, i, loss)
    return (1 - loss.alpha) * ce + loss.alpha * loss.temperature**2 * d, ce, d


def naive_loss(logits: Tensor, targets: SparseTargets, loss: LossSection) -> Tensor:
    """The sum at T = 1 as one would write it first, in the dtype of the logits and through all of them."""
    log_q, ids = logits.log_softmax(1), targets.ids.long()
    tail = log_q.masked_fill(torch.zeros_like(log_q, dtype=torch.bool).scatter(1, ids, targets.in_head), -torch.inf)
    d = entry_divergence(log_q.gather(1, ids), tail.logsumexp(1), targets, loss)
    return ((1 - loss.alpha) * -log_q.gather(1, targets.labels[:, None])[:, 0] + loss.alpha * d).sum()
