"""One rank of stage two: `python -m student_train.worker --config resolved.json`, as `llm-neo train` starts it.

The protocol with whoever starts it (`pipeline`, or torchrun by hand):

- `resolved.json` holds the sections `dump`, `student`, `loss` and `train`, complete and validated. RANK, WORLD_SIZE and
  LOCAL_RANK come from the environment, as torchrun sets them; nothing else in this package reads it. `--rendezvous`
  says where the ranks meet, by default where the environment says.
- All ranks leave with the same exit code. Each also leaves it, as text, in `<train.output>/exit/rank-<RANK>`: for the
  others, and because torchrun turns every failure into 1. Who starts the ranks empties that directory before.
- SIGTERM or SIGINT to any rank, or a file `<train.output>/exit/stop`: a checkpoint at the next step boundary, and 75 on
  all.
- Errors are printed once, by the rank that met them, on standard error.

A rank that fails between two agreements (out of memory, killed) cannot tell the others, who may wait for it in a
collective. They see its file, or their connection to it breaks; then they leave with its code, within half a minute.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage_schemas.config import DumpSection
from storage_schemas.devices import refuse_idle_gpus
from storage_schemas.errors import Exit, MismatchError, NeoError, TemporaryError, explained
from storage_schemas.publish import publish
from storage_schemas.section import Section
from student_train.config import LossSection, StudentSection, TrainSection
from student_train.directory import TRAINING, held

EXIT_FOLDER, STOP = "exit", "stop"
GRACE_SECONDS = 15.0
"""How long a rank may go on once another one has left with an error."""
LOST_SECONDS = 5.0
"""How long a rank whose collective broke looks for the reason that another one gives."""
MEMORY = (
    "lower train.micro_batch_size, set train.gradient_checkpointing, raise train.zero_stage, or use more GPUs; "
    "the last checkpoint is kept"
)
"""What to change when training runs out of memory."""
LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "remote process")
"""What the errors of a collective say when another rank is gone."""


class Resolved(Section):
    """resolved.json."""

    dump: DumpSection
    student: StudentSection
    loss: LossSection
    train: TrainSection
    stated: dict[str, Any] = {}
    """Settings of stage one that the configuration names, see `train.train`."""


class ExitCodes:
    """The exit codes of all ranks, as files in the run directory."""

    def __init__(self, output: Path, rank: int, world_size: int) -> None:
        self._folder, self._rank, self._world_size = output / EXIT_FOLDER, rank, world_size

    def clear(self) -> None:
        """Forget what the last start left here, if who started this one has not done so."""
        (self._folder / f"rank-{self._rank}").unlink(missing_ok=True)

    def write(self, code: int) -> None:
        """Leave this rank's code; a disk that is full cannot be helped here."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            publish(self._folder / f"rank-{self._rank}", f"{code}\n")
        except OSError as error:
            print(f"cannot write {self._folder}: {error}", file=sys.stderr)

    def of_others(self) -> int:
        """The code of the lowest other rank that has failed; 0 if none has."""
        others = set(range(self._world_size)) - {self._rank}
        codes = read_codes(self._folder.parent)
        return next((code for rank, code in sorted(codes.items()) if code and rank in others), 0)

    def stop_requested(self) -> bool:
        """Whether somebody asks for a checkpoint and an end."""
        return (self._folder / STOP).exists()


def read_codes(output: Path) -> dict[int, int]:
    """Rank -> exit code, of the ranks that have left."""
    folder = output / EXIT_FOLDER
    found = {}
    for file in folder.glob("rank-*") if folder.is_dir() else ():
        rank = file.name.removeprefix("rank-")
        if rank.isdecimal():
            found[int(rank)] = int(file.read_text(encoding="ascii"))
    return found


