"""The teacher: who it is, and its targets for a batch of samples. Logits exist for chunks of supervised tokens only."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_class_from_dynamic_module
from transformers.quantizers.auto import AutoHfQuantizer

from storage_schemas.common.batching import length_sorted_batches
from storage_schemas.common.code import NO_CODE, Code, code_sha256, importing, runs_code
from storage_schemas.common.devices import no_such_device, refuse_idle_gpus, refuse_no_compiler
from storage_schemas.common.errors import MismatchError, explained, first_line
from storage_schemas.common.models import refuse_torn, refusing_attention
from storage_schemas.config import Estimator
from storage_schemas.logits import (
    TOLERANCE,
    LogitTransform,
    body_of,
    compile_layers,
    finish_logits,
    head_rows,
    refuse_other_logits,
    relative_difference,
)
from storage_schemas.provenance import EngineIdentity, MadeBy, Provenance, Recipe, TeacherIdentity
from storage_schemas.rows import Row
from storage_schemas.targets import Targets
from teacher_dump.config import TeacherSection
from teacher_dump.corpus.freeze import Corpus
from teacher_dump.estimators.estimate import Entries, estimate, gather, on_device
from teacher_dump.teachers.model_files import ModelFiles, find_model
from teacher_dump.teachers.products import Float32Results, linear

log = logging.getLogger(__name__)

TRUST = "teacher.trust_remote_code"
"""Where the user says that code may be run."""

_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits that exist at a time: little memory, and enough to keep the matrix product busy."""
_MEMORY_ADVICE = (
    "load it in bfloat16 (teacher.dtype), spread it over several devices (teacher.sharding: device_map, tensor or "
    "zero3), or use a larger one"
)
_PROBE = 8
"""Tokens of each sequence that a freshly loaded model is checked with."""
PendingTargets = Callable[[], list[Targets | None]]
"""Call it to wait for the targets of a batch."""


