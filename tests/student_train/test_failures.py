"""What one rank meets, all ranks learn; a loss or a gradient that is not finite changes no weight."""

from itertools import product
from pathlib import Path

import pytest
from support.distributed import run_ranks
from support.failure_jobs import SPOILED
from support.tiny_student import save_student, write_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump and a student."""
    folder = tmp_path_factory.mktemp("failures")
    write_dump(folder / "dump")
    save_student(folder / "student")
    return folder


def test_ranks_leave_together() -> None:
    """The rank that fails raises its own error, all others one that names its exit code; nobody waits."""
    world_size = 3
    found = run_ranks("support.failure_jobs:agree", world_size)
    for rank, results in enumerate(found):
        cases = iter(results)
        for bad in range(world_size):
            assert next(cases) == ("DataError" if rank == bad else "PeerError", 65, None)
            assert next(cases) == (("ZeroDivisionError", -1, None) if rank == bad else ("PeerError", 70, None))
        assert list(cases) == [("", 0, 100 + rank)] * 2


def check(folder: Path, world_size: int, cases: list[tuple[int, str, str]]) -> None:
    """Every rank refuses every spoiled step, and no weight or moment has moved."""
    found = run_ranks(
        "support.failure_jobs:spoiled_steps",
        world_size,
        dump=str(folder / "dump"),
        model=str(folder / "student"),
        cases=cases,
        timeout=600,
    )
    for results in found:
        for case, (error, message, untouched) in zip(cases, results, strict=True):
            assert error == "DataError", case
            assert f"the {case[2].split()[1]} is not finite" in message, case
            assert untouched, case


def test_nothing_is_learned_from_nan(folder: Path) -> None:
    """On the last of two ranks, under every stage."""
    check(folder, 2, [(0, "fp32", "nan loss"), (0, "fp32", "inf gradient"), (1, "bf16", "nan gradient"),
                      (2, "fp32", "nan gradient"), (3, "fp32", "inf gradient")])  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_learned_from_anything_that_is_not_finite(folder: Path, world_size: int) -> None:
    """Every stage, precision and kind."""
    grid = product((0, 1, 2, 3), ("fp32", "bf16"), SPOILED)
    check(folder, world_size, [case for case in grid if case[:2] != (0, "bf16")])
