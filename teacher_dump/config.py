"""The sections of the configuration that only stage one reads."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, field_validator, model_validator

from storage_schemas.common.dtypes import Spelling, dtype_name
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import Estimator
from storage_schemas.stores.address import Located
from teacher_dump.corpus.formats import READ

_WAYS = ("tensor", "pipeline", "data")
"""In which vLLM spreads a model over GPUs."""
_OWNED_BY_BACKEND = {
    "dtype": "teacher.dtype sets it",
    "enable_prefix_caching": "cached tokens have no log-probs",
    "generation_config": "nothing is generated",
    "hf_config_path": "teacher.model sets it",
    "logprobs_mode": "only raw log-probs carry the tail's mass",
    "max_logprobs": "estimator.k sets it",
    "model": "teacher.model sets it",
    "revision": "teacher.revision sets it",
    "runner": "targets come from the runner for generation",
    "skip_tokenizer_init": "vLLM sees token ids only",
    "tokenizer": "vLLM sees token ids only",
    "tokenizer_revision": "vLLM sees token ids only",
    "trust_remote_code": "code that comes with a teacher is never run",
}
"""Arguments of vLLM's engine that the backend sets itself, and why."""


class TeacherSection(FrozenModel):
    """The model whose distribution is stored."""

    model: str
    """Directory or hub id of the teacher."""
    revision: str | None = None
    """Branch, tag or commit on the hub; it is resolved to a commit and recorded."""
    trust_remote_code: bool = False
    """Run the code of Python that the teacher brings with it, as you: read it first. For a directory, or a commit on
    the hub, given as `revision` with all its 40 digits; the code is part of the dump's identity: its `*.py`, not what
    these load. With the backend `transformers` alone, and never for the tokenizer, which stage two must be able to
    load."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], BeforeValidator(dtype_name, json_schema_input_type=Spelling)
    ] = "bfloat16"
    """Compute dtype of the forward pass; `bf16`, `fp16` and `fp32` mean the same. Statistics are always taken in
    float32 or better."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Which engine runs the teacher. `vllm` needs the extra of that name and makes only `topk` targets at T = 1,
    with `dump.logsumexp: false`."""
    attn_implementation: str | None = None
    """transformers' name of its attention: `sdpa`, `eager`, `flash_attention_2`, ... Null: the model's own default. If
    set, it is part of the dump's identity, as vLLM's choice is."""
    compile: bool = False
    """Compile each decoder layer (torch.compile): its body is a quarter faster on a GPU, after a minute at the start;
    needs a C++ compiler. What is dumped differs by rounding."""
    vllm: dict[str, Any] = {}
    """More arguments of vLLM's engine, e.g. `{tensor_parallel_size: 4, gpu_memory_utilization: 0.8}`."""
    vllm_check_samples: int = Field(8, ge=0)
    """Samples that transformers computes too, before the run: vLLM must agree. 0 disables the check."""
    sharding: Literal["none", "device_map", "tensor", "zero3"] = "none"
    """For a teacher that is larger than one device. `device_map`: its layers over this process's GPUs, the host's
    memory and disk (accelerate). `tensor`: each layer over several processes (tensor parallelism, transformers 5.21 or
    newer). `zero3`: each weight over several processes, gathered when used (DeepSpeed). Both: `--nproc` of `dump` and
    `plan`.
    """
    max_memory: dict[str, str] = {}
    """With `device_map`: how much of each device may be used, e.g. `{"0": 70GiB, cpu: 200GiB}`."""
    offload_folder: str | None = None
    """With `device_map`: where weights go that fit nowhere else. Null: a temporary directory."""
    offload: bool = False
    """With `zero3`: keep the weights in the host's memory until they are used."""
    batch_tokens: int = Field(16384, ge=1)
    """Token budget of a forward pass, padding included; with `zero3`, of each process. Only speed and memory depend on
    it."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` … Where torchrun, srun or mpirun start several workers on
    one machine, `auto` and `cuda` mean this worker's own GPU, by its local rank."""

    @property
    def gpus(self) -> int | None:
        """GPUs that a process takes, any that there are; None: all that it sees, or one that is named."""
        if self.sharding != "none" or self.device not in ("auto", "cuda"):
            return None
        ways: list[int] = [self.vllm.get(f"{way}_parallel_size", 1) for way in _WAYS]
        return math.prod(ways)

    @property
    def grouped(self) -> bool:
        """Whether several processes hold one teacher."""
        return self.sharding in ("tensor", "zero3")

    @field_validator("vllm")
    @classmethod
    def _not_owned(cls, value: dict[str, Any]) -> dict[str, Any]:
        if owned := [f"{name} ({_OWNED_BY_BACKEND[name]})" for name in sorted(value) if name in _OWNED_BY_BACKEND]:
            raise ValueError(f"the backend sets these itself: {', '.join(owned)}")
        length = value.get("max_model_len")
        if length is not None and (type(length) is not int or length < 2):
            raise ValueError(
                f"max_model_len must be a number of tokens, at least 2, but is {length!r}: "
                "leave it out, and it follows corpus.max_length"
            )
        for name in (f"{way}_parallel_size" for way in _WAYS):
            if type(ways := value.get(name, 1)) is not int or ways < 1:
                raise ValueError(f"{name} must be a number of GPUs, at least 1, but is {ways!r}")
        return value

    @model_validator(mode="after")
    def _backend_takes_them(self) -> "TeacherSection":
        if self.trust_remote_code and self.backend != "transformers":
            raise ValueError(f"trust_remote_code is for the backend transformers, but backend is {self.backend}")
        if self.vllm and self.backend != "vllm":
            raise ValueError(f"`vllm` holds arguments for vLLM's engine, but backend is {self.backend}")
        if self.backend == "vllm" and self.attn_implementation is not None:
            raise ValueError("vLLM chooses its attention itself: say it in `vllm` instead of `attn_implementation`")
        if self.backend == "vllm" and self.sharding != "none":
            raise ValueError("vLLM shards by itself: set `vllm: {tensor_parallel_size: N}` instead of `sharding`")
        if self.compile and (self.backend, self.sharding) != ("transformers", "none"):
            raise ValueError("`compile` is for backend: transformers with sharding: none; vLLM compiles by itself")
        for name, kind in (("max_memory", "device_map"), ("offload_folder", "device_map"), ("offload", "zero3")):
            if getattr(self, name) and self.sharding != kind:
                raise ValueError(f"`{name}` is for sharding: {kind}, but sharding is {self.sharding}")
        if self.sharding != "none" and self.device.startswith("cuda:"):
            raise ValueError("a sharded teacher runs on several devices: set CUDA_VISIBLE_DEVICES instead of `device`")
        if self.backend == "vllm" and self.device.startswith("cuda:"):
            raise ValueError("vLLM chooses its devices itself: set CUDA_VISIBLE_DEVICES instead of `device`")
        return self


