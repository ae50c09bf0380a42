"""The DeepSpeed configuration of a run: a preset per ZeRO stage, under what the user gives for DeepSpeed itself."""

from collections.abc import Collection, Mapping
from typing import Any

from storage_schemas.canonical import leaves
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.suggest import did_you_mean
from student_train.config import TrainSection

AUTO = "auto"
"""What configurations for transformers' Trainer say where it shall decide; here it is as if the key were not there."""

MONITORS = ("csv_monitor", "tensorboard", "wandb")
"""Sections of DeepSpeed that say where a run's events go as well, see `metrics.reporting`."""

TUNABLE = (
    *MONITORS,
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
)
"""Top-level keys of DeepSpeed that change speed, memory or logs, and that nothing here decides."""

OURS = {
    "activation_checkpointing": "train.gradient_checkpointing",
    "amp": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate, weight_decay and adam_*",
    "scheduler": "train.lr_scheduler_type and warmup_ratio",
}
"""Top-level keys of DeepSpeed for what has a place of its own in the configuration."""

WHOLE = 2**22
"""Values of a weight that ZeRO-3 keeps on every GPU, at most."""


def deepspeed_config(train: TrainSection) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the preset of the ZeRO stage, overridden by `train.deepspeed`.

    The optimizer is not part of it; it is handed over as an object.

    Raises:
        MismatchError: `train.deepspeed` contradicts the train section, or holds a key that has no effect here.
    """
    claims = _claims(train)
    known = {path.split(".")[0] for path in claims} | {*TUNABLE}
    _refuse_unknown(train.deepspeed, known)
    _refuse_impossible(train)
    for path, value in leaves(train.deepspeed):
        claimed, field = claims.get(path, (value, ""))
        if value not in (claimed, AUTO):
            raise MismatchError(
                f"train.deepspeed.{path} contradicts {field}",
                got=f"train.deepspeed.{path} = {value!r}",
                expected=f"{claimed!r}, from {field}",
                fix=f"remove train.deepspeed.{path}",
            )
    given = {key: value for key, value in train.deepspeed.items() if key in known - {*MONITORS}}
    config = _merge(_preset(train), given)
    for path, (value, _) in claims.items():
        _set(config, path, value)
    # DeepSpeed would insist on micro-batch size * world size, which the global batch need not be a multiple of.
    del config["train_batch_size"]
    return config


def _refuse_impossible(train: TrainSection) -> None:
    """Refuse what DeepSpeed would meet with an assertion, or with gradients that are coarser than asked for."""
    given = dict(leaves(train.deepspeed))
    overlap, ratio = "zero_optimization.overlap_comm", "zero_optimization.offload_optimizer.ratio"
    allowed = (None, AUTO, "fp32", *(["bf16"] if train.precision == "bf16" else []))
    for dtype in ("data_types.grad_accum_dtype", "communication_data_type"):
        if given.get(dtype) not in allowed:
            raise MismatchError(
                f"train.deepspeed.{dtype} does not go with train.precision {train.precision}",
                got=given[dtype],
                expected="fp32, or with train.precision bf16 also bf16",
                fix=f"remove train.deepspeed.{dtype}",
            )
    if given.get(overlap) is True and train.zero_stage < 2:
        raise MismatchError(
            f"train.deepspeed.{overlap} needs ZeRO stage 2 or 3: below, gradients are reduced once per step",
            got=f"train.zero_stage = {train.zero_stage}",
            expected="train.zero_stage = 2 or 3",
            fix=f"remove train.deepspeed.{overlap}, or raise train.zero_stage",
        )
    zero = train.deepspeed.get("zero_optimization")
    needing = {"zero_optimization.zenflow": zero.get("zenflow") if isinstance(zero, Mapping) else None}
    if train.zero_stage == 3 and given.get(ratio) != 1:
        needing[ratio] = given.get(ratio)
    for path, value in needing.items():
        if value not in (None, AUTO):
            raise MismatchError(
                f"train.deepspeed.{path} needs an optimizer of DeepSpeed's own",
                got=f"train.deepspeed.{path} = {value!r}",
                expected="what goes with the AdamW of train.adam_*, whose state is in one place",
                fix=f"remove train.deepspeed.{path}",
            )


def monitors(deepspeed: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The monitors that `train.deepspeed` switches on: name -> its section."""
    sections = {name: deepspeed[name] for name in MONITORS if isinstance(deepspeed.get(name), Mapping)}
    return {name: section for name, section in sections.items() if section.get("enabled") is True}


