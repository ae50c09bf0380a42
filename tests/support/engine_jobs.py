"""What the engine tests run on every rank."""

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import masking_utils

from storage_schemas.reader import Dump
from student_train import engine as engine_module
from student_train.config import LoraSection, LossSection, StudentSection, TrainSection
from student_train.data.batch import TrainBatch, collate
from student_train.data.deal import rank_slice
from student_train.engine import Engine, join, load_weights
from student_train.metrics import Event, HeldoutResult
from student_train.model.student import Distilled, load_student
from student_train.world import World

Result = dict[str, Any]
T = TypeVar("T")


def train_section(folder: Path, **changes: Any) -> TrainSection:
    """A small fp32 run."""
    defaults = {"precision": "fp32", "micro_batch_size": 2, "global_batch_size": 6, "learning_rate": 1e-2}
    if changes.get("micro_batch_tokens"):
        del defaults["micro_batch_size"]
    return TrainSection(output=folder, **(defaults | changes))


def some_result(step: int, kl: float = 1.0, ce: float = 1.0) -> HeldoutResult:
    """An evaluation."""
    return HeldoutResult(
        step=step, kl=kl, ce=ce, top1_agreement=None, acceptance_rate_min=0.0, acceptance_rate_max=1.0,
        supervised_tokens=1, seconds=0.0, temperature=1.0, dump="",
    )  # fmt: skip


def some_event(step: int, **changes: Any) -> Event:
    """What a run might say of a step."""
    values = {
        "epoch": 0.1, "loss": 1.5, "ce": 2.0, "kl": 1.0, "learning_rate": 1e-4, "grad_norm": 0.3,
        "supervised_tokens": 10, "tokens_per_second": 100.0, "data_wait_seconds": 0.0, "eta_seconds": 3661.0,
    }  # fmt: skip
    return Event(step=step, **(values | changes))


def student_of(
    model: Path | str,
    dump: Dump,
    train: TrainSection,
    *,
    lora: Mapping[str, Any] | None = None,
    loss: Mapping[str, Any] | None = None,
    **student: Any,
) -> Distilled:
    """A student and its loss, by default with an adapter of rank 4."""
    section = StudentSection(model=str(model), lora=LoraSection(**{"r": 4, **(lora or {})}), **student)
    return load_student(section, [LossSection(**(loss or {}))], train, dump.provenance).module


def leave_start(module: torch.nn.Module, *, std: float = 0.1) -> None:
    """Give each B of an adapter values, so that all of its weights have a gradient."""
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def batches_of_step(
    dump: Dump, train: TrainSection, step: int, *, rank: int, world_size: int, temperature: float = 1.0
) -> tuple[list[TrainBatch], int]:
    """This rank's micro-batches of a step that takes the samples as they come, and the step's supervised tokens."""
    unit_size, g = dump.provenance.samples_per_unit, train.global_batch_size
    rows = []
    for sample in range(step * g, (step + 1) * g):
        unit, place = divmod(sample % dump.provenance.corpus.samples, unit_size)
        rows.append(dump.read_unit(unit).row(place))
    tokens = sum(len(row.targets) for row in rows if row.targets is not None)
    shares = rank_slice(np.arange(g), rank, world_size, train.micro_batch, lengths=[len(row.input_ids) for row in rows])
    make = lambda share: collate(  # noqa: E731
        [rows[i] for i in share],
        temperature_index=dump.provenance.temperature_index(temperature),
        temperature=temperature,
        entries=train.distils,
        packed=train.packing,
    )
    return [make(share) for share in shares], tokens


def make_engine(
    world: World,
    dump: Dump,
    model: str,
    train: TrainSection,
    *,
    lora: Mapping[str, Any] | None = None,
    loss: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    updates: int = 0,
    **student: Any,
) -> Engine:
    """A student under DeepSpeed, from the start or from an exported state."""
    module = student_of(model, dump, train, lora=lora, loss=loss, **student)
    if state:
        load_weights(module, state.items())
    engine = Engine(module, train, world)
    if state:
        engine.restore(state.items(), updates=updates)
    return engine


