"""The fused head equals the unfused definition in loss and gradients, and never holds [tokens, vocabulary]."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from reference import DIVERGENCES, SMOOTH, drawn_targets, head_logits, head_targets, naive_loss, unfused_loss
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from storage_schemas.common.errors import MismatchError
from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model import vocabulary
from student_train.model.head import HeadLoss, HeadSpec, fused_head_loss

pytestmark = pytest.mark.exact
both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["in place", "fused"])

N, HIDDEN, VOCAB = 11, 8, 29
SIZES = [1, 4, 7, 2, 7, 21, 3, 5, 6, 7, 4]
VARIANTS = {
    "plain": HeadSpec(),
    "chunks": HeadSpec(chunk_tokens=3),
    "scale": HeadSpec(scale=0.37),
    "softcap": HeadSpec(softcap=3.0),
    "padded": HeadSpec(valid_vocab=24, chunk_tokens=4),
    "all": HeadSpec(valid_vocab=24, scale=1.7, softcap=3.0, chunk_tokens=4),
}


@pytest.fixture(autouse=True)
def functions_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling them takes half a minute; one test does."""
    monkeypatch.setattr(vocabulary, "_compiled", lambda function: function)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def random_targets(
    *, seed: int = 0, vocab: int = 24, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> SparseTargets:
    labels = torch.randint(vocab, (N,), generator=torch.Generator().manual_seed(seed))
    logits = random(N, vocab, seed=seed, spread=2.0)
    return head_targets(logits, SIZES, temperature=temperature, labels=labels, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = random(N, HIDDEN, seed=1), random(VOCAB, HIDDEN, seed=2), random(VOCAB, seed=3)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()


def compare(
    targets: SparseTargets, loss: LossSection, head: HeadSpec, *, bias: bool = False, rtol: float = 1e-10
) -> HeadLoss:
    """Fused, in both ways, against unfused: sums, and gradients in hidden, weight and bias."""
    leaves = inputs()[: 3 if bias else 2]
    expected = unfused_loss(*leaves[:2], targets, loss=loss, head=head, bias=leaves[2] if bias else None)
    gradients = torch.autograd.grad(expected[0], leaves)
    for way in (replace(head, compile=True), head):
        got = fused_head_loss(*leaves[:2], targets, loss=loss, head=way, bias=leaves[2] if bias else None)
        for one, other in zip(got[:3], expected, strict=True):
            torch.testing.assert_close(one, other.detach() if not one.requires_grad else other, rtol=rtol, atol=1e-11)
        for one, other in zip(torch.autograd.grad(got.loss, leaves), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-11)
    return got


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_fused_equals_unfused_for_every_divergence(kind: str, temperature: float, alpha: float) -> None:
    spec = LossSection(alpha=alpha, divergence=kind, temperature=temperature, beta=0.3)
    compare(random_targets(temperature=temperature), spec, HeadSpec(valid_vocab=24, chunk_tokens=4))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_unfused_for_every_head(variant: str, bias: bool, alpha: float) -> None:
    for temperature in (1.0, 2.0):
        targets = random_targets(temperature=temperature)
        compare(targets, LossSection(alpha=alpha, temperature=temperature), VARIANTS[variant], bias=bias)


def test_fused_equals_unfused_on_draws() -> None:
    draws = torch.randint(VOCAB, (N, 6), generator=torch.Generator().manual_seed(0))
    compare(drawn_targets(random(N, VOCAB, seed=4), 0, draws), LossSection(), HeadSpec(chunk_tokens=4))
    teacher = random(N, VOCAB, seed=4, spread=2.0)
    outside = teacher.argsort(1)[:, :12].gather(1, draws % 12)
    compare(drawn_targets(teacher, 5, outside), LossSection(alpha=0.8), HeadSpec(chunk_tokens=4))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_full_vocabulary_equals_the_dense_loss_in_float32(temperature: float) -> None:
    vocab, alpha = 200, 0.4
    hidden = random(N, HIDDEN, seed=5, dtype=torch.float32).requires_grad_()
    weight = random(vocab, HIDDEN, seed=6, dtype=torch.float32)
    teacher, labels = random(N, vocab, seed=7, spread=3.0), torch.arange(N)
    targets = head_targets(teacher, [vocab] * N, temperature=temperature, labels=labels, dtype=torch.float32)
    got = fused_head_loss(
        hidden, weight, targets, loss=LossSection(alpha=alpha, temperature=temperature), head=HeadSpec()
    )
    logits = hidden @ weight.T
    kl = torch.nn.functional.kl_div(
        (logits / temperature).log_softmax(1), (teacher.float() / temperature).softmax(1), reduction="sum"
    )
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    dense = (1 - alpha) * ce + alpha * temperature**2 * kl
    assert abs(got.loss - dense) <= 1e-5 * dense
    ours, theirs = (torch.autograd.grad(x, hidden)[0] for x in (got.loss, dense))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@both_ways
@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_student_equal_to_teacher_has_zero_loss_and_gradient(kind: str, temperature: float, compiled: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        hidden, weight, _ = inputs(dtype)
        teacher = (hidden @ weight.T).detach()
        targets = head_targets(teacher, SIZES, temperature=temperature, dtype=dtype)
        spec = LossSection(alpha=1.0, divergence=kind, temperature=temperature)
        got = fused_head_loss(hidden, weight, targets, loss=spec, head=HeadSpec(compile=compiled))
        assert abs(got.loss) <= bound
        for gradient in torch.autograd.grad(got.loss, (hidden, weight)):
            assert gradient.abs().max() <= bound
        assert got.agreement == N


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_nothing_supervised_is_a_zero_on_the_graph(alpha: float) -> None:
    hidden, weight, _ = inputs()
    empty = random_targets()[:0]
    got = fused_head_loss(hidden[:0], weight, empty, loss=LossSection(alpha=alpha), head=HeadSpec())
    assert [float(x.detach()) for x in got] == [0.0] * len(got)
    for gradient in torch.autograd.grad(got.loss, (hidden, weight)):
        assert not gradient.any()


@both_ways
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_extreme_logits_stay_finite(kind: str, compiled: bool) -> None:
    peaked = torch.zeros(3, VOCAB)
    peaked[0, 3], peaked[1, 5], peaked[2, 7] = 90.0, 1e3, 1e4
    for temperature in (1.0, 2.0):
        for teacher in (peaked, -peaked, torch.zeros_like(peaked)):
            targets = head_targets(teacher, [1, 4, VOCAB], temperature=temperature, dtype=torch.float32)
            hidden = torch.eye(3).requires_grad_()
            spec = LossSection(divergence=kind, temperature=temperature)
            got = fused_head_loss(
                hidden, peaked.flip(1).T.contiguous(), targets, loss=spec, head=HeadSpec(compile=compiled)
            )
            assert torch.isfinite(got.loss)
            assert torch.isfinite(torch.autograd.grad(got.loss, hidden)[0]).all()


@both_ways
def test_a_student_without_the_tail_that_the_teacher_has_stays_finite(compiled: bool) -> None:
    # The teacher's padded columns leave it a tail beyond the student's last column.
    teacher = random(2, VOCAB + 3, seed=8)
    teacher[:, VOCAB:] = -20.0
    targets = head_targets(teacher, [VOCAB, VOCAB], dtype=torch.float32)
    hidden = random(2, HIDDEN, seed=9, dtype=torch.float32).requires_grad_()
    weight = random(VOCAB, HIDDEN, seed=2, dtype=torch.float32)
    got = fused_head_loss(hidden, weight, targets, loss=LossSection(), head=HeadSpec(compile=compiled))
    assert torch.isfinite(got.loss)
    assert got.loss < 100
    assert torch.isfinite(torch.autograd.grad(got.loss, hidden)[0]).all()


@pytest.mark.parametrize("kind", ["forward_kl", "akl"])
def test_chunks_do_not_change_anything(kind: str) -> None:
    targets, results = random_targets(), []
    for chunk in (1, 4, N, 512):
        hidden, weight, _ = inputs()
        spec = LossSection(divergence=kind)
        got = fused_head_loss(hidden, weight, targets, loss=spec, head=HeadSpec(chunk_tokens=chunk))
        results.append([*got, *torch.autograd.grad(got.loss, (hidden, weight))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_two_graphs_of_each_kernel_serve_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for chunks that fill the buffer and one for shorter ones, whatever the number of tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = cache(lambda function: torch.compile(function, dynamic=True, fullgraph=True, backend=counter))
    monkeypatch.setattr(vocabulary, "_compiled", graph)
    for kept in (N, 7, 5):
        hidden, weight, bias = inputs()
        targets, spec = random_targets(temperature=2.0)[:kept], LossSection(temperature=2.0)
        for head in (VARIANTS["all"], replace(VARIANTS["all"], chunk_tokens=N)):
            losses = [
                fused_head_loss(
                    hidden[:kept], weight, targets, loss=spec, head=replace(head, compile=way), bias=bias
                ).loss
                for way in (True, False)
            ]
            gradients = [torch.autograd.grad(loss, (hidden, weight, bias)) for loss in losses]
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    assert counter.frame_count == 4


def test_gradcheck() -> None:
    hidden, weight, bias = inputs()
    targets = random_targets(temperature=2.0)
    head, loss = VARIANTS["all"], LossSection(temperature=2.0, divergence="jsd", beta=0.3)

    def total(*leaves: Tensor) -> Tensor:
        return fused_head_loss(leaves[0], leaves[1], targets, loss=loss, head=head, bias=leaves[2]).loss

    assert torch.autograd.gradcheck(total, (hidden, weight, bias), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "akl", "reverse_kl"])
@pytest.mark.parametrize("split", [[1] * 8, [3, 0, 4, 1]], ids=["eight of 1", "ragged"])
def test_one_batch_of_8_equals_any_split(split: list[int], kind: str) -> None:
    hidden, weight, _ = inputs()
    targets, spec, head = random_targets()[:8], LossSection(divergence=kind), HeadSpec(chunk_tokens=3)
    whole = fused_head_loss(hidden[:8], weight, targets, loss=spec, head=head)
    parts, start = [], 0
    for size in split:
        part = slice(start, start + size)
        parts.append(fused_head_loss(hidden[part], weight, targets[part], loss=spec, head=head))
        start += size
    for name in HeadLoss._fields:
        got = torch.stack([getattr(part, name) for part in parts]).sum()
        torch.testing.assert_close(got, getattr(whole, name), rtol=1e-10, atol=0)
    summed = torch.autograd.grad(sum(part.loss for part in parts), (hidden, weight))
    for got, expected in zip(summed, torch.autograd.grad(whole.loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@both_ways
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bf16_error_is_not_above_that_of_the_naive_path(kind: str, compiled: bool) -> None:
    n, width, vocab = 64, 64, 2000
    hidden, weight = random(n, width, seed=10, dtype=torch.bfloat16), random(vocab, width, seed=11, spread=0.3)
    weight = weight.to(torch.bfloat16)
    teacher = random(n, vocab, seed=12, spread=2.0)
    labels, spec = teacher.argmax(1), LossSection(divergence=kind)
    targets = head_targets(teacher, [64] * n, labels=labels, dtype=torch.float32)

    def naive(hidden: Tensor, weight: Tensor, up: torch.dtype) -> tuple[Tensor, ...]:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = naive_loss((leaves[0] @ leaves[1].T).to(up), targets, spec)
        return loss, *torch.autograd.grad(loss, leaves)

    exact = naive(hidden.double(), weight.double(), torch.float64)
    plain = naive(hidden, weight, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    fused = fused_head_loss(*leaves, targets, loss=spec, head=HeadSpec(chunk_tokens=24, compile=compiled)).loss
    ours = (fused, *torch.autograd.grad(fused, leaves))
    assert ours[0].dtype == torch.float32
    for got, other, true in zip(ours, plain, exact, strict=True):
        error, naive_error = ((x.double() - true).norm() / true.norm() for x in (got, other))
        assert error <= naive_error * 1.05 + 1e-6
    assert ours[1].dtype == ours[2].dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@both_ways
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_is_bounded_by_the_chunk(temperature: float, compiled: bool) -> None:
    n, vocab, chunk = 400, 300, 10
    hidden = random(n, HIDDEN, seed=13, dtype=torch.float32).requires_grad_()
    weight = random(vocab, HIDDEN, seed=14, dtype=torch.float32)
    teacher = random(n, vocab, seed=15)
    targets = head_targets(teacher, [4] * n, temperature=temperature, dtype=torch.float32)
    with Largest() as seen:
        spec = LossSection(temperature=temperature)
        got = fused_head_loss(hidden, weight, targets, loss=spec, head=HeadSpec(chunk_tokens=chunk, compile=compiled))
        got.loss.backward()
    assert seen.elements <= max(chunk * vocab, n * HIDDEN, vocab * HIDDEN)


def test_a_frozen_head_gets_no_gradient_and_is_not_read_in_the_backward() -> None:
    hidden, weight, _ = inputs()
    expected = torch.autograd.grad(
        fused_head_loss(hidden, weight, random_targets(), loss=LossSection(), head=HeadSpec()).loss, hidden
    )
    frozen = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    got = fused_head_loss(hidden, frozen, random_targets(), loss=LossSection(), head=HeadSpec())
    frozen.data = torch.empty(0, dtype=torch.float64)  # what ZeRO-3 does once the weight is partitioned again
    got.loss.backward()
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, expected[0], rtol=0, atol=0)


def test_gradients_scale_with_what_comes_from_above() -> None:
    hidden, weight, _ = inputs()
    got = fused_head_loss(hidden, weight, random_targets(), loss=LossSection(), head=HeadSpec())
    once = torch.autograd.grad(got.loss, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(got.loss * 0.25, (hidden, weight)), once, strict=True):
        torch.testing.assert_close(a, b * 0.25)


def test_without_gradients_the_sums_are_the_same_and_detached() -> None:
    hidden, weight, _ = inputs()
    args, options = (hidden, weight, random_targets()), {"loss": LossSection(), "head": HeadSpec(chunk_tokens=4)}
    with torch.no_grad():
        got = fused_head_loss(*args, **options)
    expected = fused_head_loss(*args, **options)
    assert not got.loss.requires_grad
    assert expected.loss.requires_grad
    assert not any(x.requires_grad for x in expected[1:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_hidden_states_of_another_dtype_than_the_weight() -> None:
    hidden, weight, _ = inputs(torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    targets = random_targets(dtype=torch.float32)
    got = fused_head_loss(narrow, weight, targets, loss=LossSection(), head=HeadSpec())
    expected = fused_head_loss(narrow.float(), weight, targets, loss=LossSection(), head=HeadSpec())
    torch.testing.assert_close(got.loss, expected.loss)
    assert torch.autograd.grad(got.loss, narrow)[0].dtype == torch.bfloat16


# The head of real model classes

TINY = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
MODELS = {
    "llama": transformers.LlamaConfig(**TINY),
    "granite": transformers.GraniteConfig(**TINY, logits_scaling=0.1),
    "cohere": transformers.CohereConfig(**TINY, logit_scale=7.0),
    "gemma2": transformers.Gemma2Config(**TINY, final_logit_softcapping=0.05),
}


@pytest.mark.parametrize("kind", MODELS)
def test_head_spec_gives_the_models_own_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind]).eval().float()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits[0]
        hidden = model.model(ids).last_hidden_state[0]
    spec = HeadSpec.of(model.config)
    weight = model.get_output_embeddings().weight.detach()
    torch.testing.assert_close(head_logits(hidden, weight, spec), expected)
    if kind != "llama":
        assert not torch.allclose(head_logits(hidden, weight, HeadSpec()), expected, rtol=0.01)
    targets = head_targets(expected, [5] * 6, dtype=torch.float32)
    got = fused_head_loss(hidden, weight, targets, loss=LossSection(alpha=1.0), head=spec)
    assert abs(got.loss) < 1e-5


def test_a_model_that_scales_its_logits_in_an_unknown_way_is_refused() -> None:
    config = transformers.LlamaConfig(**TINY, logits_scaling=8.0)
    with pytest.raises(MismatchError, match=r"logits_scaling = 8\.0"):
        HeadSpec.of(config)
