"""FLOP of a step against a count by hand, and of devices by their names."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_student import VOCAB, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from student_train.utilisation import Work, peak_of


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak_of_a_gpu(name: str, tera: int | None) -> None:
    assert peak_of(name) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_flop_of_a_step_are_those_that_torch_counts(lora: bool, tied: bool) -> None:
    """Of the linear layers: 2 forward, 2 for what came in, 2 for trained weights. torch counts attention apart."""
    model = tiny_llama(0, tied=tied)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).base_model.model
        # What LoRA's A is fed needs a gradient as every layer's input does, but for the first one's.
        model.enable_input_require_grads()
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(VOCAB, (1, tokens)), use_cache=False).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    work = Work.with_peak(model, 1e12)
    assert work is not None
    flop = tokens * (work.per_token + work.per_supervised_token)
    assert work.utilisation(tokens, tokens, seconds=2.0, devices=4) == pytest.approx(flop / 8e12)
    # In the first layer nothing asks for the gradient of what came in, where the embeddings are frozen.
    assert flop == pytest.approx(products, rel=1e-6)


def test_under_zero3_a_weight_is_known_by_its_whole_shape() -> None:
    whole, spread = tiny_llama(0), tiny_llama(0)
    for parameter in spread.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    assert Work.with_peak(spread, 1e12) == Work.with_peak(whole, 1e12) != Work(0.0, 0.0, 1e12)


def test_of_a_head_that_is_trained_and_saved_only_the_copy_counts_once_per_supervised_token() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    work = Work.with_peak(get_peft_model(tiny_llama(0), config).base_model.model, 1e12)
    lora = Work.with_peak(
        get_peft_model(tiny_llama(0), LoraConfig(r=4, target_modules=["q_proj"])).base_model.model, 1e12
    )
    assert work is not None
    assert lora is not None
    assert work.per_token == lora.per_token
    assert work.per_supervised_token == 6 * VOCAB * tiny_llama(0).config.hidden_size == 1.5 * lora.per_supervised_token


def test_weights_of_which_a_token_uses_some_are_not_counted() -> None:
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    assert Work.with_peak(MixtralForCausalLM(config), 1e12) is None
    assert Work.of(tiny_llama(0), torch.device("cpu")) is None
