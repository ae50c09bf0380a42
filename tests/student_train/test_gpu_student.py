"""Stage two on a GPU: head and training steps against references on the CPU, and what the host waits for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import assert_same_steps, train_plainly
from reference import DIVERGENCES, drawn_targets, head_targets, unfused_loss
from support.distributed import run_ranks
from support.gpus import close, need_gpus
from support.rounding import GRADIENT, update_excess
from torch import Tensor

from storage_schemas.reader import Dump
from student_train.config import LossSection
from student_train.data.batch import SparseTargets
from student_train.model.head import HeadSpec, fused_head_loss
from student_train.underway import Underway

pytestmark = need_gpus()

N, HIDDEN, VOCAB = 23, 16, 211
SIZES = [1 + 3 * (i % 7) for i in range(N)]
HEADS = {
    "plain": HeadSpec(chunk_tokens=8),
    "all": HeadSpec(valid_vocab=200, scale=1.3, softcap=5.0, chunk_tokens=8),
}
BATCH, STEPS, RATE, CLIP = 6, 3, 1e-2, 0.3


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))]


def targets(temperature: float = 1.0, *, draws: bool = False) -> SparseTargets:
    """Of a teacher with the vocabulary in use."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(N, 200, generator=generator)
    if draws:
        return drawn_targets(logits, 0, torch.randint(200, (N, 12), generator=generator))
    return head_targets(logits, SIZES, temperature=temperature, labels=torch.arange(N))


