"""One teacher held by several processes. Every forward pass is collective: process 0 leads, the others follow.

The leader is a worker like any other: it takes units, chooses and commits targets. What it sends through the teacher it
sends to the followers first, as JSON. Under tensor parallelism they run the same batch; under ZeRO-3 each runs its part
of it, and sends back the targets. They know nothing of the dump.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from packaging.version import Version
from pydantic import TypeAdapter
from safetensors.numpy import load, save
from transformers.distributed import DistributedConfig

from storage_schemas.common.errors import MismatchError, first_line
from storage_schemas.provenance import Recipe
from storage_schemas.rows import Row
from storage_schemas.targets import Targets, concatenate
from teacher_dump.config import TeacherSection
from teacher_dump.teachers.teacher import PendingTargets, Teacher, cuda_or_no_gpu, launch

_COLLECTIVE = timedelta(minutes=10)
"""How long a forward pass may take."""
_CONTROL = timedelta(days=7)
"""How long followers wait for the next batch: their leader may be tokenising a corpus or waiting for a store."""
LOAD = "load"
"""What the leader says when the weights are to be loaded; else it says which batch to run, or None: the end."""
_RECIPE = TypeAdapter(Recipe)
TENSOR_PARALLEL_FROM = Version("5.21")
"""The first transformers that spreads a teacher's layers and leaves its head whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This process among those that hold the teacher."""

    rank: int
    size: int
    local_rank: int
    on_gpu: bool
    control: dist.ProcessGroup
    """For what the leader sends."""
    answers: dist.ProcessGroup
    """For what it is sent: a group of its own, since another thread waits there."""

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
            if 0 < (gpus := torch.cuda.device_count()) <= local_rank:
                raise MismatchError(
                    "there are more processes than GPUs for them on this machine",
                    got=f"process {local_rank + 1}, {gpus} GPUs",
                    expected="one process per GPU",
                    fix=f"--nproc {gpus}, or make more GPUs visible",
                )
            torch.cuda.set_device(local_rank)
        os.environ["LOCAL_RANK"] = str(local_rank)  # transformers and DeepSpeed take it from here alone.
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_COLLECTIVE, init_method=rendezvous)
        control = dist.new_group(backend="gloo", timeout=_CONTROL)
        answers = dist.new_group(backend="gloo", timeout=_COLLECTIVE)
        return cls(rank=rank, size=size, local_rank=local_rank, on_gpu=on_gpu, control=control, answers=answers)

    @property
    def leads(self) -> bool:
        """Whether this process works on the dump."""
        return self.rank == 0

    def send(self, message: object) -> None:
        """Tell the followers, in JSON: what comes over a socket is not unpickled."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor(len(data)), src=0, group=self.control)
        dist.broadcast(data, src=0, group=self.control)

    def receive(self) -> Any:
        """Wait for what the leader says."""
        size = torch.zeros((), dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.control)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self.control)
        return json.loads(data.numpy().tobytes())

    def answer(self, data: bytes) -> None:
        """Send the leader what it waits for in `read_answer`."""
        dist.send(torch.tensor(len(data)), dst=0, group=self.answers)
        dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0, group=self.answers)

    def read_answer(self, rank: int) -> bytes:
        """Wait for the answer of another process."""
        size = torch.zeros((), dtype=torch.int64)
        dist.recv(size, src=rank, group=self.answers)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, src=rank, group=self.answers)
        return data.numpy().tobytes()

    def close(self) -> None:
        """Leave, when nothing is under way. Collective."""
        if self.leads:
            self.send(None)
        if self.on_gpu:
            torch.cuda.synchronize()
        dist.destroy_process_group()


class GroupTeacher(Teacher):
    """The same teacher, spread over the processes of a group."""

    def __init__(self, section: TeacherSection, group: Group) -> None:
        super().__init__(section)
        self.group = group
        self._answers = ThreadPoolExecutor(1, "answers")
        """Waits for the targets of a batch, and for those of the other processes, or sends them; in turn."""

    @property
    def ways(self) -> int:
        """Processes that share the samples of a batch.

        Under tensor parallelism each computes a share of every sample. Under ZeRO-3 all must run the same modules in
        the same order, in which weights are gathered; only transformers' own models are known to do so.
        """
        return self.group.size if self.section.sharding == "zero3" and not self.code else 1

    @property
    def devices(self) -> int:
        """How many devices it runs on."""
        return self.group.size

    def refuse_unloadable(self) -> None:
        """As `Teacher.refuse_unloadable`; and tensor parallelism deals whole attention heads.

        Raises:
            MismatchError: their number is no multiple of that of the processes, or transformers is too old.
        """
        super().refuse_unloadable()
        if self.section.sharding != "tensor":
            return
        if Version(installed := version("transformers")) < TENSOR_PARALLEL_FROM:
            raise MismatchError(
                "teacher.sharding: tensor needs a newer transformers",
                got=f"transformers {installed}",
                expected=f"{TENSOR_PARALLEL_FROM} or newer",
                fix=f"pip install 'transformers>={TENSOR_PARALLEL_FROM}', or set teacher.sharding: zero3",
            )
        named = ("num_attention_heads", "num_key_value_heads")
        found = {name: getattr(self.config.get_text_config(), name, None) for name in named}
        heads = {name: count for name, count in found.items() if isinstance(count, int)}
        if any(count % self.group.size for count in heads.values()):
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

    def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
        """As `Teacher.launch`, with every process of the group; in the others, what it returns waits for their part.

        Raises:
            MismatchError: the batch does not fit into a device's memory. It is not halved: the other processes may be
                in the middle of it.
        """
        _ = self.model
        if self.group.leads:
            plain = {
                "samples": [_plain(sample) for sample in samples],
                "recipe": _RECIPE.dump_python(recipe, mode="json"),
            }
            self.group.send(plain)
        try:
            return launch(self.model, samples, recipe) if self.ways == 1 else self._launch_part(samples, recipe)
        except torch.OutOfMemoryError as error:
            raise MismatchError(
                f"a batch does not fit into the memory of {self.device}",
                got=first_line(error),
                expected="room for teacher.batch_tokens tokens beside this process's share of the weights",
                fix="lower teacher.batch_tokens, or start more processes",
            ) from error

    def _launch_part(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
        parts = shares(samples, self.ways)
        # Who has no sample keeps the others company with one of theirs.
        mine = parts[self.group.rank]
        most = max(sum(len(sample.positions.tokens) for sample in part) for part in parts)
        pending = launch(self.model, mine or samples[-1:], recipe, least_tokens=most)

        def gathered() -> list[Targets | None]:
            found = pending()
            for rank in range(1, sum(map(bool, parts))):
                found += unpacked(self.group.read_answer(rank))
            return found

        def sent() -> list[Targets | None]:
            found = pending()
            if mine:
                self.group.answer(packed(found))
            return found

        return self._answers.submit(gathered if self.group.leads else sent).result

    def follow(self) -> None:
        """Run what the leader sends, until it has nothing more to send."""
        before: PendingTargets = list
        while (message := self.group.receive()) is not None:
            if message == LOAD:
                _ = self.model
                continue
            recipe = _RECIPE.validate_python(message["recipe"])
            after = self.launch([_sample(plain) for plain in message["samples"]], recipe)
            if self.ways > 1:
                before()
                before = after
        before()

    def load_model(self) -> Any:
        """This process's share of the weights. Collective."""
        if self.group.leads:
            self.group.send(LOAD)
        if self.section.sharding == "tensor":
            # Without tp_size, transformers takes the plan and spreads nothing.
            return self.read_weights(distributed_config=DistributedConfig(tp_size=self.group.size, tp_plan="auto"))
        from teacher_dump.teachers.zero3 import load_partitioned

        return load_partitioned(
            self.read_weights, dtype=self.section.dtype, offload=self.section.offload, on_gpu=self.group.on_gpu
        )