_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GIVEN_TO_TEMPLATES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}


def _share(weight: float) -> float:
    if weight > 1:
        raise ValueError(
            "must be at most 1: a repeated record would make the teacher answer twice what it answered already; lower "
            "the other sources' weights instead, or raise train.epochs"
        )
    return weight


class SourceSection(FrozenModel):
    """One file, glob, directory, object-store prefix or hub dataset of the corpus."""

    path: Located
    """File (JSONL, JSON, Parquet, Arrow, CSV, TSV, txt) or glob, `s3://`, `gs://`, `az://` or `file://` too; directory,
    prefix or hub id. `llm-neo docs data_formats` has an example of each format."""
    format: Literal[
        "auto", "messages", "conversations", "alpaca", "prompt_completion", "text", "tokens", "question_answer",
        "question_response", "instruction_response",
    ] = "auto"  # fmt: skip
    """Shape of a record; `auto` looks at the columns of the first one."""
    columns: dict[str, str] = {}
    """Name that a format reads -> column of this source, e.g. `{messages: dialogue}`. A column that is not there is
    refused."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """What this source calls a role -> the role, e.g. `{customer: user, agent: assistant}`."""
    split: str = "train"
    """Split, in the notation of `datasets` (`train[:1000]` works)."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    weight: Annotated[float, AfterValidator(_share)] = Field(1.0, gt=0.0)
    """Share of the records that is used: `weight` x records, rounded half up, at least one; drawn by `corpus.seed`."""
    ignore_columns: list[str] = []
    """Columns that are taken as not being there, such as those that would be refused because they are not read."""
    storage_options: dict[str, str] = {}
    """Passed to this source's object store, as `dump.storage_options` is. Secrets belong into the environment."""

    @field_validator("columns")
    @classmethod
    def _are_read(cls, value: dict[str, str]) -> dict[str, str]:
        if unread := [name for name in value if name not in READ]:
            raise ValueError(f"no format reads {', '.join(unread)}; what they read: {', '.join(sorted(READ))}")
        return value


