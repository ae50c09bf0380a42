"""The teacher's targets against the model's own logits, over architectures, batches, dtypes and bad weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.rounding import LOGPROB
from support.tiny_teachers import ARCHITECTURES, VOCABULARY, sample_of, save_teacher, tiny_model
from transformers import AutoModelForCausalLM

from storage_schemas.common.errors import MismatchError
from storage_schemas.config import Adaptive, Estimator, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.rows import Row
from storage_schemas.targets import Targets, concatenate
from teacher_dump.config import TeacherSection
from teacher_dump.dump import tokenizer_files
from teacher_dump.teachers import products
from teacher_dump.teachers import teacher as teacher_module
from teacher_dump.teachers.teacher import Teacher

pytestmark = pytest.mark.exact

EVERYTHING = TopK(k=VOCABULARY, mass=1.0)


def ask(
    teacher: Teacher, samples: Sequence[Row], estimator: Estimator = EVERYTHING, temperatures: Sequence[float] = (1.0,)
) -> list[Targets | None]:
    return teacher.targets(samples, Recipe(estimator=estimator, temperatures=temperatures, logsumexp=True))


def teacher_of(folder: Path, **options: Any) -> Teacher:
    return Teacher(TeacherSection(model=str(folder), **({"dtype": "float32", "device": "cpu"} | options)))


def all_logits(model: Any, sample: Row) -> np.ndarray:
    """(tokens, V) logits of the whole sample, alone, through the model's own forward, float64."""
    with torch.no_grad():
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        return model(input_ids=ids, use_cache=False).logits[0].double().numpy()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_equal_the_models_logits_one_position_earlier(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    teacher = teacher_of(save_teacher(tmp_path, name))
    samples = [sample_of(n, index=i) for i, n in enumerate([19, 7, 30])]
    for sample, targets in zip(samples, ask(teacher, samples, temperatures=(1.0, 2.0)), strict=True):
        logits = all_logits(model, sample)
        supervised = np.flatnonzero(sample.loss_mask)
        assert len(targets) == len(supervised)
        for i, t in enumerate(supervised):
            expected = logits[t - 1]
            token = targets.slice(i, i + 1)
            np.testing.assert_array_equal(token.ids, np.arange(VOCABULARY))
            np.testing.assert_allclose(token.logprobs, expected - np.logaddexp.reduce(expected), atol=2e-4)
            lse = [np.logaddexp.reduce(expected), np.logaddexp.reduce(expected / 2)]
            np.testing.assert_allclose(token.logsumexp[0], lse, atol=2e-4)
            assert np.isneginf(token.tail_logprob).all()
    assert np.ptp(logits) > 0.5, "the logits of this model tell nothing apart"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path, name))
    samples = [sample_of(n, index=i) for i, n in enumerate([12, 40, 3, 23])]
    estimator = Adaptive(kind="adaptive", mass=0.6, k_max=4, tail_draws=4)
    together = ask(teacher, samples, estimator)
    for sample, there in zip(samples, together, strict=True):
        (alone,) = ask(teacher, [sample], estimator)
        np.testing.assert_array_equal(there.ids, alone.ids)
        np.testing.assert_array_equal(there.counts, alone.counts)
        np.testing.assert_allclose(there.logprobs, alone.logprobs, atol=LOGPROB)
        np.testing.assert_allclose(there.tail_logprob, alone.tail_logprob, atol=LOGPROB)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_compiled_layers_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of any shape, by a compiler that traces the layers and leaves the kernels as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    save_teacher(tmp_path, name)
    compiled, plain = teacher_of(tmp_path, compile=True), teacher_of(tmp_path)
    for lengths in ([19, 7, 30], [12], [40, 41]):
        samples = [sample_of(n, index=n) for n in lengths]
        for found, expected in zip(ask(compiled, samples), ask(plain, samples), strict=True):
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LOGPROB)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    with pytest.raises(ValidationError, match="compile"):
        teacher_of(tmp_path, compile=True, sharding="device_map")


def test_chunks_of_the_head_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    samples = [sample_of(60, index=i) for i in range(3)]
    whole = ask(teacher, samples, TopK(k=5))
    monkeypatch.setitem(teacher_module._CHUNK_BYTES, "cpu", 16 * 4 * VOCABULARY)
    for a, b in zip(whole, ask(teacher, samples, TopK(k=5)), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=LOGPROB)


