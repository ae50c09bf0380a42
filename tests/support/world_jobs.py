"""What the tests of `World` run on every rank."""

import time
from collections.abc import Callable
from typing import Any

import torch

from storage_schemas.common.errors import DataError, MismatchError, NeoError
from storage_schemas.common.exits import Exit
from student_train.world import PeerError, World, join

Case = tuple[str, dict[int, str]]
"""(name, what goes wrong on which ranks)"""


def do(what: str, rank: int) -> str:
    """Fail as asked, or return something of this rank."""
    match what:
        case "data":
            raise DataError(f"bad shard on {rank}")
        case "mismatch":
            raise MismatchError(f"bad key on {rank}")
        case "bug":
            raise ZeroDivisionError(f"bug on {rank}")
        case "late":
            time.sleep(0.5)
            raise DataError(f"bad shard on {rank}")
    return f"fine {rank}"


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returned or raised, and how long it took."""
    began = time.monotonic()
    try:
        result, code, peer = str(call()), 0, False
    except NeoError as error:
        result, code, peer = str(error), int(error.exit_code), isinstance(error, PeerError)
    except Exception as error:
        result, code, peer = f"{type(error).__name__}: {error}", int(Exit.BUG), False
    return {"result": result, "code": code, "peer": peer, "seconds": time.monotonic() - began}


def run_world(rank: int, world_size: int, rendezvous: str, *, cases: list[Case]) -> list[dict[str, Any]]:
    """Each case in turn, on the same ranks; and a gather after it, which must be in step again."""
    world = join(rank, world_size, rank, device=torch.device("cpu"), rendezvous=rendezvous)
    results = [one(world, number, broken) for number, (_, broken) in enumerate(cases)]
    results.append(asking(world))
    world.close()
    return results


def asking(world: World) -> dict[str, Any]:
    """The others ask half a second after rank 0."""
    time.sleep(0.5 if world.rank else 0.0)
    began = time.monotonic()
    told = world.ask([world.rank])
    asked = time.monotonic()
    return {"values": told(), "asking": asked - began, "waiting": time.monotonic() - asked}


def one(world: World, number: int, broken: dict[int, str]) -> dict[str, Any]:
    """One case."""
    found = outcome(lambda: world.together(lambda: do(broken.get(world.rank, ""), world.rank)))
    return found | {"after": world.gather([number, world.rank, 2.0**53])}
