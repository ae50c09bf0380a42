"""The learning rate equals that of transformers' schedulers, step by step."""

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
    for step in range(total + 1):
        got = learning_rate(step, total_steps=total, warmup_ratio=ratio, kind=kind, peak=peak)
        assert got == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20), step
        optimizer.step()
        scheduler.step()


def test_the_schedule_peaks_after_the_warm_up_and_ends_at_0() -> None:
    rates = [learning_rate(s, total_steps=50, warmup_ratio=0.1, kind="cosine", peak=1.0) for s in range(51)]
    assert rates[0] == 0.0
    assert rates[5] == max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(60, total_steps=50, warmup_ratio=0.1, kind="cosine", peak=1.0) == pytest.approx(0.0, abs=1e-15)
