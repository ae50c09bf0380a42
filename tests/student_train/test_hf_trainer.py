"""transformers' Trainer on a dump takes the steps of the definition, however a step is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import loss_sum
from support.distributed import run_ranks
from support.tiny_student import tiny_llama, tiny_tokenizer, write_dump
from support.trainer_jobs import arguments, step_gradients
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from storage_schemas import Dump, MismatchError, Sampled, TemporaryError
from student_train import DumpCollator, DumpDataset, DumpTrainer, LossSection

pytestmark = pytest.mark.exact

STEP, SAMPLES = 8, 22
"""Samples of a step and of the dump: the last step has six, so that one of four micro-batches is missing."""
LOSS = {"alpha": 0.3, "temperature": 2.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_dump(folder / "dump", samples=SAMPLES, temperatures=(1.0, 2.0))
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> tuple[list[Tensor], list[float]]:
    """Gradients and losses of each step in float64, sample by sample from dense logits, divided once by its tokens."""
    data, gradients, losses = DumpDataset(Dump.open(str(place / "dump")), block_units=2), [], []
    for first in range(0, SAMPLES, STEP):
        model = tiny_llama(1).double()
        rows = [data[i] for i in range(first, min(first + STEP, SAMPLES)) if data[i].targets is not None]
        loss = sum(loss_sum(model, row, index=1, **LOSS) for row in rows) / sum(len(row.targets) for row in rows)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        losses.append(float(loss.detach()))
    return gradients, losses


def assert_same(found: tuple[list[Tensor], list[float]], expected: tuple[list[Tensor], list[float]]) -> None:
    assert len(found[0]) == len(expected[0]) == 3
    for here, there in zip(found[0], expected[0], strict=True):
        assert float((here - there).norm() / there.norm()) < 1e-6
    assert found[1] == pytest.approx(expected[1], rel=1e-3)  # Trainer rounds what it logs.


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_accumulation_changes_nothing(accumulated: int, place: Path, tmp_path: Path, expected: Any) -> None:
    found = step_gradients(
        str(place / "dump"), str(tmp_path), LOSS,
        per_device_train_batch_size=STEP // accumulated, gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    assert_same(found, expected)


@pytest.mark.slow
def test_ranks_change_nothing(place: Path, tmp_path: Path, expected: Any) -> None:
    """Two ranks under DDP. In the last step Trainer repeats samples, so that all ranks have as many."""
    for gradients, _ in run_ranks(
        "support.trainer_jobs:on_rank", 2, url=str(place / "dump"), output=str(tmp_path), loss=LOSS,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    ):  # fmt: skip
        for here, there in zip(gradients[:-1], expected[0][:-1], strict=True):
            assert float((here - there).norm() / there.norm()) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 9])
def test_evaluation_is_the_loss_of_another_dump(size: int, place: Path, tmp_path: Path) -> None:
    """Per supervised token, whatever the batches; two samples have no targets."""
    write_dump(tmp_path / "heldout", samples=9, samples_per_unit=9, temperatures=(1.0, 2.0), first=100)
    model, heldout = tiny_llama(1).double(), DumpDataset(Dump.open(str(tmp_path / "heldout")))
    trainer = DumpTrainer(
        model, arguments(tmp_path, per_device_eval_batch_size=size), DumpDataset(Dump.open(str(place / "dump"))),
        loss=LossSection(**LOSS), eval_dataset=heldout, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    rows = [row for row in heldout.dump.read_unit(0) if row.targets is not None]
    with torch.no_grad():
        total = sum(float(loss_sum(model, row, index=1, **LOSS)) for row in rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / sum(len(row.targets) for row in rows), rel=1e-6)


def test_the_labels_count_the_targets(place: Path) -> None:
    """By both of Trainer's rules: whole rows, or from their second token on."""
    dump = Dump.open(str(place / "dump"))
    rows = list(dump.read_unit(0))
    made = DumpCollator(dump, temperature=2.0)(rows)
    labels, kept = made["labels"], labels_of(made)
    assert int(kept.sum()) == made["batch"].supervised == int(labels[:, 1:].ne(-100).sum())
    assert torch.equal(labels[kept], made["batch"].targets.labels)
    assert torch.equal(labels[kept], made["input_ids"][kept])
    filler = DumpCollator(dump)([row for row in rows if row.targets is None])
    assert not labels_of(filler).any()


def labels_of(made: dict[str, Any]) -> Tensor:
    return made["labels"].ne(-100)


def refused(place: Path, tmp_path: Path, says: str, *, model: Any = None, **changes: Any) -> None:
    options = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    train = DumpDataset(Dump.open(str(options.pop("dump", place / "dump"))))
    with pytest.raises(MismatchError, match=says):
        DumpTrainer(model or tiny_llama(1), arguments(tmp_path, **changes), train, **options)


OPTIONS = ("dump", "loss", "eval_dataset", "compute_metrics", "data_collator", "processing_class")


class Spread(Tensor):
    """As a DTensor: no plain tensor."""


def test_what_would_be_trained_otherwise_is_refused(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    refused(place, tmp_path, "label_smoothing_factor", label_smoothing_factor=0.1)
    refused(place, tmp_path, "torch_compile", torch_compile=True)
    refused(place, tmp_path, "train_sampling_strategy", train_sampling_strategy="group_by_length")
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    refused(place, tmp_path, "dataloader_persistent_workers, which would read", **workers)
    refused(place, tmp_path, "compute_metrics", compute_metrics=print)
    refused(place, tmp_path, "data_collator", data_collator=print)
    refused(place, tmp_path, "tail mass for this temperature", loss=LossSection(temperature=3.0))
    refused(place, tmp_path, "tokenizer", processing_class=tiny_tokenizer("other"))
    spread = tiny_llama(1)
    spread.lm_head.weight = torch.nn.Parameter(spread.lm_head.weight.data.as_subclass(Spread))
    refused(place, tmp_path, "spread over ranks", model=spread)
    with monkeypatch.context() as zero3:
        zero3.setattr("student_train.hf_trainer.is_deepspeed_zero3_enabled", lambda: True)
        refused(place, tmp_path, "spread over ranks")
    config = AutoConfig.for_model(
        "mixtral", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    refused(place, tmp_path, "routers", model=AutoModelForCausalLM.from_config(config))
    short = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    refused(place, tmp_path, "learned positions", model=AutoModelForCausalLM.from_config(short))
    with monkeypatch.context() as two:
        two.setattr("transformers.TrainingArguments.world_size", 2)
        refused(place, tmp_path, "average_tokens_across_devices", average_tokens_across_devices=False)
    with monkeypatch.context() as two:
        two.setattr("transformers.TrainingArguments.n_gpu", 2)
        refused(place, tmp_path, "torchrun")


def test_dumps_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    write_dump(tmp_path / "drawn", samples=5, estimator=Sampled(kind="sampled", draws=20))
    refused(place, tmp_path, "unbiased", dump=tmp_path / "drawn", loss=LossSection(divergence="reverse_kl"))
    write_dump(tmp_path / "swapped", samples=5, temperatures=(1.0, 4.0, 2.0))
    swapped = DumpDataset(Dump.open(str(tmp_path / "swapped")))
    refused(place, tmp_path, "temperature_index", eval_dataset=swapped, loss=LossSection(temperature=2.0))
    write_dump(tmp_path / "growing", samples=10, units=range(1), seal=False)
    with pytest.raises(TemporaryError, match="not complete"):
        DumpDataset(Dump.open(str(tmp_path / "growing")))