def _claims(train: TrainSection) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed key -> (value, who decides it)."""
    norm = "the normalisation by global tokens"
    micro_batch = "micro_batch_tokens" if train.micro_batch_tokens else "micro_batch_size"
    return {
        "train_micro_batch_size_per_gpu": (train.micro_batch.samples, f"train.{micro_batch}"),
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "gradient_accumulation_steps": (1, norm),
        # Every step() is a boundary, so that the number of micro-batches follows from the world size.
        "managed_gradient_accumulation": (False, norm),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "zero_optimization.stage": (train.zero_stage, "train.zero_stage"),
        "zero_optimization.compute_grad_norm": (True, "the logged gradient norm"),
        "bf16.enabled": (train.precision == "bf16", "train.precision"),
        "bf16.check_grad_overflow": (train.precision == "bf16", "the refusal of non-finite gradients"),
        "bf16.bf16_master_weights_and_grads": (False, "the promise that master weights are fp32"),
        "bf16.bf16_optimizer_states": (False, "the promise that moments are fp32"),
        "zero_allow_untested_optimizer": (True, "train.adam_*"),
        "zero_force_ds_cpu_optimizer": (False, "train.adam_*"),
    }


def _preset(train: TrainSection) -> dict[str, Any]:
    zero: dict[str, Any] = {"contiguous_gradients": True}
    preset: dict[str, Any] = {"zero_optimization": zero if train.zero_stage else {}, "steps_per_print": None}
    # DeepSpeed's clock waits for the device before each micro-batch and after each step.
    preset["timers"] = {"throughput": {"enabled": False}}
    if train.precision == "bf16":
        # Micro-batches add up: in bf16, whose steps are 2^-8 of the sum, small terms would be lost.
        preset["data_types"] = {"grad_accum_dtype": "fp32"}
    return preset


def sized(config: Mapping[str, Any], train: TrainSection, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the sizes of ZeRO's buffers that follow from those of the trained weights, by name.

    DeepSpeed's own bucket holds 5e8 values, beside all activations, whatever is trained. Under ZeRO-3 the factors of an
    adapter are small: gathering them one by one, twice per micro-batch, costs more than keeping them whole. So are then
    frozen weights that are no larger, such as norms.
    """
    factors = [size for name, size in sizes.items() if ".lora_" in name]
    zero = dict(config["zero_optimization"])
    if train.zero_stage:
        zero.setdefault("reduce_bucket_size", min(500_000_000, sum(sizes.values())))
    if train.zero_stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", min(WHOLE, max(factors, default=100_000)))
    return {**config, "zero_optimization": zero}


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a key that would have no effect, or contradicts what is done here; one that is switched off does not."""
    for key, value in given.items():
        off = isinstance(value, Mapping) and value.get("enabled") in (False, AUTO)
        if key not in known and not off:
            hint = f"{OURS[key]} instead" if key in OURS else did_you_mean(key, known)
            raise MismatchError(
                f"train.deepspeed.{key} is not a key of DeepSpeed that can be set here",
                got=f"train.deepspeed.{key} = {value!r}",
                expected=hint or f"one of {', '.join(sorted(known))}",
                fix=f"correct or remove train.deepspeed.{key}",
            )


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value == AUTO:
            continue
        inner = merged.get(key, {} if isinstance(value, Mapping) else None)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        tree[name] = dict(tree.get(name, {}))
        tree = tree[name]
    tree[leaf] = value