class CorpusSection(FrozenModel):
    """What is distilled on, and which tokens are supervised."""

    sources: list[SourceSection] = Field(min_length=1)
    """Read in order and concatenated; the order is part of the corpus's fingerprint."""
    max_length: int = Field(2048, ge=2)
    """Tokens per sample, at most."""
    mask: Literal["assistant", "all"] = "assistant"
    """`assistant`: only what the assistant says (or the completion) is supervised. `all`: every token but the first,
    whatever a record's own masks or weights say."""
    too_long: Literal["truncate", "drop", "error", "chunk"] = "truncate"
    """Longer samples are cut, kept as a row without targets, or refused. `chunk` makes several samples of a longer
    `text`, so that all of its tokens are supervised, and cuts samples of other formats."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: the template itself, or the path of a Jinja file. The dump keeps
    it with its tokenizer, and what is trained from the dump has it, too."""
    template_kwargs: dict[str, JsonValue] = {}
    """Arguments of the chat template, e.g. `{enable_thinking: false}`. They become defaults inside the template that
    the dump keeps; a record's own `chat_template_kwargs` come before them."""
    max_bad_share: float = Field(0.01, ge=0.0, le=1.0)
    """Share of a source's records that may be unusable (not valid Unicode, of another shape, refused by the template).
    They are rows of status `invalid_text`, and the first ones are named; above it nothing is dumped. One is always
    allowed, unless this is 0."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Which records a source of `weight` below 1 gives; a larger weight keeps those of a smaller one. Order is kept."""
    num_proc: int | None = Field(None, ge=1)
    """Processes that tokenise. Null: one per core that this process may use, but at most one per 5,000 records. Only
    speed depends on it."""
    cache_dir: Located | None = None
    """Where fetched files and the tokenised corpus are kept; default: `$LLM_NEO_CACHE`, else `~/.cache/llm-neo`."""

    @property
    def template_file(self) -> Path | None:
        """Where the chat template lies, if it is not given itself."""
        if self.chat_template is None or any(mark in self.chat_template for mark in ("{{", "{%", "\n")):
            return None
        return Path(self.chat_template).expanduser()

    @field_validator("template_kwargs")
    @classmethod
    def _arguments(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if wrong := [name for name in value if not _ARGUMENT.fullmatch(name) or name in _GIVEN_TO_TEMPLATES]:
            raise ValueError(f"no argument of a template: {', '.join(wrong)}; what the corpus decides is not set here")
        return value

    @model_validator(mode="after")
    def _chunks_have_room(self) -> "CorpusSection":
        if self.too_long == "chunk" and self.max_length < 3:
            raise ValueError(
                "too_long: chunk needs a max_length of 3 or more: a chunk may begin with 2 tokens of context"
            )
        return self


def vllm_cannot(
    estimators: Mapping[str, Estimator], temperatures: Sequence[float], *, logsumexp: bool
) -> Iterator[tuple[str, str, object]]:
    """(dotted path, problem, got) of every setting that vLLM's log-probs of the k largest entries cannot serve."""
    for place, estimator in estimators.items():
        if estimator.draws:
            problem = "must be topk with teacher.backend vllm: it names the largest entries only; draws need them all"
            yield f"{place}.kind", problem, estimator.kind
    if tuple(temperatures) != (1.0,):
        problem = "must be [1.0] with teacher.backend vllm: the tail's mass at T needs every logit"
        yield "temperatures", problem, list(temperatures)
    if logsumexp:
        problem = "must be false with teacher.backend vllm: its log-probs are normalised, their logsumexp is lost"
        yield "dump.logsumexp", problem, logsumexp
