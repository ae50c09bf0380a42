"""Flash attention is not at hand here: what runs around it is tested with a function that refuses a CPU as it does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_student import VOCAB, tiny_llama, write_dump
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    modeling_flash_attention_utils,
    modeling_utils,
)

from storage_schemas.common.errors import MismatchError
from student_train.config import LossSection
from student_train.model.attention import looking_for_packed_samples
from student_train.model.probes import refuse_mixed_samples, refuse_unknown_head
from student_train.model.router import RouterLoss
from student_train.model.student import distilled

FLASH = "flash_of_tests"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuses(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "Could not run 'flash_attn::_flash_attn_forward' with arguments from the 'CPU' backend"
        )

    AttentionInterface.register(FLASH, refuses)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)  # There is no package.
    yield
    AttentionInterface._global_mapping.pop(FLASH)


def test_a_student_is_looked_at_before_it_is_on_its_gpu(tmp_path: Path) -> None:
    model = tiny_llama(1)
    model.set_attn_implementation(FLASH)
    with pytest.raises(NotImplementedError):
        model(input_ids=torch.arange(3)[None])
    module = distilled(model, [LossSection()], write_dump(tmp_path / "dump"))
    refuse_mixed_samples(module)
    refuse_unknown_head(module)
    assert model.config._attn_implementation == FLASH
    assert model.model.config._attn_implementation == FLASH


def test_layers_that_tell_flash_attention_no_positions_mix_packed_samples(tmp_path: Path) -> None:
    """Other attention keeps them apart here by a mask, which flash attention has not."""
    config = AutoConfig.for_model("gpt_bigcode", vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    module = distilled(model, [LossSection()], write_dump(tmp_path / "dump"))
    refuse_mixed_samples(module)
    model.set_attn_implementation(FLASH)
    with pytest.raises(MismatchError, match=f"{FLASH}, whose layers are told no position ids"):
        refuse_mixed_samples(module)


def test_so_are_its_routers() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(FLASH)
    assert RouterLoss.of(model) is not None
    assert model.config._attn_implementation == FLASH


def test_flash_attention_reads_no_value_in_each_layer() -> None:
    """It would look for packed samples in rows that are whole."""
    look, packed = modeling_flash_attention_utils._is_packed_sequence, torch.tensor([[0, 1, 2, 0, 1]])
    assert look(packed, 1)
    with looking_for_packed_samples(False):
        assert modeling_flash_attention_utils._is_packed_sequence(packed, 1) is False
    assert modeling_flash_attention_utils._is_packed_sequence is look
