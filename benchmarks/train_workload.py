"""What `benchmarks/train.py` trains on, and who takes a step: a dump of real text, a student of 12 layers, and Neo
beside its rivals on one and the same batch."""

import importlib.util
import itertools
import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from results import quiet
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage_schemas.config import DumpSection, TopK
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from student_train.config import LoraSection, LossSection, StudentSection, TrainSection
from student_train.data.batch import SparseTargets, TrainBatch, collate
from student_train.model.student import Distilled, load_student

DATA = Path(__file__).parent / "data" / "gsm8k_150.jsonl"
SCRATCH = Path("runs/bench/train")
SAMPLES, UNIT, BATCH, TOKENS, SUPERVISED, LAYERS, K, RANK = 64, 16, 4, 256, 154, 12, 64, 16
"""Samples of the dump, per unit and per step; tokens per sample, 60 % of them supervised; layers of the student."""
ALPHA, HELDOUT = 0.5, 8

Step = Callable[[], float]
"""Forward, backward and AdamW on the batch; the cross-entropy per supervised token before the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Where the models and the dump lie."""

    teacher: Path
    student: Path
    dump: Path
    heldout: Path

    @property
    def provenance(self) -> Provenance:
        """The dump's run.json."""
        return Dump.open(str(self.dump)).provenance

    def batch(self) -> TrainBatch:
        """The first samples, as training gets them."""
        vocab = self.provenance.teacher.lm_head_rows
        return collate(rows_of(self.dump)[:BATCH], temperature_index=0, temperature=1.0, vocab_size=vocab)

    def student_section(self) -> StudentSection:
        """The student and its adapter."""
        return StudentSection(model=str(self.student), lora=LoraSection(r=RANK))

    def train_section(self, output: Path, **changes: Any) -> TrainSection:
        """One micro-batch per step, fp32, ZeRO-2."""
        sizes: dict[str, Any] = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "shuffle_block_units": 2}
        return TrainSection(output=output, precision="fp32", **(sizes | changes))


def workload_at(teacher: Path) -> Workload:
    """Where it all lies."""
    return Workload(teacher=teacher, student=SCRATCH / "student", dump=SCRATCH / "dump", heldout=SCRATCH / "heldout")


def make_workload(teacher: str) -> Workload:
    """Whatever of it is not there yet."""
    # Here, as further down: peak memory is to be that of a step, not of stage one's libraries.
    from storage import find_teacher

    from pipeline.prune import prune

    work = workload_at(find_teacher(Path(teacher)))
    SCRATCH.mkdir(parents=True, exist_ok=True)
    prune(str(work.teacher), work.student, layers=LAYERS)
    dump(work, work.dump, TopK(k=K))
    dump(work, work.heldout, TopK(k=K), range(SAMPLES, SAMPLES + HELDOUT))
    batch = work.batch()
    assert batch.input_ids.shape == (BATCH, TOKENS)
    assert len(batch.targets) == BATCH * SUPERVISED
    assert batch.targets.ids.shape[1] == K
    return work


def dump(work: Workload, url: Path, estimator: TopK, samples: range = range(SAMPLES)) -> Path:
    """The teacher's targets of some samples, unless they are there."""
    if not (url / "SEALED.json").is_file():
        from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
        from teacher_dump.dump import run_dump

        corpus = SCRATCH / f"corpus-{url.name}.jsonl"
        corpus.write_text("".join(json.dumps(record) + "\n" for record in records(work.teacher, samples)))
        run_dump(
            dump=DumpSection(url=str(url), samples_per_unit=UNIT),
            teacher=TeacherSection(model=str(work.teacher), dtype="float32", device="cpu", batch_tokens=2048),
            corpus=CorpusSection(sources=[SourceSection(path=str(corpus))]),
            estimator=estimator,
        )
    return url


def rows_of(url: Path) -> list[Row]:
    """All samples of a dump."""
    dump = Dump.open(str(url))
    units = [dump.read_unit(unit) for unit in range(dump.provenance.units)]
    return [unit.row(i) for unit in units for i in range(len(unit))]


