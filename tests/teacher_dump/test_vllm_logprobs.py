"""vLLM's prompt_logprobs as targets: recorded answers, and the estimator that sees all logits."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.record_vllm import TARGET

from storage_schemas.common.errors import MismatchError
from storage_schemas.config import TopK
from teacher_dump.estimators.estimate import gather, topk
from teacher_dump.teachers.vllm_logprobs import TAIL_NOISE, ranked, topk_targets

RECORDED = json.loads(Path(TARGET).read_text())
K, VOCABULARY = RECORDED["k"], RECORDED["vocabulary"]


class Flat(SimpleNamespace):
    """vLLM's FlatLogprobs, as far as it is read."""

    def __len__(self) -> int:
        return len(self.start_indices)


def truth(case: Any) -> np.ndarray:
    """(tokens - 1, V) log-probs of transformers; the head's rows come in equal pairs."""
    return np.repeat(np.array(case["transformers"]), 2, axis=1)


@pytest.mark.parametrize("case", RECORDED["cases"])
def test_recorded_answers_are_the_largest_entries_of_transformers(case: Any) -> None:
    tokens = np.arange(1, len(case["prompt"]))
    ids, logprobs = ranked(Flat(**case["flat"]), tokens, K)
    exact = truth(case)
    assert ids.shape == logprobs.shape == (len(tokens), K)
    assert all(len(set(row)) == K for row in ids.tolist())
    np.testing.assert_allclose(logprobs, -np.sort(-exact, axis=1)[:, :K], atol=2e-5)
    np.testing.assert_allclose(logprobs, np.take_along_axis(exact, ids, 1), atol=2e-5)


def test_the_recording_holds_what_it_is_for() -> None:
    """A prompt token among the k largest, one outside them (K + 1 entries), and one that a tie alone keeps out."""
    inside = outside = tied = 0
    for case in RECORDED["cases"]:
        assert case["list"][0] is None
        assert case["flat"]["start_indices"][0] == case["flat"]["end_indices"][0]
        for token, entries in zip(case["prompt"][1:], case["list"][1:], strict=True):
            assert entries[0][0] == token
            inside += len(entries) == K
            outside += len(entries) == K + 1 and entries[0][2] > K + 2
            tied += len(entries) == K + 1 and entries[0][1] == entries[-1][1]
    assert min(inside, outside, tied) >= 2


def test_the_prompts_own_token_is_no_entry_unless_it_is_among_the_largest() -> None:
    kept = dropped = 0
    for case in RECORDED["cases"]:
        ids, _ = ranked(Flat(**case["flat"]), np.arange(1, len(case["prompt"])), K)
        for row, token, entries in zip(ids, case["prompt"][1:], case["list"][1:], strict=True):
            assert (token in row) == (len(entries) == K)
            kept, dropped = kept + (token in row), dropped + (token not in row)
    assert min(kept, dropped) >= 4


def test_a_tied_token_with_the_rank_of_another_entry_is_no_entry() -> None:
    """Were ranks counted by `greater than`, a token tied with the k-th but not chosen would have a rank up to k."""
    case = {
        "start_indices": [0, 0],
        "end_indices": [0, 3],
        "token_ids": [9, 4, 2],
        "logprobs": [-1.0, -0.5, -1.0],
        "ranks": [2, 1, 2],
    }
    ids, logprobs = ranked(Flat(**case), np.array([1]), 2)
    assert ids.tolist() == [[4, 2]]
    assert logprobs.tolist() == [[-0.5, -1.0]]


@pytest.mark.parametrize(
    ("tokens", "k", "problem"),
    [
        ([0, 1], K, "1 of 2 positions"),  # Nothing precedes token 0.
        ([1, 6], K, "6 positions"),  # As long as the prompt, which was 6 tokens.
        ([1, 2], K + 1, "2 of 2 positions"),
    ],
)
def test_what_is_missing_is_refused(tokens: list[int], k: int, problem: str) -> None:
    with pytest.raises(MismatchError, match=problem):
        ranked(Flat(**RECORDED["cases"][0]["flat"]), np.array(tokens), k)


def test_a_missing_rank_is_refused() -> None:
    case = copy.deepcopy(RECORDED["cases"][0])
    case["flat"]["ranks"][case["flat"]["start_indices"][3] + 3] = K + 9
    with pytest.raises(MismatchError, match="1 of 5 positions"):
        ranked(Flat(**case["flat"]), np.arange(1, 6), K)


def logits_of(kind: str, n: int = 64, vocabulary: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=generator) * {"flat": 0.1, "usual": 3.0, "ties": 3.0}.get(kind, 2.0)
    if kind == "ties":
        logits = logits.round()
    if kind.startswith("peaked"):  # The rest has a mass of about exp(-gap).
        logits[:, 7] = logits.logsumexp(1) + float(kind.removeprefix("peaked"))
    return logits + 12.0


