"""The learning rate equals that of transformers' schedulers, step by step, but for a warm-up that is one step ahead."""

import math

import pytest
import torch
import transformers

from student_train.schedule import learning_rate


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate_equals_the_scheduler_of_transformers(kind: str, ratio: float, total: int) -> None:
    peak = 2e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=math.ceil(total * ratio), num_training_steps=total
    )
    theirs = []
    for _ in range(total + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step in range(total + 1):
        got = learning_rate(step, total_steps=total, warmup_ratio=ratio, kind=kind, peak=peak)
        ahead = step < math.ceil(total * ratio) < total
        wanted = peak * (step + 1) / total if step < total == math.ceil(total * ratio) else theirs[step + ahead]
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-20), step


def test_the_schedule_peaks_after_the_warm_up_and_ends_at_0() -> None:
    rates = [learning_rate(s, total_steps=50, warmup_ratio=0.1, kind="cosine", peak=1.0) for s in range(51)]
    assert rates[0] == 0.2
    assert rates[4] == rates[5] == max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(60, total_steps=50, warmup_ratio=0.1, kind="cosine", peak=1.0) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_every_step_of_a_run_can_learn(total: int, ratio: float) -> None:
    """A run of one step included, whose rate was 0."""
    for kind in ("cosine", "linear", "constant"):
        rates = [
            learning_rate(s, total_steps=total, warmup_ratio=ratio, kind=kind, peak=1.0)  # type: ignore[arg-type]
            for s in range(total)
        ]
        assert min(rates) > 0
