"""Stage one against a bare forward pass: `make bench-dump`. Writes runs/bench/dump.json and prints the table.

Both sides run the same samples under the same token budget with the same threads, taking turns. The bare side is
`model(**batch)` in arrival order with padding and attention mask, and throws its logits away; the dump side is
`run_dump`, everything included from the first batch to the last commit. The limit is the time that the teacher's
matrix products alone would take at the rate that this machine reaches on a large one.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from results import machine, refuse_missed, resident, seconds, table, versions

import teacher_dump.teachers.teacher
from storage_schemas.config import Adaptive, DumpSection, Estimator, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.rows import Row
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.freeze import Corpus, freeze_corpus
from teacher_dump.dump import run_dump
from teacher_dump.teachers.teacher import Teacher

DATA = Path(__file__).parent / "data" / "gsm8k_150.jsonl"
OUT, SCRATCH = Path("runs/bench/dump.json"), Path("runs/bench/dump")
ADAPTIVE = Adaptive(kind="adaptive", mass=0.9, k_min=1, k_max=16, tail_draws=4)
MEMORY_TOKENS = 8192
UNIT = 5
"""Samples per unit where two workers share a dump."""
GOALS = {
    "assistant-masked: dump / bare, tokens per second": 1.3,
    "every token supervised, sorted: dump / bare, tokens per second": 0.95,
    "topk: share of time outside the forward": 0.05,
    "adaptive: share of time outside the forward": 0.10,
    "peak memory above the model at 8192 tokens: dump / bare": 1 / 3,
    "adaptive: bytes per supervised token": 32.0,
    "two workers / one, a thread each, tokens per second": 1.7,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peak", choices=("bare", "dump"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.peak:
        print(json.dumps(peak_memory(arguments.teacher, arguments.peak)))
        return
    if arguments.worker:
        worker(arguments, *arguments.worker)
        return
    rows = speed(arguments) | memory(arguments.teacher) | workers(arguments)
    print(f"{arguments.samples} conversations, batch_tokens {arguments.batch_tokens}, fp32; {machine()}")
    print(versions("torch", "transformers", "pyarrow"), "", *table(OUT, rows, GOALS), sep="\n")
    refuse_missed(rows, GOALS)


def speed(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of both sides, best of the repetitions, and where the dump's time goes."""
    teacher = Teacher(section(arguments.teacher, arguments.batch_tokens))
    parts = {name: Stopwatch(teacher_dump.teachers.teacher, name) for name in ("_hidden", "_logits", "estimate")}
    rows: dict[str, float] = {}
    for title, mask, ordered in (
        ("assistant-masked", "assistant", False),
        ("every token supervised, sorted", "all", True),
    ):
        corpus = corpus_of(teacher, mask, arguments.samples)
        samples = samples_of(corpus, ordered=ordered)
        tokens = sum(len(sample.input_ids) for sample in samples)
        bare, dumped = 0.0, 0.0
        for _ in range(arguments.repetitions):
            bare = max(bare, tokens / seconds(lambda s=samples: forward_all(teacher, s, arguments.batch_tokens)))
            found = dump(teacher, mask, arguments.samples, TopK())
            dumped = max(dumped, found["tokens_per_second"])
        rows |= {f"{title}: bare, tokens per second": bare, f"{title}: dump, tokens per second": dumped}
        rows[f"{title}: dump / bare, tokens per second"] = dumped / bare
        rows[f"{title}: limit, tokens per second"] = limit(teacher.model, samples)
    for estimator in (TopK(), ADAPTIVE):
        for part in parts.values():
            part.seconds = 0.0
        found = dump(teacher, "assistant", arguments.samples, estimator)
        shares = {name: part.seconds / found["seconds"] for name, part in parts.items()}
        name = estimator.kind
        rows[f"{name}: share of time in the body"] = shares["_hidden"]
        rows[f"{name}: share of time in the head"] = shares["_logits"]
        rows[f"{name}: share of time in the estimator"] = shares["estimate"]
        rows[f"{name}: share of time outside the forward"] = 1 - shares["_hidden"] - shares["_logits"]
        rows[f"{name}: bytes per supervised token"] = found["bytes_per_supervised_token"]
    return rows


def limit(model: Any, samples: Sequence[Row]) -> float:
    """Tokens per second if the linear layers' products were all there is, the head's on supervised positions only."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rate = 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))
    head = model.get_output_embeddings()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    supervised = sum(int(sample.loss_mask.sum()) for sample in samples)
    tokens = sum(len(sample.input_ids) for sample in samples)
    return tokens / (2 * (body * tokens + head.weight.numel() * supervised) / rate)


def workers(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one worker and of two at the same dump, each a process with one thread."""
    rates = {}
    for count in (1, 2):
        shutil.rmtree(SCRATCH, ignore_errors=True)
        command = [sys.executable, __file__, "--teacher", arguments.teacher, "--samples", str(arguments.samples)]
        command += ["--batch-tokens", str(arguments.batch_tokens)]
        processes = [
            subprocess.Popen([*command, "--worker", str(rank), str(count)], text=True, stdin=-1, stdout=-1)
            for rank in range(count)
        ]
        for process in processes:
            process.stdout.readline()
        begin = time.perf_counter()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        tokens = sum(int(process.communicate()[0]) for process in processes)
        rates[count] = tokens / (time.perf_counter() - begin)
    return {
        "one worker, one thread, tokens per second": rates[1],
        "two workers, a thread each, tokens per second": rates[2],
        "two workers / one, a thread each, tokens per second": rates[2] / rates[1],
    }