def main(argv: list[str] | None = None) -> int:
    """Train as one rank; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m student_train.worker")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--rendezvous", default="env://")
    arguments = parser.parse_args(argv)
    path: Path = arguments.config
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "torch", "transformers", "accelerate", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Deprecations inside torch and transformers are not the user's business.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        config = read_config(path)
    except NeoError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return int(error.exit_code)
    codes = ExitCodes(config.train.output, rank, world_size)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    place = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    try:
        with held(config.train.output, TRAINING) if rank == 0 else nullcontext():
            codes.clear()
            threading.Thread(target=leave_with_others, args=(codes,), daemon=True, name="watchdog").start()
            code = run(config, codes, **place, rendezvous=arguments.rendezvous, stop=stop)
            codes.write(code)
            return code
    except NeoError as error:  # Of the directory. If it is another training's, its exit codes are not ours to write.
        print(error, file=sys.stderr)
        return int(error.exit_code)


def read_config(path: Path) -> Resolved:
    """Read resolved.json.

    Raises:
        MismatchError: missing or invalid.
    """
    try:
        return Resolved.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        raise MismatchError(
            f"{path} is not a resolved configuration",
            got=str(error)[:1000],
            expected="a JSON object with the sections dump, student, loss and train",
            fix="start training with `llm-neo train`",
        ) from error


def run(
    config: Resolved,
    codes: ExitCodes,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    rendezvous: str,
    stop: threading.Event,
) -> int:
    """Train; an error becomes an exit code, and is printed by the rank that it belongs to."""
    # Here, so that a wrong configuration is told in an instant.
    import torch
    from transformers.utils.logging import disable_progress_bar

    cpu_is_meant = os.environ.get("DS_ACCELERATOR") == "cpu"  # The engine chooses where nobody has.
    from student_train.train import train
    from student_train.world import PeerError

    disable_progress_bar()

    def stopped() -> bool:
        return stop.is_set() or (rank == 0 and codes.stop_requested())

    try:
        if not cpu_is_meant and not torch.cuda.is_available():
            refuse_idle_gpus(os.environ, build=torch.__version__, fix="set DS_ACCELERATOR=cpu to train on the CPU")
        train(
            config.dump,
            config.student,
            config.loss,
            config.train,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            rendezvous=rendezvous,
            stop=stopped,
            stated=config.stated,
        )
    except PeerError as error:
        return int(error.exit_code)
    except BaseException as error:
        return failed(error, codes, rank, memory=MEMORY)
    return int(Exit.DONE)


def failed(error: BaseException, codes: ExitCodes, rank: int, *, memory: str) -> int:
    """Say what ended this rank; the code is another rank's if this error is but its echo, 70 if it is nobody's.

    Args:
        error: what ended it.
        codes: of all ranks.
        rank: this one.
        memory: what to change when memory runs out.
    """
    told = explained(error, memory=memory)
    if told is not None:
        print(f"llm-neo: {told}", file=sys.stderr)
        return int(told.exit_code)
    lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
    deadline = time.monotonic() + LOST_SECONDS
    while lost and time.monotonic() < deadline:
        if code := codes.of_others():
            return code
        time.sleep(0.1)
    if lost:
        gone = TemporaryError(
            f"rank {rank} has lost another rank",
            got=str(error).splitlines()[0][:300],
            expected="all ranks to be there",
            fix="look for what ended it (out of memory? a lost node?), then run the same command again",
        )
        print(gone, file=sys.stderr)
        return int(gone.exit_code)
    traceback.print_exception(error)
    return int(Exit.BUG)


def leave_with_others(codes: ExitCodes) -> None:
    """End this process if another rank has failed and this one does not get to know: it waits in a collective."""
    seen: float | None = None
    while True:
        time.sleep(1.0)
        code = codes.of_others()
        seen = (seen or time.monotonic()) if code else None
        if seen is not None and time.monotonic() - seen > GRACE_SECONDS:
            codes.write(code)
            end(code)


def end(code: int) -> Any:
    """Leave at once, whatever other threads and collectives are in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
