"""A teacher that is in memory already, and is known by the very weights that it runs with."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from storage_schemas.canonical import canonical_json
from storage_schemas.common.errors import MismatchError
from storage_schemas.provenance import IN_MEMORY, EngineIdentity, MadeBy, TeacherIdentity
from teacher_dump.config import TeacherSection
from teacher_dump.teachers.model_files import content_sha256
from teacher_dump.teachers.teacher import Teacher, whole

_DTYPES = ("float32", "bfloat16", "float16")
_UNSETTLED = {"architectures", "dtype", "use_cache"}
"""What saving, training and generating change in a model's config, and what changes no logit or is recorded apart."""


class LoadedTeacher(Teacher):
    """A causal language model of transformers, or a subclass of one, that you have loaded, changed or trained.

    Give it to `run_dump` in place of a `TeacherSection`. The dump is identified by a hash of the model's tensors and
    of its config, not of any file: the same weights continue it, others are refused. Hooks that you have registered are
    not in the hash. `llm-neo verify --recompute` cannot load such a teacher again; `recompute_rows` takes it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None = None, batch_tokens: int = 16384) -> None:
        """Try the model on a few tokens; it stays where it is, and nothing about it is changed.

        Args:
            model: whole in this process, in evaluation mode, in float32, bfloat16 or float16.
            tokenizer: a fast tokenizer of transformers, which the dump keeps.
            name: what the dump's notes call the model. None: its class.
            batch_tokens: tokens of a forward pass, padding included.

        Raises:
            MismatchError: it is no such model, or targets of its architecture cannot be computed.
        """
        _refuse_unusable(model)
        section = TeacherSection(
            model=name or f"{type(model).__name__} in memory", dtype=_dtype_of(model), batch_tokens=batch_tokens
        )
        super().__init__(section)
        self.config, self.tokenizer, self.device = model.config, whole(tokenizer), model.device
        self.model = self._checked(model)

    def refuse_unloadable(self) -> None:
        """There is nothing to load; but a model that trains again has dropout, and other weights with every step."""
        _refuse_unusable(self.model)

    @property
    def engine(self) -> EngineIdentity:
        """transformers, with the model's class and the attention that it runs with."""
        attention = getattr(self.config, "_attn_implementation", None)
        return EngineIdentity(
            name="transformers", arguments={"class": type(self.model).__name__, "attn_implementation": attention}
        )

    def identify(self) -> TeacherIdentity:
        """Who the teacher is: its tensors are hashed now, since they may have changed since the last dump."""
        return TeacherIdentity(
            config_sha256=content_sha256(self.config.to_diff_dict(), without=_UNSETTLED),
            weights_sha256={IN_MEMORY: tensors_sha256(self.model.state_dict() | dict(self.model.named_buffers()))},
            dtype=self.section.dtype,
            lm_head_rows=self.lm_head_rows,
        )

    def note_origin(self) -> MadeBy:
        """Its name, and what it runs with."""
        return MadeBy(model=self.section.model, versions={name: version(name) for name in ("transformers", "torch")})


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hash of named tensors, wherever they lie: of each, by name, a JSON line [name, dtype, shape] and its elements."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            found.update(canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _dtype_of(model: Any) -> str:
    return str(getattr(model, "dtype", None)).removeprefix("torch.")


def _refuse_unusable(model: Any) -> None:
    needed = ("config", "device", "get_output_embeddings", "named_parameters")
    got, fix = None, "give a causal language model of transformers"
    if missing := [name for name in needed if not hasattr(model, name)]:
        got = f"a {type(model).__name__} without {', '.join(missing)}"
    elif model.get_output_embeddings() is None:
        got = f"a {type(model).__name__}, which has no language-model head"
    elif any(type(part).__module__.startswith("peft.") for part in model.modules()):
        got, fix = "an adapter of peft, whose scaling is in no tensor", "call model.merge_and_unload() first"
    elif any(part.training for part in model.modules()):
        got, fix = "a model in training mode", "call model.eval() first"
    elif _dtype_of(model) not in _DTYPES:
        got, fix = f"a model in {_dtype_of(model)}", "call model.to(torch.float32) first"
    elif any(p.is_meta or hasattr(p, "ds_shape") or hasattr(p, "device_mesh") for p in model.parameters()):
        got, fix = "weights on disk, or spread over processes", "name it in a TeacherSection, with its `sharding`"
    if got is not None:
        raise MismatchError(
            "the model in memory cannot be a teacher",
            got=got,
            expected=f"a causal language model, whole in this process, in evaluation mode, in {' or '.join(_DTYPES)}",
            fix=fix,
        )
