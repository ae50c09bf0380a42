"""From logits to sparse targets: exact head, tail mass, draws. No loop over tokens.

Every function that takes logits uses their memory, and says what it leaves there. Log-sum-exps of the tail are
taken over the tail itself, with the head masked: 1 - sum(head) is noise where the teacher is sure. Ties are broken by
the lowest id, so that equal logits give equal targets on every device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from torch import Tensor
from torch.nn.functional import pad

from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.targets import I64, Targets
from teacher_dump.estimators.draws import uniforms
from teacher_dump.estimators.selection import draw_from_weights, largest

Logits = Float32[Tensor, "n V"]
_NO_DRAWS_BELOW = 1e-7
"""Tail mass that float32 weights cannot tell from 0; such a token needs no draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Targets of n tokens, padded to K entries, on the device of the logits."""

    ids: Int32[Tensor, "n K"]
    """The head's ascending, then the draws' ascending."""
    logprobs: Float32[Tensor, "n K"]
    """log p at T = 1."""
    filled: Bool[Tensor, "n K"]
    """False is padding."""
    head_size: Int32[Tensor, " n"]
    """How many leading entries are exact."""
    counts: Int32[Tensor, "n K"] | None = None
    """How often an entry was drawn; None for `topk`."""
    tail_logprob: Float32[Tensor, "n temperatures"]
    """Log of the mass outside the head."""
    logsumexp: Float32[Tensor, "n temperatures"]
    """Log of the sum of exp(z / T)."""
    finite: Bool[Tensor, " n"]
    """False where the logits hold NaN or +inf; the rest of such a row means nothing."""


@dataclass(frozen=True, slots=True)
class _Head:
    """The k largest entries, largest first, and all that is known of the rest of the vocabulary."""

    ids: Int64[Tensor, "n k"]
    logprobs: Float64[Tensor, "n k"]
    """log p at T = 1."""
    inside: Bool[Tensor, "n k"]
    """Whether an entry belongs to the head: a leading stretch of each row."""
    outside: Float64[Tensor, "n k"]
    """The logits of those that do not; -inf in the head's places."""
    rest_top: Float64[Tensor, " n"]
    """The largest logit of the rest; -inf where there is none."""
    tail: Float64[Tensor, "n temperatures"]
    """Log of the mass outside the head."""
    logsumexp: Float64[Tensor, "n temperatures"]
    """Of all z / T."""


def estimate(logits: Logits, recipe: Recipe, *, sample_index: I64, position: I64) -> Entries:
    """Targets of n tokens; `sample_index` and `position` (n,) say which, for the draws. Leaves no logits behind."""
    estimator, temperatures = recipe.estimator, recipe.temperatures
    if isinstance(estimator, TopK):
        return topk(logits, estimator, temperatures)
    draws = estimator.draws if isinstance(estimator, Sampled) else 1
    u = on_device(uniforms(estimator.seed, sample_index, position, draws=draws), logits.device)
    if isinstance(estimator, Sampled):
        return sampled(logits, u, temperatures)
    return adaptive(logits, u[:, 0], estimator, temperatures)


def topk(logits: Logits, estimator: TopK, temperatures: Sequence[float]) -> Entries:
    """The k largest probabilities, ending early once they hold `mass` (1.0: never early), and the mass of the rest.

    Leaves in `logits` what `_head` does.
    """
    head = _head(logits, k_min=1, k_max=estimator.k, mass=estimator.mass, temperatures=temperatures)
    return _exact(head)


def adaptive(logits: Logits, u: Float64[Tensor, " n"], estimator: Adaptive, temperatures: Sequence[float]) -> Entries:
    """The fewest entries that reach `mass`, then systematic draws from the rest: points (u + j) / m, one u per token.

    Args:
        logits: left as exp(z - the tail's largest) of the tail, 0 in the head's places.
        u: in [0, 1).
        estimator: m are its `tail_draws`.
        temperatures: of the stored tail masses; the first is 1.
    """
    k_min, k_max, m = estimator.k_min, estimator.k_max, estimator.tail_draws
    head = _head(logits, k_min=k_min, k_max=k_max, mass=estimator.mass, temperatures=temperatures)
    exact = _exact(head)
    # `_head` left exp(z - rest_top) of what is not among the k largest. Scale to the largest entry of the tail, and
    # give back those of the k largest that the head left out.
    tail_top = torch.maximum(head.outside.amax(1), head.rest_top)
    logits.mul_(torch.exp(head.rest_top - tail_top).nan_to_num_(0.0).float()[:, None])
    logits.scatter_(1, head.ids, torch.exp(head.outside - tail_top[:, None]).nan_to_num_(0.0).float())
    steps = torch.arange(m, device=u.device, dtype=torch.float64)
    drawn, weights = draw_from_weights(logits, (u[:, None] + steps) / m)
    drawn_logprobs = weights.log() + (tail_top - head.logsumexp[:, 0])[:, None]

    ids, logprobs, counts = _merged(drawn, drawn_logprobs.float())
    counts = counts.masked_fill((head.tail[:, 0].exp() <= _NO_DRAWS_BELOW)[:, None], 0)
    return replace(
        exact,
        ids=torch.cat([exact.ids, ids], 1),
        logprobs=torch.cat([exact.logprobs, logprobs], 1),
        filled=torch.cat([exact.filled, counts > 0], 1),
        counts=torch.cat([torch.zeros_like(exact.ids), counts], 1),
    )


