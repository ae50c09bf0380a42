"""What one rank meets, all ranks get to know; on real gloo groups."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_ranks
from support.world_jobs import Case


def cases(world_size: int) -> list[Case]:
    """All is well; each rank alone, with each kind of error; several ranks at once; a rank that takes its time."""
    found: list[Case] = [("fine", {})]
    found += [(f"{what} on {rank}", {rank: what}) for rank in range(world_size) for what in ("data", "mismatch", "bug")]
    found += [
        ("two kinds", {0: "mismatch", world_size - 1: "data"}),
        ("all", dict.fromkeys(range(world_size), "data")),
        ("late", {world_size - 1: "late"}),
        ("fine again", {}),
    ]
    return found


CODES = {"data": 65, "late": 65, "mismatch": 78, "bug": 70}


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_error_on_one_rank_reaches_all(world_size: int) -> None:
    """Its own there and PeerError elsewhere, with the same code; the lowest of several speaks; nobody waits for it.

    The ranks go on together afterwards: that is what the gather of the case's number shows.
    """
    what = cases(world_size)
    by_rank: list[list[dict[str, Any]]] = run_ranks("support.world_jobs:run_world", world_size, timeout=120, cases=what)
    for number, (name, broken) in enumerate(what):
        found = [results[number] for results in by_rank]
        if not broken:
            assert [one["result"] for one in found] == [f"fine {rank}" for rank in range(world_size)], name
        else:
            speaker = min(broken)
            assert [one["code"] for one in found] == [CODES[broken[speaker]]] * world_size, name
            assert [one["peer"] for one in found] == [rank != speaker for rank in range(world_size)], name
            assert f"on {speaker}" in found[speaker]["result"], name
            assert all(f"rank {speaker} has stopped" in one["result"] for one in found if one["peer"]), name
        assert all(one["after"] == [[number, rank, 2.0**53] for rank in range(world_size)] for one in found), name
        assert all(one["seconds"] < 20 for one in found), name
    assert [results[-1]["values"] for results in by_rank] == [[[rank] for rank in range(world_size)]] * world_size
    assert by_rank[0][-1]["asking"] < 0.4 < by_rank[0][-1]["asking"] + by_rank[0][-1]["waiting"]


def test_a_rank_that_waits_for_the_others_says_so(tmp_path: Path) -> None:
    body = """
    import sys, torch
    from student_train import world
    world.MEETING_SECONDS = 0.5
    world.join(0, 2, 0, device=torch.device("cpu"), rendezvous="file://" + sys.argv[1])
    """
    argv = [sys.executable, "-c", textwrap.dedent(body), str(tmp_path / "ranks")]
    alone = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert alone.stderr is not None
    try:
        assert any("rank 0 of 2 still waits for the others" in line for line in alone.stderr)
    finally:
        alone.kill()
        alone.wait()