def shares(samples: Sequence[Row], ways: int) -> list[list[Row]]:
    """The part of each process, in order: as many samples, or one less."""
    return [[samples[place] for place in part] for part in np.array_split(np.arange(len(samples)), ways)]


def packed(found: Sequence[Targets | None]) -> bytes:
    """Targets of samples, for another process; nothing of it is unpickled there."""
    arrays = {"tokens": np.array([-1 if targets is None else len(targets) for targets in found])}
    if some := [targets for targets in found if targets is not None]:
        whole = concatenate(some)
        columns = {field.name: getattr(whole, field.name) for field in fields(Targets)}
        arrays |= {name: column for name, column in columns.items() if column is not None}
    return bytes(save(arrays))


def unpacked(data: bytes) -> list[Targets | None]:
    """What `packed` was given."""
    arrays = load(data)
    tokens = arrays.pop("tokens")
    stops = np.cumsum(np.maximum(tokens, 0))
    whole = Targets(**arrays) if arrays else None
    pairs = zip(tokens.tolist(), stops.tolist(), strict=True)
    return [None if whole is None or count < 0 else whole.slice(stop - count, stop) for count, stop in pairs]


def _plain(sample: Row) -> dict[str, Any]:
    plain = {name: getattr(sample, name) for name in ("sample_index", "sample_id", "status")}
    return plain | {"input_ids": sample.input_ids.tolist(), "loss_mask": sample.loss_mask.tolist()}


def _sample(plain: dict[str, Any]) -> Row:
    arrays = {"input_ids": np.array(plain["input_ids"], np.int32), "loss_mask": np.array(plain["loss_mask"], np.bool_)}
    return Row(**(plain | arrays))
