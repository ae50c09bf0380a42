"""The ranks of a job, and the few numbers they exchange for each step so that they go on, or leave, together.

All of this runs on its own gloo group, beside whatever DeepSpeed does: a rank that has met an error says so here
instead of staying away from the next collective, where the others would wait for it.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from storage_schemas.common.errors import NeoError, exit_code
from storage_schemas.common.exits import Exit

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take. Ranks whose peer has died leave much earlier, see `student_train.worker`."""
MEETING_SECONDS = 20.0
"""After which a rank says that it waits for the others: a node has not come, or a firewall keeps the port."""
CONTROL_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other between steps: one of them may be writing a large model."""


class PeerError(NeoError):
    """Another rank has met an error and has printed it; this rank leaves with the same exit code."""

    def __init__(self, rank: int, code: int) -> None:
        self.exit_code = Exit(code)
        super().__init__(f"rank {rank} has stopped with exit code {code}; its message says why")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the processes of the job."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank. Collective; float64, so that integers are exact up to 2^53."""
        return self.ask(values)()

    def ask(self, values: Sequence[float]) -> Callable[[], list[list[float]]]:
        """As `gather`, but it does not wait for the others: calling what it gives does. Collective."""
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        asked = dist.all_gather(everyone, mine, group=self.control, async_op=True)

        def told() -> list[list[float]]:
            asked.wait()
            return [one.tolist() for one in everyone]

        return told

    def spread(self, tensor: torch.Tensor, owner: int) -> None:
        """Give all ranks, in place, what one of them has of a tensor in the host's memory. Collective."""
        dist.broadcast(tensor, src=owner, group=self.control)

    def leave_together(self, codes: Sequence[float], error: BaseException | None) -> None:
        """Raise on every rank if any has an error: its own on the lowest such rank, PeerError elsewhere.

        `codes` are the exit codes of all ranks, 0 where all is well; the result of a `gather`.
        """
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return
        if failed[0] == self.rank:
            assert error is not None
            raise error
        raise PeerError(failed[0], int(codes[failed[0]])) from error

    def raise_on_all(self, error: NeoError) -> NoReturn:
        """Raise what all ranks have found at once: the error itself on the main rank, PeerError elsewhere."""
        raise error if self.main else PeerError(0, error.exit_code)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on one, raise on all. Collective; `work` itself must not be."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        self.leave_together([vote[0] for vote in self.gather([exit_code(error)])], error)
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on the main rank alone; if it fails, raise on all. Collective; `work` itself must not be."""
        return self.together(lambda: work() if self.main else None)

    def told(self, work: Callable[[], float]) -> float:
        """What `work` finds on the main rank, on every rank. Collective; `work` itself must not be."""
        return self.gather([self.on_main(work) or 0.0])[0][0]

    def close(self) -> None:
        """Leave the job. Collective."""
        dist.barrier(group=self.control)
        dist.destroy_process_group()


def _tell_waiting(rank: int, world_size: int) -> None:
    what = f"rank {rank} of {world_size} still waits for the others, {COLLECTIVE_TIMEOUT.total_seconds():.0f} s at most"
    sys.stderr.write(f"llm-neo: {what}: a node has not come, or a firewall keeps the first one's port\n")


def join(rank: int, world_size: int, local_rank: int, *, device: torch.device, rendezvous: str) -> World:
    """Meet the other ranks at `env://` (several nodes, torchrun), `tcp://host:port` or `file://path`.

    A single rank meets nobody, and needs no port.
    """
    meeting = threading.Timer(MEETING_SECONDS, _tell_waiting, (rank, world_size))
    meeting.daemon = True
    if local_rank == 0:
        meeting.start()
    # DeepSpeed makes groups without naming a timeout; they take this default and not that of the first group.
    distributed_c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        **({"store": dist.HashStore()} if world_size == 1 else {"init_method": rendezvous}),  # type: ignore[attr-defined]
    )
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    meeting.cancel()
    return World(rank=rank, world_size=world_size, device=device, control=control)
