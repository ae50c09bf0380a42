"""A step that is not finite: refused on every rank, nothing changed, and forgotten by the next step."""

import math
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_ranks

Bad = tuple[str, float, int]
"""(where, value, rank)"""
SAMPLE: list[tuple[int, Bad]] = [
    (0, ("loss", math.nan, 1)), (0, ("gradient", math.inf, 0)),
    (1, ("loss", math.inf, 0)), (1, ("gradient", math.nan, 1)),
    (2, ("loss", math.nan, 0)), (2, ("gradient", math.inf, 1)),
    (3, ("loss", -math.inf, 1)), (3, ("gradient", math.nan, 0)),
]  # fmt: skip
"""(ZeRO stage, what goes wrong) of the ordinary tests, in fp32"""
SAMPLE_BF16: list[tuple[int, Bad]] = [(1, ("loss", math.nan, 1)), (1, ("gradient", math.inf, 0))]
"""In bf16: there stage 1 is another optimizer of DeepSpeed."""


def check(folder: Path, world_size: int, what: list[tuple[dict[str, Any], Bad]]) -> None:
    """Run all, and the same without the incident, on some ranks."""
    settings = list({str(train): train for train, _ in what}.values())
    cases = [{"model": str(folder / "student"), "train": train, "bad": bad} for train, bad in what]
    cases += [{"model": str(folder / "student"), "train": train} for train in settings]
    by_rank = run_ranks(
        "support.incident_jobs:run_incidents", world_size, timeout=600, dump=str(folder / "dump"), cases=cases
    )
    for rank in by_rank:
        good = dict(zip(map(str, settings), rank[len(what) :], strict=True))
        for (train, bad), found in zip(what, rank, strict=False):
            name = f"{train} {bad}"
            assert found["code"] == 65, name
            assert f"the {bad[0]} is not finite" in found["message"], name
            same(found["after"], found["before"], name)
            same(found["state"], good[str(train)]["state"], name)
            assert found["last"] == good[str(train)]["last"], name
            assert found["state"]["updates"] == 2, name
            assert not found["state"]["logits"].equal(found["before"]["logits"]), name


def same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert any(key.startswith("exp_avg_sq/") for key in found)
    for key, value in expected.items():
        assert found[key].equal(value), f"{name}: {key}"


def test_is_refused_and_forgotten(folder: Path) -> None:
    """NaN and infinities, in the loss or in nothing but a gradient, on one of two ranks, at each ZeRO stage."""
    what: list[tuple[dict[str, Any], Bad]] = [({"zero_stage": stage}, bad) for stage, bad in SAMPLE]
    check(folder, 2, what + [({"zero_stage": stage, "precision": "bf16"}, bad) for stage, bad in SAMPLE_BF16])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 3])
def test_everywhere(world_size: int, folder: Path) -> None:
    """Each stage, both precisions, LoRA and full, fillers included; in turn each place and value on each rank."""
    trains: list[dict[str, Any]] = [{"zero_stage": stage} for stage in (0, 1, 2, 3)]
    trains += [{"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)]
    trains += [{"zero_stage": stage, "arm": "kd", "max_grad_norm": 0.0} for stage in (0, 2, 3)]
    trains += [{"zero_stage": stage, "global_batch_size": 4, "micro_batch_size": 1} for stage in (2, 3)]
    places = list(product(("loss", "gradient"), (math.nan, math.inf, -math.inf), range(world_size)))
    turns = cycle(places)
    check(folder, world_size, [(train, next(turns)) for train in trains for _ in range(2)])