def as_vllm_says(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) ids and log-probs from a float32 log-softmax."""
    logprobs, ids = torch.log_softmax(logits, 1).sort(descending=True, stable=True)
    return ids[:, :k].numpy(), logprobs[:, :k].double().numpy()


@pytest.mark.parametrize(("k", "mass"), [(1, 0.999), (8, 1.0), (16, 0.9), (64, 0.999), (499, 1.0), (500, 1.0)])
@pytest.mark.parametrize("kind", ["usual", "flat", "ties", "peaked3", "peaked12"])
def test_targets_are_those_of_the_estimator_that_sees_all_logits(kind: str, k: int, mass: float) -> None:
    logits = logits_of(kind)
    found, finite = topk_targets(*as_vllm_says(logits, k), mass=mass, vocabulary=500)
    expected, _ = gather([topk(logits.clone(), TopK(k=k, mass=mass), (1.0,))], logsumexp=False)()
    assert finite.all()
    assert found.counts is None
    assert found.logsumexp is None
    np.testing.assert_array_equal(found.head_size, expected.head_size)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-6)
    np.testing.assert_allclose(np.exp(found.tail_logprob), np.exp(expected.tail_logprob), atol=2 * TAIL_NOISE)
    assert (np.isneginf(found.tail_logprob) == (k == 500)).all()


@pytest.mark.parametrize("gap", [10, 14, 18, 25])
def test_where_the_teacher_is_sure_the_tail_is_bounded_by_the_smallest_entry(gap: int) -> None:
    """1 - sum is noise of either sign there; the tail stays finite and within the noise, and better where it can."""
    logits = logits_of(f"peaked{gap}")
    exact = torch.log_softmax(logits.double(), 1)
    for k in (4, 64, 495):
        targets, _ = topk_targets(*as_vllm_says(logits, k), mass=1.0, vocabulary=500)
        tail, truth = np.exp(targets.tail_logprob[:, 0].astype(np.float64)), exact.sort(1).values[:, :-k].exp().sum(1)
        smallest = exact.sort(1).values[:, -k].exp().numpy()
        assert np.isfinite(targets.tail_logprob).all()
        assert (np.abs(tail - truth.numpy()) <= np.minimum(TAIL_NOISE, (500 - k) * smallest * 1.0001)).all()


def test_what_the_head_leaves_out_of_the_k_entries_is_known_exactly() -> None:
    """The head ends with the first entry; 1e-9 of mass follow, far below what 1 - sum can tell."""
    logits = torch.full((1, 64), -200.0)
    logits[0, :3] = torch.tensor([0.0, -21.0, -22.0])
    targets, _ = topk_targets(*as_vllm_says(logits, 4), mass=0.999, vocabulary=64)
    assert targets.head_size.tolist() == [1]
    assert float(targets.tail_logprob[0, 0]) == pytest.approx(np.logaddexp(-21.0, -22.0), abs=1e-5)


def test_impossible_tokens_are_no_entries_and_nan_is_said() -> None:
    logits = torch.full((2, 10), -torch.inf)
    logits[:, :3] = torch.tensor([1.0, 2.0, 3.0])
    logits[1, 0] = torch.nan
    targets, finite = topk_targets(*as_vllm_says(logits, 5), mass=1.0, vocabulary=10)
    assert finite.tolist() == [True, False]
    assert targets.slice(0, 1).ids.tolist() == [0, 1, 2]
    assert np.isneginf(targets.tail_logprob[0, 0])


def test_of_equal_entries_the_lowest_id_comes_first_whatever_the_order_of_the_answer() -> None:
    ids, logprobs = np.array([[5, 2, 9], [9, 5, 2]]), np.log([[0.4, 0.4, 0.2], [0.5, 0.25, 0.25]])
    targets, _ = topk_targets(ids, logprobs, mass=0.3, vocabulary=3)
    assert targets.ids.tolist() == [2, 9]
    targets, _ = topk_targets(ids, logprobs, mass=0.6, vocabulary=3)
    assert targets.ids.tolist() == [2, 5, 2, 9]


@pytest.mark.parametrize("k", [40, 12])
def test_ids_that_the_tokenizer_lacks_are_dropped(k: int) -> None:
    """With all entries known, as if they had been masked; else what is not named of them stays in the tail."""
    logits = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * 3
    every = logits.double().log_softmax(1).numpy()
    ids = np.argsort(-every, axis=1)[:, :k]
    found, finite = topk_targets(ids, np.take_along_axis(every, ids, 1), mass=0.9, vocabulary=40, masked_from=30)
    logits[:, 30:] = -torch.inf
    exact, _ = gather([topk(logits, TopK(k=40, mass=0.9), (1.0,))], logsumexp=False)()
    assert finite.all()
    assert found.ids.max() < 30
    if k == 40:
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=1e-5)
        np.testing.assert_allclose(found.tail_logprob, exact.tail_logprob, atol=1e-4)
    heads = np.add.reduceat(np.exp(found.logprobs.astype(np.float64)), found.offsets[:-1])
    np.testing.assert_allclose(heads + np.exp(found.tail_logprob[:, 0]), 1.0, atol=1e-5)
