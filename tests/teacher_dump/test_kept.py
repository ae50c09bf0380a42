"""The tokenised corpus between starts: taken when nothing changed, made again when anything did or it is damaged."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from support.dump_checks import assert_each_sample_once, files_of, sections, write_corpus
from support.tiny_teachers import CHATML, HEADERS, VOCABULARY, save_teacher, tiny_tokenizer

from storage_schemas.errors import DataError
from teacher_dump import corpus as corpus_module
from teacher_dump.config import CorpusSection, SourceSection
from teacher_dump.corpus import Corpus, freeze_corpus
from teacher_dump.dump import run_dump

RECORDS = [
    {"id": f"r{i}", "messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "so " * i}]}
    for i in range(1, 9)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "a.jsonl", RECORDS)


def write(path: Path, records, *, age: float = 60) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))
    return path


def freeze(path: Path, *, tokenizer=None, head_size=VOCABULARY, source=None, **options) -> Corpus:
    section = CorpusSection(
        sources=[SourceSection(path=str(path), **source or {})],
        **{"cache_dir": str(path.parent / "neo")} | options,
    )
    return freeze_corpus(section, tokenizer or tiny_tokenizer(CHATML), head_size=head_size)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Grows by one for every batch that is tokenised."""
    calls: list[int] = []
    original = corpus_module.tokenise

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(corpus_module, "tokenise", counted)
    return calls


def assert_equal(a: Corpus, b: Corpus) -> None:
    assert (a.sample_ids, a.statuses, a.fingerprint) == (b.sample_ids, b.statuses, b.fingerprint)
    assert a.source_samples == b.source_samples
    for name in ("offsets", "input_ids", "loss_mask", "lengths"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype


def test_a_second_start_tokenises_nothing(path, made):
    first = freeze(path, max_length=20)
    assert made == [1]
    again = freeze(path, max_length=20)
    assert made == [1]
    assert_equal(first, again)
    assert again.lengths.max() > again.longest == 20
    again.input_ids[0] += 1  # torch wants arrays that it may write to; the file stays as it is.
    assert_equal(first, freeze(path, max_length=20))
    assert made == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 40},
        {"mask": "all"},
        {"too_long": "drop"},
        {"seed": 1},
        {"source": {"weight": 0.5}},
        {"source": {"split": "train[:4]"}},
        {"source": {"format": "messages"}},
        {"head_size": VOCABULARY + 1},
        {"tokenizer": HEADERS},
        {"records": RECORDS[::-1]},
        {"moved": True},
    ],
)
def test_whatever_a_corpus_depends_on_makes_a_new_one(path, made, change):
    freeze(path)
    if template := change.pop("tokenizer", None):
        change["tokenizer"] = tiny_tokenizer(template)
    if change.pop("moved", False):
        path = path.rename(path.with_name("b.jsonl"))
    if records := change.pop("records", None):
        write(path, records, age=30)
    found = freeze(path, **change)
    assert made == [1, 1]
    assert_equal(found, freeze(path, **change))
    assert made == [1, 1]


def test_code_that_changes_makes_a_new_one(path, made, monkeypatch):
    freeze(path)
    monkeypatch.setattr("teacher_dump.kept._MADE_BY", ("formats", "masks"))
    freeze(path)
    assert made == [1, 1]


def test_a_file_that_may_still_be_written_to_is_not_kept(tmp_path, made):
    fresh = write(tmp_path / "fresh.jsonl", RECORDS, age=0)
    freeze(fresh)
    freeze(fresh)
    assert made == [1, 1]
    assert not list((tmp_path / "neo").rglob("*.npy"))


@pytest.mark.parametrize("name", ["offsets.npy", "input_ids.npy", "loss_mask.npy", "lengths.npy", "samples.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_copy_is_made_again(path, made, name, damage, caplog):
    first = freeze(path)
    (kept,) = (path.parent / "neo" / "corpora").glob("*/" + name)
    data = bytearray(kept.read_bytes())
    if damage == "flip":
        # In samples.json, a digit of a hash.
        data[-3 if name == "samples.json" else -1] ^= 1
    if damage == "gone":
        kept.unlink()
    else:
        kept.write_bytes({"flip": data, "cut": data[:-5], "empty": b""}[damage])
    assert_equal(first, freeze(path))
    assert made == [1, 1]
    assert "damaged" in caplog.text
    assert_equal(first, freeze(path))
    assert made == [1, 1], "what was made again was not kept"


def test_of_several_workers_one_tokenises(path, made):
    start = threading.Barrier(4)

    def work(_: int) -> Corpus:
        start.wait()
        return freeze(path)

    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(work, range(4)))
    assert made == [1]
    for other in corpora[1:]:
        assert_equal(corpora[0], other)


def test_a_failure_leaves_nothing_behind_and_no_lock(path, made):
    bad = write(path.with_name("bad.jsonl"), [*RECORDS, {"messages": "oops"}])
    for _ in range(2):
        with pytest.raises(DataError, match="record 9"):
            freeze(bad)
    assert [p for p in (path.parent / "neo" / "corpora").iterdir() if p.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_to_is_no_error(path, made, caplog):
    first = freeze(path, cache_dir=str(path))
    assert "nothing is kept" in caplog.text
    assert_equal(first, freeze(path))


def test_a_directory_is_known_by_its_files(tmp_path, made):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    first = freeze(folder)
    assert_equal(first, freeze(folder))
    assert made == [1]
    (file,) = folder.glob("*.arrow")
    os.utime(file, (2e9 - 1e9 + 5, 1e9 + 5))
    assert_equal(first, freeze(folder))
    assert made == [1, 1]


def test_a_dump_continues_with_the_kept_corpus(tmp_path, made):
    file = write_corpus(tmp_path / "corpus.jsonl")
    os.utime(file, (1e9, 1e9))
    job = sections(tmp_path / "dump", file, save_teacher(tmp_path / "teacher"))
    first = run_dump(**job)
    before = files_of(tmp_path / "dump")
    assert run_dump(**job).fingerprint == first.fingerprint
    assert files_of(tmp_path / "dump") == before
    assert made == [1]
    assert_each_sample_once(tmp_path / "dump")
    other = sections(tmp_path / "again", file, tmp_path / "teacher")
    assert run_dump(**other).rows == first.rows
    assert made == [1], "a dump from the kept corpus"