def test_no_tensor_of_batch_times_sequence_times_vocabulary_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    largest = 0

    def watch(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel() // VOCABULARY)

    teacher.model.get_output_embeddings().register_forward_hook(watch)
    monkeypatch.setitem(teacher_module._CHUNK_BYTES, "cpu", 20 * 4 * VOCABULARY)
    samples = [sample_of(60, index=i, mask=list(range(30, 50))) for i in range(3)]
    found = ask(teacher, samples, TopK(k=5))
    assert [len(targets) for targets in found] == [20, 20, 20]
    assert largest == 20


def test_what_follows_the_last_supervised_token_is_not_run(tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    seen = []
    teacher.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ask(teacher, [sample_of(50, mask=[4, 9]), sample_of(30, mask=[2])])
    assert seen == [(2, 9)]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "phi"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_heads_product_of_16_bit_factors_is_not_rounded_to_16_bits(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large logits, as real teachers have them, rounding costs more than the fidelity gate allows."""
    model = tiny_model(name)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(4.0)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 4 * 32 * 50)
    teacher = teacher_of(tmp_path, dtype=dtype)
    samples = [sample_of(n, index=i) for i, n in enumerate([40, 31, 60])]
    kept = []
    teacher.model.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output[0]))
    targets = concatenate(ask(teacher, samples))
    head = teacher.model.get_output_embeddings()
    exact = torch.cat([kept[-1][i, np.flatnonzero(s.loss_mask) - 1] for i, s in enumerate(samples)]).double()
    exact = exact @ head.weight.double().t() + (0 if head.bias is None else head.bias.double())
    cap = getattr(teacher.config, "final_logit_softcapping", None)
    exact = exact if cap is None else cap * torch.tanh(exact / cap)
    expected = exact.log_softmax(1).numpy()
    p = np.exp(expected)

    def kl(found: Any) -> float:
        return (p * (expected - found)).sum(1).mean()

    assert abs(kl(targets.logprobs.reshape(expected.shape))) < 1e-6
    rounded = exact.to(teacher.model.dtype).double().log_softmax(1).numpy()
    if dtype == "bfloat16" and cap is None:
        assert kl(rounded) > 1e-4, "these logits are too small to show anything"


def test_a_sample_with_nonfinite_logits_leaves_the_others_of_its_batch_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    model.save_pretrained(tmp_path)
    samples = [sample_of(20, index=i) for i in range(3)]
    for sample in samples:
        sample.input_ids[sample.input_ids == 77] = 78
    samples[1].input_ids[10] = 77
    teacher = teacher_of(tmp_path)
    good, bad, also_good = ask(teacher, samples)
    assert bad is None
    for targets, sample in [(good, samples[0]), (also_good, samples[2])]:
        np.testing.assert_allclose(targets.logprobs, ask(teacher, [sample])[0].logprobs, atol=LOGPROB)
    samples[1] = replace(samples[1], loss_mask=samples[1].loss_mask & (np.arange(len(samples[1].loss_mask)) < 10))
    assert ask(teacher, samples)[1] is not None, "logits before the broken token are finite"


def test_a_batch_that_does_not_fit_is_halved_and_the_lesson_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    samples = [sample_of(21, index=i) for i in range(8)]
    expected = ask(teacher, samples, TopK(k=5))
    sizes = []

    def small_memory(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    teacher.model.get_decoder().register_forward_pre_hook(small_memory, with_kwargs=True)
    for _ in range(2):
        found = ask(teacher, samples, TopK(k=5))
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert sum("halving" in message for message in caplog.messages) == 1


def test_a_sample_that_alone_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path))

    def no_memory(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    teacher.model.get_output_embeddings().register_forward_pre_hook(no_memory)
    with pytest.raises(MismatchError, match=r"sample 3 alone does not fit(.|\n)*max_length(.|\n)*teacher.sharding"):
        ask(teacher, [sample_of(9, index=3)])


def test_a_teacher_that_does_not_fit_is_told_how_to_spread_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(MismatchError, match=r"out of memory(.|\n)*teacher.sharding: device_map, tensor or zero3"):
        _ = teacher.model


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    layer = type(teacher.model.get_decoder().layers[0])
    forward = layer.forward

    def sees_everything(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs) + hidden_states.mean(1, keepdim=True)

    layer.forward = sees_everything
    try:
        with pytest.raises(MismatchError, match="not causal"):
            _ = teacher_of(tmp_path).model
    finally:
        layer.forward = forward


def test_a_head_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path))
    kind = type(teacher.model)
    forward = kind.forward

    def scales(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    kind.forward = scales
    try:
        with pytest.raises(MismatchError, match="not understood"):
            _ = teacher_of(tmp_path).model
    finally:
        kind.forward = forward


def test_a_model_with_more_than_a_weight_before_its_logits_is_refused(tmp_path: Path) -> None:
    """transformers takes the head of ModernBERT's decoder for its body."""
    tiny_model("modernbert-decoder", num_key_value_heads=None, cls_token_id=0, sep_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="head of ModernBertDecoderForCausalLM is not understood"):
        _ = teacher_of(tmp_path).model


def test_long_and_short_contexts_of_longrope_do_not_share_a_batch(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [7.0] * 4}
    save_teacher(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None)
    teacher = teacher_of(tmp_path, batch_tokens=1000)
    samples = [sample_of(n, index=i) for i, n in enumerate([12, 40, 17, 18, 30])]
    batches = teacher.batches(samples)
    # Of the samples of 18 and 17 tokens, the first 17 and 15 are run.
    assert [[len(sample.input_ids) for sample in batch] for batch in batches] == [[40, 30, 18], [17, 12]]
    for batch in batches:
        for sample, targets in zip(batch, ask(teacher, batch), strict=True):
            np.testing.assert_allclose(targets.logprobs, ask(teacher, [sample])[0].logprobs, atol=LOGPROB)
    mixed = ask(teacher, samples)[0].logprobs
    assert np.abs(mixed - ask(teacher, [samples[0]])[0].logprobs).max() > 1e-2, "the factors of this model do nothing"


def test_identity_needs_no_weights_and_follows_the_files(tmp_path: Path) -> None:
    first = teacher_of(save_teacher(tmp_path / "a"))
    same, other = teacher_of(save_teacher(tmp_path / "b")), teacher_of(save_teacher(tmp_path / "c", seed=1))
    hashes = [teacher.identify().weights_sha256 for teacher in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert list(hashes[0]) == ["model.safetensors"]
    assert first.identify().lm_head_rows == VOCABULARY
    assert "model" not in vars(first), "the weights were loaded"


def test_truncation_and_padding_that_a_training_has_left_are_in_no_dump(tmp_path: Path) -> None:
    """They are gone after the first call: files and keys that hold them would depend on whether it was made."""
    save_teacher(tmp_path, "llama")
    trained = Teacher(TeacherSection(model=str(tmp_path))).tokenizer
    trained.backend_tokenizer.enable_truncation(7)
    trained.backend_tokenizer.enable_padding(length=9)
    trained.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    tokenizer = Teacher(TeacherSection(model=str(tmp_path))).tokenizer
    before = tokenizer_files(tokenizer)
    assert len(tokenizer("what is it " * 5)["input_ids"]) > 9
    assert tokenizer_files(tokenizer) == before


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(MismatchError, match="safetensors"):
        _ = teacher_of(tmp_path).identify()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(teacher_of(tmp_path).identify().weights_sha256) == shards
    (tmp_path / shards[1]).unlink()
    with pytest.raises(MismatchError, match=shards[1]):
        _ = teacher_of(tmp_path).identify()


def test_a_gpu_that_torch_cannot_use_is_no_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    teacher = teacher_of(save_teacher(tmp_path), device="auto")
    with pytest.raises(MismatchError, match=r"(?s)GPUs that torch cannot use.*2 visible.*teacher.device: cpu"):
        _ = teacher.device
    assert teacher_of(tmp_path, device="cpu").device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert teacher_of(tmp_path, device="auto").device.type == "cpu"


def test_an_unknown_device_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"teacher\.device"):
        _ = teacher_of(save_teacher(tmp_path), device="warp:9").model


def test_an_attention_is_passed_on_and_known_by_its_name_where_it_is_asked_for(tmp_path: Path) -> None:
    """Only there: dumps that name none keep their identity."""
    folder, sample = save_teacher(tmp_path), sample_of(20)
    default = teacher_of(folder)
    (expected,) = ask(default, [sample])
    assert default.engine.arguments == {}
    for attention in ("eager", "sdpa"):
        teacher = teacher_of(folder, attn_implementation=attention)
        teacher.refuse_unloadable()
        (found,) = ask(teacher, [sample])
        assert teacher.model.config._attn_implementation == attention
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LOGPROB)
        assert teacher.engine.arguments == {"attn_implementation": attention}
        assert teacher.identify() == default.identify()


@pytest.mark.parametrize(
    ("attention", "says"), [("sdap", "is not supported"), ("flash_attention_2", "FlashAttention2")]
)
def test_an_attention_that_is_not_there_is_refused_without_weights(attention: str, says: str, tmp_path: Path) -> None:
    teacher = teacher_of(save_teacher(tmp_path), attn_implementation=attention)
    with pytest.raises(MismatchError, match=r"teacher\.attn_implementation: ") as error:
        teacher.refuse_unloadable()
    assert says in str(error.value.got)
    assert "model" not in vars(teacher), "the weights were loaded"


def test_vllm_takes_no_attention_of_transformers() -> None:
    with pytest.raises(ValueError, match="vLLM chooses its attention itself"):
        TeacherSection(model="any", backend="vllm", attn_implementation="eager")
