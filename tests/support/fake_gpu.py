"""A device `gpu` without hardware: operations on it have shapes, dtypes and gradients, and no values.

Tensors of two devices in one operation raise there as on CUDA, and so does reading a value, for which the host would
wait for the GPU. A process that has imported this has the device for good: tests run it in one of their own.

    python -m support.fake_gpu      prints one JSON object: check -> what went wrong, "" if nothing
"""

import json
import os
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from support.tiny_teachers import sample_of
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.provenance import Recipe
from student_train.config import LoraSection, LossSection
from student_train.data.batch import SparseTargets, TrainBatch
from student_train.model.adapter import attach
from student_train.model.head import HeadSpec, fused_head_loss
from student_train.model.scaling import scale_between
from student_train.model.student import Distilled
from teacher_dump.estimators.estimate import estimate
from teacher_dump.teachers import teacher

GPU, VOCAB, HIDDEN, K = "gpu", 1000, 64, 16


class _Backend:
    """What torch asks of a device's module."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
        answers |= {"_is_in_bad_fork": False, "get_amp_supported_dtype": [torch.bfloat16]}
        return lambda *arguments, **options: answers.get(name)


backend_registration._setup_privateuseone_for_python_backend(GPU, backend_module=_Backend())
fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # Else the values of small tensors are known after all.


def pretended() -> FakeTensorMode:
    """Within it, tensors have no values."""
    return FakeTensorMode(allow_non_fake_inputs=False)


class Copies(TorchDispatchMode):
    """Counts copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "_to_copy" in name or "copy_" in name:
            source, target = (args[0], out) if "_to_copy" in name else (args[1], args[0])
            if isinstance(source, Tensor) and isinstance(target, Tensor) and source.device != target.device:
                self.seen[f"{source.device.type} -> {target.device.type}"] += 1
        return out


def targets(n: int, *, draws: bool = False) -> SparseTargets:
    """Of n tokens, on the device."""
    entries = {"device": GPU}
    return SparseTargets(
        labels=torch.randint(VOCAB, (n,), **entries),
        ids=torch.randint(VOCAB, (n, K), dtype=torch.int32, **entries),
        logprobs=torch.randn(n, K, **entries),
        weights=torch.rand(n, K, **entries),
        in_head=torch.ones(n, K, dtype=torch.bool, **entries),
        tail_logprob=torch.randn(n, **entries),
        has_draws=draws,
    )


def head(divergence: str, *, temperature: float = 1.0, draws: bool = False, trained: bool = False) -> None:
    """Loss and gradients of the fused head: nothing is copied, nothing is read."""
    with pretended():
        _head(LossSection(alpha=0.7, divergence=divergence, temperature=temperature), draws=draws, trained=trained)


def _head(loss: LossSection, *, draws: bool, trained: bool) -> None:
    hidden = torch.randn(96, HIDDEN, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=GPU, dtype=torch.bfloat16, requires_grad=trained)
    bias = torch.randn(VOCAB, device=GPU, dtype=torch.bfloat16, requires_grad=trained)
    spec = HeadSpec(valid_vocab=VOCAB - 8, softcap=30.0, scale=0.5, chunk_tokens=40)
    given = targets(96, draws=draws)
    with Copies() as copies:
        (fused_head_loss(hidden, weight, given, loss=loss, head=spec, bias=bias).loss * 0.5).backward()
    assert not copies.seen, copies.seen
    assert hidden.grad is not None
    assert hidden.grad.device.type == GPU