def in_float32(targets: SparseTargets) -> SparseTargets:
    """The same in the dtype that dumps are read in."""
    return targets._each(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def run_head(
    leaves: list[Tensor], targets: SparseTargets, loss: LossSection, head: HeadSpec
) -> tuple[Tensor, list[Tensor]]:
    """The loss on the GPU, and its gradients."""
    there = [leaf.cuda().requires_grad_() for leaf in leaves]
    found = fused_head_loss(*there[:2], targets.to("cuda"), loss=loss, head=head, bias=there[2])
    return found.loss.detach(), list(torch.autograd.grad(found.loss, there))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", [*DIVERGENCES, "draws"])
def test_the_head_equals_its_definition_in_float64(kind: str, temperature: float, head: str) -> None:
    """float64 to the last digits, float32 to 1e-5, and bfloat16 to what its 8 bits allow."""
    if kind == "draws" and temperature != 1.0:
        pytest.skip("draws are of T = 1")
    loss = LossSection(alpha=0.6, divergence="forward_kl" if kind == "draws" else kind, temperature=temperature)
    sparse = targets(temperature, draws=kind == "draws")
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        leaves = inputs(dtype)
        exact = [leaf.double().requires_grad_() for leaf in leaves]
        expected = unfused_loss(*exact[:2], sparse, loss=loss, head=HEADS[head], bias=exact[2])[0]
        given = sparse if dtype == torch.float64 else in_float32(sparse)
        value, gradients = run_head(leaves, given, loss, HEADS[head])
        assert close(value, expected) < bound, dtype
        for gradient, reference in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
            assert close(gradient, reference) < bound, dtype


@pytest.mark.parametrize("kind", [*DIVERGENCES, "draws"])
def test_the_host_never_waits_for_the_head(kind: str) -> None:
    loss = LossSection(alpha=0.6, divergence="forward_kl" if kind == "draws" else kind)
    sparse = in_float32(targets(draws=kind == "draws")).to("cuda")
    hidden, weight, _ = (leaf.cuda().requires_grad_() for leaf in inputs(torch.bfloat16))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = fused_head_loss(hidden, weight, sparse, loss=loss, head=HEADS["all"])
        (found.loss * 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


CASES = [
    ("neo", False, 0), ("neo", False, 1), ("neo", False, 2), ("neo", False, 3), ("neo", True, 2), ("neo", True, 3),
    ("kd", False, 1), ("kd", True, 2), ("kd", True, 3), ("lora", False, 2), ("sft", True, 2),
]  # fmt: skip
"""(arm, tied head, ZeRO stage)"""


def case_of(folder: Path, arm: str, tied: bool, stage: int, **train: Any) -> dict[str, Any]:
    """Of `engine_jobs.run_case`."""
    train = {"arm": arm, "zero_stage": stage, "max_grad_norm": CLIP, "learning_rate": RATE} | train
    model = str(folder / ("tied" if tied else "student"))
    return {"model": model, "steps": STEPS, "train": {"global_batch_size": BATCH, **train}}


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """All cases on one GPU, in one process."""
    cases = [case_of(folder, *case) for case in CASES]
    return run_ranks("support.engine_jobs:run_cases", 1, dump=str(folder / "dump"), cases=cases)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_steps_equal_plain_torch_on_the_cpu(case: int, results: list[dict[str, Any]], folder: Path) -> None:
    arm, tied, _ = CASES[case]
    model = str(folder / ("tied" if tied else "student"))
    dump = Dump.open(str(folder / "dump"))
    expected = train_plainly(dump, model, arm=arm, steps=STEPS, batch=BATCH, rate=RATE, clip=CLIP)
    assert_same_steps(results[case], expected, rate=RATE)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_bfloat16_is_near_float32(changes: dict[str, Any], results: list[dict[str, Any]], folder: Path) -> None:
    cases = [case_of(folder, "neo", False, stage, precision="bf16", **changes) for stage in (2, 3)]
    found = run_ranks("support.engine_jobs:run_cases", 1, dump=str(folder / "dump"), cases=cases)[0]
    for result in found:
        for here, there in zip(result["steps"], results[CASES.index(("neo", False, 2))]["steps"], strict=True):
            assert here[0] == pytest.approx(there[0], rel=0.02)
            assert here[3] == pytest.approx(there[3], rel=0.1)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_as_if_it_had_not_stopped(stage: int, folder: Path) -> None:
    """The state after two steps, put into another engine at every stage, and one step more."""
    run = "support.engine_jobs:run_cases"
    dump = str(folder / "dump")
    two, three = (case_of(folder, "neo", False, 2) | {"steps": steps} for steps in (2, 3))
    half, whole = run_ranks(run, 1, dump=dump, cases=[two, three])[0]
    rest = case_of(folder, "neo", False, stage) | {"state": half["last"], "first": 2, "steps": 1}
    (found,) = run_ranks(run, 1, dump=dump, cases=[rest])[0]
    assert found["steps"][0] == pytest.approx(whole["steps"][2], rel=GRADIENT)
    assert update_excess(found["last"], whole["last"], first=whole["first"], rate=RATE, steps=3) < 1


def test_numbers_are_those_of_the_time_when_they_were_asked_for() -> None:
    """And nothing that is launched afterwards is waited for."""
    numbers = torch.arange(4.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        asked = Underway(numbers)
        numbers.add_(1)
        found = asked.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == [0.0, 1.0, 2.0, 3.0]


def test_what_the_host_waits_for_in_a_step(folder: Path) -> None:
    """Reads of the device per step, at four micro-batches and at one."""
    job = case_of(folder, "neo", False, 2)
    few, many = run_ranks(
        "support.gpu_jobs:host_reads", 1, dump=str(folder / "dump"), model=job["model"], micro_batch_sizes=[8, 2]
    )[0]
    assert few <= 6
    assert many == few


@pytest.mark.parametrize("marks", [pytest.param(2, marks=need_gpus(2))])
def test_two_gpus_equal_one(marks: int, results: list[dict[str, Any]], folder: Path) -> None:
    cases = [case_of(folder, *case) for case in CASES]
    found = run_ranks("support.engine_jobs:run_cases", marks, dump=str(folder / "dump"), cases=cases)[0]
    for here, there in zip(found, results, strict=True):
        for one, other in zip(here["steps"], there["steps"], strict=True):
            assert one == pytest.approx(other, rel=GRADIENT)
