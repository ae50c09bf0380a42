"""A teacher under DeepSpeed's ZeRO-3: every weight is spread over the processes and gathered when it is used."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# DeepSpeed looks for accelerators of every maker unless told; a machine without CUDA is a CPU to us.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from transformers.integrations import HfDeepSpeedConfig

from storage_schemas.logits import body_of


def load_partitioned(load: Callable[[], Any], *, dtype: str, offload: bool, on_gpu: bool) -> Any:
    """The model, partitioned while it is loaded: no device ever holds all of it. Collective.

    In the host's memory of process 0, transformers collects the whole checkpoint before it is spread.

    Args:
        load: reads the weights with `from_pretrained`.
        offload: keep this process's share in the host's memory.
    """
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": None,
    }
    if not on_gpu:
        # A shared-memory all-reduce; building it takes a compiler and a minute.
        deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    partitions = HfDeepSpeedConfig(config)  # transformers asks whether one is alive.
    model = load()
    engine = deepspeed.initialize(model=model, config=config)[0]
    del partitions
    # Its hooks gather the weights: it must live as long. In a list, it is no part of the model.
    model.zero_engine = [engine]
    # It gathers weights ahead of their use once it has recorded a pass from beginning to end. A pass is the
    # body's: the head is called more or less often, and is gathered once for all its calls.
    order = engine.optimizer.get_param_coordinator
    body_of(model, role="teacher").register_forward_hook(lambda *_: order().reset_step())
    model.whole_head = partial(deepspeed.zero.GatheredParameters, [model.get_output_embeddings().weight])
    return model
