"""The rows of `benchmarks/train.py` that need no training: the loader, starting on a huge dump, and how the cost of
the head and of a step grows."""

import gc
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from results import seconds
from storage import repeated_dump
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from train_workload import SCRATCH, SUPERVISED, K, Workload, dump, neo, random_batch, random_targets, sft

from storage_schemas.config import TopK
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import CommitRecord, Seal, data_key, manifest_bytes, totals
from storage_schemas.rows import OK
from storage_schemas.stores.shared import KEPT
from storage_schemas.stores.store import Store
from student_train.config import LossSection, TrainSection
from student_train.data.batch import collate_mixed
from student_train.data.follower import Follower
from student_train.data.mix import Mix
from student_train.data.order import Order
from student_train.data.stream import Stream
from student_train.model.head import HeadSpec, fused_head_loss
from student_train.resume import consumed_root

Rows = dict[str, float]
LOADER_UNITS, LOADER_SAMPLES = 32, 128
RANKS = {"1": (1, 1), "8": (8, 1), "64 on one node": (64, 1), "64 on 8 nodes": (64, 8)}
"""Ranks, and the nodes that they are on."""
RANKS_SAMPLES, RANKS_BATCH = 512, 256
"""Samples of a unit, and of a step: a micro-batch of 4 for each of 64 ranks."""
HUGE_SAMPLES, HUGE_UNITS = 10**9, 100_000
HIDDEN, HEAD_TOKENS, STEP_TOKENS = 576, 256, 1024


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def loader(work: Workload) -> Rows:
    """Our stream and `datasets` over the same files, taking turns on one core, in processor seconds."""
    to_the_end = dump(work, SCRATCH / "dump-to-the-end", TopK(k=K, mass=1.0))
    one_core()
    return loader_rows(f"k={K}", work.dump) | loader_rows(f"k={K} to the end", to_the_end)


def one_core() -> None:
    """Let this process use one core alone."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    gc.collect()
    gc.freeze()  # As training does; it serves all contenders.


def loader_rows(title: str, source: Path) -> Rows:
    """Of one dump."""
    url = loader_dump(source)
    speeds: dict[str, list[float]] = {name: [] for name in READERS}
    for i in range(9):
        for name in list(READERS)[:: -1 if i % 2 else 1]:
            READERS[name](url)  # Memory that another one left is not its own.
            speeds[name].append(READERS[name](url))
            say(f"{title}: {name}: {speeds[name][-1]:,.0f} supervised tokens/s")
    rows = {f"{name}, {title}: supervised tokens/s on one core": statistics.median(v) for name, v in speeds.items()}
    for name in list(speeds)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(speeds["loader"], speeds[name], strict=True)]
        rows[f"loader / {name}, {title}"] = statistics.median(ratios)
    return rows


def loader_dump(source: Path, *, units: int = LOADER_UNITS, each: int = LOADER_SAMPLES) -> Path:
    """A dump's rows several times over, in units of ordinary size."""
    url = SCRATCH / "loader"
    shutil.rmtree(url, ignore_errors=True)
    repeated_dump(Dump.open(str(source)), url, units=units, each=each)
    return url


def stream_speed(url: Path) -> float:
    """Supervised tokens per processor second from files to micro-batches, every check included."""
    dump = Dump.open(str(url))
    tokens, taken = streamed(dump, TrainSection(output=SCRATCH))
    assert tokens == dump.provenance.corpus.samples * SUPERVISED
    return tokens / taken


def streamed(dump: Dump, train: TrainSection, *, world_size: int = 1, epochs: int = 1) -> tuple[int, float]:
    """Supervised tokens of the first rank, and the processor seconds that their stream takes."""
    mix = mix_of(dump.provenance, train)
    make = partial(
        collate_mixed, temperature_indices=[0], temperature=1.0, vocab_size=dump.provenance.teacher.lm_head_rows
    )  # fmt: skip
    begin, tokens, steps = time.process_time(), 0, epochs * mix.steps_per_epoch
    stream = Stream(
        [dump], mix, make, rank=0, world_size=world_size, limit=train.micro_batch, start=0, stop=steps, allowed=steps,
    )  # fmt: skip
    for step in range(steps):
        batches = stream.get(step, timeout=60)
        assert batches is not None
        tokens += sum(len(batch.targets) for batch in batches)
    stream.close()
    return tokens, time.process_time() - begin


