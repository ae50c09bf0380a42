"""What the tests of steps that are not finite run on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.engine_jobs import batches_of_step, make_engine, train_section
from torch import Tensor

from storage_schemas.common.errors import NeoError
from storage_schemas.reader import Dump
from student_train.data.batch import TrainBatch
from student_train.engine import Engine, join
from student_train.world import World


def run_incidents(rank: int, world_size: int, rendezvous: str, *, dump: str, cases: list[Any]) -> list[dict[str, Any]]:
    """Several cases one after the other, in one process."""
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    results = [run_incident(world, Dump.open(dump), case) for case in cases]
    world.close()
    return results


def run_incident(world: World, dump: Dump, case: Mapping[str, Any]) -> dict[str, Any]:
    """A good step, a bad one if `case["bad"]` names (where, value, rank), and a good one again.

    Gives what the bad step raised, the states around it, and the last step.
    """
    train = train_section(Path("unused"), **case["train"])
    engine = make_engine(world, dump, case["model"], train)

    def step(number: int, spoil: bool = False) -> Any:
        batches, tokens = batches_of_step(dump, train, number, rank=world.rank, world_size=world.world_size)
        if not spoil:
            return engine.step(batches, tokens=tokens, learning_rate=train.learning_rate)
        where, value, rank = case["bad"]
        mine = where if rank == world.rank else None
        batches = spoiled(batches, value) if mine == "loss" else batches
        with bad_gradient(engine, value) if mine == "gradient" else nullcontext():
            return engine.step(batches, tokens=tokens, learning_rate=train.learning_rate)

    step(0)
    found: dict[str, Any] = {"before": everything(engine), "code": 0, "message": ""}
    if case.get("bad"):
        try:
            step(1, spoil=True)
        except NeoError as error:
            found |= {"code": int(error.exit_code), "message": str(error)}
        found["after"] = everything(engine)
    result = step(2)
    (part,) = result.parts
    found["last"] = (result.loss, part.ce, part.divergence, result.grad_norm)
    found["state"] = everything(engine)
    engine.close()
    return found


def everything(engine: Engine) -> dict[str, Tensor]:
    """Masters, moments, the count of updates, and the working weights as the model uses them."""
    logits = engine.module.eval().logits(torch.arange(6)[None])
    return dict(engine.export()) | {"updates": torch.tensor(engine.updates), "logits": logits}


def spoiled(batches: Sequence[TrainBatch], value: float) -> list[TrainBatch]:
    """The teacher's log-probs of the first micro-batch that has targets, and so its loss, become `value`."""
    found = list(batches)
    at = next(i for i, batch in enumerate(found) if len(batch.targets))
    targets = found[at].targets
    logprobs = torch.where(targets.in_head, value, targets.logprobs)
    found[at] = replace(found[at], parts=(replace(targets, logprobs=logprobs),))
    return found


@contextmanager
def bad_gradient(engine: Engine, factor: float) -> Iterator[None]:
    """The loss stays finite; the gradient is multiplied by `factor` on its way through the first layer."""

    def forward(_: Any, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * factor)

    layer = next(m for name, m in engine.module.student.named_modules() if name.endswith("layers.0"))
    handle = layer.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()
