"""The whole training step in plain torch: one process, one sample at a time, dense logits, ordinary autograd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.rounding import FORWARD, GRADIENT, update_excess
from torch import Tensor

from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from storage_schemas.targets import decode
from student_train.config import LoraSection
from student_train.model.adapter import attach
from student_train.model.load import load_model


@dataclass(kw_only=True)
class Trace:
    """What a run gave, in the form of `engine_jobs.run_case`."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)


def plain_student(model: str, *, lora: bool, r: int = 4, seed: int = 0, **more: Any) -> Any:
    """The student before training, with all of its weights trainable or an adapter on it."""
    base = load_model(model, None, dtype=torch.float32)
    return attach(base, LoraSection(r=r, **more), seed=seed) if lora else base.requires_grad_(True)


def rows_of(dump: Dump, samples: Sequence[int]) -> list[Row]:
    """Rows by sample index."""
    size, n = dump.provenance.samples_per_unit, dump.provenance.corpus.samples
    return [dump.read_unit(sample % n // size).row(sample % n % size) for sample in samples]


def loss_sum(model: Any, row: Row, *, alpha: float, temperature: float = 1.0, index: int = 0) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL over the supervised tokens of one sample: the head's entries and one bucket."""
    ids = torch.from_numpy(row.input_ids.astype("int64"))
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    targets = decode(row.targets, temperature_index=index, temperature=temperature)
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(t for t in range(len(ids)) if row.loss_mask[t]):
        total = total - (1 - alpha) * logits[t - 1].log_softmax(0)[ids[t]]
        if alpha:
            head = torch.from_numpy(targets.ids[i][targets.in_head[i]].astype("int64"))
            log_p = torch.from_numpy(targets.logprobs[i][targets.in_head[i]]).double()
            log_q = (logits[t - 1] / temperature).log_softmax(0)
            kl = (log_p.exp() * (log_p - log_q[head])).sum()
            rest = torch.ones(len(log_q), dtype=torch.bool)
            rest[head] = False
            if rest.any():
                tail = float(targets.tail_logprob[i])
                kl = kl + torch.tensor(tail).double().exp() * (tail - log_q[rest].logsumexp(0))
            total = total + alpha * temperature**2 * kl
    return total


def train_plainly(
    dump: Dump,
    model: str,
    *,
    arm: str,
    steps: int,
    batch: int,
    rate: float,
    clip: float,
    alpha: float = 0.5,
    **more: Any,
) -> Trace:
    """Train for some steps on the samples as they come; `more` is of `student.lora`."""
    student = plain_student(model, lora=arm in ("lora", "neo"), **more).train()
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=rate, weight_decay=0.0)
    trace = Trace()
    for step in range(steps):
        rows = [row for row in rows_of(dump, range(step * batch, (step + 1) * batch)) if row.targets is not None]
        tokens = sum(len(row.targets) for row in rows)
        loss = sum(loss_sum(student, row, alpha=alpha if arm in ("kd", "neo") else 0.0) for row in rows) / tokens
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for _, p in named]
        trace.losses.append(float(loss.detach()))
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip) if clip else norm(parameters)))
        optimizer.step()
        if step == 0:
            trace.first = _state(named, optimizer)
    trace.last = _state(named, optimizer)
    return trace


def norm(parameters: Sequence[Tensor]) -> Tensor:
    """Global norm of the gradients."""
    return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str) -> float:
    """Largest difference of one kind of tensor, relative to its largest value."""
    keys = [key for key in expected if key.startswith(f"{kind}/")]
    assert keys
    assert {key for key in found if key.startswith(f"{kind}/")} == set(keys)
    largest = max(float(expected[key].abs().max()) for key in keys)
    return max(float((found[key] - expected[key]).abs().max()) for key in keys) / largest


def _state(named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"master/{name}": p.detach().clone() for name, p in named}
    for name, p in named:
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = optimizer.state[p][kind].clone()
    return found


def assert_same_steps(found: Mapping[str, Any], expected: Trace, *, rate: float) -> None:
    """What `engine_jobs.run_case` gave is what plain torch did: losses, norms, the gradient of the first step, and the
    weights after the last."""
    assert len(found["steps"]) == len(expected.losses)
    for (loss, _, _, norm), wanted, wanted_norm in zip(found["steps"], expected.losses, expected.norms, strict=True):
        assert loss == pytest.approx(wanted, rel=FORWARD)
        assert norm == pytest.approx(wanted_norm, rel=GRADIENT)
    # Adam's first moment after one step is a tenth of the clipped gradient.
    assert relative(found["first"], expected.first, "exp_avg") < GRADIENT
    steps = len(expected.losses)
    assert update_excess(found["last"], expected.last, first=expected.first, rate=rate, steps=steps) < 1
