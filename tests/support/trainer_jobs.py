"""transformers' Trainer on a dump: the gradients of its steps."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.tiny_student import tiny_llama
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from storage_schemas import Dump
from student_train import DumpDataset, DumpTrainer, LossSection


def arguments(output: Path | str, **changes: Any) -> TrainingArguments:
    """An epoch on the CPU that leaves the weights as they are."""
    defaults = {
        "output_dir": str(output), "use_cpu": True, "learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0,
        "num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**(defaults | changes))


class Gradients(TrainerCallback):
    """Keeps the gradient of each step, all parameters one behind the other."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def step_gradients(url: str, output: str, loss: dict[str, Any], **changes: Any) -> tuple[list[Tensor], list[float]]:
    """Gradients and losses of all steps of an epoch with a student in float64, all of whose weights are trained."""
    seen, model = Gradients(), tiny_llama(1).double()
    model.accepts_loss_kwargs = False  # Of such a model Trainer counts no tokens by itself.
    trainer = DumpTrainer(
        model,
        arguments(output, **changes),
        DumpDataset(Dump.open(url), block_units=2),
        loss=LossSection(**loss),
        chunk_tokens=16,
        callbacks=[seen],
    )
    trainer.train()
    return seen.found, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def on_rank(rank: int, world_size: int, rendezvous: str, **job: Any) -> tuple[list[Tensor], list[float]]:
    """The same on one of several ranks, under DDP."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=rendezvous)
    found = step_gradients(**job, ddp_backend="gloo")
    dist.destroy_process_group()
    return found