def worker(arguments: argparse.Namespace, rank: int, world_size: int) -> None:
    """One worker: loads, says so, waits for the start, and prints the tokens that it sent through the teacher."""
    torch.set_num_threads(1)
    teacher = Teacher(section(arguments.teacher, arguments.batch_tokens))
    _ = teacher.model
    print("ready", flush=True)
    sys.stdin.readline()
    found = run_dump(
        dump=DumpSection(url=str(SCRATCH), samples_per_unit=UNIT),
        teacher=teacher,
        corpus=corpus_section("assistant", arguments.samples),
        estimator=TopK(),
        rank=rank,
        world_size=world_size,
    )
    print(found.tokens_here, flush=True)


def memory(teacher: str) -> dict[str, float]:
    """Peak resident memory above the loaded model, of a process for each side."""
    peaks = {}
    for side in ("bare", "dump"):
        command = [sys.executable, __file__, "--teacher", teacher, "--peak", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[side] = float(json.loads(done.stdout.splitlines()[-1]))
    rows = {f"peak memory above the model at {MEMORY_TOKENS} tokens: {k}, MiB": v / 2**20 for k, v in peaks.items()}
    return rows | {f"peak memory above the model at {MEMORY_TOKENS} tokens: dump / bare": peaks["dump"] / peaks["bare"]}


def peak_memory(name: str, side: str) -> int:
    """Bytes above the loaded model, while one batch of MEMORY_TOKENS goes through."""
    teacher = Teacher(section(name, MEMORY_TOKENS))
    samples = samples_of(corpus_of(teacher, "assistant", 150), ordered=False)
    batch = next(batches(samples, MEMORY_TOKENS))
    _ = teacher.model
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # From here on the kernel notes the peak anew.
    if side == "bare":
        forward_all(teacher, batch, MEMORY_TOKENS)
    else:
        teacher.targets(batch, Recipe(estimator=TopK(), logsumexp=True))
    return resident("VmHWM") - base


class Stopwatch:
    """Adds up the time that a function of a module takes."""

    def __init__(self, module: Any, name: str) -> None:
        self.seconds = 0.0
        setattr(module, name, self._timed(getattr(module, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def section(name: str, batch_tokens: int) -> TeacherSection:
    """The teacher, in fp32 on the CPU."""
    return TeacherSection(model=name, dtype="float32", device="cpu", batch_tokens=batch_tokens)


def corpus_section(mask: Any, samples: int) -> CorpusSection:
    """The first conversations of GSM8K."""
    return CorpusSection(sources=[SourceSection(path=str(DATA), split=f"train[:{samples}]")], mask=mask)


def corpus_of(teacher: Teacher, mask: str, samples: int) -> Corpus:
    """The same, tokenised."""
    return freeze_corpus(corpus_section(mask, samples), teacher.tokenizer, lm_head_rows=teacher.lm_head_rows)


def samples_of(corpus: Corpus, *, ordered: bool) -> list[Row]:
    """All samples, in arrival order or the longest first."""
    samples = [corpus.sample(index) for index in range(len(corpus))]
    return sorted(samples, key=lambda sample: -len(sample.input_ids)) if ordered else samples


def batches(samples: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Consecutive samples whose padded size stays in the budget."""
    batch: list[Row] = []
    for sample in samples:
        longest = max(len(s.input_ids) for s in [*batch, sample])
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


@torch.inference_mode()
def forward_all(teacher: Teacher, samples: Sequence[Row], budget: int) -> None:
    """`model(**batch)` for every batch; the logits are thrown away."""
    for batch in batches(samples, budget):
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s.input_ids.astype("int64")) for s in batch], True)
        lengths = torch.tensor([len(s.input_ids) for s in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        teacher.model(input_ids=ids, attention_mask=mask, use_cache=False)


def dump(teacher: Teacher, mask: str, samples: int, estimator: Estimator) -> dict[str, Any]:
    """A whole dump into an empty directory; its summary."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    target = DumpSection(url=str(SCRATCH), samples_per_unit=samples)
    found = run_dump(dump=target, teacher=teacher, corpus=corpus_section(mask, samples), estimator=estimator)
    return found.model_dump()


if __name__ == "__main__":
    main()
