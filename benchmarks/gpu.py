"""Both stages on one GPU, beside what transformers, peft and TRL do there: `make bench-gpu`. Ten minutes at most.

Models have the shapes of Llama-3.1-8B (teacher) and Llama-3.2-1B (student) and random weights, in bfloat16; samples are
random tokens, the last 60 % of each supervised. Nothing is downloaded. Writes runs/bench/gpu.json, and prints a table:
tokens per second (all tokens that go through the model), share of the rate of a large matrix product (`ceiling`, taken
in the same run) that the arithmetic of the models reaches, and peak memory.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from results import quiet, shown, versions
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from train_workload import plain_inputs
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from storage_schemas.config import Adaptive, DumpSection, Estimator, Sampled, TopK
from storage_schemas.logits import compile_layers
from storage_schemas.provenance import TeacherIdentity
from storage_schemas.reader import Dump
from student_train.config import LoraSection, LossSection, Resolved, StudentSection, TrainSection
from student_train.data.batch import TrainBatch, collate
from student_train.engine import join
from student_train.metrics import EVENTS, read_events
from student_train.model.student import causal_of, load_student
from student_train.train import train
from student_train.world import World
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.dump import run_dump
from teacher_dump.teachers.teacher import Teacher

OUT, SCRATCH = Path("runs/bench/gpu.json"), Path("runs/bench/gpu")
VOCAB, TOKENS, SUPERVISED = 128256, 512, 307
BATCH_TOKENS = 32768
"""Of stage one."""
MICRO, ROWS = 32, 64
"""Samples of a micro-batch and of a step of stage two."""
RANK, ALPHA = 128, 0.9
SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "student": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
ESTIMATORS: dict[str, Estimator] = {
    "topk, k=64": TopK(k=64, mass=1.0),
    "adaptive": Adaptive(kind="adaptive", mass=0.9, k_min=1, k_max=64, tail_draws=16),
    "sampled, 50 draws": Sampled(kind="sampled", draws=50),
}
CEILING, RATE = "ceiling: bf16 matrix product, TFLOP/s", ": tokens/s"
FLOP: dict[str, float] = {}
"""Per token, of what has a rate whose share of the ceiling is shown: name -> arithmetic that it cannot do without."""
Rows = Iterator[tuple[str, float]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="two layers of 64: to try the benchmark itself")
    parser.add_argument("--samples", type=int, default=768, help="samples that each estimator is dumped on")
    arguments = parser.parse_args()
    quiet()
    if not torch.cuda.is_available():
        raise SystemExit(f"no GPU that torch {torch.__version__} can use")
    shutil.rmtree(SCRATCH, ignore_errors=True)
    for role in ("teacher", "student"):
        save_shape(SCRATCH / role, SHAPES["tiny" if arguments.tiny else role])
    rows = {CEILING: ceiling() / 1e12}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    for section in arguments.only:
        began = time.monotonic()
        for name, value in SECTIONS[section](arguments):
            rows[name] = value
            if name.endswith(RATE) and name.removesuffix(RATE) in FLOP:
                of_ceiling = value * FLOP[name.removesuffix(RATE)] / 1e12 / rows[CEILING]
                rows[name.removesuffix(RATE) + ": share of the ceiling"] = of_ceiling
            print(f"{name}: {value:.5g}", flush=True)
            OUT.write_text(json.dumps(rows, indent=2) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{section}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"{torch.cuda.get_device_name()}; {versions('torch', 'transformers', 'peft', 'deepspeed', 'trl')}")
    print(f"{TOKENS} tokens per sample, {SUPERVISED} supervised; rank {RANK}\n\n| | value |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {shown(value)} |")


def save_shape(folder: Path, shape: dict[str, Any]) -> None:
    """A model's folder, its file of weights empty."""
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=8192, eos_token_id=1, bos_token_id=0, **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


def random_model(folder: Path) -> Any:
    """A model of that shape, on the GPU in bfloat16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()


def ceiling() -> float:
    """FLOP/s of a large matrix product of bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(seconds(lambda: a @ b, times=20)[5:])


def seconds(work: Callable[[], Any], *, times: int) -> list[float]:
    """How long it takes, each time."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def linear_weights(model: nn.Module) -> int:
    """Weights of the linear layers, without the LM head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def attention(config: Any) -> float:
    """FLOP of attention's two products per token, forward, half of which the causal mask leaves."""
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(2 * config.num_hidden_layers * width * TOKENS)


