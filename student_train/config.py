"""The sections of the configuration that only stage two reads."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from storage_schemas.common.dtypes import Wide, dtype_name
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import DumpSection
from storage_schemas.stores.address import DumpUrl, LocalFolder, StoreUrl
from student_train.data.deal import Limit

Metric = Literal["kl", "ce"]
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "akl", "tvd"]
Method = Literal["full_sft", "lora_sft", "full_kd", "lora_kd"]
Arm = Literal["sft", "lora", "kd", "neo"]
ARMS: dict[Method, Arm] = {"full_sft": "sft", "lora_sft": "lora", "full_kd": "kd", "lora_kd": "neo"}
"""Methods by the names that checkpoints and summaries hold, after the paper's."""
METHODS = {arm: method for method, arm in ARMS.items()}
_Hyphenated = Literal["full-sft", "lora-sft", "full-kd", "lora-kd"]
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
"""What checkpoints call a precision."""


def _method(given: object) -> object:
    return METHODS.get(given, given.replace("-", "_")) if isinstance(given, str) else given  # type: ignore[call-overload]


def _precision(given: object) -> object:
    name = dtype_name(given)
    return _SHORT.get(name, given) if isinstance(name, str) else given


DEEPSPEED_PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    },
}
"""Values of `train.deepspeed` that need no file; everything else in them is this project's default."""


def _deepspeed_settings(given: object) -> object:
    """A preset's or a file's content in place of its name, so that a resolved configuration needs no other file."""
    if not isinstance(given, str | Path):
        return given
    if str(given) in DEEPSPEED_PRESETS:
        return DEEPSPEED_PRESETS[str(given)]
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        presets = ", ".join(DEEPSPEED_PRESETS)
        raise ValueError(f"{given} is none of {presets}, and cannot be read as a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{given} holds a {type(content).__name__}, not a JSON object")
    return content


class LoraSection(FrozenModel):
    """The low-rank adapter (peft)."""

    r: int = Field(64, ge=1)
    """Rank."""
    alpha: float | None = Field(None, gt=0)
    """Scaling numerator; the update is scaled by alpha / r. Null: 2 * r, as in the paper's code."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or `all-linear`: every linear layer but the head. Of a mixture of experts
    that is the experts too, but not the routers (`gate`, `router`), which must be named to be adapted."""
    variant: Literal["lora", "rslora", "dora", "pissa", "moslora"] = "lora"
    """Which LoRA. `rslora` scales by alpha / sqrt(r), `dora` learns magnitudes apart, `pissa` starts from the principal
    components of the weights, `moslora` puts a trained r x r mixer between A and B. Each is saved so that peft alone
    loads it."""
    modules_to_save: list[str] = []
    """Names of modules that are trained in full beside the adapter and lie in its files, such as `[norm]` or
    `[embed_tokens, lm_head]`; a head that shares the embeddings' weight is trained with them, as one. Each costs its
    weights in fp32 and two moments, and vLLM and llama.cpp take such an adapter merged only."""
    extra: dict[str, Any] = {}
    """More arguments of `peft.LoraConfig`, those that leave base weights, head and embeddings as they are."""

    @property
    def scaled_by(self) -> float:
        """`alpha`, or what null stands for."""
        return float(2 * self.r if self.alpha is None else self.alpha)


