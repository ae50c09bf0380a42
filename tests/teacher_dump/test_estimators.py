"""Estimators against float64 references written from the definition, and their statistical properties."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rounding import BELOW_16

from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.targets import Targets, decode
from teacher_dump.estimators.draws import uniforms
from teacher_dump.estimators.estimate import estimate, gather
from teacher_dump.estimators.selection import draw_from_weights, largest

pytestmark = pytest.mark.exact

VOCABULARIES = [7, 64, 333, 5000]


def random_logits(n: int, vocabulary: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, vocabulary, generator=generator)


def targets_of(
    logits: torch.Tensor,
    estimator: Estimator,
    *,
    temperatures: Sequence[float] = (1.0,),
    sample_index: Any = None,
    position: Any = None,
) -> Targets:
    n = len(logits)
    entries = estimate(
        logits.clone(),
        Recipe(estimator=estimator, temperatures=temperatures),
        sample_index=np.zeros(n, np.int64) if sample_index is None else sample_index,
        position=np.arange(n) if position is None else position,
    )
    targets, finite = gather([entries], logsumexp=True)()
    assert finite.all()
    return targets


def log_softmax64(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    return torch.log_softmax(logits.double() / temperature, dim=1).numpy()


def head_by_definition(logprobs: np.ndarray, *, k_min: int, k_max: int, mass: float) -> np.ndarray:
    """Ids of the fewest entries that hold `mass`, by value, then by lowest id; ascending."""
    order = np.lexsort((np.arange(len(logprobs)), -logprobs))[:k_max]
    if mass >= 1.0:
        return np.sort(order)
    held = np.cumsum(np.exp(logprobs[order]))
    size = max(int(np.searchsorted(held, mass)) + 1, k_min)
    return np.sort(order[:size])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("k", "mass"), [(1, 1.0), (8, 1.0), (8, 0.9), (64, 0.999), (6000, 1.0), (6000, 0.5)])
def test_topk_equals_its_definition_at_every_temperature(vocabulary: int, k: int, mass: float) -> None:
    logits = random_logits(9, vocabulary)
    temperatures = (1.0, 2.0, 0.5)
    targets = targets_of(logits, TopK(k=k, mass=mass), temperatures=temperatures)
    exact = log_softmax64(logits)
    for i in range(len(logits)):
        token = targets.slice(i, i + 1)
        head = head_by_definition(exact[i], k_min=1, k_max=k, mass=mass)
        np.testing.assert_array_equal(token.ids, head)
        assert token.head_size[0] == len(head)
        np.testing.assert_allclose(token.logprobs, exact[i, head], atol=BELOW_16)
        for j, temperature in enumerate(temperatures):
            tempered = log_softmax64(logits, temperature)[i]
            rest = np.delete(tempered, head)
            expected = np.logaddexp.reduce(rest) if len(rest) else -np.inf
            np.testing.assert_allclose(token.tail_logprob[0, j], expected, atol=BELOW_16)
            scaled = logits[i].double().numpy() / temperature
            np.testing.assert_allclose(token.logsumexp[0, j], np.logaddexp.reduce(scaled), atol=BELOW_16)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_adaptive_head_and_draws_equal_their_definition(vocabulary: int) -> None:
    logits = random_logits(40, vocabulary)
    estimator = Adaptive(kind="adaptive", mass=0.9, k_min=2, k_max=16, tail_draws=4, seed=3)
    targets = targets_of(logits, estimator)
    exact = log_softmax64(logits)
    u = uniforms(3, np.zeros(40, np.int64), np.arange(40), draws=1)[:, 0]
    for i in range(40):
        token = targets.slice(i, i + 1)
        size = token.head_size[0]
        head = head_by_definition(exact[i], k_min=2, k_max=16, mass=0.9)
        np.testing.assert_array_equal(token.ids[:size], head)
        tail = np.exp(exact[i])
        tail[head] = 0.0
        if tail.sum() < 1e-7:
            assert len(token.ids) == size
            continue
        points = (u[i] + np.arange(4)) / 4 * tail.sum()
        drawn, counts = np.unique(np.searchsorted(np.cumsum(tail), points, side="right"), return_counts=True)
        np.testing.assert_array_equal(token.ids[size:], drawn)
        np.testing.assert_array_equal(token.counts[size:], counts)
        np.testing.assert_array_equal(token.counts[:size], 0)
        np.testing.assert_allclose(token.logprobs, exact[i, token.ids], atol=BELOW_16)
        np.testing.assert_allclose(token.tail_logprob[0, 0], np.log(tail.sum()), atol=BELOW_16)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sampled_draws_equal_their_definition(vocabulary: int) -> None:
    logits = random_logits(20, vocabulary)
    targets = targets_of(logits, Sampled(kind="sampled", draws=50, seed=5), temperatures=(1.0, 2.0))
    exact = log_softmax64(logits)
    u = uniforms(5, np.zeros(20, np.int64), np.arange(20), draws=50)
    for i in range(20):
        token = targets.slice(i, i + 1)
        drawn, counts = np.unique(np.searchsorted(np.cumsum(np.exp(exact[i])), u[i], "right"), return_counts=True)
        np.testing.assert_array_equal(token.ids, drawn)
        np.testing.assert_array_equal(token.counts, counts)
        assert token.head_size[0] == 0
        np.testing.assert_array_equal(token.tail_logprob, 0.0)
        np.testing.assert_allclose(token.logprobs, exact[i, drawn], atol=BELOW_16)
        np.testing.assert_allclose(token.logsumexp[0, 1], np.logaddexp.reduce(logits[i].double().numpy() / 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 80), st.integers(0, 2**31), st.sampled_from([1, 3, 17, 1000]))
def test_largest_breaks_ties_by_lowest_id(width: int, k: int, seed: int, levels: int) -> None:
    k = min(k, width)
    generator = np.random.default_rng(seed)
    values = generator.integers(-levels, levels + 1, (3, width)).astype(np.float32) / 4
    values[generator.random(values.shape) < 0.1] = -0.0
    got, index = largest(torch.from_numpy(values), k)
    for row in range(3):
        expected = np.lexsort((np.arange(width), -values[row]))[:k]
        np.testing.assert_array_equal(index[row], expected)
        np.testing.assert_array_equal(got[row], values[row, expected])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
def test_a_weight_of_zero_is_never_drawn(width: int, seed: int, u: Any) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.random((2, width)).astype(np.float32) * (generator.random((2, width)) < 0.05)
    weights[:, generator.integers(width)] = 1e-30
    points = torch.tensor([[u, 0.0, 1.0 - 2**-53]] * 2, dtype=torch.float64)
    index, weight = draw_from_weights(torch.from_numpy(weights), points)
    assert (weight > 0).all()
    np.testing.assert_array_equal(weight, np.take_along_axis(weights, index.numpy(), 1).astype(np.float64))


@pytest.mark.parametrize("estimator", [TopK(k=4), Adaptive(kind="adaptive", k_max=4)])
def test_a_peaked_teacher_keeps_an_exact_tail(estimator: Estimator) -> None:
    # 1 - p of the first token is far below what float32 or float64 can subtract.
    logits = torch.full((1, 1000), -100.0)
    logits[0, 3] = 60.0
    targets = targets_of(logits, estimator, temperatures=(1.0, 2.0))
    assert targets.head_size[0] == 1
    assert targets.ids[0] == 3
    assert targets.logprobs[0] == 0.0
    np.testing.assert_allclose(targets.tail_logprob[0], [np.log(999) - 160, np.log(999) - 80], rtol=1e-6)
    if targets.counts is not None:
        assert len(targets.ids) == 1, "a tail of mass 0 needs no draws"


def test_a_flat_teacher() -> None:
    logits = torch.zeros(2, 5000)
    top = targets_of(logits, TopK(k=64, mass=0.999))
    np.testing.assert_array_equal(top.ids.reshape(2, 64), np.tile(np.arange(64), (2, 1)))
    np.testing.assert_allclose(np.exp(top.tail_logprob), 1 - 64 / 5000, rtol=1e-6)
    drawn = targets_of(logits, Adaptive(kind="adaptive", k_max=16, tail_draws=4))
    np.testing.assert_array_equal(drawn.counts.reshape(2, 20)[:, 16:], 1)
    np.testing.assert_allclose(drawn.logprobs, -np.log(5000), rtol=1e-6)


def test_bfloat16_ties_are_broken_by_lowest_id() -> None:
    logits = random_logits(50, 5000).bfloat16().float()
    targets = targets_of(logits, TopK(k=16, mass=1.0))
    exact = logits.numpy()
    for i in range(50):
        np.testing.assert_array_equal(
            targets.ids[16 * i : 16 * i + 16], np.sort(np.lexsort((np.arange(5000), -exact[i]))[:16])
        )


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 70, 4999])
@pytest.mark.parametrize("estimator", [TopK(), Adaptive(kind="adaptive"), Sampled(kind="sampled")])
def test_nonfinite_logits_are_reported_and_leave_other_rows_alone(
    bad: float, column: int, estimator: Estimator
) -> None:
    logits = random_logits(3, 5000)
    good = targets_of(logits, estimator)
    logits[1, column] = bad
    keys = {"sample_index": np.zeros(3, np.int64), "position": np.arange(3)}
    targets, finite = gather([estimate(logits, Recipe(estimator=estimator), **keys)], logsumexp=True)()
    np.testing.assert_array_equal(finite, [True, False, True])
    for i in (0, 2):
        np.testing.assert_array_equal(targets.slice(i, i + 1).ids, good.slice(i, i + 1).ids)
        np.testing.assert_array_equal(targets.slice(i, i + 1).logprobs, good.slice(i, i + 1).logprobs)


@pytest.mark.parametrize("estimator", [TopK(k=8), Adaptive(kind="adaptive", k_max=8), Sampled(kind="sampled", draws=9)])
def test_masked_out_vocabulary_has_no_entries(estimator: Estimator) -> None:
    logits = random_logits(5, 300)
    logits[:, 5:] = -torch.inf
    targets = targets_of(logits, estimator)
    assert targets.ids.max() < 5
    assert np.isfinite(targets.logprobs).all()
    if isinstance(estimator, TopK) and estimator.mass == 1.0:
        assert np.isneginf(targets.tail_logprob).all()


@pytest.mark.parametrize(
    "estimator", [TopK(k=8), Adaptive(kind="adaptive", mass=0.8, k_max=8), Sampled(kind="sampled", draws=20)]
)
def test_weights_and_bucket_sum_to_one(estimator: Estimator) -> None:
    targets = targets_of(random_logits(60, 500), estimator)
    decoded = decode(targets)
    total = decoded.weights.astype(np.float64).sum(1)
    if targets.counts is None:
        total += np.exp(decoded.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1.0, atol=2e-6)


@pytest.mark.parametrize("estimator", [Adaptive(kind="adaptive", k_max=4), Sampled(kind="sampled", draws=10)])
def test_draws_depend_on_sample_and_position_alone(estimator: Estimator) -> None:
    logits = random_logits(12, 700)
    sample_index, position = np.repeat([4, 9, 11], 4), np.tile(np.arange(4), 3)
    together = targets_of(logits, estimator, sample_index=sample_index, position=position)
    order = np.random.default_rng(0).permutation(12)
    shuffled = targets_of(logits[order], estimator, sample_index=sample_index[order], position=position[order])
    for place, i in enumerate(order):
        alone, there = together.slice(i, i + 1), shuffled.slice(place, place + 1)
        np.testing.assert_array_equal(alone.ids, there.ids)
        np.testing.assert_array_equal(alone.counts, there.counts)


def test_uniforms_are_uniform_and_differ_by_seed_sample_and_position() -> None:
    u = uniforms(1, np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100), draws=5)
    assert len(np.unique(u)) == u.size
    assert u.min() >= 0.0
    assert u.max() < 1.0
    histogram = np.histogram(u, bins=20, range=(0, 1))[0]
    expected = u.size / 20
    assert ((histogram - expected) ** 2 / expected).sum() < 45, "chi-square with 19 degrees of freedom"
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.04
    assert not np.isin(uniforms(2, np.arange(100), np.arange(100), draws=5), u).any()


def dense(targets: Targets, vocabulary: int) -> np.ndarray:
    """(n, vocabulary) what each entry weighs in an expectation."""
    decoded = decode(targets)
    full = np.zeros((len(targets), vocabulary))
    np.add.at(full, (np.arange(len(targets))[:, None], decoded.ids), decoded.weights)
    return full


ADAPTIVE = Adaptive(kind="adaptive", mass=0.7, k_max=4, tail_draws=3)


@pytest.mark.parametrize("estimator", [ADAPTIVE, Sampled(kind="sampled", draws=12)])
def test_target_and_gradient_are_unbiased(estimator: Any) -> None:
    vocabulary, repeats = 100, 5000
    teacher, student = random_logits(1, vocabulary, scale=1.0), random_logits(1, vocabulary, seed=1)
    p = np.exp(log_softmax64(teacher))[0]
    q = np.exp(log_softmax64(student))[0]
    draws = dense(targets_of(teacher.expand(repeats, -1), estimator, sample_index=np.arange(repeats)), vocabulary)
    # The gradient of KL with respect to the student's logits is q - target, seen along random directions as well.
    directions = np.random.default_rng(2).standard_normal((vocabulary, 20))
    for estimates, exact in [(draws, p), ((q - draws) @ directions, (q - p) @ directions)]:
        error = estimates.std(0) / np.sqrt(repeats)
        np.testing.assert_array_less(np.abs(estimates.mean(0) - exact), 4 * error + 1e-6)


@pytest.mark.parametrize(("scale", "draws"), [(5.0, 72), (6.0, 80)])
def test_adaptive_is_closer_than_sampling_at_equal_entries(scale: float, draws: int) -> None:
    # 2.0 and 1.5 nats of entropy, as on real text. Where most mass lies outside k_max entries, four draws are too few.
    logits = random_logits(400, 3000, scale=scale)
    p = np.exp(log_softmax64(logits))

    def error_and_entries(estimator: Estimator) -> tuple[float, float]:
        targets = targets_of(logits, estimator)
        return np.linalg.norm(dense(targets, 3000) - p, axis=1).mean(), targets.lengths.mean()

    adaptive_error, adaptive_entries = error_and_entries(Adaptive(kind="adaptive", mass=0.9, k_max=16, tail_draws=4))
    sampled_error, sampled_entries = error_and_entries(Sampled(kind="sampled", draws=draws))
    assert adaptive_entries <= sampled_entries
    assert adaptive_error < 0.6 * sampled_error
