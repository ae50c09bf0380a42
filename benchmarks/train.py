"""Stage two against what users run today: `make bench-train`. Writes runs/bench/train.json and prints the tables.

    make bench-train                       # about a quarter of an hour on two quiet cores
    make bench-train ARGS="--only loader"  # one section: steps, memory, loop, loader, ranks, start, profile,
                                           # vocabulary, entries, length; several: --only loader start

Every section runs in a process of its own. All contenders of a section take turns in one process, in alternating
order, on the same batch; only peak memory takes a process for each. What is made once, the student and the dump of
real targets, stays in runs/bench/train.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import train_workload
from results import machine, quiet, refuse_missed, table, versions
from torch.profiler import ProfilerActivity, profile
from train_scale import Rows, entries, length, loader, ranks, say, start, turns, vocabulary
from train_workload import (
    BATCH,
    CONTENDERS,
    LAYERS,
    RANK,
    SCRATCH,
    SUPERVISED,
    TOKENS,
    Workload,
    distilled,
    make_workload,
    neo,
)

OUT = Path("runs/bench/train.json")
THREADS = 2
ROUNDS, PROCESSES, LOOP_STEPS, WAIT_STEPS = 6, 3, 9, 13
GOALS = {
    "Neo step / LoRA SFT of transformers + peft": 0.80,
    "Neo step / online-teacher KD": 0.45,
    "Neo step / TRL GKD": 0.45,
    "peak memory: Neo / online-teacher KD": 0.55,
    "whole training step / bare forward + backward": 1.03,
    "whole training step / bare forward + backward, evaluated every 3 steps": 1.03,
    "share of a step that waits for data": 0.01,
    "loader, k=64: supervised tokens/s on one core": 100_000.0,
    "loader / datasets streaming, k=64": 20.0,
    "start, 1e9 samples in 100,000 units: seconds": 5.0,
    "seek to any step: milliseconds, median": 1.0,
}
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default=os.environ.get("LLM_NEO_TEACHER", "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(THREADS)
    if arguments.child:
        print(json.dumps(SECTIONS[arguments.child](make_workload(arguments.teacher))))
        return
    begin = time.monotonic()
    say("teacher, student and dump")
    make_workload(arguments.teacher)
    rows: Rows = {}
    for section in arguments.only:
        say(f"{section}: starting")
        rows |= child("--teacher", arguments.teacher, "--child", section)
    write(rows, minutes=(time.monotonic() - begin) / 60)


def child(*options: str, script: str = __file__) -> Rows:
    """The rows that another process prints as its last line; what it says before is passed on."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, script, *options]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last and not last.startswith("{"):
                print(last, end="", flush=True)
            last = line
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return json.loads(last)  # type: ignore[no-any-return]


def steps(work: Workload) -> Rows:
    """A step of Neo and of its rivals on one batch."""
    batch = work.batch()
    made = {name: make(work, batch) for name, make in CONTENDERS.items()}
    before = {name: step() for name, step in made.items()}
    say("cross-entropy of the first step: " + ", ".join(f"{name} {ce:.5f}" for name, ce in before.items()))
    # The same work: one model, one batch, one mask. TRL's loss is the divergence alone.
    assert all(abs(ce - before["Neo"]) < 1e-3 for ce in before.values() if not math.isnan(ce))
    cpu = dict.fromkeys(made, 0.0)

    def counted(name: str) -> Callable[[], None]:
        def run() -> None:
            begin = time.process_time()
            made[name]()
            cpu[name] += time.process_time() - begin

        return run

    found = dict(zip(made, turns([counted(name) for name in made], rounds=ROUNDS), strict=True))
    rows = {f"step of {name}, seconds": statistics.median(times) for name, times in found.items()}
    for name in list(found)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(found["Neo"], found[name], strict=True)]
        rows |= {f"Neo step / {name}": statistics.median(ratios)}
        rows |= {f"Neo step / {name}, processor time": cpu["Neo"] / cpu[name]}
    if "TRL GKD" not in made:
        say("TRL is not installed, so its GKD trainer is left out: pip install --no-deps trl==1.16.0")
    return rows


def memory(work: Workload) -> Rows:
    """Peak resident memory of a process that takes three steps, models and libraries included. What the allocator
    makes of the same allocations differs by 200 MB from process to process, hence the median of several."""
    peaks: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for i in range(PROCESSES):
        for name in list(peaks)[:: -1 if i % 2 else 1]:
            found = child(str(work.teacher), name, str(THREADS), script=train_workload.__file__)
            peaks[name].append(found["peak"] / 2**30)
            say(f"peak memory of {name}: {peaks[name][-1]:.2f} GiB")
    rows = {f"peak memory of {name}, GiB": statistics.median(sizes) for name, sizes in peaks.items()}
    ours = rows["peak memory of Neo, GiB"]
    names = list(peaks)[1:]
    return rows | {f"peak memory: Neo / {name}": ours / rows[f"peak memory of {name}, GiB"] for name in names}