def sampled(logits: Logits, u: Float64[Tensor, "n draws"], temperatures: Sequence[float]) -> Entries:
    """Independent draws from p, one per column of `u`, in [0, 1). Leaves exp(z - the largest) in `logits`."""
    top = logits.amax(1).double()
    logsumexp = _log_sums(logits, top, temperatures)
    drawn, weights = draw_from_weights(logits, u)
    ids, logprobs, counts = _merged(drawn, (weights.log() + (top - logsumexp[:, 0])[:, None]).float())
    return Entries(
        ids=ids,
        logprobs=logprobs,
        filled=counts > 0,
        head_size=torch.zeros_like(ids[:, 0]),
        counts=counts,
        tail_logprob=torch.zeros_like(logsumexp).float(),
        logsumexp=logsumexp.float(),
        finite=logsumexp[:, 0].isfinite(),
    )


def gather(parts: Sequence[Entries], *, logsumexp: bool) -> Callable[[], tuple[Targets, npt.NDArray[np.bool_]]]:
    """Begin to copy the entries of all tokens of `parts` to the CPU.

    Returns:
        What waits for the copies and gives the targets and, per token, whether its logits were finite.
    """
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Entries)}
    if not logsumexp:
        del columns["logsumexp"]
    if columns["counts"][0] is None:
        del columns["counts"]
    # To pinned memory: a GPU copies while it computes what comes next.
    copies = {name: torch.cat(column).to("cpu", non_blocking=True) for name, column in columns.items()}
    device = parts[0].ids.device
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def gathered() -> tuple[Targets, npt.NDArray[np.bool_]]:
        if copied is not None:
            copied.synchronize()
        arrays: dict[str, Any] = {name: copy.numpy() for name, copy in copies.items()}
        filled, finite = arrays.pop("filled"), arrays.pop("finite")
        arrays |= {name: arrays[name][filled] for name in ("ids", "logprobs", "counts") if name in arrays}
        offsets = np.concatenate([[0], np.cumsum(filled.sum(1), dtype=np.int64)])
        return Targets(offsets=offsets, **arrays), finite

    return gathered


def on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A tensor with the array's values. From pinned memory, so that nobody waits for what a GPU has yet to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _head(logits: Logits, *, k_min: int, k_max: int, mass: float, temperatures: Sequence[float]) -> _Head:
    """Choose the head. Leaves in `logits` exp(z - rest_top) of all but the k_max largest, and 0 in their places."""
    n, vocabulary = logits.shape
    k = min(k_max, vocabulary)
    values, ids = largest(logits, min(k + 1, vocabulary))
    rest_top = values[:, k].double() if k < vocabulary else values.new_full((n,), -torch.inf, dtype=torch.float64)
    values, ids = values[:, :k].double(), ids[:, :k]
    logits.scatter_(1, ids, -torch.inf)
    scale = _inverse(temperatures, logits.device)
    rest = _log_sums(logits, rest_top, temperatures)
    everything = torch.cat([values[:, None, :] * scale[:, None], rest[:, :, None]], 2)
    logsumexp = everything.logsumexp(2)

    logprobs = values - logsumexp[:, :1]
    # An entry is inside if the ones before it do not yet hold the mass.
    before = pad(logprobs.exp().cumsum(1)[:, :-1], (1, 0))
    inside = before < mass if mass < 1.0 else torch.ones_like(before, dtype=torch.bool)
    inside[:, :k_min] = True
    inside &= logprobs > -torch.inf
    outside = values.masked_fill(inside, -torch.inf)
    left_out = torch.cat([outside[:, None, :] * scale[:, None], rest[:, :, None]], 2)
    # Rounding may not push a log-mass above 0.
    tail = (left_out.logsumexp(2) - logsumexp).clamp_max(0.0)
    return _Head(ids, logprobs, inside, outside, rest_top, tail, logsumexp)


def _log_sums(
    logits: Logits, top: Float64[Tensor, " n"], temperatures: Sequence[float]
) -> Float64[Tensor, "n temperatures"]:
    """Log sum exp(z / T), where `top` bounds z. Leaves exp(z - top) in `logits`."""
    shift = top.masked_fill(top.isneginf(), 0.0).float()[:, None]
    logits.sub_(shift)
    sums = [torch.exp(logits / T).sum(1) for T in temperatures[1:]]
    sums.insert(0, logits.exp_().sum(1))
    return torch.stack(sums, 1).double().log() + top[:, None] * _inverse(temperatures, logits.device)


def _inverse(temperatures: Sequence[float], device: torch.device) -> Float64[Tensor, " temperatures"]:
    """1 / T."""
    return on_device(1.0 / np.array(temperatures, np.float64), device)


def _exact(head: _Head) -> Entries:
    """The head and nothing else, ascending by id; what lies outside it comes last, as padding."""
    order = head.ids.masked_fill(~head.inside, 2**31 - 1).argsort(1)
    return Entries(
        ids=head.ids.gather(1, order).int(),
        logprobs=head.logprobs.gather(1, order).float(),
        filled=head.inside.gather(1, order),
        head_size=head.inside.sum(1).int(),
        tail_logprob=head.tail.float(),
        logsumexp=head.logsumexp.float(),
        finite=head.logsumexp[:, 0].isfinite(),
    )


def _merged(
    ids: Int64[Tensor, "n draws"], logprobs: Float32[Tensor, "n draws"]
) -> tuple[Int32[Tensor, "n draws"], Float32[Tensor, "n draws"], Int32[Tensor, "n draws"]]:
    """Sort the draws of each row by id and merge repeated ones: ids, log-probs and counts; count 0 is padding."""
    ids, order = ids.sort(1)
    logprobs = logprobs.gather(1, order)
    first = torch.ones_like(ids)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, place, torch.ones_like(ids))
    return ids.scatter(1, place, ids).int(), logprobs.scatter(1, place, logprobs), counts.int()