def llama() -> LlamaForCausalLM:
    """A student and teacher without values."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def onto_gpu(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers of a module on the meta device, once each."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fresh = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=GPU), parameter.requires_grad)
                part._parameters[name] = known.setdefault(id(parameter), fresh)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)


def student() -> None:
    """Forward and backward pass of an adapted student."""
    model = llama()
    model.config.use_cache = False
    adapted = attach(model, LoraSection(r=4), seed=0)
    scale_between(adapted)
    with pretended():
        onto_gpu(adapted, torch.bfloat16)
        module = Distilled(adapted, losses=(LossSection(alpha=0.5), LossSection(alpha=1.0)), head=HeadSpec()).train()
        module.packed = False
        batch = TrainBatch(
            input_ids=torch.randint(VOCAB, (3, 20), device=GPU),
            position_ids=torch.arange(20, device=GPU).expand(3, 20),
            positions=torch.arange(30, device=GPU),
            parts=(targets(10), targets(20)),
            tokens=60,
            lengths=torch.full((3,), 20, device=GPU),
        )
        with Copies() as copies:
            loss, _ = module(batch)
            loss.backward()
        assert not copies.seen, copies.seen
        assert all(p.grad is not None for _, p in module.trained())


def estimates(estimator: Estimator) -> None:
    """Of logits on the device: ids, log-probs, draws."""
    recipe = Recipe(estimator=estimator, temperatures=(1.0,) if estimator.draws else (1.0, 2.0))
    place = {"sample_index": np.zeros(50, np.int64), "position": np.arange(50)}
    with pretended(), Copies() as copies:
        estimate(torch.randn(50, VOCAB, device=GPU), recipe, **place)
    assert not [way for way in copies.seen if way.startswith(GPU)], copies.seen


def dumped(estimator: Estimator) -> None:
    """A batch of the teacher, up to the copy to the host, that nothing waits for."""
    model, samples = llama(), [sample_of(n, index=n) for n in (9, 30, 17)]
    replaced = [
        mock.patch.object(teacher, "gather", return_value=None),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
        mock.patch.object(teacher, "on_device", lambda array, device: torch.zeros(array.shape, device=device).long()),
    ]
    with ExitStack() as stack:
        for each in (*replaced, pretended()):
            stack.enter_context(each)
        onto_gpu(model, torch.bfloat16)
        with Copies() as copies:
            teacher.launch(model, samples, Recipe(estimator=estimator))
    assert not [way for way in copies.seen if way.startswith(GPU)], copies.seen


def mixed() -> None:
    """A planted mistake: a tensor made without the device."""
    with pretended():
        torch.randn(4, device=GPU) + torch.arange(4)


def read() -> None:
    """A planted mistake: a value is read."""
    with pretended():
        float(torch.randn(4, device=GPU).sum())


def copied() -> None:
    """A planted mistake: a result is copied to the host."""
    with pretended(), Copies() as copies:
        torch.randn(4, device=GPU).sum().cpu()
    assert not copies.seen, copies.seen


ESTIMATORS: dict[str, Estimator] = {
    "topk": TopK(k=8, mass=0.9),
    "adaptive": Adaptive(kind="adaptive", mass=0.9, k_max=8, tail_draws=4),
    "sampled": Sampled(kind="sampled", draws=5),
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "akl", "tvd")
CHECKS: dict[str, Callable[[], None]] = {
    **{f"head, {name}": lambda name=name: head(name) for name in DIVERGENCES},  # type: ignore[misc]
    "head, T = 2": lambda: head("forward_kl", temperature=2.0),
    "head, draws": lambda: head("forward_kl", draws=True),
    "head, trained": lambda: head("jsd", trained=True),
    "student": student,
    **{f"estimates, {name}": lambda e=e: estimates(e) for name, e in ESTIMATORS.items()},  # type: ignore[misc]
    **{f"teacher, {name}": lambda e=e: dumped(e) for name, e in ESTIMATORS.items()},  # type: ignore[misc]
    "planted: two devices": mixed,
    "planted: a read": read,
    "planted: a copy": copied,
}


def main() -> None:
    """All checks."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
            if not name.startswith("planted"):
                traceback.print_exc(limit=-8)
    print(json.dumps(found), flush=True)
    os._exit(0)  # The device has no end of its own.


if __name__ == "__main__":
    main()
