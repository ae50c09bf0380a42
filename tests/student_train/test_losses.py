"""The loss that runs, on logits of one's own, against its definition in float64, and what training relies on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference import DIVERGENCES, SMOOTH, drawn_targets, head_targets, systematic_draws, token_divergence
from torch import Tensor

from storage_schemas.common.errors import MismatchError
from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.head import HeadLoss, HeadSpec, fused_head_loss
from student_train.model.losses import entry_divergence, refuse_biased
from student_train.model.token_losses import entries_and_tail, token_losses

pytestmark = pytest.mark.exact

N, VOCAB = 6, 23
SIZES = [1, 4, 7, 2, 7, 22]
PLAIN = LossSection()


def random_logits(seed: int, n: int = N, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def losses(logits: Tensor, targets: SparseTargets, spec: LossSection) -> HeadLoss:
    """Sums of the fused head over some tokens; its weight is the unit matrix, so that hidden states are logits."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return fused_head_loss(logits, eye, targets, loss=spec, head=HeadSpec())


def divergences(logits: Tensor, targets: SparseTargets, spec: LossSection = PLAIN) -> Tensor:
    """(n,) D of each token, differentiable."""
    alone, n = spec.model_copy(update={"alpha": 1.0}), len(targets)
    found = [losses(logits[i : i + 1], targets[i : i + 1], alone).loss for i in range(n)]
    return torch.stack(found) / spec.temperature**2


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_float32_stays_close_to_the_definition(kind: str) -> None:
    teacher, student = random_logits(2), random_logits(3)
    spec = LossSection(divergence=kind, beta=0.3)
    got = divergences(student.float(), head_targets(teacher, SIZES, dtype=torch.float32), spec)
    exact = head_targets(teacher, SIZES)
    expected = torch.stack([token_divergence(student, exact, i, spec) for i in range(N)])
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", SMOOTH)
def test_student_equal_to_teacher_has_no_divergence_and_no_gradient(kind: str, temperature: float) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        logits = random_logits(4).to(dtype).requires_grad_()
        targets = head_targets(logits.detach(), SIZES, temperature=temperature, dtype=dtype)
        spec = LossSection(divergence=kind, temperature=temperature)
        value = divergences(logits, targets, spec)
        assert value.abs().max() <= bound
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.abs().max() <= bound


def test_total_variation_of_equal_models_is_0() -> None:
    logits = random_logits(4)
    value = divergences(logits, head_targets(logits, SIZES), LossSection(divergence="tvd"))
    assert value.abs().max() < 1e-14


def test_cross_entropy_is_at_temperature_1_and_needs_no_entries() -> None:
    logits, labels = random_logits(5).requires_grad_(), torch.arange(N)
    targets = head_targets(random_logits(6), [0] * N, labels=labels)
    assert targets.ids.shape == (N, 0)
    got = losses(logits, targets, LossSection(alpha=0.0, temperature=2.0))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got.loss, expected)))
    assert got.loss == got.ce_sum
    assert not got.divergence_sum


