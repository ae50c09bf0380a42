"""What goes wrong on one rank, and what every rank makes of it."""

from typing import Any

import torch
from support.engine_jobs import batches_of_step, make_engine, train_section
from torch import Tensor

from storage_schemas.errors import DataError, NeoError
from storage_schemas.reader import Dump
from student_train.engine import Engine, join
from student_train.world import World

SPOILED = ("nan loss", "inf loss", "nan gradient", "inf gradient")


class _Spoil(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def agree(rank: int, world_size: int, rendezvous: str) -> list[tuple[str, int, Any]]:
    """Each rank fails in turn, with an error of ours and with a bug, and then none: (kind, exit code, result)."""
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    found: list[tuple[str, int, Any]] = []
    for bad in [*range(world_size), None]:
        for error in (DataError("torn", got="x"), ZeroDivisionError("bug")):

            def work(bad: int | None = bad, error: Exception = error) -> int:
                if rank == bad:
                    raise error
                return 100 + rank

            try:
                found.append(("", 0, world.together(work)))
            except Exception as caught:
                code = int(caught.exit_code) if isinstance(caught, NeoError) else -1
                found.append((type(caught).__name__, code, None))
    world.close()
    return found


def spoiled_steps(
    rank: int, world_size: int, rendezvous: str, *, dump: str, model: str, cases: list[tuple[int, str, str]]
) -> list[tuple[str, str, bool]]:
    """Per (stage, precision, what is spoiled): the error of the spoiled step and its message, and whether the training
    state is what it was before."""
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    found = [_spoiled_step(world, Dump.open(dump), model, *case) for case in cases]
    world.close()
    return found


def _spoiled_step(world: World, dump: Dump, model: str, stage: int, precision: str, what: str) -> tuple[str, str, bool]:
    train = train_section(
        dump.store.root, zero_stage=stage, precision=precision, global_batch_size=6, micro_batch_size=1
    )
    engine = make_engine(world, dump, model, train)
    for step in range(2):
        _step(engine, world, dump, train, step)
    before = dict(engine.export())
    if world.rank == world.world_size - 1:
        _spoil(engine, what)
    error = "", ""
    try:
        _step(engine, world, dump, train, 2)
    except NeoError as caught:
        error = type(caught).__name__, str(caught)
    after = dict(engine.export())
    engine.close()
    assert before.keys() == after.keys()
    return *error, all(after[key].equal(value) for key, value in before.items())


def _step(engine: Engine, world: World, dump: Dump, train: Any, step: int) -> None:
    batches, tokens = batches_of_step(dump, train, step, rank=world.rank, world_size=world.world_size)
    engine.step(batches, tokens=tokens, learning_rate=1e-2)


def _spoil(engine: Engine, what: str) -> None:
    """Let this rank's next losses, or only their gradients, be NaN or infinite."""
    forward = engine.module.forward
    factor = {"nan": torch.nan, "inf": torch.inf}[what.split()[0]]

    def spoiled(batch: Any) -> tuple[Tensor, Tensor]:
        loss, parts = forward(batch)
        return (_Spoil.apply(loss, factor), parts) if "gradient" in what else (loss * factor, parts * factor)

    engine.module.forward = spoiled  # type: ignore[method-assign]
