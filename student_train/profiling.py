"""What a few steps of each rank are made of, kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

TRACES = "profile"
"""Folder of a run directory."""
WARMUP = 3
"""Steps before those that are recorded: first kernels are chosen and compiled, and buffers made."""


@contextmanager
def recorded(output: Path, steps: int | None, *, rank: int) -> Iterator[Callable[[], object]]:
    """Record so many steps of this start, after the first ones; None: nothing.

    Yields what is to be called after each step. The trace lies in `profile/rank-N.json` as soon as the last of them is
    done, or the context is left.
    """
    if steps is None:
        yield lambda: None
        return
    file = output / TRACES / f"rank-{rank}.json"
    file.parent.mkdir(exist_ok=True)
    window = schedule(wait=0, warmup=WARMUP, active=steps, repeat=1)
    with profile(schedule=window, on_trace_ready=lambda done: done.export_chrome_trace(str(file))) as profiler:
        yield profiler.step
