"""The tokenised corpus between starts: taken when nothing changed, made again when anything did or it is damaged."""

import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from filelock import FileLock
from support.corpora import freeze, ids_of, statuses_of, write_jsonl
from support.dump_checks import assert_each_sample_once, files_of, sections, write_corpus
from support.tiny_teachers import CHATML, HEADERS, VOCABULARY, save_teacher, tiny_tokenizer

from storage_schemas.common.errors import DataError, TemporaryError
from teacher_dump.config import CorpusSection, SourceSection
from teacher_dump.corpus import cache as kept_module
from teacher_dump.corpus import freeze as corpus_module
from teacher_dump.corpus.cache import kept
from teacher_dump.corpus.columns import COLUMNS, JOURNAL, Columns, Part
from teacher_dump.corpus.freeze import Corpus, freeze_corpus
from teacher_dump.corpus.preview import load_tokenizer, preview
from teacher_dump.dump import run_dump
from teacher_dump.plan import plan_dump
from teacher_dump.teachers.teacher import Teacher

pytestmark = pytest.mark.usefixtures("own_cache")

RECORDS = [
    {"id": f"r{i}", "messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "so " * i}]}
    for i in range(1, 9)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", RECORDS)


def write(path: Path, records: Sequence[Any], *, age: float = 60) -> Path:
    write_jsonl(path, records)
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every batch that is tokenised."""
    calls: list[int] = []
    original = corpus_module.tokenise

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(corpus_module, "tokenise", counted)
    return calls


def assert_equal(a: Corpus, b: Corpus) -> None:
    assert (ids_of(a), statuses_of(a), a.fingerprint) == (ids_of(b), statuses_of(b), b.fingerprint)
    assert a.problems == b.problems
    assert a.source_samples == b.source_samples
    for name in ("offsets", "input_ids", "loss_mask", "lengths"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype


def test_a_second_start_tokenises_nothing(path: Path, made: list[int]) -> None:
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
        {"weight": 0.5},
        {"split": "train[:4]"},
        {"format": "messages"},
        {"lm_head_rows": VOCABULARY + 1},
        {"tokenizer": HEADERS},
        {"chat_template": HEADERS},
        {"chat_template": CHATML + "{{ given }}", "template_kwargs": {"given": "x"}},
        {"too_long": "chunk"},
        {"columns": {"system": "id"}},
        {"roles": {"user": "system"}},
        {"records": RECORDS[::-1]},
        {"moved": True},
    ],
)
def test_whatever_a_corpus_depends_on_makes_a_new_one(path: Path, made: list[int], change: dict[str, Any]) -> None:
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


def test_code_that_changes_makes_a_new_one(path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(path)
    monkeypatch.setattr("teacher_dump.corpus.cache._MADE_BY", ("formats", "masks"))
    freeze(path)
    assert made == [1, 1]


def test_a_file_that_may_still_be_written_to_is_not_kept(tmp_path: Path, made: list[int]) -> None:
    fresh = write(tmp_path / "fresh.jsonl", RECORDS, age=0)
    freeze(fresh)
    freeze(fresh)
    assert made == [1, 1]
    assert not list((tmp_path / "neo" / "corpora").iterdir())


@pytest.mark.parametrize("name", [*COLUMNS, JOURNAL])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_copy_is_made_again(
    path: Path, made: list[int], name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = freeze(path)
    (kept,) = (path.parent / "neo" / "corpora").glob("*/" + name)
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.unlink()  # What is mapped stays as it is.
    if damage != "gone":
        kept.write_bytes({"flip": data, "cut": data[:-5], "empty": b""}[damage])
    assert_equal(first, freeze(path))
    assert made == [1, 1]
    assert "damaged" in caplog.text
    assert_equal(first, freeze(path))
    assert made == [1, 1], "what was made again was not kept"


def part_of(samples: int) -> Part:
    """Some samples of 3 tokens each."""
    arrays = {
        "offsets": np.arange(samples + 1) * 3,
        "input_ids": np.arange(3 * samples, dtype=np.int32),
        "loss_mask": np.ones(3 * samples, bool),
        "lengths": np.full(samples, 4),
        "statuses": np.zeros(samples, np.uint8),
        "id_offsets": np.arange(samples + 1) * 2,
        "id_bytes": np.full(2 * samples, ord("x"), np.uint8),
    }
    return Part(arrays)


def fill(columns: Columns, *, parts: int = 3, samples: int = 4) -> None:
    for _ in range(parts):
        columns.append(part_of(samples), source=0, records=0, problems=[])
    columns.finish(fingerprint="0")


def test_every_mutation_of_a_kept_corpus_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Bits of every file flipped, every file cut, at 20 places and more: the same corpus, each time."""

    def taken() -> tuple[str, int]:
        makes: list[int] = []
        found = kept(tmp_path, "key", make=lambda columns: (makes.append(1), fill(columns))[1])
        arrays = "".join(array.tobytes().hex() for array in found.arrays.values())
        return arrays + json.dumps(found.parts, sort_keys=True), len(makes)

    first, _ = taken()
    folder = tmp_path / "key"
    assert taken() == (first, 0)
    noticed = mutations = 0
    for name in (*COLUMNS, JOURNAL, next(folder.glob("proven-*")).name):
        whole = (folder / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 20)):
            for changed in (bytes([*whole[:at], whole[at] ^ 1 << at % 8, *whole[at + 1 :]]), whole[:at]):
                (folder / name).write_bytes(changed)
                found, makes = taken()
                assert found == first, (name, at, len(changed))
                assert makes == (0 if name.startswith("proven") else 1), (name, at)
                mutations, noticed = mutations + 1, noticed + makes
                whole = (folder / name).read_bytes()
    assert noticed > 298


def test_what_is_proven_is_not_read_again_until_the_machine_is_started_again(
    path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = freeze(path)
    assert_equal(first, freeze(path))
    assert "is read once" not in caplog.text
    monkeypatch.setattr(kept_module, "_proof_name", lambda: "proven-other.json")
    assert_equal(first, freeze(path))
    assert "is read once" in caplog.text
    caplog.clear()
    assert_equal(first, freeze(path))
    assert "is read once" not in caplog.text
    assert made == [1]


def test_a_flipped_bit_that_no_write_has_made_is_found_after_the_next_start_of_the_machine(
    path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = freeze(path)
    (file,) = (path.parent / "neo" / "corpora").glob("*/input_ids")
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(bytes([data[0] ^ 1, *data[1:]]))
    # As a disk does it: nothing that `stat` tells has changed.
    kept_module._write_proof(file.parent, kept_module._opened(file.parent)[1])
    assert not np.array_equal(freeze(path).input_ids, first.input_ids), "the test changes nothing"
    monkeypatch.setattr(kept_module, "_proof_name", lambda: "proven-other.json")
    assert_equal(first, freeze(path))
    assert made == [1, 1]


def test_readers_need_no_lock(path: Path, made: list[int]) -> None:
    first = freeze(path)
    (lock,) = (path.parent / "neo" / "corpora").glob("*.lock")
    with FileLock(lock), ThreadPoolExecutor(1) as pool:
        assert_equal(first, pool.submit(freeze, path).result(timeout=20))
    assert made == [1]


def private_bytes() -> int:
    """Of this process, without pages of files."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("parts", "seconds"), [(31, 2), pytest.param(1526, 20, marks=pytest.mark.slow)])
def test_opening_costs_neither_time_nor_memory_per_sample(tmp_path: Path, parts: int, seconds: int) -> None:
    """2 million samples, and 100 million (5 GB): in seconds, and their statuses and lengths in 40 MB."""
    made = kept(tmp_path, "key", make=lambda columns: fill(columns, parts=parts, samples=2**16))
    del made
    before, started = private_bytes(), time.monotonic()
    corpus = corpus_module._corpus(kept(tmp_path, "key", make=fill), 1)
    assert time.monotonic() - started < 1
    assert private_bytes() - before < 10e6
    assert (len(corpus), corpus.status_counts().get("ok", 0)) == (parts * 2**16, parts * 2**16)
    assert corpus.longest == 3
    assert corpus.sample(len(corpus) - 1).sample_id == "xx"
    assert time.monotonic() - started < seconds
    assert private_bytes() - before < 40e6


@pytest.mark.parametrize("key", ["key", None])
def test_a_full_disk_is_temporary_and_loses_no_part(tmp_path: Path, key: str | None) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TemporaryError, match=r"cannot be written(.|\n)*corpus\.cache_dir"):
            kept(tmp_path, key, make=lambda columns: fill(columns, parts=20, samples=2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there: list[int] = []
    found = kept(tmp_path, key, make=lambda columns: (there.append(len(columns.parts)), fill(columns, parts=1))[1])
    assert there == [4 if key else 0]
    assert len(found.arrays["statuses"]) == 2000 * there[0] + 4


def test_what_an_interrupted_start_has_tokenised_is_kept(
    path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH", 2)
    monkeypatch.setattr(corpus_module, "_PART_SAMPLES", 2)
    with caplog.at_level("INFO", logger="teacher_dump"):
        whole = freeze(path, cache_dir=str(path.parent / "other"))
    said = [message.partition(":")[0] for message in caplog.messages if message.startswith("tokenised")]
    assert said == [f"tokenised {count} of 8 records" for count in (2, 4, 6)]
    assert made == [1] * 4
    made.clear()

    def stop() -> None:
        if len(made) == 3:
            raise KeyboardInterrupt

    section = CorpusSection(sources=[SourceSection(path=str(path))])
    with pytest.raises(KeyboardInterrupt):
        freeze_corpus(section, tiny_tokenizer(CHATML), lm_head_rows=VOCABULARY, check=stop)
    assert made == [1] * 3
    (part,) = (path.parent / "neo" / "corpora").glob("*.part")
    saved = {file.name: file.read_bytes() for file in part.iterdir()}
    made.clear()
    assert_equal(whole, freeze(path))
    assert made == [1], "what was tokenised was tokenised again"
    assert not part.exists()
    # A part with a flipped bit and what comes after it are made again.
    (target,) = (target for target in part.parent.iterdir() if target.is_dir())
    shutil.rmtree(target)
    part.mkdir()
    for name, data in saved.items():
        data = bytearray(data)
        if name == "loss_mask":
            data[-1] ^= 1
        (part / name).write_bytes(data + b"torn")
    made.clear()
    assert_equal(whole, freeze(path))
    assert made == [1] * 2


def test_of_several_workers_one_tokenises(path: Path, made: list[int]) -> None:
    start = threading.Barrier(4)

    def work(_: int) -> Corpus:
        start.wait()
        return freeze(path)

    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(work, range(4)))
    assert made == [1]
    for other in corpora[1:]:
        assert_equal(corpora[0], other)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Threads are processes of machines, by their name. Grows by the machine of each reading of a whole corpus."""
    proofs: list[str] = []
    original = kept_module.whole_parts

    def machine() -> str:
        return threading.current_thread().name.split("_")[0]

    def whole_parts(folder: Path) -> list[dict[str, Any]]:
        proofs.append(machine())
        return original(folder)

    monkeypatch.setattr(kept_module, "_proof_name", lambda: f"proven-{machine()}.json")
    monkeypatch.setattr(kept_module, "whole_parts", whole_parts)
    return proofs


def on_machines(names: Sequence[str], path: Path) -> list[Corpus]:
    """The corpora that two processes of each machine freeze at the same time."""
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(2, name)) for name in names]
        return [future.result() for future in [pool.submit(freeze, path) for pool in pools for _ in range(2)]]


def test_machines_prove_a_kept_corpus_at_the_same_time_and_each_once(
    path: Path, made: list[int], machines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = freeze(path)
    together, counted = threading.Barrier(3, timeout=20), kept_module.whole_parts
    monkeypatch.setattr(kept_module, "whole_parts", lambda folder: (together.wait(), counted(folder))[1])
    for corpus in on_machines("abc", path):
        assert_equal(first, corpus)
    assert (sorted(machines), made) == (["a", "b", "c"], [1])


def test_of_several_machines_one_makes_a_damaged_corpus_again(path: Path, made: list[int], machines: list[str]) -> None:
    first = freeze(path)
    (damaged,) = (path.parent / "neo" / "corpora").glob("*/lengths")
    data = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(data[:-1] + b"\x07")
    for corpus in on_machines("abc", path):
        assert_equal(first, corpus)
    assert made == [1, 1]
    assert {"a", "b", "c"} <= set(machines)


def test_a_failure_leaves_nothing_behind_and_no_lock(path: Path, made: list[int]) -> None:
    bad = path.with_name("bad.jsonl")
    bad.write_text(path.read_text() + '{"messages": [{"ro')
    os.utime(bad, (1e9, 1e9))
    for _ in range(2):
        with pytest.raises(DataError, match="line 9"):
            freeze(bad)
    assert [p for p in (path.parent / "neo" / "corpora").iterdir() if p.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_to_is_no_error(
    path: Path, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = freeze(path, cache_dir=str(path))
    assert "nothing is kept" in caplog.text
    assert_equal(first, freeze(path))


def test_a_directory_is_known_by_its_files(tmp_path: Path, made: list[int]) -> None:
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


def prepare_hub(path: Path, cache: Path, commit: str) -> None:
    """Leave a hub dataset as `datasets` does when it has fetched it; offline, that is where it takes it from."""
    made = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache / "staged"))
    folder = cache / "cache/org___name/default/0.0.0" / commit
    folder.mkdir(parents=True)
    for file in Path(made.cache_files[0]["filename"]).parent.iterdir():
        (folder / file.name.replace("json-", "name-")).write_bytes(file.read_bytes())


def test_a_hub_dataset_is_kept_by_its_commit(tmp_path: Path, path: Path, made: list[int]) -> None:
    plain = freeze(path)
    made.clear()
    hub = SourceSection(path="org/name")
    prepare_hub(path, tmp_path, "a" * 40)
    assert freeze(hub).fingerprint == plain.fingerprint
    assert_equal(freeze(hub), freeze(hub))
    assert made == [1]
    other = freeze(SourceSection(path="org/name", split="train[2:]", weight=0.5))
    assert len(other) == 3
    assert made == [1, 1]
    write(path, RECORDS[:4], age=10)
    prepare_hub(path, tmp_path, "b" * 40)
    os.utime(tmp_path / "cache/org___name/default/0.0.0" / ("a" * 40), (1, 1))
    assert len(freeze(hub)) == 4
    assert len(freeze(hub)) == 4
    assert made == [1, 1, 1]


def test_a_dump_continues_with_the_kept_corpus(tmp_path: Path, made: list[int]) -> None:
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


def test_preview_plan_and_dump_share_one_kept_corpus(tmp_path: Path, made: list[int]) -> None:
    file = write_corpus(tmp_path / "corpus.jsonl")
    os.utime(file, (1e9, 1e9))
    job = sections(tmp_path / "dump", file, save_teacher(tmp_path / "teacher"))
    tokenizer, lm_head_rows = load_tokenizer(job["teacher"])
    seen, _ = preview(job["corpus"], tokenizer, lm_head_rows=lm_head_rows, row=None, samples=1)
    plan = plan_dump(**job | {"teacher": Teacher(job["teacher"]), "temperatures": (1.0,)}, samples=2)
    assert (plan.samples, plan.statuses) == (seen.samples, seen.statuses)
    assert run_dump(**job).rows == plan.samples
    assert made == [1]