def run_case(world: World, dump: Dump, case: Mapping[str, Any]) -> Result:
    """Train one case for some steps; per-step results, and the state after the first and the last step."""
    train = train_section(Path("unused"), **case.get("train", {}))
    temperature = case.get("loss", {}).get("temperature", 1.0)
    engine = make_engine(
        world,
        dump,
        case["model"],
        train,
        lora=case.get("lora"),
        loss=case.get("loss"),
        state=case.get("state"),
        updates=case.get("first", 0),
        quantization=case.get("quantization"),
    )
    steps, first_state = [], None
    first = case.get("first", 0)
    for step in range(first, first + case.get("steps", 1)):
        batches, tokens = batches_of_step(
            dump, train, step, rank=world.rank, world_size=world.world_size, temperature=temperature
        )
        result = engine.step(batches, tokens=tokens, learning_rate=train.learning_rate)
        (part,) = result.parts
        steps.append((result.loss / tokens, part.ce / tokens, part.divergence / tokens, result.grad_norm))
        if step == first:
            first_state = dict(engine.export())
    probe = engine.module.eval().logits(torch.arange(6, device=world.device)[None]).float().cpu()
    result = {"steps": steps, "first": first_state, "last": dict(engine.export()), "probe": probe}
    engine.close()
    return result if world.main else {"steps": steps, "last": result["last"]}


def run_cases(rank: int, world_size: int, rendezvous: str, *, dump: str, cases: list[dict[str, Any]]) -> list[Result]:
    """Several cases one after the other, in one process."""

    def run(world: World, case: dict[str, Any]) -> Result:
        with mock.patch.object(engine_module, "GATHERED", case.get("gathered", engine_module.GATHERED)):
            return run_case(world, Dump.open(dump), case)

    return on_rank(rank, world_size, rendezvous, lambda world: [run(world, case) for case in cases])


def reads_of_a_step(
    rank: int, world_size: int, rendezvous: str, *, dump: str, cases: list[dict[str, Any]]
) -> list[list[str]]:
    """Of each case, the functions of student_train that read a value in the third step, "look" where transformers looks
    for packed samples, "wait" where anybody waits for all that the device was given, and "update" where the optimizer
    begins."""

    def seen(world: World, case: dict[str, Any]) -> list[str]:
        train = train_section(Path("unused"), **case["train"])
        engine, found = make_engine(world, Dump.open(dump), case["model"], train), list[str]()
        batches, tokens = batches_of_step(Dump.open(dump), train, 0, rank=world.rank, world_size=world.world_size)
        for _ in range(2):  # DeepSpeed's clock starts with the third step.
            engine.step(batches, tokens=tokens, learning_rate=1e-3)
        engine._inner().register_step_pre_hook(lambda *_: found.append("update"))
        with ExitStack() as stack:
            waits = mock.patch.object(
                type(get_accelerator()), "synchronize", side_effect=lambda *_: found.append("wait")
            )
            stack.enter_context(waits)
            look = masking_utils.find_packed_sequence_indices
            looking = mock.Mock(side_effect=lambda *given: found.append("look") or look(*given))
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", looking))
            for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
                stack.enter_context(mock.patch.object(Tensor, name, _telling(getattr(Tensor, name), found)))
            engine.step(batches, tokens=tokens, learning_rate=1e-3)
        engine.close()
        return found

    return on_rank(rank, world_size, rendezvous, lambda world: [seen(world, case) for case in cases])


def _telling(read: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def telling(tensor: Tensor, *arguments: Any) -> Any:
        code = sys._getframe(1).f_code
        if Path(code.co_filename).parent.name == "student_train" and "tests" not in Path(code.co_filename).parts:
            found.append(code.co_qualname)
        return read(tensor, *arguments)

    return telling


def on_rank(rank: int, world_size: int, rendezvous: str, work: Callable[[World], T]) -> T:
    """What `work` gives on a rank that has met the others."""
    torch.manual_seed(1234 + rank)  # Nothing may depend on a rank's own random state.
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    result = work(world)
    world.close()
    return result


def gradients(first: Mapping[str, Tensor], beta1: float = 0.9) -> dict[str, Tensor]:
    """Gradients of the first update, from Adam's first moment: exp_avg = (1 - beta1) * gradient."""
    return {k.split("/", 1)[1]: v / (1 - beta1) for k, v in first.items() if k.startswith("exp_avg/")}


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Global norm."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
