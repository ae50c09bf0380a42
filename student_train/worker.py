"""One rank of stage two: `python -m student_train.worker --config resolved.json`, as `llm-neo train` starts it.

The protocol with whoever starts it (`pipeline`, or torchrun by hand):

- `resolved.json` holds the sections `dump`, `student`, `loss` and `train`, complete and validated. RANK, WORLD_SIZE and
  LOCAL_RANK come from the environment, as torchrun sets them; nothing else in this package reads it. `--rendezvous`
  says where the ranks meet, by default where the environment says.
- All ranks leave with the same exit code. Each also leaves it, as text, in `<train.output>/exit/rank-<RANK>`: for the
  others, and because torchrun turns every failure into 1. Who starts the ranks empties that directory before.
- SIGTERM or SIGINT to any rank, or a file `<train.output>/exit/stop`: a checkpoint at the next step boundary, or at the
  one after it once the step's micro-batches are launched, and 75 on all.
- Errors are printed once, by the rank that met them, on standard error.
- A rank that fails where it cannot tell the others: see `storage_schemas/common/ranks.py`.
"""

import argparse
import logging
import os
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

from pydantic import ValidationError

from storage_schemas.common.devices import refuse_idle_gpus
from storage_schemas.common.errors import MismatchError, NeoError
from storage_schemas.common.exits import Exit
from storage_schemas.common.ranks import ExitCodes, end, failed
from storage_schemas.common.signals import stop_event
from student_train.config import Resolved
from student_train.run_directory import TRAINING, held

MEMORY = (
    "lower train.micro_batch_size (or micro_batch_tokens), set train.gradient_checkpointing, raise train.zero_stage, "
    "or use more GPUs; where much is reserved and not allocated, export "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; the last checkpoint is kept"
)
"""What to change when training runs out of memory."""


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
    stop = stop_event()
    place = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    try:
        with held(config.train.output, TRAINING) if rank == 0 else nullcontext():
            codes.clear()
            codes.watch()
            code = run(config, codes, **place, rendezvous=arguments.rendezvous, stop=stop)
            codes.write(code)
            return code
    except NeoError as error:  # Of the directory. If it is another training's, its exit codes are not ours to write.
        print(error, file=sys.stderr)
        return int(error.exit_code)


def read_config(path: Path) -> Resolved:
    """Read resolved.json. Raises MismatchError if it is missing or invalid."""
    try:
        return Resolved.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
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
    from student_train.engine import join
    from student_train.train import train
    from student_train.world import PeerError

    disable_progress_bar()

    def stopped() -> bool:
        return stop.is_set() or (rank == 0 and codes.stop_requested())

    try:
        if not cpu_is_meant and not torch.cuda.is_available():
            refuse_idle_gpus(os.environ, build=torch.__version__, fix="set DS_ACCELERATOR=cpu to train on the CPU")
        world = join(rank, world_size, local_rank, rendezvous=rendezvous)
        train(world, config, stop=stopped)
        world.close()
    except PeerError as error:
        return int(error.exit_code)
    except BaseException as error:
        return failed(error, codes, rank, memory=MEMORY)
    return int(Exit.DONE)


if __name__ == "__main__":
    end(main())
