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
from teacher_dump.foreign.bring import ImportSummary, bring
from teacher_dump.foreign.export import export_axolotl

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


def rows_of(url: Path) -> list[Row]:
    dump = Dump.open(str(url))
    return [unit.row(i) for unit in map(dump.read_unit, range(dump.provenance.units)) for i in range(len(unit))]


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


@pytest.mark.parametrize("suffix", ["arrow", "jsonl"])
def test_the_kind_of_file_makes_no_difference(suffix: str, world: World, tmp_path: Path) -> None:
    """As `datasets` saves prepared data, and as JSON; but run.json tells them apart, and the columns that were read."""
    table = pq.read_table(write_lists(world, tmp_path / "p" / "x.parquet", again=world.logprobs))
    other = tmp_path / f"x.{suffix}"
    if suffix == "arrow":
        with pa.ipc.new_stream(other, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    else:
        other.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
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


def entries(*rows: Row) -> Iterator[tuple[dict[int, float], ...]]:
    """Id -> log-prob of each token of the rows."""
    for i in range(0 if rows[0].targets is None else len(rows[0].targets)):
        parts = [row.targets.slice(i, i + 1) for row in rows if row.targets is not None]
        yield tuple(dict(zip(part.ids.tolist(), part.logprobs.tolist(), strict=True)) for part in parts)


def test_axolotl_there_and_back(world: World, tmp_path: Path) -> None:
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
    "tail of logits": (lambda w, d: write_lists(w, d), "lists", TRUE | {"values": "logits"}, UsageError, "logsumexp"),
    "renormalised": (
        lambda w, d: write_lists(w, d, top_values=w.logprobs - np.log(np.exp(w.logprobs).sum(-1, keepdims=True))),
        "lists", TRUE, DataError, "say --tail lost",
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
        lambda w, d: write_table(d, [w.records(token_ids=w.ids)[0] | {"top_values": [[None]] * TOKENS}]),
        "lists", TRUE, DataError, "null|type null",
    ),
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
