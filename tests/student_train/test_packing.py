"""Samples in one row: the same loss and gradients as apart, and models that would mix them are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dense import rows_of
from packaging.version import Version
from support.engine_jobs import leave_start, student_of, train_section
from support.rounding import FORWARD, GRADIENT
from support.tiny_student import VOCAB, save_student, write_dump
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4TextConfig, MistralConfig, Qwen3Config

from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from storage_schemas.rows import EMPTY, OK
from student_train.data.batch import collate
from student_train.model.student import Distilled

pytestmark = pytest.mark.exact

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "head_dim": 8,
}  # fmt: skip
MODELS = {
    "llama": None,
    "qwen3": Qwen3Config(**SMALL),
    "mistral, window of 6": MistralConfig(**SMALL, sliding_window=6),
    "llama 4": Llama4TextConfig(**SMALL, intermediate_size_mlp=56, num_local_experts=2, attention_chunk_size=8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, and a student of each architecture."""
    folder = tmp_path_factory.mktemp("packing")
    write_dump(folder / "dump", samples=10, exact=True)
    for name, config in MODELS.items():
        if config is None:
            save_student(folder / name)
            continue
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def student(folder: Path, name: str, *, targets: str | list[str] | None = None, **changes: Any) -> Distilled:
    """A student whose adapter has left its start."""
    dump = Dump.open(str(folder / "dump"))
    module = student_of(
        folder / name, dump, train_section(folder, **changes), lora={"target_modules": targets or "all-linear"}
    )
    leave_start(module)
    return module


def loss_and_gradients(module: Distilled, folder: Path, *, packed: bool) -> tuple[Tensor, list[Tensor]]:
    """Of all samples in one micro-batch."""
    rows = rows_of(Dump.open(str(folder / "dump")), range(10))
    batch = collate(rows, temperature_index=0, temperature=1.0, packed=packed)
    assert (batch.input_ids.shape[0] == 1) == packed
    loss, _ = module(batch)
    return loss.detach(), list(torch.autograd.grad(loss, [p for _, p in module.trained()]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_padded(folder: Path, name: str, attention: str) -> None:
    """Loss and the gradient of every adapter weight, with recomputed activations too."""
    if name == "llama 4" and Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(MismatchError, match="keep packed samples apart"):
            student(folder, name, packing=True)
        pytest.skip(f"transformers {transformers.__version__} does not keep packed samples of Llama 4 apart: refused")
    for checkpointing in (False, True):
        module = student(folder, name, packing=True, gradient_checkpointing=checkpointing).train()
        module.causal.set_attn_implementation(attention)
        loss, found = loss_and_gradients(module, folder, packed=True)
        expected_loss, expected = loss_and_gradients(module, folder, packed=False)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=FORWARD)
        for here, there in zip(found, expected, strict=True):
            assert float((here - there).abs().max() / there.abs().max()) < GRADIENT


def test_an_adapter_that_the_model_cannot_be_run_with_is_refused(folder: Path) -> None:
    """Llama 4's router, if it is named: a linear layer that returns a pair, which peft does not know."""
    with pytest.raises(MismatchError, match=r"Llama4ForCausalLM cannot be run(.|\n)*'dtype'(.|\n)*target_modules"):
        student(folder, "llama 4", targets=["q_proj", "router"])


def test_layout(folder: Path) -> None:
    """Every token stands where it should, and every supervised one is predicted from the place before it."""
    rows = rows_of(Dump.open(str(folder / "dump")), range(10))
    assert {row.status for row in rows} > {OK, EMPTY}
    batch = collate(rows, temperature_index=0, temperature=1.0, packed=True)
    used = [row for row in rows if row.status == OK]
    assert batch.input_ids[0].tolist() == np.concatenate([row.input_ids for row in used]).tolist()
    assert batch.position_ids[0].tolist() == np.concatenate([np.arange(len(row.input_ids)) for row in used]).tolist()
    mask = np.concatenate([row.loss_mask for row in used])
    assert batch.positions.tolist() == (np.flatnonzero(mask) - 1).tolist()
    assert batch.targets.labels.tolist() == batch.input_ids[0][torch.from_numpy(mask)].tolist()
    assert batch.tokens == batch.input_ids.numel()
    filler = collate([], temperature_index=0, temperature=1.0, packed=True)
    assert (filler.input_ids.tolist(), filler.position_ids.tolist(), len(filler.targets)) == ([[0]], [[0]], 0)


@pytest.mark.parametrize("mistake", ["a mask is given", "positions go on"])
def test_a_student_that_mixes_samples_is_refused(folder: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers does with an attention mask, and what an architecture without position ids would do."""

    def states(self: Distilled, input_ids: Tensor, position_ids: Tensor) -> Any:
        body = self.causal.get_decoder()
        if mistake == "a mask is given":
            mask = torch.ones_like(input_ids)
            return body(input_ids=input_ids, position_ids=position_ids, attention_mask=mask)
        return body(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(Distilled, "_states", states)
    student(folder, "llama")  # Nothing is packed.
    with pytest.raises(MismatchError, match="does not keep packed samples apart"):
        student(folder, "llama", packing=True)
