"""The only module that knows DeepSpeed: one optimizer step, and the training state in a form free of world size.

Gradients are divided once, by the supervised tokens of the global batch. Master weights and Adam moments go in and
out as whole fp32 tensors, whatever the ZeRO stage and the number of ranks they are spread over.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

# DeepSpeed looks for accelerators of every maker unless told; a machine without CUDA is a CPU to us.
import torch

os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.logits import compile_layers
from student_train import world as worlds
from student_train.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, exactly
from student_train.config import LossSection, TrainSection
from student_train.data.batch import TrainBatch
from student_train.metrics import Part
from student_train.model.attention import looking_for_packed_samples
from student_train.model.head import SUMS
from student_train.model.student import DTYPES, Distilled, causal_of
from student_train.optimizer import ClippedAdamW, adamw
from student_train.underway import Underway
from student_train.world import World
from student_train.zero import deepspeed_config, monitors, sized

GATHERED = 2**24
"""Values of small weights that one collective brings: 64 MiB in fp32. Larger weights go alone."""


class StepResult(NamedTuple):
    """Sums over the supervised tokens of the global batch, the same on every rank."""

    loss: float
    """(1 - alpha) * CE + alpha * T^2 * D, and the coefficient times `router_aux`."""
    router_aux: float
    """Of a mixture of experts with such a loss, see `RouterLoss`; else 0."""
    grad_norm: float
    """Of the mean loss, before clipping."""
    parts: list[Part]
    """Of each dump; none of a step without supervised tokens."""


def join(rank: int, world_size: int, local_rank: int, *, rendezvous: str = "env://") -> World:
    """Meet the other ranks, and let DeepSpeed use the group: gloo on CPUs, NCCL on CUDA devices."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() == "cuda"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        accelerator.set_device(local_rank)
    else:
        # A shared-memory all-reduce that only inference uses; building it takes a compiler and a minute.
        deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes it from here alone.
    world = worlds.join(rank, world_size, local_rank, device=device, rendezvous=rendezvous)
    deepspeed.init_distributed(accelerator.communication_backend_name(), auto_mpi_discovery=False, verbose=False)
    return world


