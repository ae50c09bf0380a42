"""The shift, the decoding rule and the fidelity of what is stored, against float64 written from the definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dumps import dense_targets

from storage_schemas.codec import (
    FINEST_STEP,
    _ladder,
    fidelity,
    mean_entropy,
    mean_kept_mass,
    round_logprobs,
    round_targets,
)
from storage_schemas.common.errors import DataError
from storage_schemas.config import TopK
from storage_schemas.provenance import Recipe
from storage_schemas.rows import no_targets
from storage_schemas.shift import supervised_positions
from storage_schemas.targets import Targets, concatenate, decode

TEMPERATURES = (1.0, 2.0)


def logits_of(n: int, vocab: int, *, scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n, vocab))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@given(st.lists(st.booleans(), max_size=40))
def test_shift_names_the_token_and_the_logits_before_it(tail: list[bool]) -> None:
    mask = np.array([False, *tail])
    tokens, logits = supervised_positions(mask)
    assert tokens.tolist() == [t for t in range(len(mask)) if mask[t]]
    assert (tokens - logits == 1).all()


def test_shift_refuses_token_0_and_accepts_nothing() -> None:
    with pytest.raises(DataError, match="token 0"):
        supervised_positions([True, False])
    assert len(supervised_positions([]).tokens) == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_decode_gives_the_teachers_distribution(scale: float, temperature: float) -> None:
    z = logits_of(50, 40, scale=scale)
    targets = dense_targets(z, k=6, temperatures=TEMPERATURES)
    got = decode(targets, temperature_index=TEMPERATURES.index(temperature), temperature=temperature)
    p = softmax(z / temperature)
    np.testing.assert_allclose(got.weights, np.take_along_axis(p, got.ids, 1), rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(got.logprobs, np.log(np.take_along_axis(p, got.ids, 1)), rtol=1e-5, atol=2e-5)
    outside = p.copy()
    np.put_along_axis(outside, got.ids, 0.0, 1)
    np.testing.assert_allclose(np.exp(got.tail_logprob), outside.sum(1), rtol=2e-5, atol=1e-30)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.0625, 0.25]))
@settings(max_examples=40, deadline=None)
def test_decoded_mass_is_1_however_coarse_the_rounding(seed: int, step: float) -> None:
    targets = dense_targets(logits_of(20, 30, scale=4.0, seed=seed), k=5, temperatures=TEMPERATURES)
    stored = round_targets(targets, temperatures=TEMPERATURES, coarsest=step, max_kl=1.0).targets
    for i, temperature in enumerate(TEMPERATURES):
        p = decode(stored, temperature_index=i, temperature=temperature)
        np.testing.assert_allclose(p.weights.sum(1) + np.exp(p.tail_logprob), 1.0, atol=1e-5)


def test_decode_weighs_draws_by_the_tail_mass() -> None:
    z = logits_of(30, 50, scale=2.0)
    targets = dense_targets(z, k=4, draws=8)
    p = decode(targets)
    mass = np.where(p.in_head, 0.0, p.weights).sum(1)
    np.testing.assert_allclose(mass, np.exp(targets.tail_logprob[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(p.weights.sum(1), 1.0, atol=1e-5)
    assert targets.counts is not None
    first = decode(targets.slice(0, 1))
    drawn = np.flatnonzero(~first.in_head[0])
    expected = np.exp(float(targets.tail_logprob[0, 0])) * targets.slice(0, 1).counts[drawn] / 8
    np.testing.assert_allclose(first.weights[0, drawn], expected, rtol=1e-5)


def test_draws_are_never_re_tempered() -> None:
    with pytest.raises(ValueError, match="temperature 1"):
        decode(dense_targets(logits_of(2, 10, scale=1.0), k=2, draws=3), temperature=2.0)


@pytest.mark.parametrize("case", ["k = V", "peaked", "flat", "k = 1", "no tokens"])
def test_decode_stays_finite_at_the_edges(case: str) -> None:
    vocab = 12
    z = {"peaked": np.eye(4, vocab) * 500.0, "flat": np.zeros((4, vocab))}.get(case, logits_of(4, vocab, scale=2.0))
    targets = dense_targets(z, k={"k = V": vocab, "k = 1": 1}.get(case, 5), temperatures=TEMPERATURES)
    if case == "no tokens":
        targets = no_targets(Recipe(estimator=TopK(), temperatures=(1.0, 2.0), logsumexp=True))
    for i, temperature in enumerate(TEMPERATURES):
        p = decode(targets, temperature_index=i, temperature=temperature)
        assert np.isfinite(p.weights).all()
        np.testing.assert_allclose(p.weights.sum(1) + np.exp(p.tail_logprob), 1.0, atol=1e-5)
        if case == "k = V":
            assert np.isneginf(p.tail_logprob).all()
            np.testing.assert_allclose(p.weights, softmax(z / temperature), atol=1e-6)


TAILS = [-np.inf, -1e-30, -1e-6, -0.3, -0.7, -20.0, -90.0]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.5, 1.0, 2.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_decode_is_the_written_rule_to_the_last_digit_of_float32(seed: int, temperature: float) -> None:
    """Heads of all lengths, peaked and flat, with tails near nothing and near everything."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, len(TAILS))
    logprobs = (-rng.gamma(1.0, rng.choice([1e-3, 3.0, 40.0]), lengths.sum())).astype(np.float32)
    tails = rng.permutation(TAILS).astype(np.float32)
    targets = Targets(
        offsets=np.cumsum([0, *lengths]),
        ids=np.arange(len(logprobs), dtype=np.int32),
        logprobs=logprobs,
        head_size=lengths.astype(np.int32),
        tail_logprob=tails[:, None],
    )
    p = decode(targets, temperature=temperature)
    for i, length in enumerate(lengths):
        x = logprobs[targets.offsets[i] : targets.offsets[i + 1]].astype(np.longdouble) / temperature
        head = x - np.logaddexp.reduce(x) + np.log(-np.expm1(tails[i].astype(np.longdouble)))
        np.testing.assert_allclose(p.logprobs[i, :length], head.astype(np.float64), rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(p.weights[i, :length], np.exp(head).astype(np.float64), rtol=2e-7, atol=1e-44)
        assert (p.ids[i, :length] == targets.ids[targets.offsets[i] : targets.offsets[i + 1]]).all()
        assert not p.weights[i, length:].any()
        assert p.in_head[i].sum() == length


def bucketed_kl(z: np.ndarray, stored: Targets, temperature: float, index: int) -> float:
    """Mean KL in nats over the head's entries and one bucket, float64, from the raw logits and the stored values."""
    p = softmax(z / temperature)
    total = 0.0
    for i in range(len(stored)):
        one = slice(stored.offsets[i], stored.offsets[i + 1])
        ids, logprobs = stored.ids[one], stored.logprobs[one].astype(np.float64) / temperature
        tail = np.exp(float(stored.tail_logprob[i, index]))
        q = np.exp(logprobs) / np.exp(logprobs).sum() * (1 - tail)
        rest = 1.0 - p[i, ids].sum()
        total += (p[i, ids] * np.log(p[i, ids] / q)).sum() + (rest * np.log(rest / tail) if rest > 1e-12 else 0.0)
    return total / len(stored)


@pytest.mark.parametrize(("scale", "step"), list(itertools.product([1.0, 4.0], [0.0625, 0.25, 1.0])))
def test_measured_fidelity_is_the_bucketed_kl(scale: float, step: float) -> None:
    z = logits_of(200, 60, scale=scale)
    rounded = round_targets(
        dense_targets(z, k=8, temperatures=TEMPERATURES), temperatures=TEMPERATURES, coarsest=step, max_kl=10.0
    )
    assert rounded.step == step
    for i, temperature in enumerate(TEMPERATURES):
        expected = bucketed_kl(z, rounded.targets, temperature, i)
        assert rounded.fidelity[i] == pytest.approx(expected, rel=2e-2, abs=2e-7)
        assert expected > 0


def test_fidelity_of_itself_is_0() -> None:
    targets = dense_targets(logits_of(50, 40, scale=3.0), k=5, temperatures=TEMPERATURES)
    assert fidelity(targets, targets, temperatures=TEMPERATURES) == (0.0, 0.0)


def test_the_ladder_of_grids() -> None:
    """From 3/64 on a dictionary of one-byte indices holds all values; below it, halves only."""
    steps = list(itertools.islice(_ladder(0.0625), 5))
    assert steps == [1 / 16, 3 / 64, 1 / 32, 1 / 64, 1 / 128]
    values = round_logprobs(-np.geomspace(1e-6, 31.0, 10**5).astype(np.float32), 3 / 64)
    assert len(np.unique(values)) <= 256
    values = round_logprobs(-np.geomspace(1e-6, 63.9, 10**5).astype(np.float32), 1 / 16)
    assert len(np.unique(values)) <= 256
    assert list(_ladder(0.0)) == []
    assert list(_ladder(1.0))[-1] == FINEST_STEP


def test_the_rung_between_the_halves_is_taken() -> None:
    targets = dense_targets(logits_of(100, 60, scale=2.0), k=8, temperatures=TEMPERATURES)
    kl = {
        step: max(round_targets(targets, temperatures=TEMPERATURES, coarsest=step, max_kl=1.0).fidelity)
        for step in (1 / 16, 3 / 64)
    }
    assert kl[3 / 64] < 0.7 * kl[1 / 16]
    between = round_targets(targets, temperatures=TEMPERATURES, coarsest=1 / 16, max_kl=0.8 * kl[1 / 16])
    assert between.step == 3 / 64


def test_rounding_is_refined_until_the_gate_holds() -> None:
    targets = dense_targets(logits_of(100, 60, scale=2.0), k=8, temperatures=TEMPERATURES)
    wide = round_targets(targets, temperatures=TEMPERATURES, coarsest=1.0, max_kl=1e-4)
    assert 0 < wide.step < 1.0
    assert max(wide.fidelity) <= 1e-4
    twice = round_targets(targets, temperatures=TEMPERATURES, coarsest=2 * wide.step, max_kl=10.0)
    assert max(twice.fidelity) > 1e-4
    exact = round_targets(targets, temperatures=TEMPERATURES, coarsest=0.0625, max_kl=1e-12)
    assert exact.step == 0.0
    assert np.array_equal(exact.targets.logprobs, targets.logprobs)


def test_rounding_of_draws_is_measured_too() -> None:
    targets = dense_targets(logits_of(100, 60, scale=2.0), k=0, draws=20)
    assert round_targets(targets, temperatures=(1.0,), coarsest=1.0, max_kl=10.0).fidelity[0] > 1e-3


def test_a_nan_never_passes_for_fidelity() -> None:
    targets = dense_targets(logits_of(4, 10, scale=2.0), k=3)
    targets.logprobs[2] = np.nan
    assert not max(round_targets(targets, temperatures=(1.0,), coarsest=0.0625, max_kl=1e-4).fidelity) <= 1e-4


def test_statistics() -> None:
    z = logits_of(300, 20, scale=1.0)
    p = softmax(z)
    whole = dense_targets(z, k=20)
    assert mean_entropy(whole) == pytest.approx(float(-(p * np.log(p)).sum(1).mean()), rel=1e-5)
    assert mean_kept_mass(whole) == 1.0
    head = np.sort(p, axis=1)[:, -5:].sum(1)
    assert mean_kept_mass(dense_targets(z, k=5)) == pytest.approx(float(head.mean()), rel=1e-5)
    # Draws estimate the entropy without bias.
    estimate = mean_entropy(dense_targets(z, k=2, draws=64))
    assert estimate == pytest.approx(mean_entropy(whole), abs=0.03)


def test_slices_concatenate_to_the_whole() -> None:
    targets = dense_targets(logits_of(9, 30, scale=2.0), k=3, draws=4)
    again = concatenate([targets.slice(0, 2), targets.slice(2, 2), targets.slice(2, 9)])
    for name in Targets.__slots__:
        assert np.array_equal(getattr(again, name), getattr(targets, name)), name
