"""One teacher held by several processes. Every forward pass is collective: process 0 leads, the others follow.

The leader is a worker like any other: it takes units, chooses and commits targets. What it sends through the teacher it
sends to the followers first, and they run the same batch. They know nothing of the dump.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from storage_schemas.config import Estimator
from storage_schemas.errors import MismatchError
from storage_schemas.targets import Targets
from teacher_dump.config import TeacherSection
from teacher_dump.corpus import Sample
from teacher_dump.teacher import Teacher, cuda_or_no_gpu

_COLLECTIVE = timedelta(minutes=10)
"""How long a forward pass may take."""
_CONTROL = timedelta(days=7)
"""How long followers wait for the next batch: their leader may be tokenising a corpus or waiting for a store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This process among those that hold the teacher."""

    rank: int
    size: int
    local_rank: int
    on_gpu: bool
    control: dist.ProcessGroup

    @classmethod
    def join(cls, rank: int, size: int, local_rank: int, *, device: str, rendezvous: str = "env://") -> "Group":
        """Meet the others.

        Args:
            rank: 0 leads.
            size: number of processes.
            local_rank: rank among those of this machine, and number of the GPU.
            device: `teacher.device`.
            rendezvous: `env://` (torchrun) or `file://path`.
        """
        on_gpu = device.startswith("cuda") or (device == "auto" and cuda_or_no_gpu())
        if on_gpu:
            torch.cuda.set_device(local_rank)
        os.environ["LOCAL_RANK"] = str(local_rank)  # transformers and DeepSpeed take it from here alone.
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_COLLECTIVE, init_method=rendezvous)
        control = dist.new_group(backend="gloo", timeout=_CONTROL)
        return cls(rank=rank, size=size, local_rank=local_rank, on_gpu=on_gpu, control=control)

    @property
    def leads(self) -> bool:
        """Whether this process works on the dump."""
        return self.rank == 0

    def send(self, message: object) -> None:
        """Tell the followers."""
        dist.broadcast_object_list([message], src=0, group=self.control)

    def receive(self) -> Any:
        """Wait for what the leader says."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def close(self) -> None:
        """Leave. Collective."""
        if self.leads:
            self.send(None)
        dist.destroy_process_group()


class GroupTeacher(Teacher):
    """The same teacher, spread over the processes of a group."""

    def __init__(self, section: TeacherSection, group: Group) -> None:
        super().__init__(section)
        self.group = group

    @property
    def devices(self) -> int:
        """How many devices it runs on."""
        return self.group.size

    def refuse_unloadable(self) -> None:
        """As `Teacher.refuse_unloadable`; and tensor parallelism deals whole attention heads.

        Raises:
            MismatchError: their number is no multiple of that of the processes.
        """
        super().refuse_unloadable()
        named = ("num_attention_heads", "num_key_value_heads")
        found = {name: getattr(self.config.get_text_config(), name, None) for name in named}
        heads = {name: count for name, count in found.items() if isinstance(count, int)}
        if self.section.sharding == "tensor" and any(count % self.group.size for count in heads.values()):
            raise MismatchError(
                f"tensor parallelism cannot spread the teacher's attention heads over {self.group.size} processes",
                got=", ".join(f"{name} = {count}" for name, count in heads.items()),
                expected="multiples of the number of processes",
                fix="choose another --nproc, or teacher.sharding: zero3, which takes any",
            )

    @cached_property
    def device(self) -> torch.device:
        """Where this process's share runs."""
        return torch.device("cuda", self.group.local_rank) if self.group.on_gpu else torch.device("cpu")

    def targets(
        self,
        samples: Sequence[Sample],
        *,
        estimator: Estimator,
        temperatures: Sequence[float],
        logsumexp: bool,
        masked_from: int | None = None,
    ) -> list[Targets | None]:
        """As `Teacher.targets`, with every process of the group.

        Raises:
            MismatchError: the batch does not fit into a device's memory. It is not halved: the other processes may be
                in the middle of it.
        """
        _ = self.model
        call: dict[str, Any] = {"estimator": estimator, "temperatures": temperatures, "logsumexp": logsumexp}
        call["masked_from"] = masked_from
        if self.group.leads:
            self.group.send((samples, call))
        try:
            return self.compute(samples, **call)
        except torch.OutOfMemoryError as error:
            raise MismatchError(
                f"a batch does not fit into the memory of {self.device}",
                got=str(error).strip().splitlines()[0],
                expected="room for teacher.batch_tokens tokens beside this process's share of the weights",
                fix="lower teacher.batch_tokens, or start more processes",
            ) from error

    def follow(self) -> None:
        """Run what the leader sends, until it has nothing more to send."""
        while (message := self.group.receive()) is not None:
            samples, call = message
            if samples:
                self.targets(samples, **call)
            else:
                _ = self.model

    def load_model(self) -> Any:
        """This process's share of the weights. Collective."""
        if self.group.leads:
            self.group.send(((), {}))
        if self.section.sharding == "tensor":
            # Without tp_size, transformers takes the plan and spreads nothing.
            return self.read_weights(distributed_config=DistributedConfig(tp_size=self.group.size, tp_plan="auto"))
        from teacher_dump.zero_inference import load_partitioned

        return load_partitioned(
            self.read_weights, dtype=self.section.dtype, offload=self.section.offload, on_gpu=self.group.on_gpu
        )
