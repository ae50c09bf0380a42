"""Compiled decoder layers: the numbers of eager ones, one graph over lengths, and no mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import relative
from pydantic import ValidationError
from support.distributed import run_ranks
from support.engine_jobs import student_of, train_section
from support.rounding import FORWARD, GRADIENT, update_excess
from torch._dynamo.testing import CompileCounterWithBackend

from storage_schemas.common.errors import MismatchError
from storage_schemas.logits import compile_layers
from storage_schemas.reader import Dump
from student_train.data.batch import collate
from student_train.model.student import causal_of

CASES: dict[str, dict[str, Any]] = {
    "neo": {},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "full": {"train": {"arm": "kd"}},
    "packed": {"train": {"packing": True}},
    "dora": {"lora": {"variant": "dora"}},
    "dropout": {"lora": {"dropout": 0.1}},
}
BROKEN = ("checkpointing", "dora")
"""Graphs of a layer that end in the middle of it."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_steps_are_those_of_eager_layers(stage: int, folder: Path) -> None:
    """By inductor, on two ranks."""
    common = {"zero_stage": stage, "max_grad_norm": 0.3, "global_batch_size": 6, "learning_rate": 1e-2}
    model = str(folder / "student")
    cases = [{"model": model, "steps": 3, "train": common | {"compile": compiled}} for compiled in (False, True)]
    eager, compiled = run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]
    for here, there in zip(compiled["steps"], eager["steps"], strict=True):
        assert here == pytest.approx(there, rel=GRADIENT)
    assert relative(compiled["first"], eager["first"], "exp_avg") < GRADIENT
    assert update_excess(compiled["last"], eager["last"], first=eager["first"], rate=1e-2, steps=3) < 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("neo", "checkpointing") else pytest.mark.slow) for name in CASES]
)
def test_one_graph_serves_all_lengths(name: str, folder: Path) -> None:
    case, dump = CASES[name], Dump.open(str(folder / "dump"))
    train = train_section(Path("unused"), **case.get("train", {}))
    eager, module = (student_of(folder / "student", dump, train, lora=case.get("lora")).train() for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(
        causal_of(module.student),
        lambda f: torch.compile(f, dynamic=True, fullgraph=name not in BROKEN, backend=counter),
        role="train",
    )
    masks: list[Any] = []
    for layer in causal_of(module.student).model.layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    frames = []
    for samples in ([0, 1], [2, 4, 5], [6, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17]):
        rows = [dump.read_unit(i // 5).row(i % 5) for i in samples]
        batch = collate(rows, temperature_index=0, temperature=1.0, packed=train.packing)
        torch.manual_seed(0)
        expected = eager(batch)[0]
        torch.manual_seed(0)
        found = module(batch)[0]
        expected.backward()
        found.backward()
        for (_, there), (key, here) in zip(eager.trained(), module.trained(), strict=True):
            assert there.grad is not None
            assert here.grad is not None
            largest = float(there.grad.abs().max())
            assert torch.allclose(here.grad, there.grad, rtol=GRADIENT, atol=GRADIENT * largest), key
        assert found.item() == pytest.approx(expected.item(), rel=FORWARD)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames[-1] == frames[0], frames
    assert {mask is None for mask in masks} == {not train.packing}


def test_what_cannot_be_compiled_is_refused(folder: Path) -> None:
    with pytest.raises(ValidationError, match="use stage 2"):
        train_section(folder, zero_stage=3, compile=True)
    with pytest.raises(MismatchError, match=r"set train\.compile: false"):
        compile_layers(torch.nn.Linear(2, 2), torch.compile, role="train")
