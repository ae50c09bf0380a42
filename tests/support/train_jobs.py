"""What the training tests run on every rank."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.engine_jobs import train_section
from support.tiny_student import write_dump
from torch.optim.optimizer import register_optimizer_step_pre_hook

from storage_schemas.common import extras, faults
from storage_schemas.common.errors import NeoError
from storage_schemas.stores.store import Store
from student_train.agreement import Agreement
from student_train.checkpoint import Checkpoints
from student_train.config import Resolved
from student_train.data.stream import Stream
from student_train.engine import join
from student_train.metrics import EVENTS, read_events
from student_train.saving import Saver
from student_train.train import train
from student_train.world import PeerError, World

Job = Mapping[str, Any]


def run_training(world: World, job: Job) -> dict[str, Any]:
    """One training: what it returned or raised, whether a checkpoint was incomplete when this rank left it, its events,
    and the state of its newest checkpoint.

    Of `job`: `dump`, `model`, `output`, `train`, `lora`, `loss`; `copy` begins with a copy of that run directory;
    `spoil` damages the run directory first; `hide` is a package that is not installed; `stop_after` asks to stop after
    so many steps, on the last rank; `stated` are settings of stage one; `grow` writes these units while it trains;
    `grows` and `shape` say which dump grows, if not `dump`, and how it is written;
    `arrive` is a dump that is copied to `dump` while it waits; `heldout` is the held-out dump, and `stop_evaluating`
    asks to stop in the middle of the evaluation after so many steps; `adapter` is what training begins from; `trust`
    runs the student's code; `quantization` is the student's; each file of a checkpoint takes `slow_saves` seconds to
    write, and the last step waits until all before are there; `fault` is one of the main rank, see `faults`; with
    `other_clock`, no checkpoint is ever due on the other ranks.
    """
    output = Path(job["output"])
    if world.main and job.get("copy"):
        shutil.copytree(job["copy"], output)
    if world.main and job.get("spoil"):
        spoil(output, job["spoil"])
    defaults = {"max_steps": 6, "epochs": 2, "save_steps": 4, "warmup_ratio": 0.2}
    settings = train_section(output, **(defaults | dict(job.get("train", {}))))
    asked = job.get("stop_after")

    order, reached = list[str](), 0

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(agreement: Agreement, stream: Stream, step: int) -> Any:
            nonlocal reached
            reached = step
            order.append(name)
            return method(agreement, stream, step)

        return noted

    def stop() -> bool:
        last = world.rank == world.world_size - 1
        while (
            job.get("slow_saves") and len(read_events(output / EVENTS)) == settings.max_steps - 1 and _unsaved(output)
        ):
            time.sleep(0.01)
        if "stop_evaluating" in job:
            # Between two micro-batches of the evaluation, the training events are written and this result is not.
            done = len(read_events(output / EVENTS))
            evaluated = len((output / EVENTS).read_text().splitlines()) - done if done else 0
            return last and done == job["stop_evaluating"] and evaluated == job["evaluated"]
        return asked is not None and last and reached >= asked

    if world.main and job.get("grow"):
        grown = output, Path(job.get("grows", job["dump"])), job["grow"], job.get("shape", {})
        threading.Thread(target=_grow, args=grown, daemon=True).start()
    if world.main and job.get("arrive"):
        threading.Thread(target=_arrive, args=(job["arrive"], Path(job["dump"])), daemon=True).start()
    result: dict[str, Any] = {"code": 0, "message": "", "summary": None}
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(extras, "installed", lambda name: name != job.get("hide")))
        _trouble(stack, job, main=world.main)
        for name in ("begin", "reach"):
            stack.enter_context(mock.patch.object(Agreement, name, noting(name, getattr(Agreement, name))))
        stack.callback(register_optimizer_step_pre_hook(lambda *_: order.append("update")).remove)
        try:
            config = Resolved(
                dump={"url": job["dump"]},
                student={
                    "model": job["model"],
                    "lora": {"r": 4, **job.get("lora", {})},
                    "adapter": job.get("adapter"),
                    "trust_remote_code": job.get("trust", False),
                    "quantization": job.get("quantization"),
                },
                loss=job.get("loss", {}),
                train=settings,
                stated=job.get("stated") or {},
                heldout={"url": job["heldout"]} if job.get("heldout") else None,
            )
            summary = train(world, config, stop=stop)
            result["summary"] = summary.model_dump(mode="json")
        except NeoError as error:
            result |= {"code": int(error.exit_code), "message": str(error), "peer": isinstance(error, PeerError)}
    result |= {"seconds": time.monotonic() - began, "unsaved": _unsaved(output)}
    result["order"] = [name for name, _ in groupby(order)]
    result["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if world.main:
        newest = Checkpoints(str(output / "checkpoints")).newest()
        result["events"] = read_events(output / EVENTS)
        result["step"] = newest.step if newest else None
        result["state"] = dict(newest.tensors(("master", "exp_avg", "exp_avg_sq"))) if newest else {}
    return result


def _trouble(stack: ExitStack, job: Job, *, main: bool) -> None:
    """What a job says of slow stores, faults and clocks."""
    put = Store.put_new

    def slow(store: Store, key: str, data: bytes) -> bool:
        won = put(store, key, data)
        time.sleep(job["slow_saves"])
        return won

    if job.get("slow_saves"):
        stack.enter_context(mock.patch.object(Store, "put_new", slow))
    if job.get("fault") and main:
        stack.enter_context(mock.patch.dict(os.environ, {"LLM_NEO_FAULT": job["fault"]}))
        stack.enter_context(mock.patch.dict(faults._passed, clear=True))
    if job.get("other_clock") and not main:
        stack.enter_context(mock.patch.object(Saver, "due", return_value=False))


def _unsaved(output: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not (step / "COMMIT.json").exists() for step in (output / "checkpoints").glob("step-*"))


def trainer(rank: int, world_size: int, rendezvous: str) -> Callable[..., dict[str, Any]]:
    """A rank that has met the others, and trains one job after the other."""
    torch.manual_seed(99 + rank)  # Nothing may depend on a rank's own random state.
    world = join(rank, world_size, rank, rendezvous=rendezvous)
    return lambda job: run_training(world, job)


def run_trainings(rank: int, world_size: int, rendezvous: str, *, jobs: list[Job]) -> list[dict[str, Any]]:
    """Several trainings, one after the other."""
    call = trainer(rank, world_size, rendezvous)
    return [call(job=job) for job in jobs]


def spoil(output: Path, how: str) -> None:
    """Damage a run directory: its newest checkpoint, or all of them."""
    steps = sorted((output / "checkpoints").iterdir())
    match how:
        case "flip newest":  # One bit of the weights.
            file = next(steps[-1].glob("*-master-*"))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "tear newest":
            file = next(steps[-1].glob("*-exp_avg-*"))
            file.write_bytes(file.read_bytes()[:-7])
        case "no commits":
            for step in steps:
                (step / "COMMIT.json").unlink()
        case "no checkpoints":
            shutil.rmtree(output / "checkpoints")
        case "empty final":
            for file in (output / "final").iterdir():
                file.unlink()
        case "change final":  # One bit of the weights.
            file = output / "final" / "adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 64
            file.write_bytes(data)
        case "no summary":  # Killed after the last checkpoint, while it wrote `final/`.
            (output / "summary.json").unlink()
            (output / "final" / "adapter_model.safetensors").write_bytes(b"half")


def _arrive(source: str, url: Path) -> None:
    time.sleep(1.5)
    staged = url.with_name(f".{url.name}")
    shutil.copytree(source, staged)
    staged.rename(url)


def _grow(output: Path, url: Path, units: tuple[range, ...], shape: Mapping[str, Any]) -> None:
    while not read_events(output / EVENTS):  # Until then the student is made, with the random numbers of this process.
        time.sleep(0.02)
    for part in units:
        time.sleep(0.8)
        write_dump(url, units=part, **shape)