def ranks(work: Workload) -> Rows:
    """What its supervised tokens cost one rank of many, in processor seconds: its own stream, and its share of decoding
    each unit once per node. One rank decodes for itself. Sizes take turns on one core."""
    one_core()
    url = loader_dump(work.dump, units=KEPT, each=RANKS_SAMPLES)
    train = TrainSection(output=SCRATCH, global_batch_size=RANKS_BATCH)
    speeds: dict[str, list[float]] = {name: [] for name in RANKS}
    for i in range(-1, 6):
        shutil.rmtree(SCRATCH / "decoded", ignore_errors=True)
        dump = Dump.open(str(url))
        dump.share(SCRATCH / "decoded")
        begin = time.process_time()
        for unit in range(KEPT):
            dump.open_unit(unit)
        decoding = time.process_time() - begin
        for name, (world_size, nodes) in list(RANKS.items())[:: -1 if i % 2 else 1]:
            # All of them stream as many tokens, so that what is done once weighs alike.
            tokens, taken = streamed(
                Dump.open(str(url)) if world_size == 1 else dump, train, world_size=world_size, epochs=world_size
            )
            if world_size > 1:
                taken += decoding * nodes  # In so many epochs, 1 / (world_size / nodes) of each.
            if i >= 0:
                speeds[name].append(tokens / taken)
        say(", ".join(f"{name}: {found[-1]:,.0f}" for name, found in speeds.items() if found))
    rows = {f"loader of a rank of {name}: own supervised tokens/s on one core": statistics.median(found)
            for name, found in speeds.items()}  # fmt: skip
    for name in list(speeds)[1:]:
        ratios = [many / one for many, one in zip(speeds[name], speeds["1"], strict=True)]
        rows[f"loader of a rank of {name} / of 1"] = statistics.median(ratios)
    return rows


