"""What vLLM says about a prompt's tokens, as targets of `topk`. Pure functions over its output; vLLM is not imported.

`prompt_logprobs[i]` is the distribution of token i given the tokens before it, the target of a supervised token i. It
is asked for the K largest entries in the flat form: lists of numbers with the bounds of every position (nothing for
token 0). Each position begins with the prompt's own token, whatever its rank, and then holds ranks 1 ... K.
"""

from typing import Any

import numpy as np

from storage_schemas.common.errors import MismatchError
from storage_schemas.targets import F64, I64, Bool, Targets

TAIL_NOISE = 1e-6
"""Mass. What 1 - sum is off by where the tail is small: the log-probs are float32. At most 6e-7 was seen below 1e-5,
with 500 to 151,936 entries. Larger tails are as exact as the log-softmax was."""


def ranked(prompt_logprobs: Any, tokens: I64, k: int) -> tuple[I64, F64]:
    """The k largest entries at some positions of a prompt, largest first.

    Args:
        prompt_logprobs: of one request, flat.
        tokens: (n,) positions.
        k: entries that were asked for.

    Returns:
        (n, k) ids and (n, k) log-probs.

    Raises:
        MismatchError: a position is missing, or one of its ranks.
    """
    if tokens.max(initial=0) >= len(prompt_logprobs):
        raise _not_understood(f"{len(prompt_logprobs)} positions", f"at least {tokens.max() + 1}")
    bounds = (prompt_logprobs.start_indices, prompt_logprobs.end_indices)
    starts, ends = (np.asarray(each, np.int64)[tokens] for each in bounds)
    counts = ends - starts
    entries = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    ids, ranks = (np.asarray(each, np.int64)[entries] for each in (prompt_logprobs.token_ids, prompt_logprobs.ranks))
    logprobs = np.asarray(prompt_logprobs.logprobs, np.float64)[entries]
    rows = np.repeat(np.arange(len(tokens)), counts)
    # The prompt's own token comes first. Where it is among the K largest, or where a tie gives it the rank of one that
    # is, the entry of that rank comes later; of equal places in an assignment, the last one stays.
    among = (ranks >= 1) & (ranks <= k)
    place = rows[among], ranks[among] - 1
    found_ids = np.full((len(tokens), k), -1, np.int64)
    found = np.zeros((len(tokens), k), np.float64)
    found_ids[place], found[place] = ids[among], logprobs[among]
    if missing := int((found_ids < 0).any(axis=1).sum()):
        raise _not_understood(f"{missing} of {len(tokens)} positions without some of the ranks", f"ranks 1 to {k}")
    return found_ids, found


def topk_targets(
    ids: I64, logprobs: F64, *, mass: float, vocabulary: int, masked_from: int | None = None
) -> tuple[Targets, Bool]:
    """Targets of n tokens from their K largest entries, as `estimators.topk` makes them from all logits.

    What lies outside the K largest is 1 - sum, taken in float64. It is noise below TAIL_NOISE; there it is taken for
    one more entry like the smallest of the K. None of the others is larger than that one, which bounds their sum, often
    better than the noise does where the teacher is sure. What the head leaves out of the K is known exactly.

    Args:
        ids: (n, K), largest entry first.
        logprobs: (n, K) natural logs, normalised over the whole vocabulary.
        mass: the head ends once it holds this much; 1.0: never early.
        vocabulary: entries of the distribution, at least K.
        masked_from: ids from here on shall have no probability. Those among the K are left out, and what remains is
            divided by its sum; those that are not among them stay in the tail, unknown.

    Returns:
        The targets and, per token, whether its log-probs were numbers; if not, its target means nothing.
    """
    k = ids.shape[1]
    finite: Bool = np.logical_not(np.isnan(logprobs).any(axis=1))
    # Equal entries in the order of their ids, as the other estimators have them.
    order = np.lexsort((ids, -logprobs), axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    p = np.exp(logprobs)
    smallest = p[:, -1]
    rest = np.clip(1.0 - p.sum(axis=1), np.minimum(smallest, TAIL_NOISE), None)
    rest = np.minimum(rest, (vocabulary - k) * smallest)
    if masked_from is not None:
        masked = ids >= masked_from
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = np.log1p(-np.where(masked, p, 0.0).sum(axis=1))
            logprobs = np.where(masked, -np.inf, logprobs - kept[:, None])
            # The largest first again, those without probability last.
            order = np.argsort(-logprobs, axis=1, kind="stable")
            ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
            p, rest = np.exp(logprobs), rest / np.exp(kept)
        finite &= np.isfinite(kept) & ~masked.all(axis=1)
    before = np.pad(np.cumsum(p[:, :-1], axis=1), ((0, 0), (1, 0)))
    inside = before < mass if mass < 1.0 else np.ones_like(p, dtype=bool)
    inside[:, 0] = True
    inside &= logprobs > -np.inf
    left_out = np.where(inside, 0.0, p).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.minimum(np.log(left_out + rest), 0.0)

    by_id = np.argsort(np.where(inside, ids, 2**31), axis=1)
    ids, logprobs = np.take_along_axis(ids, by_id, 1), np.take_along_axis(logprobs, by_id, 1)
    sizes = inside.sum(axis=1)
    filled = np.arange(k) < sizes[:, None]
    targets = Targets(
        offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        ids=ids[filled].astype(np.int32),
        logprobs=logprobs[filled].astype(np.float32),
        head_size=sizes.astype(np.int32),
        tail_logprob=tail[:, None].astype(np.float32),
    )
    return targets, finite


def _not_understood(got: str, expected: str) -> MismatchError:
    return MismatchError(
        "vLLM's prompt_logprobs are not understood",
        got=got,
        expected=expected,
        fix="install the vLLM that `llm-neo docs design/teacher` names, or use teacher.backend: transformers",
    )