class RandomTeacher(Teacher):
    """A teacher whose weights are made, not read."""

    def load_model(self) -> Any:
        """They are made on the GPU."""
        return random_model(self.files.folder)

    def refuse_unloadable(self) -> None:
        """There are no files to refuse."""

    def identify(self) -> TeacherIdentity:
        """Not that of any files."""
        return TeacherIdentity(
            config_sha256="0" * 64, weights_sha256={}, dtype="bfloat16", lm_head_rows=self.lm_head_rows
        )


def corpus(samples: int) -> CorpusSection:
    """Random samples."""
    path = SCRATCH / f"corpus-{samples}.jsonl"
    ids = torch.randint(2, VOCAB, (samples, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    mask = [False] * (TOKENS - SUPERVISED) + [True] * SUPERVISED
    path.write_text("".join(json.dumps({"input_ids": row, "loss_mask": mask}) + "\n" for row in ids))
    return CorpusSection(sources=[SourceSection(path=str(path))], max_length=TOKENS)


def random_teacher() -> RandomTeacher:
    """The teacher as stage one has it."""
    return RandomTeacher(TeacherSection(model=str(SCRATCH / "teacher"), dtype="bfloat16", batch_tokens=BATCH_TOKENS))


def stage_one(arguments: argparse.Namespace) -> Rows:
    """Whole dumps, everything included from the first batch to the last commit, beside bare forward passes."""
    teacher = random_teacher()
    model = teacher.model
    ids = torch.randint(2, VOCAB, (BATCH_TOKENS // TOKENS, TOKENS), device="cuda")

    @torch.inference_mode()
    def naive() -> None:
        part = ids[: len(ids) // 4]
        logits = model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits
        logits.float().log_softmax(-1).topk(64)

    yield from body_alone(model, ids, "stage one: the body's forward alone")
    torch.cuda.reset_peak_memory_stats()
    yield (
        "stage one: forward, log_softmax and topk of all logits, by transformers: tokens/s",
        ids.numel() / 4 / statistics.median(seconds(naive, times=5)[1:]),
    )
    yield "stage one: the same, GiB above the weights, at a quarter of the batch", peak_above(model)
    for name, estimator in ESTIMATORS.items():
        yield from dumps(teacher, f"stage one, {name}", estimator, arguments.samples)


def stage_one_compiled(arguments: argparse.Namespace) -> Rows:
    """The same with the decoder layers compiled."""
    teacher = random_teacher()
    compile_layers(teacher.model, partial(torch.compile, dynamic=True), role="teacher")
    ids = torch.randint(2, VOCAB, (BATCH_TOKENS // TOKENS, TOKENS), device="cuda")
    yield from body_alone(teacher.model, ids, "stage one, compiled: the body's forward alone")
    yield from dumps(teacher, "stage one, compiled, topk, k=64", ESTIMATORS["topk, k=64"], arguments.samples)


def body_alone(model: Any, ids: Tensor, name: str) -> Rows:
    """The hidden states of a full batch."""

    @torch.inference_mode()
    def body() -> None:
        model.model(input_ids=ids, use_cache=False)

    yield f"{name}: tokens/s", ids.numel() / statistics.median(seconds(body, times=5)[1:])


def dumps(teacher: RandomTeacher, name: str, estimator: Estimator, samples: int) -> Rows:
    """A dump, after a short one that pays for what is done once."""
    config = teacher.model.config
    head = config.hidden_size * VOCAB * SUPERVISED / TOKENS
    FLOP[name] = 2 * linear_weights(teacher.model) + 2 * head + attention(config)
    for count in (64, samples):
        torch.cuda.reset_peak_memory_stats()
        url = SCRATCH / f"dump-{estimator.kind}"
        shutil.rmtree(url, ignore_errors=True)
        given = {"corpus": corpus(count), "estimator": estimator}
        told = run_dump(dump=DumpSection(url=str(url), samples_per_unit=256), teacher=teacher, **given)
    yield f"{name}: tokens/s", told.tokens_per_second or 0.0
    yield f"{name}: GiB above the weights", peak_above(teacher.model)


def peak_above(model: nn.Module) -> float:
    """GiB, since the peak was last reset."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (torch.cuda.max_memory_allocated() - weights) / 2**30


def student_folder() -> Path:
    """The student's weights on disk, as training reads them."""
    folder = SCRATCH / "student"
    if (folder / "model.safetensors").stat().st_size < 1000:
        random_model(folder).save_pretrained(folder)
    return folder


def dumped(samples: int) -> Path:
    """A dump of the teacher's tokenizer: that of stage one, or of a tiny teacher where stage one is not run."""
    url = SCRATCH / "dump-topk"
    if not (url / "SEALED.json").exists():
        save_shape(SCRATCH / "stand-in", SHAPES["tiny"])
        section = TeacherSection(model=str(SCRATCH / "stand-in"), dtype="bfloat16", batch_tokens=BATCH_TOKENS)
        given = {"corpus": corpus(samples), "estimator": ESTIMATORS["topk, k=64"]}
        run_dump(dump=DumpSection(url=str(url), samples_per_unit=256), teacher=RandomTeacher(section), **given)
    return url


def sections(output: Path, **changes: Any) -> dict[str, Any]:
    """The sections student, loss and train."""
    settings: dict[str, Any] = {
        "global_batch_size": ROWS, "micro_batch_size": MICRO, "precision": "bf16", "zero_stage": 2, "logging_steps": 1,
        "save_steps": 10**6, "warmup_ratio": 0.0, "epochs": 100,
    }  # fmt: skip
    return {
        "student": StudentSection(model=str(student_folder()), lora=LoraSection(r=RANK)),
        "loss": LossSection(alpha=ALPHA),
        "train": TrainSection(output=output, **(settings | changes)),
    }


@cache
def world() -> World:
    """One rank."""
    return join(0, 1, 0, rendezvous=f"file://{(SCRATCH / 'rendezvous').absolute()}")


def stage_two(arguments: argparse.Namespace) -> Rows:
    """`train` as `llm-neo train` runs it, on one rank."""
    yield from trained(arguments, "stage two, ZeRO-2")
    yield from trained(arguments, "stage two, ZeRO-2, gradient checkpointing", gradient_checkpointing=True)
    yield from trained(arguments, "stage two, ZeRO-3", zero_stage=3)


def stage_two_compiled(arguments: argparse.Namespace) -> Rows:
    """The same with the decoder layers compiled."""
    yield from trained(arguments, "stage two, compiled, ZeRO-2", compile=True)
    checkpointing = {"gradient_checkpointing": True, "compile": True}
    yield from trained(arguments, "stage two, compiled, ZeRO-2, gradient checkpointing", **checkpointing)


def trained(arguments: argparse.Namespace, name: str, **changes: Any) -> Rows:
    """Ten steps."""
    url = dumped(arguments.samples)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    output = SCRATCH / f"run-{name}"
    train(world(), Resolved(dump=DumpSection(url=str(url)), **sections(output, max_steps=10, **changes)))
    events = read_events(output / EVENTS)[3:]
    if not changes.get("gradient_checkpointing"):
        FLOP[name] = step_flop(AutoConfig.from_pretrained(student_folder()))
    rate = statistics.median(event.tokens_per_second for event in events)
    yield f"{name}: tokens/s", rate
    wait = sum(event.data_wait_seconds for event in events)
    yield f"{name}: share of a step that waits for data", wait / (len(events) * ROWS * TOKENS / rate)
    yield f"{name}: peak GiB", torch.cuda.max_memory_allocated() / 2**30


def step_flop(config: Any) -> float:
    """FLOP per token that a step needs: forward, gradients of activations, and of the adapter's weights alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    body = linear_weights(model)
    head = model.get_output_embeddings()
    adapter = sum(RANK * sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return 4 * body + 6 * adapter + 4 * config.hidden_size * VOCAB * SUPERVISED / TOKENS + 3 * attention(config)


def rivals(arguments: argparse.Namespace) -> Rows:
    """A step on one micro-batch: Neo, LoRA fine-tuning, distillation with the teacher beside the student; in turn."""
    dump = Dump.open(str(dumped(arguments.samples)))
    unit = dump.read_unit(0)
    batch = collate([unit.row(i) for i in range(MICRO)], temperature_index=0, temperature=1.0, vocab_size=VOCAB)
    made: dict[str, Callable[[], float]] = {}
    for name, make in CONTENDERS.items():
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step = make(dump, batch.to("cuda"))
            step()
            step()
            yield f"step of {name}: peak GiB", (torch.cuda.max_memory_allocated() - before) / 2**30
            made[name] = step
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(6):
        for name in list(made)[:: -1 if turn % 2 else 1]:
            times[name] += seconds(made[name], times=2)
    for name, taken in times.items():
        yield f"step of {name}: tokens/s", batch.tokens / statistics.median(taken)
    for name in list(made)[1:]:
        yield f"step of Neo / {name}", statistics.median(times["Neo"]) / statistics.median(times[name])
    for name in ("Neo", "Neo, layers compiled"):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            made[name]()
            torch.cuda.synchronize()
        kernels = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        total = sum(event.self_device_time_total for event in kernels)
        yield f"step of {name}: kernels", sum(event.count for event in kernels)
        yield f"step of {name}: seconds that the GPU is busy", total / 1e6
        print(f"{name}: kernels by their share of the GPU's time", flush=True)
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
            print(f"  {event.self_device_time_total / total:6.1%} {event.count:5d} {event.key[:100]}", flush=True)


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every contender."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward, backward and update; the loss before it."""
    optimizer = adam(model.parameters())

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value)

    return step


def neo(dump: Dump, batch: TrainBatch, *, compiled: bool = False) -> Callable[[], float]:
    """Stored targets and the fused head; no teacher. All in bfloat16, without masters in fp32, which `train` has."""
    given = sections(SCRATCH / "unused")
    module = load_student(given["student"], [given["loss"]], given["train"], dump.provenance).module
    module.cuda().to(torch.bfloat16).train()
    if compiled:
        compile_layers(causal_of(module.student), partial(torch.compile, dynamic=True), role="train")
    return stepper(module, lambda: module(batch)[0] / len(batch.targets))


def neo_compiled(dump: Dump, batch: TrainBatch) -> Callable[[], float]:
    """The same, each decoder layer compiled."""
    return neo(dump, batch, compiled=True)


def plain_student() -> Any:
    """The student and its adapter by transformers and peft, as people have it: base in bfloat16, adapter in fp32."""
    base = AutoModelForCausalLM.from_pretrained(student_folder(), dtype=torch.bfloat16).cuda()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return get_peft_model(base, config).train()


def sft(dump: Dump, batch: TrainBatch) -> Callable[[], float]:
    """LoRA fine-tuning on labels."""
    model, inputs = plain_student(), plain_inputs(batch)

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(**inputs, use_cache=False).loss  # type: ignore[no-any-return]

    return stepper(model, loss)


def online_kd(dump: Dump, batch: TrainBatch) -> Callable[[], float]:
    """The teacher runs in every step; CE and the full KL on the logits of the supervised positions."""
    model, teacher, inputs = (
        plain_student(),
        random_model(SCRATCH / "teacher").requires_grad_(False),
        plain_inputs(batch),
    )
    labels = inputs.pop("labels")
    supervised = labels[:, 1:] != -100
    wanted = labels[:, 1:][supervised]

    def loss() -> Tensor:
        with torch.no_grad():
            theirs = teacher(**inputs, use_cache=False).logits[:, :-1][supervised].float().log_softmax(-1)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits[:, :-1][supervised]
        ours = logits.float().log_softmax(-1)
        ce = nn.functional.nll_loss(ours, wanted)
        kl = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - ALPHA) * ce + ALPHA * kl

    return stepper(model, loss)


def trl_gkd(dump: Dump, batch: TrainBatch) -> Callable[[], float]:
    """The step of TRL's GKDTrainer, off-policy (lmbda 0) with the forward KL (beta 0); it has no CE of its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    os.environ.pop("LOCAL_RANK", None)  # By which it would take this for one process of many.
    settings: dict[str, Any] = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "max_steps": 1000, "report_to": []}
    settings |= {"output_dir": str(SCRATCH / "gkd"), "bf16": True, "gradient_checkpointing": False}
    trainer = GKDTrainer(
        model=plain_student(),
        teacher_model=random_model(SCRATCH / "teacher").requires_grad_(False),
        args=GKDConfig(per_device_train_batch_size=MICRO, **settings),
        train_dataset=Dataset.from_list([{"messages": []}]),
        processing_class=AutoTokenizer.from_pretrained(SCRATCH / "teacher"),
    )
    inputs, model = plain_inputs(batch), trainer.model.train()
    optimizer = adam(model.parameters())

    def step() -> float:
        trainer.training_step(model, dict(inputs), num_items_in_batch=torch.tensor(len(batch.targets)))
        optimizer.step()
        optimizer.zero_grad()
        return float("nan")

    return step


CONTENDERS: dict[str, Callable[[Dump, TrainBatch], Callable[[], float]]] = {
    "Neo": neo,
    "Neo, layers compiled": neo_compiled,
    "LoRA SFT of transformers + peft": sft,
    "online-teacher KD": online_kd,
}
if find_spec("trl"):
    CONTENDERS["TRL GKD"] = trl_gkd
SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "one": stage_one,
    "one-compiled": stage_one_compiled,
    "two": stage_two,
    "two-compiled": stage_two_compiled,
    "rivals": rivals,
}


if __name__ == "__main__":
    main()
