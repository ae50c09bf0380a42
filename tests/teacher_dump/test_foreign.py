"""Import and export: what other projects store becomes the dump that the teacher itself would have given."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from support.dump_checks import rows_of
from support.foreign_stores import (
    EXACT_CODEC,
    README_CODEC,
    distillkit_row,
    top,
    write_distillkit,
    write_megatron,
    write_table,
)
from support.tiny_teachers import VOCABULARY, save_teacher
from transformers import AutoModelForCausalLM

from pipeline.commands import recomputing
from storage_schemas.common.errors import DataError, MismatchError, NeoError, UsageError
from storage_schemas.config import DumpSection, TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row
from storage_schemas.verify import verify
from student_train.results.evaluate import evaluate
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.dump import run_dump
from teacher_dump.foreign import export
from teacher_dump.foreign.bring import ImportSummary, bring
from teacher_dump.foreign.export import export_axolotl
from teacher_dump.foreign.sample import Claims, Made, Survey
from teacher_dump.foreign.tables import files_of, integers, named_hashes

SAMPLES, TOKENS, PROMPT, K = 24, 30, 6, 40
OF_T_1 = {"temperature": 1.0, "mask": "loss_mask"}
TRUE = {"shift": "next", "values": "logprobs", "tail": "implied", **OF_T_1}


@dataclass(frozen=True)
class World:
    """A teacher, what it has written, its logits, and the dump that it gives itself."""

    folder: Path
    tokens: np.ndarray
    """(SAMPLES, TOKENS)"""
    mask: np.ndarray
    ids: np.ndarray
    """(SAMPLES, TOKENS, K) of the logits at each position, largest first."""
    logprobs: np.ndarray
    rows: list[Row]

    def records(self, **columns: np.ndarray) -> list[dict[str, Any]]:
        """Rows of a table: tokens, mask and these columns."""
        shared = {"input_ids": self.tokens, "loss_mask": self.mask.astype(np.int8)}
        return [{name: column[i] for name, column in (shared | columns).items()} for i in range(SAMPLES)]

    def bring(
        self, layout: Any, source: Path, url: Path, *, tokens: Path | None = None, **claims: Any
    ) -> ImportSummary:
        """Import a store."""
        section = DumpSection(url=str(url), samples_per_unit=7, logprob_step=0.0)
        columns = claims.pop("columns", None)
        teacher = TeacherSection(model=str(self.folder / "teacher"))
        return bring(layout, source, section, teacher=teacher, claims=claims, tokens=tokens, columns=columns)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("foreign")
    teacher = AutoModelForCausalLM.from_pretrained(save_teacher(folder / "teacher"), dtype=torch.float32)
    torch.manual_seed(0)
    begin = torch.randint(20, VOCABULARY, (SAMPLES, 1))
    with torch.no_grad():
        tokens = teacher.generate(
            begin, attention_mask=torch.ones_like(begin), max_new_tokens=TOKENS - 1, min_new_tokens=TOKENS - 1,
            do_sample=True, top_k=0, pad_token_id=0,
        )  # fmt: skip
        logits = teacher(tokens).logits.double().numpy()
    mask = np.zeros((SAMPLES, TOKENS), bool)
    mask[:, PROMPT:] = True
    mask[5] = False
    corpus = folder / "corpus.jsonl"
    lines = ({"input_ids": ids, "loss_mask": m} for ids, m in zip(tokens.tolist(), mask.tolist(), strict=True))
    corpus.write_text("\n".join(map(json.dumps, lines)))
    run_dump(
        dump=DumpSection(url=str(folder / "dump"), samples_per_unit=7, logprob_step=0.0),
        teacher=TeacherSection(model=str(folder / "teacher"), dtype="float32", device="cpu", batch_tokens=400),
        corpus=CorpusSection(sources=[SourceSection(path=str(corpus))], max_length=96),
        estimator=TopK(k=K, mass=1.0),
    )
    ids, logprobs = top(logits.reshape(SAMPLES * TOKENS, -1), K)
    shape = (SAMPLES, TOKENS, K)
    return World(folder, tokens.numpy(), mask, ids.reshape(shape), logprobs.reshape(shape), rows_of(folder / "dump"))


def write_lists(world: World, path: Path, **columns: np.ndarray) -> Path:
    return write_table(path, world.records(**({"token_ids": world.ids, "top_values": world.logprobs} | columns)))


def distillkit(world: World, folder: Path, config: dict[str, Any]) -> Path:
    rows = world.records()
    for i, row in enumerate(rows):
        values = world.logprobs[i, :-1].copy()
        if config is EXACT_CODEC:
            values[::4, 38:] = -np.inf  # vLLM gave fewer than k.
        row |= distillkit_row(world.ids[i, :-1], values, config)
    return write_distillkit(folder, rows, config)


def megatron(world: World, folder: Path, *, version: int, dtype: torch.dtype = torch.float16) -> Path:
    values, ids = world.logprobs.copy(), world.ids.copy()
    values[:, ::3, 30:], ids[:, ::3, 30:] = (-1e4 if version == 1 else -1e3), -1  # Outside of the nucleus.
    write_table(folder / "tokens.parquet", world.records())
    return write_megatron(folder / "store", ids, values, ranks=2, micro_batch=3, version=version, dtype=dtype)


# Layout -> (writes the store, claims, tolerance of a log-prob).
STORES: dict[str, tuple[Callable[[World, Path], Path], str, dict[str, Any], float]] = {
    "lists": (lambda w, d: write_lists(w, d / "x.parquet"), "lists", TRUE, 1e-5),
    "lists of probabilities, row j of token j": (
        lambda w, d: write_lists(
            w, d / "x.parquet", top_values=np.exp(np.roll(w.logprobs, 1, axis=1)), token_ids=np.roll(w.ids, 1, axis=1),
            loss_mask=(w.mask | (np.arange(TOKENS) == 0)).astype(int),  # Nothing precedes token 0.
        ),
        "lists", TRUE | {"values": "probs", "shift": "same"}, 1e-5,
    ),
    "distillkit, float32": (lambda w, d: distillkit(w, d, EXACT_CODEC), "distillkit", {"mask": "loss_mask"}, 1e-4),
    # The last seven entries have the polynomial alone.
    "distillkit, polynomial": (lambda w, d: distillkit(w, d, README_CODEC), "distillkit", {"mask": "loss_mask"}, 0.25),
    "megatron 1": (lambda w, d: megatron(w, d, version=1), "megatron", {"mask": "loss_mask"}, 5e-3),
    "megatron 2": (lambda w, d: megatron(w, d, version=2), "megatron", {"mask": "loss_mask"}, 5e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_an_imported_store_is_the_dump_of_the_teacher(name: str, world: World, tmp_path: Path) -> None:
    write, layout, claims, tolerance = STORES[name]
    source, url = write(world, tmp_path / "s"), tmp_path / "dump"
    tokens = tmp_path / "s" / "tokens.parquet" if layout == "megatron" else None
    found = world.bring(layout, source, url, tokens=tokens, **claims)
    assert verify(str(url)).ok
    assert (found.rows, found.left_out) == (SAMPLES, 0)
    assert found.statuses == {"empty": 1, "ok": SAMPLES - 1}
    assert found.shift_standard_errors is not None
    assert found.shift_standard_errors > 5
    for mine, theirs in zip(world.rows, rows_of(url), strict=True):
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.loss_mask, theirs.loss_mask)
        assert (mine.targets is None) == (theirs.targets is None)
        for x, y in entries(mine, theirs):
            assert y.keys() <= x.keys()
            assert len(y) in (30, 38, K)
            assert max(abs(x[token] - y[token]) for token in y) <= tolerance
            assert abs(sum(map(np.exp, y.values())) - 1) > 1e-4  # With a tail.
    # As stage two sees it: the teacher is its own best student.
    result = evaluate(world.folder / "teacher", Dump.open(str(url)), device="cpu").result()
    assert abs(result.kl_mean) < max(1e-4, tolerance**2 / 10)
    assert result.top1_agreement is not None
    assert result.top1_agreement > 0.99
    run = Dump.open(str(url)).provenance
    assert run.imported == layout
    assert "imported" in (url / "README.md").read_text()
    with pytest.raises(MismatchError, match="was imported"):
        recomputing(str(url), {}, rows=1, seed=0, config=None, model=None)
    assert run.engine.arguments is not None
    assert run.engine.arguments["shift"] == claims.get("shift", "next")
    # Again: nothing to do, and nothing else.
    before = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    assert world.bring(layout, source, url, tokens=tokens, **claims) == found
    assert before == {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["stream.arrow", "file.arrow", "lines.jsonl"])
def test_the_kind_of_file_makes_no_difference(kind: str, world: World, tmp_path: Path) -> None:
    """As `datasets` saves prepared data, and as JSON; but run.json tells them apart, and the columns that were read."""
    table = pq.read_table(write_lists(world, tmp_path / "p" / "x.parquet", again=world.logprobs))
    other = tmp_path / kind
    if other.suffix == ".arrow":
        with (pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file)(other, table.schema) as file:
            file.write_table(table, max_chunksize=5)
    else:
        rows = table.to_pylist()
        rows[3]["text"] = "x" * 2**21  # A line longer than the blocks in which pyarrow reads JSON.
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    urls = [tmp_path / "a", tmp_path / "b"]
    for source, url in zip((tmp_path / "p" / "x.parquet", other), urls, strict=True):
        world.bring("lists", source, url, **TRUE)
    for mine, theirs in zip(*map(rows_of, urls), strict=True):
        assert mine.sample_id == theirs.sample_id
        assert (mine.targets is None) == (theirs.targets is None)
        if mine.targets is not None and theirs.targets is not None:
            assert np.array_equal(mine.targets.ids, theirs.targets.ids)
            assert np.allclose(mine.targets.logprobs, theirs.targets.logprobs, atol=1e-6)
    one, two = (Dump.open(str(url)).provenance for url in urls)
    assert one.corpus.fingerprint == two.corpus.fingerprint
    assert one.fingerprint != two.fingerprint
    with pytest.raises(MismatchError, match=r"engine.arguments.columns.values"):
        world.bring("lists", other, urls[1], columns={"values": "again"}, **TRUE)


def test_files_that_datasets_keeps_beside_the_data_are_no_samples(world: World, tmp_path: Path) -> None:
    """`map` of a data set that was loaded from a directory writes cache-*.arrow into that directory."""
    folder = tmp_path / "prepared"
    records = world.records(token_ids=world.ids, top_values=world.logprobs)
    Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in records]).save_to_disk(folder)
    Dataset.load_from_disk(str(folder)).map(lambda row: {"again": row["loss_mask"]})
    assert list(folder.glob("cache-*.arrow"))
    assert world.bring("lists", folder, tmp_path / "dump", **TRUE).rows == SAMPLES


def test_numbers_in_the_names_of_files_count_as_numbers(tmp_path: Path) -> None:
    names = ["x2.parquet", "x10.parquet", "x\u00b2.parquet", "y.parquet"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path)] == names


def test_no_file_of_a_store_is_missing_in_its_hashes(tmp_path: Path) -> None:
    """Those of one name in folders of one name too: a change of any is another store."""
    files = [
        tmp_path / place for place in ("x.parquet", "de/train/y.parquet", "en/train/y.parquet", "en/test/y.parquet")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(file))
    assert list(named_hashes(files)) == ["x.parquet", "de/train/y.parquet", "en/train/y.parquet", "test/y.parquet"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_of_16_bits_keep_their_tail(dtype: str, world: World, tmp_path: Path) -> None:
    found = world.bring("lists", rounded(world, tmp_path / "x.parquet", dtype), tmp_path / "dump", **TRUE)
    described = np.roll(world.mask, -1, axis=1)
    assert found.mean_kept_mass == pytest.approx(np.exp(world.logprobs[described]).sum(-1).mean(), abs=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_told_from_a_tail_where_most_tails_are_rounding(dtype: str, world: World) -> None:
    """A teacher that is sure of most of its tokens: the masses of some lie above 1."""
    logits = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    values = logits.log_softmax(-1).topk(K).values
    claims, none = Claims.model_validate(TRUE), np.empty(0)
    surveys = []
    for each in (values, values.log_softmax(-1)):
        mass = each.to(getattr(torch, dtype)).double().exp().sum(-1).numpy()
        assert (mass > 1).sum() > 30
        surveys.append(Survey())
        surveys[-1].add(Made(world.rows[0], 0, mass, none, none))
    surveys[0].refuse_contradicted(claims, heads_are_whole=False, must_be_sure=False)
    with pytest.raises(DataError, match="say --tail lost"):
        surveys[1].refuse_contradicted(claims, heads_are_whole=False, must_be_sure=False)


def entries(*rows: Row) -> Iterator[tuple[dict[int, float], ...]]:
    """Id -> log-prob of each token of the rows."""
    for i in range(0 if rows[0].targets is None else len(rows[0].targets)):
        parts = [row.targets.slice(i, i + 1) for row in rows if row.targets is not None]
        yield tuple(dict(zip(part.ids.tolist(), part.logprobs.tolist(), strict=True)) for part in parts)


def test_axolotl_there_and_back(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its columns can hold comes back; what they cannot is said."""
    out = tmp_path / "x.parquet"
    told = export_axolotl(str(world.folder / "dump"), out)
    assert (told.rows, told.rows_left_out, told.k, told.lost_draws) == (SAMPLES - 1, 1, K, 0)
    tails = np.concatenate([row.targets.tail_logprob for row in world.rows if row.targets is not None])
    assert told.lost_tail_mass == pytest.approx(float(np.exp(tails).mean()))
    # By the rule of axolotl's README: row j describes token j + 1, padding has mask 0, a slot sums to 1.
    usable = [row for row in world.rows if row.status == OK]
    for row, mine in zip(pq.read_table(out).to_pylist(), usable, strict=True):
        described = np.array(row["labels"][1:]) != -100
        mask = np.array(row["target_mask"])
        assert np.array_equal(mask[:-1].any(1), described)
        assert not mask[-1].any()
        assert np.array_equal(np.array(row["labels"])[mine.loss_mask], mine.input_ids[mine.loss_mask])
        assert np.allclose(np.exp(np.array(row["target_logprobs"])[:-1][described]).sum(1), 1, atol=1e-5)
    # A unit is written in parts, so that not all of its dense rows are in memory.
    monkeypatch.setattr(export, "_ENTRIES", 3 * TOKENS * K)
    export_axolotl(str(world.folder / "dump"), tmp_path / "parts.parquet")
    parts = pq.ParquetFile(tmp_path / "parts.parquet")
    assert max(parts.metadata.row_group(i).num_rows for i in range(parts.num_row_groups)) == 3
    assert parts.read().equals(pq.read_table(out))
    claims = {"shift": "next", "tail": "lost", "temperature": 1.0}
    found = world.bring("axolotl", out, tmp_path / "back", **claims)
    assert found.mean_kept_mass == 1.0
    assert verify(str(tmp_path / "back")).ok
    for mine, theirs in zip(usable, rows_of(tmp_path / "back"), strict=True):
        assert np.array_equal(mine.loss_mask, theirs.loss_mask)
        for x, y in entries(mine, theirs):
            total = np.log(sum(map(np.exp, x.values())))
            assert x.keys() == y.keys()
            assert max(abs(x[token] - total - y[token]) for token in x) < 1e-5
    # A head m that takes all is at KL -log m from the teacher that it was cut from.
    kl = evaluate(world.folder / "teacher", Dump.open(str(tmp_path / "back")), device="cpu").result().kl_mean
    assert kl == pytest.approx(float(-np.log1p(-np.exp(tails)).mean()), rel=1e-3)
    with pytest.raises(UsageError, match="it is there"):
        export_axolotl(str(world.folder / "dump"), out)