class StudentSection(FrozenModel):
    """The model that is trained."""

    model: str
    """Directory or hub id of the student. It must share the teacher's tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the code of Python that the model brings with it, as you: read it first. For a directory, or a commit on the
    hub, given as `revision` with all its 40 digits; the code is part of what identifies the student: its `*.py`, not
    what these load. Code of tokenizers is never run."""
    attn_implementation: str | None = None
    """transformers' name of the attention that training runs with: `sdpa`, `eager`, `flash_attention_2`, ... Null: the
    model's own default. It changes speed, memory and rounding only, and may change between two starts of a run."""
    quantization: Literal["nf4"] | None = None
    """QLoRA (arXiv 2305.14314): hold the frozen linear layers in 4-bit NormalFloat while an adapter is trained, about a
    quarter of bf16's memory. Head and embeddings stay as they are. A student of whose other weights less than half are
    in linear layers, such as a mixture with all experts in one parameter, is refused. The adapter that is left belongs
    to the unquantised model, where it is evaluated and merged. For ZeRO stages 0 to 2 and plain LoRA; needs the extra
    `qlora`."""
    lora: LoraSection = LoraSection()
    """Used by the methods `lora_sft` and `lora_kd`."""
    adapter: LocalFolder | None = None
    """Directory of an adapter on this very model that training begins from, such as `final` of another run, with its
    rank, scaling and modules; in bfloat16 from its weights rounded to that. Null: a new one."""

    @model_validator(mode="after")
    def _plain_start(self) -> "StudentSection":
        if self.adapter is not None and self.lora.variant in ("pissa", "moslora"):
            raise ValueError(f"adapter does not go with lora.variant {self.lora.variant}, which has a start of its own")
        return self


class LossSection(FrozenModel):
    """L = (1 - alpha) * CE + alpha * T^2 * KL, summed over supervised tokens, divided once by their global number."""

    alpha: float = Field(0.5, ge=0.0, le=1.0)
    """Weight of the divergence; 1 - alpha is the weight of the cross-entropy (LLM-Neo, section 3)."""
    divergence: Divergence = "forward_kl"
    """On the stored entries and one tail bucket; p is the teacher, q the student. `forward_kl`: KL(p || q).
    `reverse_kl`: KL(q || p). `jsd`: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (arXiv
    2306.13649). `skewed_kl`: KL(p || beta p + (1 - beta) q), `skewed_reverse_kl`: KL(q || (1 - beta) p + beta q) (arXiv
    2402.03898). `akl`: forward and reverse KL, weighted per token (arXiv 2404.02657). `tvd`: the total variation
    distance."""
    temperature: float = Field(1.0, gt=0.0)
    """Must be one of the temperatures that the dump was made with."""
    beta: float = Field(0.5, gt=0.0, lt=1.0)
    """Mixture weight of `jsd`, skew of `skewed_kl` and `skewed_reverse_kl`."""


class MixedDump(FrozenModel):
    """One of several dumps that are trained on together."""

    url: DumpUrl
    """Where it lies."""
    weight: float = Field(1.0, gt=0.0, le=1000.0)
    """How often each of its samples is seen in an epoch: 1 is once, 2 twice; with 0.5 an epoch sees one half of them,
    and the next epoch the other half."""
    alpha: float | None = Field(None, ge=0.0, le=1.0)
    """`loss.alpha` of its samples. Null: what that says."""
    storage_options: dict[str, str] | None = None
    """Of its object store. Null: those of the section `dump`."""


def _several(dumps: list[MixedDump]) -> list[MixedDump]:
    places = {dump.url.rstrip("/") for dump in dumps}
    if dumps and (len(dumps) < 2 or len(places) < len(dumps)):
        raise ValueError("must name two dumps or more, each once; one alone is what dump.url is for")
    return dumps


def _with_old_names(schema: dict[str, Any]) -> None:
    schema["properties"]["arm"] = schema["properties"]["method"] | {
        "description": "Old name of `method`.",
        "title": "Arm",
    }