def loop(work: Workload) -> Rows:
    """`train` as `llm-neo train` runs it, on one rank: DeepSpeed ZeRO-2, loader, metrics, log."""
    import shutil

    import student_train.train as training
    from student_train.config import Resolved
    from student_train.data.batch import TrainBatch
    from student_train.engine import Engine, StepResult, join
    from student_train.metrics import EVENTS, read_events
    from student_train.summary import Summary

    bare_module = distilled(work).train()
    whole: list[float] = []
    bare: list[float] = []
    interleave = True
    since = time.perf_counter()

    def bare_step(batches: Sequence[TrainBatch], tokens: int) -> float:
        begin = time.perf_counter()
        for batch in batches:
            (bare_module(batch)[0] / tokens).backward()
        taken = time.perf_counter() - begin
        bare_module.zero_grad()
        return taken

    class Timed(Engine):
        """An engine that stands aside for the bare student, before or after its own step, in turn."""

        def step(self, batches: Sequence[TrainBatch], *, tokens: int, learning_rate: float, **more: Any) -> StepResult:
            nonlocal since
            first = interleave and len(whole) % 2 == 1
            if first:
                before = time.perf_counter()
                bare.append(bare_step(batches, tokens))
                since += time.perf_counter() - before
            result = super().step(batches, tokens=tokens, learning_rate=learning_rate, **more)
            whole.append(time.perf_counter() - since)
            if interleave and not first:
                bare.append(bare_step(batches, tokens))
            since = time.perf_counter()
            return result

    evaluate = training._Loop._evaluate

    def evaluated(self: training._Loop) -> bool:
        nonlocal since
        before = time.perf_counter()
        try:
            return evaluate(self)
        finally:
            since += time.perf_counter() - before

    training.Engine = Timed  # type: ignore[misc]
    training._Loop._evaluate = evaluated  # type: ignore[method-assign]
    world = join(0, 1, 0)

    def train(name: str, steps: int, **changes: Any) -> Summary:
        output = SCRATCH / name
        shutil.rmtree(output, ignore_errors=True)
        section = work.train_section(output, max_steps=steps, save_steps=10**6, warmup_ratio=0.0, **changes)
        student, heldout = work.student_section(), {"url": str(work.heldout)} if changes else None
        config = Resolved(dump={"url": str(work.dump)}, student=student, loss={}, train=section, heldout=heldout)
        summary = training.train(world, config)
        say(f"{name}: {steps} steps")
        return summary

    def ratio() -> float:
        return statistics.median(a / b for a, b in zip(whole[1:], bare[1:], strict=True))

    train("interleaved", LOOP_STEPS)
    rows = {
        "whole training step, seconds": statistics.median(whole[1:]),
        "bare forward + backward, seconds": statistics.median(bare[1:]),
        "whole training step / bare forward + backward": ratio(),
    }
    whole.clear()
    bare.clear()
    summary = train("evaluated", LOOP_STEPS, eval_steps=3)
    rows |= {
        "whole training step / bare forward + backward, evaluated every 3 steps": ratio(),
        "one evaluation on 8 samples / a training step on 4": statistics.median(
            result.seconds for result in summary.heldout[1:]
        )
        / statistics.median(whole[1:]),
    }
    interleave = False
    train("alone", WAIT_STEPS)
    events = read_events(SCRATCH / "alone" / EVENTS)
    waits = [event.data_wait_seconds for event in events]
    taken = [BATCH * TOKENS / event.tokens_per_second for event in events]
    return rows | {
        "wait for data of the first step, seconds": waits[0],
        "share of a step that waits for data": sum(waits[1:]) / sum(taken[1:]),
    }


def profiled(work: Workload) -> Rows:
    """Where a Neo step's time goes: the fused head, and the operators of torch."""
    step = neo(work, work.batch())
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
        step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(times.values())
    rows = {"Neo step: share of matrix products": sum(times.get(name, 0) for name in MATRIX_PRODUCTS) / total}
    rows["Neo step: share of the fused head"] = (
        next(event.cpu_time_total for event in found.key_averages() if event.key == "_FusedHead") / total
    )
    for name in sorted(times, key=times.__getitem__, reverse=True)[:12]:
        rows[f"Neo step: share of {name}"] = times[name] / total
    return rows


SECTIONS: dict[str, Callable[[Workload], Rows]] = {
    "steps": steps,
    "memory": memory,
    "loop": loop,
    "loader": loader,
    "ranks": ranks,
    "start": start,
    "profile": profiled,
    "vocabulary": vocabulary,
    "entries": entries,
    "length": length,
}


def write(rows: Rows, *, minutes: float) -> None:
    """train.json, and the table; exit code 1 if a goal is missed."""
    size = f"{BATCH} x {TOKENS} tokens, {SUPERVISED} of each supervised, fp32"
    print(f"\nstudent of {LAYERS} layers, LoRA r={RANK}, {size}")
    print(f"{machine()}, {THREADS} threads; {minutes:.1f} minutes")
    print(versions("torch", "transformers", "peft", "deepspeed", "datasets", "pyarrow", "trl"))
    print("", *table(OUT, rows, GOALS), sep="\n")
    refuse_missed(rows, {name: goal for name, goal in GOALS.items() if name in rows})


if __name__ == "__main__":
    main()