def records(teacher: Path, samples: range) -> Iterator[dict[str, Any]]:
    """Conversations one after the other, cut into samples of equal length; the end of each is supervised."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(line["messages"], tokenize=False) for line in lines]
    ids = list(itertools.chain.from_iterable(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))
    assert len(ids) >= samples.stop * TOKENS
    mask = [False] * (TOKENS - SUPERVISED) + [True] * SUPERVISED
    for start in range(samples.start * TOKENS, samples.stop * TOKENS, TOKENS):
        yield {"input_ids": ids[start : start + TOKENS], "loss_mask": mask}


def distilled(work: Workload) -> Distilled:
    """The student as `llm-neo train` makes it."""
    train = work.train_section(SCRATCH)
    return load_student(work.student_section(), [LossSection(alpha=ALPHA)], train, work.provenance).module


def neo(work: Workload, batch: TrainBatch) -> Step:
    """Stored targets, the fused head; no teacher."""
    module = distilled(work).train()
    adam = torch.optim.AdamW([p for _, p in module.trained()], lr=1e-4, weight_decay=0.0)

    def step() -> float:
        loss, sums = module(batch)
        (loss / len(batch.targets)).backward()
        adam.step()
        adam.zero_grad()
        return float(sums[1]) / len(batch.targets)

    return step


def plain_student(work: Workload) -> nn.Module:
    """The same student and adapter by transformers and peft alone."""
    base = AutoModelForCausalLM.from_pretrained(work.student, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return get_peft_model(base, config).train()


def plain_inputs(batch: TrainBatch) -> dict[str, Tensor]:
    """The batch as transformers takes it: labels are -100 where nothing is supervised."""
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.positions + 1] = batch.targets.labels
    return {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "labels": labels.view_as(batch.input_ids),
    }


def sft(work: Workload, batch: TrainBatch) -> Step:
    """LoRA fine-tuning on labels: model(input_ids, attention_mask, labels)."""
    model, inputs = plain_student(work), plain_inputs(batch)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def step() -> float:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss)

    return step


def teacher_model(work: Workload) -> nn.Module:
    """The teacher, which online distillation has in memory."""
    return AutoModelForCausalLM.from_pretrained(work.teacher, dtype=torch.float32).eval().requires_grad_(False)


def online_kd(work: Workload, batch: TrainBatch) -> Step:
    """The teacher runs in every step; CE and the full KL on dense logits, of the supervised positions only."""
    model, teacher, inputs = plain_student(work), teacher_model(work), plain_inputs(batch)
    labels = inputs.pop("labels")
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    supervised = labels[:, 1:] != -100
    wanted = labels[:, 1:][supervised]

    def step() -> float:
        with torch.no_grad():
            theirs = teacher(**inputs, use_cache=False).logits[:, :-1][supervised].log_softmax(-1)
        ours = model(**inputs, use_cache=False).logits[:, :-1][supervised].log_softmax(-1)
        ce = nn.functional.nll_loss(ours, wanted)
        kl = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        ((1 - ALPHA) * ce + ALPHA * kl).backward()
        adam.step()
        adam.zero_grad()
        return float(ce)

    return step


def trl_gkd(work: Workload, batch: TrainBatch) -> Step:
    """The step of TRL's GKDTrainer, off-policy (lmbda 0) with the forward KL (beta 0); it has no CE of its own."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "max_steps": 1000, "report_to": [], "use_cpu": True}
    trainer = GKDTrainer(
        model=plain_student(work),
        teacher_model=teacher_model(work),
        args=GKDConfig(
            output_dir=str(SCRATCH / "gkd"), per_device_train_batch_size=BATCH, bf16=False,
            gradient_checkpointing=False, **settings,
        ),
        train_dataset=Dataset.from_list([{"messages": []}]),
        processing_class=AutoTokenizer.from_pretrained(work.teacher),
    )  # fmt: skip
    inputs, model = plain_inputs(batch), trainer.model.train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def step() -> float:
        trainer.training_step(model, dict(inputs), num_items_in_batch=torch.tensor(len(batch.targets)))
        adam.step()
        adam.zero_grad()
        return float("nan")

    return step


CONTENDERS: dict[str, Callable[[Workload, TrainBatch], Step]] = {
    "Neo": neo,
    "LoRA SFT of transformers + peft": sft,
    "online-teacher KD": online_kd,
}
if importlib.util.find_spec("trl"):
    CONTENDERS["TRL GKD"] = trl_gkd


def random_batch(rows: int, tokens: int, *, vocab: int, k: int, seed: int = 0) -> TrainBatch:
    """Like a batch of a dump, of made-up tokens: the last 60 % of each row are supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, tokens), generator=generator)
    first = tokens - round(tokens * SUPERVISED / TOKENS)
    positions = torch.arange(rows * tokens).view(rows, tokens)[:, first - 1 : -1].flatten()
    return TrainBatch(
        input_ids=ids,
        position_ids=torch.arange(tokens).repeat(rows, 1),
        positions=positions,
        parts=(random_targets(ids[:, first:].flatten(), vocab=vocab, k=k, generator=generator),),
        tokens=rows * tokens,
        lengths=torch.full((rows,), tokens),
    )


def random_targets(labels: Tensor, *, vocab: int, k: int, generator: torch.Generator) -> SparseTargets:
    """Heads of k entries that hold 98 % of the mass."""
    n = len(labels)
    start = torch.randint(vocab, (n, 1), generator=generator)
    logprobs = torch.randn(n, k, generator=generator).mul(2).log_softmax(1) + float(np.log(0.98))
    return SparseTargets(
        labels=labels,
        ids=((start + torch.arange(k) * (vocab // k)) % vocab).int(),
        logprobs=logprobs,
        weights=logprobs.exp(),
        in_head=torch.ones(n, k, dtype=torch.bool),
        tail_logprob=torch.full((n,), float(np.log(0.02))),
        has_draws=False,
    )


def main() -> None:
    """The peak resident memory in bytes of a process that takes steps: TEACHER CONTENDER THREADS."""
    quiet()
    torch.set_num_threads(int(sys.argv[3]))
    work = workload_at(Path(sys.argv[1]))
    step = CONTENDERS[sys.argv[2]](work, work.batch())
    for _ in range(3):
        step()
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
