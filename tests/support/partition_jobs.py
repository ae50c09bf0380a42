"""What the tests of partitioned students run on every rank."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
from support.engine_jobs import make_engine, on_rank, train_section

from storage_schemas.reader import Dump
from student_train.world import World

SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Else ZeRO-3 keeps small weights whole on every rank."""


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@contextmanager
def peak_of(measure: Callable[[], int]) -> Iterator[list[int]]:
    """The largest value while the block runs, above the one before it; known when it has ended."""
    found, before, over = [0], measure(), threading.Event()

    def look() -> None:
        while not over.is_set():
            found[0] = max(found[0], measure() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def weights_of(world: World, dump: Dump, case: Mapping[str, Any]) -> dict[str, Any]:
    """All weights of a student under DeepSpeed, whole; how much of each this rank holds; the peak of its memory."""
    train = train_section(Path("unused"), deepspeed=SPREAD if case["train"]["zero_stage"] == 3 else {}, **case["train"])
    with peak_of(private_bytes) as peak:
        engine = make_engine(world, dump, case["model"], train, lora=case.get("lora"))
    whole, held = {}, {}
    for name, parameter in engine.module.named_parameters():
        held[name] = getattr(parameter, "ds_tensor", parameter).numel()
        if case.get("look", True):
            with deepspeed.zero.GatheredParameters([parameter] if train.zero_stage == 3 else []):
                whole[name] = parameter.detach().clone()
    masters = {key: value for key, value in engine.export() if case.get("look", True)}
    engine.close()
    return {"whole": whole, "held": held, "peak": peak[0], "masters": masters}


def weights(rank: int, world_size: int, rendezvous: str, *, dump: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Several students, one after the other."""
    return on_rank(rank, world_size, rendezvous, lambda world: [weights_of(world, Dump.open(dump), c) for c in cases])