class Engine:
    """A student under DeepSpeed."""

    def __init__(self, module: Distilled, train: TrainSection, world: World) -> None:
        """Hand the module to DeepSpeed, which casts it to the precision and shards it. Collective.

        In bf16 the working copy of an adapter is rounded to bf16, and its fp32 master starts from that rounded copy;
        from the first update on, the master keeps what bf16 would lose. All ranks bring the same weights.

        Raises:
            MismatchError: `train.deepspeed` is not what DeepSpeed takes. PeerError on the other ranks.
        """
        sizes = {name: _numel(parameter) for name, parameter in module.trained()}
        config = sized(deepspeed_config(train), train, sizes)
        self.monitors: dict[str, Callable[[], Any]] = {}
        """DeepSpeed's own monitors, to be opened by the rank that reports: name -> how."""
        self._world, self._stage = world, train.zero_stage
        self.module = module
        """The student; under ZeRO-3 its weights are spread over the ranks, and every forward is collective."""
        self._trained = module.trained()
        if train.compile:
            torch._dynamo.config.recompile_limit = 64  # Kinds of layers, fillers, with gradients or without.
            compile_layers(causal_of(module.student), partial(torch.compile, dynamic=True), role="train")
        adam = adamw(self._trained, train)
        if isinstance(adam, ClippedAdamW):
            config["gradient_clipping"], adam.max_grad_norm = 0.0, train.max_grad_norm
        try:
            for name, section in monitors(train.deepspeed).items():
                self.monitors[name] = partial(MonitorMaster, DeepSpeedMonitorConfig(**{name: section}))
            if train.zero_stage == 3:
                _partition(module, config, world.device, DTYPES[train.precision])
            self._engine: Any = deepspeed.initialize(model=module, optimizer=adam, config=config)[0]
        except (ValidationError, DeepSpeedConfigError) as error:
            world.raise_on_all(_not_taken(error))
        if train.zero_stage == 3:
            module.head.gather = _gather
        self._norm: Underway | None = None
        if train.zero_stage:
            self._inner().register_step_pre_hook(self._ask_norm)
        self.updates = 0
        """Optimizer updates of these weights so far, in other runs too; Adam's step count."""

    def step(
        self,
        batches: Sequence[TrainBatch],
        *,
        tokens: int,
        learning_rate: float,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """One optimizer step over the global batch. Collective; every rank brings the same number of micro-batches.

        `tokens` are the supervised tokens of the global batch; `meanwhile` is called while a device computes their
        gradient, if there are any.

        Raises:
            DataError: the loss or the gradient is not finite; the weights are untouched.
        """
        if not tokens:
            return StepResult(0, 0, 0, [])
        sums = self._accumulate(batches, tokens)
        for group in self._inner().param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        meanwhile()
        self._norm = None
        self._engine.step()
        # DeepSpeed has waited for the gradient, so all that is read here is there; the update is still to be done.
        *each, loss, router_aux = sums.read()
        if not self._engine.was_step_applied():
            raise _not_finite("gradient" if all(map(math.isfinite, (loss, *each))) else "loss")
        if not self.updates:
            self._link_moments()
        self.updates += 1
        (norm,) = self._norm.read() if self._norm else [float(self._engine.get_global_grad_norm())]
        dumps = len(self.module.head.losses)
        parts = [Part(int(each[dump]), *each[dumps + dump * SUMS :][:3]) for dump in range(dumps)]
        return StepResult(loss, router_aux, norm, parts)

    @torch.no_grad()
    def evaluate(self, batch: TrainBatch, *, temperature: float) -> Underway:
        """The sums of `HeadLoss`, with the forward KL, over a micro-batch. Collective under ZeRO-3.

        Args:
            batch: with targets, or a filler.
            temperature: that its targets were decoded at.
        """
        self.module.eval()
        trained_on, self.module.head.losses = self.module.head.losses, (LossSection(temperature=temperature),)
        try:
            sums = self.module(batch.to(self._world.device, non_blocking=True))[1]
        finally:
            self.module.head.losses = trained_on
        return Underway(sums)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Training state as whole fp32 tensors, one at a time: (`kind/name`, tensor). Collective: exhaust it.

        On the main rank they are copies on the host; the others, which write nothing, have them on their device, at
        stage 0 the live ones.
        """
        for kind in self._kinds:
            for name, _, whole in self._wholes(kind):
                whole = whole.detach()
                yield f"{kind}/{name}", whole.to("cpu", torch.float32, copy=True) if self._world.main else whole

    @property
    def export_bytes(self) -> int:
        """Of all that `export` gives."""
        return 4 * len(self._kinds) * sum(_numel(parameter) for _, parameter in self._trained)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return (MASTER, EXP_AVG, EXP_AVG_SQ) if self.updates else (MASTER,)

    def restore(self, tensors: Iterable[tuple[str, Tensor]], *, updates: int) -> None:
        """Set what `export` gave, at any world size and ZeRO stage.

        The weights must have been loaded into the module before it was handed to this engine: only masters and
        moments are set here.

        Raises:
            DataError: it is not one tensor of each kind for each trained parameter.
        """
        self.updates = updates
        self._engine.global_steps = updates
        self._make_moments(updates)
        parameters = dict(self._trained)
        # Under ZeRO-3 a parameter's own shape is that of what this rank holds: none.
        shapes = {
            f"{kind}/{name}": getattr(p, "ds_shape", p.shape) for kind in self._kinds for name, p in self._trained
        }
        for key, value in exactly(tensors, shapes):
            kind, name = key.split("/", 1)
            self._set(kind, parameters[name], value.to(self._world.device))

    def stray(self) -> list[str]:
        """Trained parameters whose working copy is not their fp32 master, rounded once. Collective."""
        found = []
        for name, parameter, master in self._wholes(MASTER):
            with _gather([parameter]) if self._stage == 3 else nullcontext():
                if not torch.equal(parameter.detach(), master.to(parameter.device, parameter.dtype)):
                    found.append(name)
        return found

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self._engine.destroy()

    def _accumulate(self, batches: Sequence[TrainBatch], tokens: int) -> Underway:
        """Gradients of the mean loss per token. Over all ranks, supervised tokens of each dump, its sums of `HeadLoss`,
        and those of loss and routers."""
        dumps = len(self.module.head.losses)
        sums = torch.zeros(dumps * (1 + SUMS) + 2, dtype=torch.float64, device=self._world.device)
        for dump in range(dumps):
            sums[dump] = sum(len(batch.parts[dump]) for batch in batches)
        self.module.train()
        # With gradient checkpointing the layers run in the backward pass, too.
        with looking_for_packed_samples(self.module.packed):
            for batch in batches:
                loss, parts = self._engine(batch=batch.to(self._world.device, non_blocking=True))
                sums[dumps:] += parts
                # DeepSpeed averages over ranks: the factor makes it a sum, and the division is by tokens alone. A step
                # whose gradient is not finite is dropped: where a sum is not, neither must that be (0 * inf is NaN).
                factor = 0 * parts.sum().to(loss.dtype) + self._world.world_size / tokens
                self._engine.backward(loss * factor, scale_wrt_gas=False)
        torch.distributed.all_reduce(sums, group=self._engine.data_parallel_group)
        return Underway(sums)

    def _ask_norm(self, *_: object) -> None:
        """Ask for the gradient's norm before the first part of the update is launched."""
        self._norm = self._norm or Underway(self._engine.optimizer._global_grad_norm)

    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW inside DeepSpeed's wrapper."""
        inner: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return inner

    def _wholes(self, kind: str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """All of each master or moment, with the parameter's name and itself; at stage 0 the live tensors.

        Collective: exhaust it.
        """
        for several in _groups(self._trained):
            wholes = self._gathered(kind, [parameter for _, parameter in several])
            for (name, parameter), whole in zip(several, wholes, strict=True):
                yield name, parameter, whole

    @torch.no_grad()
    def _gathered(self, kind: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """All of a master or moment of each parameter, in one collective; at stage 0 in none."""
        if not self._stage:
            return [self._live(kind, parameter) for parameter in parameters]
        if self._stage == 3:
            local = [
                safe_get_local_fp32_param(p) if kind == MASTER else safe_get_local_optimizer_state(p, kind)
                for p in parameters
            ]
            mine = torch.cat(local)
            everyone = mine.new_empty(self._world.world_size * len(mine))
            torch.distributed.all_gather_into_tensor(everyone, mine, group=self._engine.data_parallel_group)
            shares = torch.split(everyone.view(self._world.world_size, -1), [len(share) for share in local], dim=1)
            # The last rank's share is filled up.
            return [
                share.flatten()[: _numel(parameter)].view(parameter.ds_shape)  # type: ignore[attr-defined]
                for share, parameter in zip(shares, parameters, strict=True)
            ]
        # The sum over ranks of what each holds, as DeepSpeed does it for one weight at a time.
        sums = torch.zeros(sum(map(_numel, parameters)), dtype=torch.float32, device=self._world.device)
        parts = torch.split(sums, [_numel(parameter) for parameter in parameters])
        for part, parameter in zip(parts, parameters, strict=True):
            if (held := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                at = held.lp_fragment_address
                part[at.start :][: at.numel] = held.get_hp_fragment(None if kind == MASTER else kind)
        torch.distributed.all_reduce(sums, group=self._engine.data_parallel_group)
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]

    def _live(self, kind: str, parameter: nn.Parameter) -> Tensor:
        """A master or moment at stage 0."""
        live: Tensor = parameter.data if kind == MASTER else self._inner().state[parameter][kind]
        return live

    def _set(self, kind: str, parameter: nn.Parameter, value: Tensor) -> None:
        if not self._stage:
            self._live(kind, parameter).copy_(value)
        elif self._stage == 3:
            # The setters for whole tensors fail on the last rank where the size is not a multiple of the world size.
            share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = nn.functional.pad(value.flatten(), (0, share * self._world.world_size - value.numel()))
            mine = flat[share * self._world.rank :][:share].clone()
            if kind == MASTER:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, kind)
        elif kind == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _make_moments(self, updates: int) -> None:
        """Create Adam's state, which does not exist before the first update and cannot be set until it does."""
        if not updates:
            return
        inner = self._inner()
        flats = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)
        for flat in flats or [p for group in inner.param_groups for p in group["params"]]:
            inner.state[flat] = {
                "step": torch.tensor(float(updates), device=flat.device),
                EXP_AVG: torch.zeros_like(flat, dtype=torch.float32),
                EXP_AVG_SQ: torch.zeros_like(flat, dtype=torch.float32),
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let ZeRO-1 and 2 find the moments of each parameter: DeepSpeed looks for them when the first group has been
        updated for the first time, and then the others have none yet."""
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def load_weights(module: Distilled, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy fp32 masters into the module's working weights, before an Engine is made of it.

    Raises:
        DataError: it is not one tensor for each trained parameter.
    """
    parameters = {f"{MASTER}/{name}": p for name, p in module.trained()}
    masters = ((key, value) for key, value in tensors if key.startswith(f"{MASTER}/"))
    for key, value in exactly(masters, {key: p.shape for key, p in parameters.items()}):
        parameters[key].data.copy_(value)


def _partition(module: nn.Module, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Cast and spread one weight after the other: DeepSpeed would have the whole module on each device first. What is
    spread already it does not move, so buffers are moved here."""

    class OneByOne(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            for parameter in module.parameters(recurse):
                parameter.data = parameter.data.to(device, dtype)
                yield parameter

    deepspeed.zero.Init(module=OneByOne(), config_dict_or_path=deepcopy(config), dtype=dtype)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _groups(trained: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Neighbours whose values are `GATHERED` at most, or one weight of more."""
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in trained:
        if group and size + _numel(parameter) > GATHERED:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += _numel(parameter)
    if group:
        yield group


def _numel(parameter: nn.Parameter) -> int:
    """Values of all of a weight: under ZeRO-3 it holds none itself."""
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel


def _gather(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
    return gathered


def _not_taken(error: Exception) -> MismatchError:
    return MismatchError(
        "DeepSpeed does not take its configuration",
        got=str(error)[:1000],
        expected="keys and values of DeepSpeed's configuration",
        fix="correct train.deepspeed",
    )


def _not_finite(what: str) -> DataError:
    return DataError(
        f"the {what} is not finite; the step was not applied",
        got="NaN or infinity",
        expected="a finite number on every rank",
        fix="lower train.learning_rate or train.max_grad_norm, or use fp32; the last checkpoint is intact, and goes on "
        "under these settings with train.extend: true",
    )