class Teacher:
    """A causal language model of transformers. Its weights are loaded when the first targets are asked for."""

    positions_rule = "max_position_embeddings"
    """Where `positions` comes from, for the message."""

    def __init__(self, section: TeacherSection) -> None:
        self.section = section
        self._fits: int | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def files(self) -> ModelFiles:
        """Its files, fetched from the hub if need be."""
        return find_model(self.section.model, self.section.revision, self.code)

    @property
    def code(self) -> Code:
        """Whether code that it brings is run."""
        section = self.section
        return runs_code(section.trust_remote_code, section.model, section.revision, setting=TRUST)

    @cached_property
    def config(self) -> Any:
        """Its transformers config."""
        if not self.code:
            return self.from_pretrained(AutoConfig)
        with importing(HF_MODULES_CACHE):
            found = self.from_pretrained(AutoConfig)
            if place := (getattr(found, "auto_map", None) or {}).get("AutoModelForCausalLM"):
                try:
                    get_class_from_dynamic_module(place, str(self.files.folder))
                except Exception as error:  # Of somebody else's code.
                    raise self._unloadable(error) from error
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return whole(self.from_pretrained(AutoTokenizer))

    @property
    def lm_head_rows(self) -> int:
        """Rows of the LM head."""
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def masked_from(self) -> int | None:
        """The first row of the LM head from which on the tokenizer has no ids; None if it has one for the last row."""
        known = max(self.tokenizer.get_vocab().values()) + 1
        return known if known < self.lm_head_rows else None

    @property
    def positions(self) -> int | None:
        """Tokens that it can see at most; None if nothing in its config limits them."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def short_context(self) -> int | None:
        """Sequences up to this length are rotated by other frequencies than longer ones (LongRoPE); else None."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
        short = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
        return min((length for length in short if length is not None), default=None)

    @cached_property
    def device(self) -> torch.device:
        """Where it runs."""
        name = self.section.device
        if name == "auto":
            name = "cuda" if cuda_or_no_gpu() else "cpu"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise no_such_device(name, error, setting="teacher.device") from error

    @property
    def ways(self) -> int:
        """Processes that share the samples of a batch."""
        return 1

    @property
    def devices(self) -> int:
        """How many devices it runs on; the host's memory and disk, where layers wait, are none."""
        places = getattr(self.model, "hf_device_map", {}).values()
        return max(1, len({str(place) for place in places} - {"cpu", "disk"}))

    @cached_property
    def model(self) -> Any:
        """The model with its weights, on its device or devices."""
        try:
            return self._checked(self.load_model().eval().requires_grad_(False))
        except (RuntimeError, MemoryError) as error:
            if (known := explained(error, memory=_MEMORY_ADVICE)) is None:
                raise
            raise known from error

    def _checked(self, model: Any) -> Any:
        """A freshly loaded model, which is refused unless its targets can be computed."""
        rows = head_rows(model)
        if rows != self.lm_head_rows:
            raise MismatchError(
                f"the LM head of {self.section.model} disagrees with its config",
                got=f"{rows} rows",
                expected=f"vocab_size = {self.lm_head_rows}",
                fix="correct config.json, or choose another teacher",
            )
        refuse_unknown_model(model)
        if self.section.compile:
            torch._dynamo.config.recompile_limit = 64  # Kinds of layers, one sample or several.
            compile_layers(model, partial(torch.compile, dynamic=True), role="teacher")
        return model

    def refuse_unloadable(self) -> None:
        """Raise what loading the weights would end in, as far as it can be known without.

        Raises:
            MismatchError: no such model, not a causal one, or packages or the device for it are missing.
            DataError: a file is torn.
        """
        refuse_torn(*self.files.weights)
        brought = self.code and "AutoModelForCausalLM" in (getattr(self.config, "auto_map", None) or {})
        if not brought and type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise self._unloadable(ValueError(f"{type(self.config).__name__} belongs to no causal language model"))
        if (quantised := getattr(self.config, "quantization_config", None)) is not None:
            try:
                AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None)
            except ImportError as error:
                raise self._unloadable(error) from error
            except (ValueError, RuntimeError) as error:  # May depend on where the weights will be.
                log.debug("%s", error)
        if (attention := self.section.attn_implementation) is not None:
            refused = refusing_attention(self.section.model, attention, setting="teacher.attn_implementation")
            with torch.device("meta"), refused:
                code = self.code
                AutoModelForCausalLM.from_config(self.config, attn_implementation=attention, trust_remote_code=code)
        if self.section.compile:
            refuse_no_compiler("teacher.compile", os.environ)
        _ = self.device

    def load_model(self) -> Any:
        """The weights, from safetensors alone."""
        place: dict[str, Any] = {}
        if self.section.sharding == "device_map":
            if (folder := self.section.offload_folder) is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="llm-neo-offload-")
                folder = self._scratch.name
            limits = {int(k) if k.isdecimal() else k: v for k, v in self.section.max_memory.items()}
            place = {"device_map": "auto", "max_memory": limits or None, "offload_folder": folder}
        elif self.device.type != "cpu":
            # A device map reads the weights straight to the device, without a copy in the host's memory.
            place = {"device_map": {"": self.device}}
        return self.read_weights(**place)

    def read_weights(self, **options: Any) -> Any:
        """The model as transformers reads it, with options that say where to put it."""
        dtype = getattr(torch, self.section.dtype)
        attention = self.section.attn_implementation
        return self.from_pretrained(
            AutoModelForCausalLM, dtype=dtype, use_safetensors=True, attn_implementation=attention, **options
        )

    @property
    def engine(self) -> EngineIdentity:
        """The software that runs it, and the attention if one is asked for: models may differ by more than rounding."""
        attention = self.section.attn_implementation
        arguments = {} if attention is None else {"attn_implementation": attention}
        return EngineIdentity(name=self.section.backend, arguments=arguments)

    def note_origin(self) -> MadeBy:
        """Where it lies and what it runs with."""
        return MadeBy(
            model=self.section.model,
            revision=self.files.revision,
            config_file_sha256=self.files.config_file_sha256(),
            versions={name: version(name) for name in ("transformers", "torch")},
        )

    def refuse_unsupported(self, estimator: Estimator, temperatures: Sequence[float], *, logsumexp: bool) -> None:
        """Raise MismatchError if it cannot make such targets, before anything is read: transformers makes them all."""

    def start(self, corpus: Corpus, provenance: Provenance) -> None:
        """Load the weights, now that there is something to do for `run`."""
        _ = self.model

    def close(self) -> None:
        """Let go of what must not be left to the interpreter's exit."""

    def batches(self, samples: Sequence[Row]) -> list[list[Row]]:
        """Samples that go through the model together: of like length, within the budget of padded tokens."""
        lengths = [forward_tokens(sample) for sample in samples]
        budget, apart_at = self.section.batch_tokens, self.short_context
        cuts = length_sorted_batches(lengths, budget=budget, apart_at=apart_at, ways=self.ways)
        return [[samples[place] for place in places] for places in cuts]

    def targets(self, samples: Sequence[Row], recipe: Recipe) -> list[Targets | None]:
        """What `launch` promises."""
        return self.launch(samples, recipe)()

    def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
        """Send samples through the model. A GPU is still at work when this returns, and the next batch may follow.

        A batch that does not fit into the GPU's memory is halved, and so are later ones of its size.

        Args:
            samples: each with at least one supervised token; they go through the model together, padded.
            recipe: what is kept of the logits.

        Returns:
            What waits for the targets of each sample's supervised tokens, in order; None where its logits are not
            finite. Any thread may call it.

        Raises:
            MismatchError: a single sample does not fit into the device's memory.
        """
        padded = len(samples) * max(forward_tokens(sample) for sample in samples)
        if len(samples) == 1 or self._fits is None or padded <= self._fits:
            try:
                return launch(self.model, samples, recipe)
            except torch.OutOfMemoryError as error:
                message = first_line(error)
            self._refuse_or_halve(samples, padded, message)
        half = (len(samples) + 1) // 2
        parts = [self.launch(part, recipe) for part in (samples[:half], samples[half:])]
        return lambda: [found for part in parts for found in part()]

    def identify(self) -> TeacherIdentity:
        """Who the teacher is, from its files alone; they are read for it."""
        return TeacherIdentity(
            config_sha256=self.files.config_sha256(),
            weights_sha256=self.files.weights_sha256(),
            dtype=self.section.dtype,
            lm_head_rows=self.lm_head_rows,
            # Left out, and not null, where there is none: as in dumps of before.
            **({"code_sha256": code_sha256(self.files.folder)} if self.code else {}),
        )

    def from_pretrained(self, kind: Any, **options: Any) -> Any:
        """`kind.from_pretrained` on its files, whose code is run if `code` says so; what fails is a NeoError."""
        code = NO_CODE if kind is AutoTokenizer else self.code
        try:
            return kind.from_pretrained(self.files.folder, trust_remote_code=code, **options)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, MemoryError) as error:
            raise explained(error, memory=_MEMORY_ADVICE) or self._unloadable(error) from error

    def _unloadable(self, error: Exception) -> MismatchError:
        return MismatchError(
            f"the teacher {self.section.model} cannot be loaded",
            got=" ".join(str(error).split())[:300] or type(error).__name__,
            expected="a causal language model that the installed transformers knows, with its tokenizer",
            fix="install what is missing" if isinstance(error, ImportError) else "correct teacher.model",
        )

    def _refuse_or_halve(self, samples: Sequence[Row], padded: int, message: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(samples) == 1:
            raise MismatchError(
                f"sample {samples[0].sample_index} alone does not fit into the memory of {self.device}",
                got=f"{padded} tokens: {message}",
                expected="a device that holds the model and one sample",
                fix="lower corpus.max_length, run it in bfloat16 or on a larger device, or set teacher.sharding",
            )
        if self._fits is None:
            log.warning("%d padded tokens do not fit into %s: halving such batches", padded, self.device)
        self._fits = padded // 2


def whole(tokenizer: Any) -> Any:
    """A tokenizer without the truncation and padding that a training may have left in it: the first call takes them off
    anyhow, and what a dump and the corpus's cache hold must not depend on who has called it."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def forward_tokens(sample: Row) -> int:
    """Tokens that the model must see: up to the one before the last supervised token."""
    return int(sample.positions.logits[-1]) + 1


def cuda_or_no_gpu() -> bool:
    """Whether torch can use a GPU here.

    Raises:
        MismatchError: there is one that it cannot use: nobody waits for a CPU in silence.
    """
    if not torch.cuda.is_available():
        refuse_idle_gpus(os.environ, build=torch.__version__, fix="set teacher.device: cpu")
    return torch.cuda.is_available()


def refuse_unknown_model(model: Any) -> None:
    """Raise MismatchError unless targets of this architecture can be computed as they are here.

    Two sequences with a common beginning must agree on it, since batches are padded without a mask; and body, head
    and what is known to follow the head must give the model's own logits.
    """
    ids = torch.arange(2 * _PROBE, device=_input_device(model)).view(2, _PROBE) % head_rows(model)
    ids[1, : _PROBE // 2] = ids[0, : _PROBE // 2]
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        hidden = _hidden(model, ids)
        got = _logits(model, hidden.flatten(0, 1), LogitTransform.of(model.config, role="teacher"))
    if not bool(expected.isfinite().all()):
        return  # Broken weights are reported sample by sample.
    seen = relative_difference(*hidden[:, : _PROBE // 2])
    if not seen < TOLERANCE:
        raise MismatchError(
            f"{type(model).__name__} is not causal: a later token changes what it computes for earlier ones",
            got=f"hidden states that differ by {seen:.2g} of the largest",
            expected="a decoder whose states depend on the tokens up to their own",
            fix="choose another teacher",
        )
    off = relative_difference(got, expected) if got.shape == expected.shape else float("inf")
    refuse_other_logits(model, off, role="teacher")


@torch.inference_mode()
def launch(model: Any, samples: Sequence[Row], recipe: Recipe, *, least_tokens: int = 0) -> PendingTargets:
    """Send samples through a model, see `Teacher.launch`. The head is called as often as for `least_tokens` supervised
    tokens, where processes must call it together."""
    hidden = _supervised_hidden(model, samples)
    # What the draws of a token depend on.
    sizes = [len(sample.positions.tokens) for sample in samples]
    sample_index = np.repeat([sample.sample_index for sample in samples], sizes)
    position = np.concatenate([sample.positions.tokens for sample in samples])
    transform = LogitTransform.of(model.config, role="teacher")
    most = max(least_tokens, len(hidden))
    chunk = min(_chunk_tokens(model), most)
    scratch = hidden.new_empty(chunk, head_rows(model), dtype=torch.float32)
    parts: list[Entries] = []
    with getattr(model, "whole_head", nullcontext)():
        for start in range(0, most, chunk):
            tokens = slice(start, start + chunk)
            logits = _logits(model, hidden[tokens], transform, scratch)
            if not len(logits):
                continue
            if recipe.masked_from is not None:
                logits[:, recipe.masked_from :] = -torch.inf
            parts.append(estimate(logits, recipe, sample_index=sample_index[tokens], position=position[tokens]))
    gathered = gather(parts, logsumexp=recipe.logsumexp)
    stops = np.cumsum(sizes).tolist()

    def targets() -> list[Targets | None]:
        found, finite = gathered()
        spans = zip([0, *stops[:-1]], stops, strict=True)
        return [found.slice(start, stop) if finite[start:stop].all() else None for start, stop in spans]

    return targets


def _supervised_hidden(model: Any, samples: Sequence[Row]) -> Float[Tensor, "tokens hidden"]:
    """The states that predict the supervised tokens, sample by sample.

    Padding is on the right, where a causal model's earlier positions cannot see it: no attention mask is needed, and
    the fast causal kernels apply. What follows the last state in use is not run at all.
    """
    lengths = [forward_tokens(sample) for sample in samples]
    ids = np.zeros((len(samples), max(lengths)), np.int64)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        ids[row, :length] = sample.input_ids[:length]
    hidden = _hidden(model, on_device(ids, _input_device(model)))
    places = [row * ids.shape[1] + sample.positions.logits for row, sample in enumerate(samples)]
    place = on_device(np.concatenate(places), hidden.device)
    return hidden.flatten(0, 1).index_select(0, place)


def _input_device(model: Any) -> torch.device:
    """Where token ids go; hooks take them on from there where a model is spread over devices, disk among them."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def _hidden(model: Any, input_ids: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
    """Final hidden states, without a key-value cache."""
    body = body_of(model, role="teacher")
    states: Tensor = body(input_ids=input_ids, use_cache=False).last_hidden_state
    return states


def _logits(
    model: Any,
    hidden: Float[Tensor, "tokens hidden"],
    transform: LogitTransform,
    scratch: Float32[Tensor, "rows V"] | None = None,
) -> Float32[Tensor, "tokens V"]:
    """The product's sums are never rounded to the model's dtype, see `products`.

    Memory of this size is fresh from the kernel at every allocation, and zeroing it takes a tenth of the product's
    time; so the product of a plain linear head goes into `scratch` (at least `tokens` rows).
    """
    head = model.get_output_embeddings()
    logits: Tensor
    if scratch is not None and _is_plain_linear(head):
        logits = linear(hidden, head.weight, out=scratch)
    elif hidden.dtype == torch.float32:
        logits = head(hidden)
    else:
        with Float32Results():
            logits = head(hidden).float()
    finish_logits(logits, scale=transform.scale, softcap=transform.softcap)
    return logits


def _is_plain_linear(head: Any) -> bool:
    """Whether calling `head` is a product with its weight and nothing else: no bias, no hooks but those by which ZeRO-3
    fetches the weight, which is here."""
    hooked = hasattr(head, "_hf_hook") or head._forward_pre_hooks or head._forward_hooks
    spread = getattr(head.weight, "ds_shape", None)
    whole = type(head.weight.data) is Tensor and (head.weight.shape == spread if spread else not hooked)
    return bool(whole and type(head) is torch.nn.Linear and getattr(head, "bias", None) is None)


def _chunk_tokens(model: Any) -> int:
    budget = _CHUNK_BYTES.get(_input_device(model).type, _CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * head_rows(model)))