def test_akl_weighs_the_head_by_half_of_the_teachers_mass() -> None:
    # Head of half the mass: the first two entries. Gaps 0.2 there, 0.2 in the rest, of which the bucket has 0.1.
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.2, 0.3, 0.2]], dtype=torch.float64)
    got = divergences(q.log(), head_targets(p.log(), [3]), LossSection(divergence="akl"))
    forward, backward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    torch.testing.assert_close(got[0], 0.5 * forward + 0.5 * backward)
    q = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64)  # all of the gap lies in the head
    got = divergences(q.log(), head_targets(p.log(), [3]), LossSection(divergence="akl"))
    torch.testing.assert_close(got[0], (p * (p / q).log()).sum())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_head_of_the_whole_vocabulary_has_no_bucket(kind: str) -> None:
    targets = head_targets(random_logits(7), [VOCAB] * N)
    assert torch.isneginf(targets.tail_logprob).all()
    spec = LossSection(divergence=kind, beta=0.7)
    for dtype in (torch.float64, torch.float32):
        student = random_logits(8).to(dtype).requires_grad_()
        got = divergences(student, targets, spec)
        expected = torch.stack([token_divergence(student, targets, i, spec) for i in range(N)])
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(got.sum(), student)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_where_the_teacher_has_no_mass_outside_the_students_is_pulled_in(kind: str) -> None:
    """Heads that hold all probability (imports with lost tails): what the student has outside counts against it.

    Compared with the definition, the teacher's mass outside being 2^-24 where its logarithm is needed.
    """
    targets = head_targets(random_logits(7), [3, 5] * (N // 2) + [3] * (N % 2))
    p = targets.weights / targets.weights.sum(1, keepdim=True)
    targets = replace(
        targets, weights=p, logprobs=torch.where(targets.in_head, p.log(), 0.0),
        tail_logprob=torch.full((N,), -torch.inf, dtype=torch.float64),
    )  # fmt: skip
    spec = LossSection(divergence=kind, beta=0.7)
    student = random_logits(8).double().requires_grad_()
    got = divergences(student, targets, spec)
    nearly = replace(targets, tail_logprob=torch.full((N,), math.log(2.0**-24), dtype=torch.float64))
    expected = torch.stack([token_divergence(student, nearly, i, spec) for i in range(N)])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    log_q, log_q_tail = entries_and_tail(student.detach().log_softmax(1), targets)
    log_q_tail.requires_grad_()
    value = entry_divergence(log_q, log_q_tail, targets, spec).sum()
    assert kind in ("forward_kl", "skewed_kl") or torch.autograd.grad(value, log_q_tail)[0].min() > 0
    outside = student.detach().clone()
    outside[torch.arange(N)[:, None], targets.ids.long()] -= 20
    assert (divergences(outside, targets, spec) > divergences(student.detach(), targets, spec)).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_peaked_distributions_stay_finite(kind: str, temperature: float) -> None:
    peaked = torch.zeros(4, VOCAB)
    peaked[0, 3], peaked[1, 3], peaked[2, 3] = 80.0, 300.0, 1e4
    peaked[3] = -1e4 * torch.arange(VOCAB)
    other = peaked.flip(1)
    for teacher, student in ((peaked, other), (peaked, peaked), (other, torch.zeros_like(other))):
        targets = head_targets(teacher, [3, 3, 1, 3], temperature=temperature, dtype=torch.float32)
        student = student.clone().requires_grad_()
        value = divergences(student, targets, LossSection(divergence=kind, temperature=temperature))
        assert torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(gradient).all()


def test_the_students_tail_is_exact_where_one_minus_the_head_is_noise() -> None:
    # Head mass 1 - 2e-8: in float32 1 - sum q is 0 or 6e-8.
    student = torch.zeros(1, VOCAB)
    student[0, :3] = torch.tensor([20.0, 19.0, 18.5])
    targets = head_targets(student * 0.01, [3], dtype=torch.float32)
    got, expected = (divergences(logits, targets) for logits in (student, student.double()))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert got > 10


def test_nothing_supervised_is_nothing() -> None:
    logits = random_logits(9, n=0).requires_grad_()
    for kind in DIVERGENCES:
        found = losses(logits, head_targets(random_logits(9, n=0), []), LossSection(divergence=kind))
        assert [value.item() for value in found] == [0] * len(found)
        assert torch.autograd.grad(found.loss, logits)[0].shape == logits.shape


# Draws


def test_draws_estimate_the_full_forward_kl_and_its_gradient_without_bias() -> None:
    teacher, student = random_logits(10, n=1), random_logits(11, n=1).requires_grad_()
    p, log_q = teacher.softmax(1), student.log_softmax(1)
    full = (p * (p.log() - log_q)).sum()
    (full_gradient,) = torch.autograd.grad(full, student)
    points = 4000
    generator = torch.Generator().manual_seed(0)
    independent = torch.multinomial(p.expand(points, -1), 12, replacement=True, generator=generator)
    u = (np.arange(points) + 0.5) / points  # the mean over the grid is the expectation over u
    systematic = systematic_draws(teacher.expand(points, -1), 4, 3, u)
    for heads, draws, bound in ((0, independent, 0.03), (4, systematic, 2e-3)):
        targets = drawn_targets(teacher.expand(points, -1), heads, draws)
        value = losses(student.expand(points, -1), targets, LossSection(alpha=1.0)).loss / points
        (gradient,) = torch.autograd.grad(value, student)
        assert abs(value - full) < bound, heads
        assert (gradient - full_gradient).abs().max() < bound / 2, heads


def test_draws_at_student_equal_to_teacher_are_0_term_by_term_with_zero_mean_gradient() -> None:
    logits = random_logits(12, n=1).requires_grad_()
    points = 2000
    rows = logits.detach().expand(points, -1)
    targets = drawn_targets(rows, 4, systematic_draws(rows, 4, 3, (np.arange(points) + 0.5) / points))
    value = divergences(logits.expand(points, -1), targets)
    assert value.abs().max() < 1e-14
    (gradient,) = torch.autograd.grad(value.mean(), logits)
    assert gradient.abs().max() < 1e-3
    one = divergences(logits, targets[:1]).sum()
    assert torch.autograd.grad(one, logits)[0].abs().max() > 1e-3  # zero on the average only


def test_draws_allow_the_forward_kl_only() -> None:
    refuse_biased("forward_kl")
    for kind in DIVERGENCES[1:]:
        with pytest.raises(MismatchError, match="only the forward KL is unbiased"):
            refuse_biased(kind)


# Agreement


def test_agreement_compares_the_two_most_likely_tokens() -> None:
    teacher, student = random_logits(14, n=200, vocab=5, spread=1.0), random_logits(15, n=200, vocab=5, spread=1.0)
    expected = teacher.argmax(1) == student.argmax(1)
    assert 20 < expected.sum() < 80
    for same in (True, False):
        some = expected == same
        targets = head_targets(teacher[some], [1 + i % 3 for i in range(int(some.sum()))])
        assert losses(student[some], targets, LossSection()).agreement == same * len(targets)
    assert not losses(student, head_targets(teacher, [0] * 200), LossSection(alpha=0.0)).agreement
    drawn = drawn_targets(teacher, 0, torch.zeros(200, 2, dtype=torch.int64))
    assert not losses(student, drawn, LossSection()).agreement


# Overlap


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_overlap_bounds_the_one_over_the_vocabulary(temperature: float) -> None:
    """sum min(p, q) in float64: between the two bounds for a head with a bucket, equal to both for the whole."""
    teacher, student = random_logits(31, n=50, vocab=40), random_logits(32, n=50, vocab=40)
    dense = torch.minimum((teacher / temperature).softmax(1), (student / temperature).softmax(1)).sum()
    spec = LossSection(temperature=temperature)
    some = losses(student, head_targets(teacher, [1 + i % 20 for i in range(50)], temperature=temperature), spec)
    assert some.overlap_least < dense < some.overlap_most
    whole = losses(student, head_targets(teacher, [40] * 50, temperature=temperature), spec)
    assert float(whole.overlap_least) == pytest.approx(float(dense), rel=1e-12)
    assert float(whole.overlap_most) == pytest.approx(float(dense), rel=1e-12)
    itself = losses(teacher, head_targets(teacher, [3] * 50, temperature=temperature), spec)
    assert float(itself.overlap_most) == pytest.approx(50, rel=1e-12)


def test_overlap_of_draws_is_unbiased() -> None:
    """Over evenly spaced draws, the mean estimate is what the vocabulary gives."""
    teacher, student = random_logits(33, n=1), random_logits(34, n=1)
    points = 2000
    rows = teacher.expand(points, -1)
    targets = drawn_targets(rows, 4, systematic_draws(rows, 4, 3, (np.arange(points) + 0.5) / points))
    found = losses(student.expand(points, -1), targets, LossSection())
    dense = float(torch.minimum(teacher.softmax(1), student.softmax(1)).sum())
    assert float(found.overlap_least) / points == pytest.approx(dense, rel=1e-3)
    assert found.overlap_most == found.overlap_least


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_losses_of_tokens_add_up_to_the_fused_sum(kind: str, temperature: float) -> None:
    """And to its gradient. Some heads are the whole vocabulary, some begin with id 0, which is also what pads."""
    teacher, student = random_logits(7), random_logits(8).requires_grad_()
    teacher[0, 0] += 20
    targets = head_targets(teacher, [*SIZES[:-1], VOCAB], temperature=temperature, labels=torch.arange(N))
    spec = LossSection(divergence=kind, temperature=temperature, alpha=0.3, beta=0.4)
    found, fused = token_losses(student, targets, spec), losses(student, targets, spec)
    for here, there in ((found.loss, fused.loss), (found.ce, fused.ce_sum), (found.divergence, fused.divergence_sum)):
        torch.testing.assert_close(here.sum(), there, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(total, student)[0] for total in (found.loss.sum(), fused.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    expected = torch.stack([token_divergence(student, targets, i, spec) for i in range(N)])
    torch.testing.assert_close(found.divergence, expected, rtol=1e-9, atol=1e-10)


def test_losses_of_tokens_on_draws_and_without_a_divergence() -> None:
    teacher, student = random_logits(7), random_logits(8)
    targets = drawn_targets(teacher, 3, systematic_draws(teacher, 3, 4, np.full(N, 0.4)))
    for alpha in (0.0, 0.5):
        found, fused = (each(student, targets, LossSection(alpha=alpha)) for each in (token_losses, losses))
        torch.testing.assert_close(found.loss.sum(), fused.loss, rtol=1e-11, atol=1e-11)
        assert bool(found.divergence.any()) == bool(alpha)


def test_a_divergence_that_is_not_known_is_refused() -> None:
    """As it is written down, and where nothing has checked it; draws have one that is unbiased."""
    with pytest.raises(ValidationError, match="'forward_kl', 'reverse_kl'"):
        LossSection(divergence="forwad_kl")
    typo = PLAIN.model_copy(update={"divergence": "forwad_kl"})
    targets = head_targets(random_logits(2), SIZES)
    for each in (token_losses, losses):
        with pytest.raises(MismatchError, match=r"no such divergence\n.*forwad_kl\n.*one of forward_kl, "):
            each(random_logits(3), targets, typo)
    drawn = drawn_targets(random_logits(2), 3, torch.zeros(N, 2, dtype=torch.int64) + 5)
    with pytest.raises(MismatchError, match="unbiased"):
        token_losses(random_logits(3), drawn, LossSection(divergence="jsd"))