def spoiled(world: World, path: Path, how: str) -> Path:
    """A store of lists with something wrong in sample 3."""
    ids, values = world.ids.copy(), world.logprobs.copy()
    match how:
        case "id":
            ids[3, 8, 2] = VOCABULARY
        case "twice":
            ids[3, 8, 2] = ids[3, 8, 1]
        case "mass":
            values[3, 8, :3] = np.log(0.5)
    return write_lists(world, path, token_ids=ids, top_values=values)


def rounded(world: World, path: Path, dtype: str, *, renormalised: bool = False) -> Path:
    """A store of lists whose values went through 16 bits."""
    values = torch.from_numpy(world.logprobs)
    values = values.log_softmax(-1) if renormalised else values
    return write_lists(world, path, top_values=values.to(getattr(torch, dtype)).double().numpy())


def ragged(world: World, path: Path, name: str, at: tuple[int, ...]) -> Path:
    """A store, of DistillKit's layout where it has to be, in which one value of a column is missing in sample 3."""
    packed = name in ("compressed_logprobs", "bytepacked_indices")
    rows = world.records(token_ids=world.ids, top_values=world.logprobs, attention_mask=np.ones_like(world.tokens))
    for i, row in enumerate(rows):
        row |= {key: value.tolist() for key, value in row.items()}
        if packed:
            row |= distillkit_row(world.ids[i, :-1], world.logprobs[i, :-1], EXACT_CODEC)
    column = rows[3][name]
    for index in at:
        column = column[index]
    column.pop()
    return write_distillkit(path.with_suffix(""), rows, EXACT_CODEC) if packed else write_table(path, rows)