class TrainSection(FrozenModel):
    """The optimisation."""

    model_config = ConfigDict(json_schema_extra=_with_old_names)

    output: LocalFolder
    """Run directory: config, events, checkpoints, final, summary. New or empty, or of an earlier start; one training at
    a time holds it."""
    method: Annotated[Method, BeforeValidator(_method, json_schema_input_type=Method | Arm | _Hyphenated)] = Field(
        "lora_kd", validation_alias=AliasChoices("method", "arm")
    )
    """Which weights are trained, and on what: all or a LoRA adapter, fine-tuning on the labels (SFT: cross-entropy
    alone) or distillation (KD: cross-entropy and divergence). `lora_kd` is LLM-Neo, and `neo` means it, too. The old
    name of this setting is `arm`, with the values `sft`, `lora`, `kd`, `neo` in the same order."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. Where it is not given, that of `deepspeed`, if that has one: 3 with `zero3`."""
    dumps: Annotated[list[MixedDump], AfterValidator(_several)] = []
    """Two or more dumps of one tokenizer that are mixed sample by sample, the one of the section `dump` among them:
    several corpora, or several teachers. Empty: that one alone."""
    precision: Annotated[
        Literal["bf16", "fp32"],
        BeforeValidator(_precision, json_schema_input_type=Wide),
    ] = "bf16"
    """Dtype of weights and activations, as `bf16` or `bfloat16`, `fp32` or `float32`; master weights and moments are
    always float32."""
    global_batch_size: int = Field(32, ge=1)
    """Samples per optimizer step, over all ranks. World size and micro-batch size change neither loss nor gradient."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward pass and rank, at most. Null: 4, unless `micro_batch_tokens` is given."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """In place of it, tokens per forward pass and rank, at most: samples times the longest of them, or with `packing`
    their sum. A longer sample is alone. Where lengths differ, passes are then of like size, so fewer small ones."""
    packing: bool = False
    """Put the samples of a micro-batch one after the other in one row, without attention across them, instead of
    padding them. Micro-batches are sorted by length, so there is little padding to save, and the attention of one long
    row costs more: worth it only where micro-batches hold samples of very different lengths."""
    learning_rate: float = Field(2e-4, gt=0.0)
    """Peak learning rate. The paper's rule: ten times that of full fine-tuning for the LoRA methods."""
    epochs: int = Field(1, ge=1)
    """Passes over the dump; of several dumps, as their weights say."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps; the schedule then ends there. Null: what `epochs` gives."""
    lr_scheduler_type: Schedule = "cosine"
    """Shape after the warm-up, by its name in transformers; `constant` has the warm-up, too."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """More arguments of that schedule, such as `{min_lr_rate: 0.1}` of `cosine_with_min_lr` and `{num_decay_steps: 9}`
    of `warmup_stable_decay`."""
    warmup_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the steps with a rising learning rate."""
    warmup_steps: int | None = Field(None, ge=0)
    """The number of these steps, in place of `warmup_ratio`."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's decoupled decay, of matrices: norms, biases and DoRA's magnitudes have none."""
    loraplus_lr_ratio: float | None = Field(None, gt=0.0)
    """LoRA+ (arXiv 2402.12354): the learning rate of the matrices B is this many times `learning_rate`. Null: 1."""
    neftune_noise_alpha: float | None = Field(None, gt=0.0)
    """NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while training, of this over the square root of
    a row's tokens times the hidden size. Like dropout, it differs between numbers of ranks. Null: none."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """AdamW's beta1."""
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """AdamW's beta2."""
    adam_epsilon: float = Field(1e-8, gt=0.0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the global gradient norm to this; 0: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each decoder layer, and what the head does over the vocabulary (torch.compile): a fifth more tokens per
    second on GPUs and less memory, after a first minute; needs a C++ compiler. Results differ by rounding; with dropout
    in the adapter also by other masks, which inductor draws in its own way at the same seed, and by the noise of
    NEFTune that is drawn after them. It may change between two starts of a run. Not with stage 3, which gathers weights
    inside of the layers."""
    deterministic: bool = False
    """On GPUs, let a run that is resumed or repeated on as many ranks be the same to the bit, as it is on CPUs anyway:
    kernels that add in a fixed order, flash attention's backward pass and cuBLAS among them. They are slower. What has
    no such kernel, the divergence `akl` for one, ends the run with 78. It may change between two starts of a run."""
    shuffle: Literal["windows", "epoch"] = "windows"
    """`windows`: samples are shuffled inside windows that follow each other, which can be done while the dump is being
    written. `epoch`: over all of a dump, or of each of `dumps`, which must be complete."""
    shuffle_bytes: int = Field(2 * 2**30, ge=2**20)
    """With `shuffle: epoch`: memory for decoded samples, over all ranks, which hold equal shares. The more units it has
    room for, the more of the dump a step draws from. With `windows`, a line of the log says at the start if a
    rank that shares no units with others may hold more."""
    shuffle_window_units: int = Field(1024, ge=1)
    """With `shuffle: windows`: units of a window, which is what a following trainer waits for."""
    shuffle_block_units: int = Field(8, ge=1)
    """With `shuffle: windows`: units that are shuffled together, and open at the same time."""
    head_chunk_tokens: int | None = Field(None, ge=1)
    """Supervised tokens per pass of the fused head; bounds its memory at chunk * vocabulary. Null: as many as have
    256 MiB of logits in float32, 523 with Llama 3's vocabulary."""
    logging_steps: int = Field(1, ge=1)
    """Steps between two records in events.jsonl."""
    profile: int | None = Field(None, ge=1)
    """Record so many steps, after the first three of this start, with torch.profiler. Each rank's trace is left in
    `profile/rank-N.json` of the run directory, for Perfetto or chrome://tracing. Null: none."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations on the held-out dump, `heldout.url`, without the teacher and on all ranks; one more
    before the first and one after the last step. Null: none."""
    metric_for_best_model: Metric = "kl"
    """By which the best evaluation is chosen, and early stopping decides: the forward KL or the cross-entropy; lower is
    better."""
    load_best_model_at_end: bool = False
    """Leave in `final/` what the best evaluation has seen, and not the last step: each new best is followed by a
    checkpoint, which is kept beside the newest."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """End after this many evaluations in a row without a new best. Null: never."""
    save_steps: int = Field(100, ge=1)
    """Steps between two checkpoints, which are written while training goes on."""
    save_minutes: float | None = Field(None, gt=0.0)
    """One more checkpoint wherever so many minutes have passed since the last one. Null: none."""
    snapshot_bytes: int = Field(8 * 2**30, ge=0)
    """Memory of the first rank's host for a copy of the training state, 12 bytes per trained parameter, from which a
    checkpoint is written while training goes on. While a larger state is written, training waits."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints that are kept, and with `load_best_model_at_end` the best one of the time of each."""
    checkpoint_url: StoreUrl | None = None
    """Where checkpoints lie, if not in `checkpoints/` of the run directory: `s3://bucket/runs/a` and the like, with the
    settings of `dump.storage_options`, so that a run goes on where its disk is lost. For one training alone."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto`: go on if the run directory has a checkpoint. `must`: exit 66 without one. `never`: refuse a used
    directory."""
    extend: bool = False
    """Let a run go on from its newest checkpoint under changed settings: more epochs or steps, another learning rate,
    schedule, precision, optimizer or loss. The schedule is then that of the new total, from the next step on; what has
    changed is logged, and noted in checkpoints and summary. What decides the order of samples stays."""
    warm_start: LocalFolder | None = None
    """Directory of another run, from whose newest checkpoint this one begins: with its weights and Adam's moments, on
    any dump and under any settings but those of the adapter. Steps and schedule are counted anew; what differs is
    logged. Once a run is resumed the setting has no effect; leave it. Checkpoints of a `checkpoint_url` have to be
    copied to `checkpoints/` in a directory first. `student.adapter` begins from an adapter's weights alone."""
    seed: int = Field(0, ge=-(2**63), lt=2**64)
    """Seed of the order, of the adapter's initial weights and of dropout."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers beside events.jsonl."""
    run_name: str | None = None
    """What Weights & Biases calls the run. Null: the name of the run directory."""
    project: str | None = None
    """Its project there. Null: what WANDB_PROJECT says."""
    tags: list[str] = []
    """Its tags there."""
    deepspeed: Annotated[
        dict[str, Any], BeforeValidator(_deepspeed_settings, json_schema_input_type=dict[str, Any] | str)
    ] = {}
    """DeepSpeed's own settings, merged over the defaults of the ZeRO stage: a mapping, the path of a JSON file, or
    `zero1`, `zero2`, `zero3`, `zero3_offload`. What contradicts this section is an error that names both."""
    cache_dir: LocalFolder | None = None
    """Where shards are cached on this node, and where its ranks share the units that one of them has decoded: best a
    fast disk of the node, or memory (`/dev/shm`). Null: `cache/` in the run directory."""
    cache_bytes: int | None = Field(64 * 2**30, ge=1)
    """What the shards in that folder may take; above it, those that were not used for longest go. Give it room for a
    block of units, better for the dump: then each shard is fetched once per node. Null: no limit. Units that the ranks
    share are not counted: decoded, two blocks of `shuffle_block_units` of each dump, or 16 units."""
    data_wait_seconds: float = Field(600.0, gt=0.0)
    """How long to wait for a dump to begin, and for the next window of one that is being written, before exit 75."""

    @property
    def arm(self) -> Arm:
        """The method by the name that checkpoints and summaries hold."""
        return ARMS[self.method]

    @property
    def lora(self) -> bool:
        """Whether only an adapter is trained."""
        return self.method in ("lora_sft", "lora_kd")

    @property
    def distils(self) -> bool:
        """Whether the loss has a divergence term."""
        return self.method in ("full_kd", "lora_kd")

    @property
    def micro_batch(self) -> Limit:
        """What a micro-batch may hold."""
        return Limit(self.micro_batch_size or 4, self.micro_batch_tokens or 0, packed=self.packing)

    @model_validator(mode="before")
    @classmethod
    def _stage_of_deepspeed(cls, data: Any) -> Any:
        """The stage in `deepspeed` where no other is given; what is wrong with `deepspeed` is told as that."""
        if isinstance(data, dict) and "zero_stage" not in data:
            with suppress(ValueError, AttributeError, KeyError, TypeError):
                stage = _deepspeed_settings(data["deepspeed"])["zero_optimization"]["stage"]  # type: ignore[index]
                return data | {"zero_stage": stage} if stage in (0, 1, 2, 3) else data
        return data

    @model_validator(mode="after")
    def _supported(self) -> "TrainSection":
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("zero_stage 0 with bf16 has no fp32 master weights that can be saved; use stage 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not go with zero_stage 3, which gathers weights inside of layers; use stage 2"
            )
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                "micro_batch_size and micro_batch_tokens both say what a micro-batch may hold; set one of them to null"
            )
        watching = [name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, name)]
        if watching and self.eval_steps is None:
            raise ValueError(f"{watching[0]} needs evaluations: set eval_steps")
        if self.loraplus_lr_ratio is not None and not self.lora:
            raise ValueError(f"loraplus_lr_ratio is for the methods lora_sft and lora_kd; {self.method} has no adapter")
        return self


class Resolved(FrozenModel):
    """What a training is told, as it stands in resolved.json."""

    dump: DumpSection
    """Where the targets lie; the rest of the section is stage one's. With `train.dumps` it is one of these."""
    student: StudentSection
    loss: LossSection
    train: TrainSection
    stated: dict[str, Any] = {}
    """Settings of stage one that the configuration names, dotted name -> value: refused if they are not the dump's."""
    heldout: DumpSection | None = None
    """Where the targets of held-out samples lie, for `train.eval_steps`."""


def sections_of(dump: DumpSection, train: TrainSection | None) -> list[DumpSection]:
    """Where the dumps lie that are trained on: the one of the section `dump`, or those of `train.dumps`."""
    if train is None or not train.dumps:
        return [dump]
    given = dump.storage_options
    return [
        DumpSection(url=one.url, storage_options=given if one.storage_options is None else one.storage_options)
        for one in train.dumps
    ]
