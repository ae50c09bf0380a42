"""What the GPU tests run in a process of their own."""

import warnings
from pathlib import Path

import torch
from support.engine_jobs import batches_of_step, make_engine, train_section

from storage_schemas.reader import Dump
from student_train.engine import join


def host_reads(
    rank: int, world_size: int, rendezvous: str, *, dump: str, model: str, micro_batch_sizes: list[int]
) -> list[int]:
    """How often the host waits for the device in a step, by size of its micro-batches of a batch of 8."""
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    opened, counts = Dump.open(dump), []
    for size in micro_batch_sizes:
        train = train_section(
            Path("unused"), zero_stage=2, global_batch_size=8, micro_batch_size=size, precision="bf16"
        )
        engine = make_engine(world, opened, model, train)
        for step in range(3):
            batches, tokens = batches_of_step(opened, train, step, rank=rank, world_size=world_size)
            batches = [batch.pin_memory() for batch in batches]
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                engine.step(batches, tokens=tokens, learning_rate=1e-3)
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in seen))
        engine.close()
    world.close()
    return counts