def splits(world: World, folder: Path, *names: str) -> Path:
    """A directory as it comes from the hub."""
    for name in names:
        write_lists(world, folder / name)
    return folder


def spoiled_line(world: World, path: Path, line: bytes) -> Path:
    """JSON lines of which this one is the second."""
    row = world.records(token_ids=world.ids, top_values=world.logprobs)[0]
    path.write_bytes(json.dumps({name: value.tolist() for name, value in row.items()}).encode() + b"\n" + line)
    return path


def torn(path: Path) -> Path:
    """A file whose last bytes are missing."""
    path.write_bytes(path.read_bytes()[:-9])
    return path


# What is wrong -> (store, layout, claims, error, what it says).
REFUSED: dict[str, tuple[Callable[[World, Path], Path], str, dict[str, Any], type[NeoError], str]] = {
    "nothing said": (lambda w, d: write_lists(w, d), "lists", {}, UsageError, "--shift, --values, --tail, --temp"),
    "mask unsaid": (lambda w, d: distillkit(w, d.with_suffix(""), EXACT_CODEC), "distillkit", {}, UsageError, "--mask"),
    "against the layout": (lambda w, d: write_lists(w, d), "distillkit", {"shift": "same"}, UsageError, "otherwise"),
    "other shift": (lambda w, d: write_lists(w, d), "lists", TRUE | {"shift": "same"}, DataError, "--shift next"),
    "temperature": (lambda w, d: write_lists(w, d), "lists", TRUE | {"temperature": 2.0}, MismatchError, "temperature"),
    "no temperature": (
        lambda w, d: write_lists(w, d), "lists", TRUE | {"temperature": float("nan")}, UsageError,
        "--temperature: .*finite",
    ),
    "tail of logits": (lambda w, d: write_lists(w, d), "lists", TRUE | {"values": "logits"}, UsageError, "logsumexp"),
    "renormalised": (
        lambda w, d: write_lists(w, d, top_values=w.logprobs - np.log(np.exp(w.logprobs).sum(-1, keepdims=True))),
        "lists", TRUE, DataError, "say --tail lost",
    ),
    "renormalised, float16": (
        lambda w, d: rounded(w, d, "float16", renormalised=True), "lists", TRUE, DataError, "say --tail lost",
    ),
    "renormalised, bfloat16": (
        lambda w, d: rounded(w, d, "bfloat16", renormalised=True), "lists", TRUE, DataError, "say --tail lost",
    ),
    "not renormalised": (lambda w, d: write_lists(w, d), "lists", TRUE | {"tail": "lost"}, DataError, "--tail implied"),
    "another vocabulary": (lambda w, d: spoiled(w, d, "id"), "lists", TRUE, DataError, "the teacher's head"),
    "an id twice": (lambda w, d: spoiled(w, d, "twice"), "lists", TRUE, DataError, "same id twice"),
    "no distribution": (lambda w, d: spoiled(w, d, "mass"), "lists", TRUE, DataError, "x.parquet, row 3 .*\n.*1\\.9"),
    "no such column": (lambda w, d: write_lists(w, d), "axolotl", TRUE, DataError, "no column target_token_ids"),
    "a list of numbers": (
        lambda w, d: write_lists(w, d, top_values=w.logprobs[..., 0]), "lists", TRUE, DataError, "a list of lists",
    ),
    "a null": (
        lambda w, d: write_table(d, [w.records(token_ids=w.ids)[0] | {"top_values": [[None] * K] * TOKENS}]),
        "lists", TRUE, DataError, "null|type null",
    ),
    "fewer values than ids": (
        lambda w, d: ragged(w, d, "top_values", (8,)), "lists", TRUE, DataError,
        "x.parquet, row 3 .*\n.*39 values of top_values for 40 of token_ids in row 8 of the sample",
    ),
    "fewer rows of values": (
        lambda w, d: ragged(w, d, "top_values", ()), "lists", TRUE, DataError, "29 rows of top_values for 30 of",
    ),
    "fewer bytes": (
        lambda w, d: ragged(w, d, "compressed_logprobs", (8,)), "distillkit", {"mask": "all"}, DataError,
        "row 3 .*\n.*159 values of compressed_logprobs in row 8 of the sample, 160 in row 0",
    ),
    "fewer bytes at first": (
        lambda w, d: ragged(w, d, "bytepacked_indices", (0,)), "distillkit", {"mask": "all"}, DataError,
        "row 3 .*\n.*45 values of bytepacked_indices in row 1 of the sample, 44 in row 0",
    ),
    "a short attention_mask": (
        lambda w, d: ragged(w, d, "attention_mask", ()), "lists", TRUE, DataError, "29 values of attention_mask for",
    ),
    "two splits in a directory": (
        lambda w, d: splits(w, d.parent / "s", "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        "lists", TRUE, MismatchError, "several splits(.*\n)+.*test and train",
    ),
    "two splits of any name": (
        lambda w, d: splits(w, d.parent / "s", "de/data.parquet", "en/data.parquet", "dataset_dict.json"),
        "lists", TRUE, MismatchError, "several splits(.*\n)+.*de and en",
    ),
    "two splits in directories": (
        lambda w, d: splits(w, d.parent / "s", "train/data.parquet", "validation/data.parquet"),
        "lists", TRUE, MismatchError, "several splits(.*\n)+.*train and validation",
    ),
    **{
        f"no line of a store: {line!r}": (
            lambda w, d, line=line: spoiled_line(w, d.with_suffix(".jsonl"), line), "lists", TRUE, DataError,
            f"x.jsonl, line 2(.*\n)+.*{says}",
        )
        for line, says in ((b"[1, 2", "delimiter"), (b'{"x": [1, "a"]}', "'a'"), (b'{"x": "\xff"}', "Unicode"))
    },
    "a torn file": (lambda w, d: torn(write_lists(w, d)), "lists", TRUE, DataError, "cannot be read"),
    "no such store": (lambda w, d: d, "lists", TRUE, MismatchError, "no store"),
    "no codec": (lambda w, d: write_lists(w, d), "distillkit", {"mask": "all"}, MismatchError, "compression_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_so_is_refused_before_anything_is_written(name: str, world: World, tmp_path: Path) -> None:
    write, layout, claims, error, says = REFUSED[name]
    source, url = write(world, tmp_path / "x.parquet"), tmp_path / "dump"
    with pytest.raises(error, match=says):
        world.bring(layout, source, url, **claims)
    assert not url.exists()


def test_other_tokens_than_megatron_saw_are_refused(world: World, tmp_path: Path) -> None:
    store = megatron(world, tmp_path / "s", version=2)
    other = tmp_path / "other.parquet"
    write_table(other, replace(world, tokens=np.roll(world.tokens, 1, axis=0)).records())
    with pytest.raises(DataError, match="do not fit the tokens"):
        world.bring("megatron", store, tmp_path / "dump", tokens=other, mask="all")
    write_table(other, world.records()[:-1])
    with pytest.raises(DataError, match="fewer sequences of tokens"):
        world.bring("megatron", store, tmp_path / "dump", tokens=other, mask="all")
    torn_tar = tmp_path / "torn"
    torn_tar.mkdir()
    data = (store / f"dp0__0-{SAMPLES}.tar").read_bytes()
    (torn_tar / f"dp0__0-{SAMPLES}.tar").write_bytes(data[:1600] + bytes(100) + data[1700:])
    with pytest.raises(DataError, match="cannot be read"):
        world.bring("megatron", torn_tar, tmp_path / "dump", tokens=other, mask="all")
    later = megatron(world, tmp_path / "later", version=3)  # Which _meta.json alone names.
    with pytest.raises(MismatchError, match="format version 3"):
        world.bring("megatron", later, tmp_path / "dump", tokens=other, mask="all")
    (store / f"dp0__0-{SAMPLES}.tar").unlink()
    with pytest.raises(DataError, match="ranks \\[1\\]"):
        world.bring("megatron", store, tmp_path / "dump", tokens=other, mask="all")
    assert not (tmp_path / "dump").exists()


def test_logits_without_a_normaliser_are_imported_as_what_they_are(world: World, tmp_path: Path) -> None:
    """As Arcee's set of Llama 405B: raw values, padding on the right; nothing is known of the rest."""
    padded = {
        "input_ids": np.pad(world.tokens, ((0, 0), (0, 4))),
        "attention_mask": np.pad(np.ones_like(world.tokens), ((0, 0), (0, 4))),
        "token_ids": np.pad(world.ids, ((0, 0), (0, 4), (0, 0))),
        "logits": np.pad(world.logprobs + 12.5, ((0, 0), (0, 4), (0, 0))),
    }
    source = write_table(tmp_path / "x.parquet", [{n: c[i] for n, c in padded.items()} for i in range(SAMPLES)])
    claims = TRUE | {"values": "logits", "tail": "lost", "mask": "all"}
    found = world.bring("lists", source, tmp_path / "dump", columns={"values": "logits"}, **claims)
    assert found.supervised_tokens == SAMPLES * (TOKENS - 1)
    row = rows_of(tmp_path / "dump")[2]
    assert np.array_equal(row.input_ids, world.tokens[2])
    (first,) = (each for (each,) in list(entries(row))[:1])
    expected = world.logprobs[2, 0] - np.log(np.exp(world.logprobs[2, 0]).sum())
    assert sorted(first.values(), reverse=True) == pytest.approx(expected.tolist(), abs=1e-5)


def test_ids_are_whole_numbers() -> None:
    np.testing.assert_array_equal(integers(np.array([[3.0, 5.0]])), [[3, 5]])
    with pytest.raises(DataError, match="whole number"):
        integers(np.array([[3.0, -1.25]]))