def datasets_speed(url: Path, *, collated: bool) -> float:
    """The same through `datasets` in torch format, all columns as here, as rows of tensors or as micro-batches that a
    plain collate function pads; of one unit, since it takes its time."""
    files = sorted(map(str, (url / "data").glob("*.parquet")))[:1]
    begin, tokens = time.process_time(), 0
    found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("torch")
    if collated:
        for batch in DataLoader(found, batch_size=TrainSection(output=SCRATCH).micro_batch.samples, collate_fn=pad):
            tokens += len(batch["target_ids"])
    else:
        for row in found:
            tokens += len(row["target_ids"])
    assert tokens == LOADER_SAMPLES * SUPERVISED
    return tokens / (time.process_time() - begin)


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tokens row by row, padded; targets one after the other, padded."""
    padded = {name: pad_sequence([row[name] for row in rows], True) for name in ("input_ids", "loss_mask")}
    for name in ("target_ids", "target_logprobs", "tail_logprob"):
        padded[name] = pad_sequence([token for row in rows for token in row[name]], True)
    return padded


READERS: dict[str, Callable[[Path], float]] = {
    "loader": stream_speed,
    "datasets streaming": partial(datasets_speed, collated=False),
    "datasets streaming in micro-batches": partial(datasets_speed, collated=True),
}


def mix_of(provenance: Provenance, train: TrainSection) -> Mix:
    """The order that a run on one dump has."""
    order = Order(
        samples=provenance.corpus.samples,
        samples_per_unit=provenance.samples_per_unit,
        window_units=train.shuffle_window_units,
        block_units=train.shuffle_block_units,
        seed=train.seed,
    )
    return Mix(orders=(order,), shares=(order.samples,), global_batch_size=train.global_batch_size)


def start(work: Workload) -> Rows:
    """What `llm-neo train` asks a dump of 1e9 samples in 100,000 units before its first step, and a seek."""
    say("writing a sealed dump of 100,000 units without their data")
    url = huge_dump(work.provenance)
    begins, resumes = [], []
    for _ in range(3):
        gc.collect()
        begin = time.perf_counter()
        dump, mix = opened(url)
        for unit in mix.orders[0].block_at(0, 0)[1]:
            dump.read_record(int(unit))
        mix.step_samples(0)
        begins.append(time.perf_counter() - begin)
    for _ in range(2):
        dump, mix = opened(url)
        begin = time.perf_counter()
        consumed_root([dump], mix, mix.steps_per_epoch // 2)
        resumes.append(time.perf_counter() - begin)
    steps = np.random.default_rng(0).integers(0, 10 * mix.steps_per_epoch, 2000)
    seeks = [seconds(partial(mix.step_samples, int(step))) for step in steps]
    return {
        "start, 1e9 samples in 100,000 units: seconds": statistics.median(begins),
        "resume in the middle of it, on top: seconds": statistics.median(resumes),
        "seek to any step: milliseconds, median": 1e3 * statistics.median(seeks),
        "seek to any step: milliseconds, 99th percentile": 1e3 * float(np.quantile(seeks, 0.99)),
    }


def opened(url: Path) -> tuple[Dump, Mix]:
    """The dump, known to be complete, and its order."""
    dump = Dump.open(str(url))
    mix = mix_of(dump.provenance, TrainSection(output=SCRATCH))
    assert Follower(dump, mix.orders[0]).windows() == mix.orders[0].windows
    return dump, mix


def huge_dump(provenance: Provenance) -> Path:
    """run.json, manifest and seal of synthetic records."""
    url, each = SCRATCH / "huge", HUGE_SAMPLES // HUGE_UNITS
    shutil.rmtree(url, ignore_errors=True)
    provenance = provenance.model_copy(
        update={"corpus": provenance.corpus.model_copy(update={"samples": HUGE_SAMPLES}), "samples_per_unit": each}
    )
    records = {unit: synthetic_record(unit, each, provenance.fingerprint) for unit in range(HUGE_UNITS)}
    manifest = manifest_bytes(records)
    seal = Seal(
        fingerprint=provenance.fingerprint,
        units=HUGE_UNITS,
        statuses={OK: HUGE_SAMPLES},
        tokenizer={},
        records_sha256="0" * 64,
        manifest=f"manifest-{hashlib.sha256(manifest).hexdigest()}.parquet",
        **totals(records),
    )
    store = Store(str(url))
    for key, data in {"run.json": provenance.to_json(), seal.manifest: manifest, "SEALED.json": seal.to_json()}.items():
        assert store.put_new(key, data)
    return url


def synthetic_record(unit: int, rows: int, fingerprint: str) -> CommitRecord:
    """A commit record that is like a real one in size."""
    digest = hashlib.sha256(str(unit).encode()).hexdigest()
    tokens = rows * SUPERVISED
    return CommitRecord(
        fingerprint=fingerprint, unit=unit, file=data_key(unit, digest[:32]), bytes=90 * tokens + unit, sha256=digest,
        rows=rows, tokens=tokens, supervised_tokens=tokens, entries=48 * tokens, max_id=49_151, statuses={OK: rows},
        mean_kept_mass=0.98, mean_entropy=1.2 + unit / 1e6, fidelity=(5e-5 + unit / 1e11,), logprob_step=0.0625,
    )  # fmt: skip


def vocabulary(_: Workload) -> Rows:
    """Forward and backward of the head alone, by vocabulary."""
    rows: Rows = {}
    for vocab in (49_152, 151_936, 262_144):
        rows |= head_rows(f"head alone, vocabulary {vocab:,}", vocab=vocab, k=64)
    return rows


def entries(_: Workload) -> Rows:
    """Forward and backward of the head alone, by entries per target."""
    rows: Rows = {}
    for k in (8, 16, 64, 256):
        rows |= head_rows(f"head alone, k={k}", vocab=49_152, k=k)
    return rows


def head_rows(title: str, *, vocab: int, k: int) -> Rows:
    """CE + KL in the fused head against plain CE on all logits, microseconds per supervised token, taking turns."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, HIDDEN, generator=generator) / HIDDEN**0.5
    hidden = torch.randn(HEAD_TOKENS, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (HEAD_TOKENS,), generator=generator)
    targets = random_targets(labels, vocab=vocab, k=k, generator=generator)

    def fused() -> None:
        fused_head_loss(hidden, weight, targets, loss=LossSection(), head=HeadSpec()).loss.backward()

    def plain() -> None:
        nn.functional.cross_entropy(nn.functional.linear(hidden, weight), labels, reduction="sum").backward()

    ours, theirs = turns([fused, plain], rounds=5)
    say(title)
    return {
        f"{title}: fused CE + KL, microseconds per token": 1e6 * statistics.median(ours) / HEAD_TOKENS,
        f"{title}: plain CE, microseconds per token": 1e6 * statistics.median(theirs) / HEAD_TOKENS,
        f"{title}: fused / plain": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def length(work: Workload) -> Rows:
    """A whole step of 1024 tokens in longer and fewer rows."""
    rows: Rows = {}
    for tokens in (128, 256, 512, 1024):
        batch = random_batch(STEP_TOKENS // tokens, tokens, vocab=work.provenance.teacher.lm_head_rows, k=64)
        ours, theirs = turns([neo(work, batch), sft(work, batch)], rounds=2)
        title = f"step of {STEP_TOKENS // tokens} x {tokens} tokens"
        rows |= {f"{title}: Neo, seconds": min(ours), f"{title}: LoRA SFT, seconds": min(theirs)}
        rows[f"{title}: Neo / LoRA SFT"] = min(ours) / min(theirs)
        say(title)
    return rows


def turns(contenders: list[Callable[[], Any]], *, rounds: int) -> list[list[float]]:
    """Seconds of each contender and round. One round is for warming up; each begins where the last one ended."""
    found: list[list[float]] = [[] for _ in contenders]
    for i in range(-1, rounds):
        for place in range(len(contenders))[:: -1 if i % 2 else 1]:
            gc.collect()
            taken = seconds(contenders[place])
            if i >= 0:
                found[place].append(taken)
    return found
