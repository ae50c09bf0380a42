"""Which records a source gives: weights, globs, object stores, and what is said when it gives none."""

import gzip
import json
import os
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.corpora import freeze, ids_of, statuses_of, write_jsonl
from support.s3_servers import BUCKET, READER, WRITER, TinyS3, be_impatient, options, seaweedfs
from support.tiny_teachers import tiny_tokenizer

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.common.signals import stoppable
from storage_schemas.stores.requests import object_store
from teacher_dump.config import SourceSection
from teacher_dump.corpus import remote
from teacher_dump.corpus.sources import chosen_records, find_source, open_source, refuse_elsewhere

pytestmark = pytest.mark.usefixtures("own_cache")

RECORDS = [{"id": f"r{i}", "text": f"what is it {i}"} for i in range(10)]


def lines_of(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path: Path, records: Sequence[Any]) -> str:
    return str(write_jsonl(path, records))


@pytest.mark.parametrize(
    ("records", "weight", "count"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.25, 3), (10, 0.24, 2), (3, 0.001, 1), (7473, 0.1, 747), (1000, 0.0125, 13)],
)
def test_a_weight_is_a_share_of_the_records_rounded_half_up(records: int, weight: float, count: int) -> None:
    assert len(chosen_records(records, weight, seed=0)) == count


@given(st.integers(0, 300), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_choices_are_ordered_repeatable_and_nested(records: int, a: float, b: float, seed: int) -> None:
    small, large = sorted((a, b))
    fewer, more = chosen_records(records, small, seed=seed), chosen_records(records, large, seed=seed)
    assert (np.diff(more) > 0).all()
    assert set(fewer) <= set(more) <= set(range(records))
    np.testing.assert_array_equal(chosen_records(records, large, seed=seed), more)


def test_every_record_is_as_likely_as_any_other() -> None:
    """1,000 seeds of 30 %: a record is chosen 300 times, give or take 4 standard deviations of 14.5."""
    counts = np.zeros(40)
    for seed in range(1000):
        counts[chosen_records(40, 0.3, seed=seed)] += 1
    assert np.abs(counts - 300).max() < 4 * np.sqrt(1000 * 0.3 * 0.7)


def test_the_choice_of_a_seed_never_changes() -> None:
    """What a fingerprint rests on: other numbers here would make every weighted dump impossible to continue."""
    assert chosen_records(20, 0.3, seed=0).tolist() == [0, 1, 2, 9, 11, 17]
    assert chosen_records(20, 0.3, seed=1).tolist() == [2, 3, 5, 7, 9, 10]


def test_weights_choose_by_seed_and_keep_order_whatever_the_other_sources(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", RECORDS)
    b = write(tmp_path / "b.jsonl", [{"id": f"b{i}", "text": "so"} for i in range(5)])
    half, other = SourceSection(path=a, weight=0.5), SourceSection(path=b, weight=0.4)
    alone = freeze(half)
    assert len(alone) == 5
    assert ids_of(alone) == sorted(ids_of(alone))
    both = freeze(other, half)
    assert ids_of(both)[2:] == ids_of(alone)
    assert freeze(half).fingerprint == alone.fingerprint
    reseeded = freeze(half, seed=1)
    assert len(reseeded) == 5
    assert reseeded.fingerprint != alone.fingerprint
    assert freeze(SourceSection(path=a), seed=1).fingerprint == freeze(SourceSection(path=a)).fingerprint, (
        "without weights, the seed chooses nothing"
    )


def test_weights_apply_to_what_the_split_leaves_and_to_files_with_broken_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    part = freeze(SourceSection(path=path, split="train[5:]", weight=0.6))
    assert ids_of(part) == [f"r{5 + i}" for i in chosen_records(5, 0.6, seed=0)]
    broken = [*RECORDS[:9], {"id": "r9", "text": "\ud800"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(record) for record in broken))
    by_line = freeze(SourceSection(path=str(tmp_path / "b.jsonl"), split="train[5:]", weight=0.6))
    assert ids_of(by_line) == ids_of(part)


def test_errors_of_a_weighted_source_name_the_record_of_the_file(tmp_path: Path) -> None:
    last = int(chosen_records(10, 0.3, seed=0)[-1])
    records = [{"messages": []} for _ in range(10)]
    records[last] = {"messages": [{"role": "nobody", "content": "x"}]}
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=f"record {last + 1}:"):
        freeze(SourceSection(path=path, weight=0.3), max_bad_share=0)


@pytest.mark.parametrize(("weight", "says"), [(1.5, "answer twice"), (0, "greater than 0"), (-1, "greater than 0")])
def test_other_weights_are_refused(weight: float, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SourceSection(path="a.jsonl", weight=weight)


def test_globs_and_file_urls_are_one_source_in_order_of_name(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(tmp_path / f"deep/{i}/part.jsonl", RECORDS[3 * i : 3 * i + 3])
    whole = freeze(SourceSection(path=write(tmp_path / "a.jsonl", RECORDS[:9])))
    for path in (f"{tmp_path}/deep/*/part.jsonl", f"{tmp_path}/deep/**/*.jsonl", f"file://{tmp_path}/a.jsonl",
                 f"file://{tmp_path}/deep/?/part.jsonl"):  # fmt: skip
        assert freeze(SourceSection(path=path)).fingerprint == whole.fingerprint, path
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "deep/2/part.parquet")
    with pytest.raises(DataError, match=r"json, parquet(.|\n)*by a glob"):
        freeze(SourceSection(path=f"{tmp_path}/deep/*/*"))
    for path in (f"{tmp_path}/none/*.jsonl", f"file://{tmp_path}/none"):
        with pytest.raises(DataError, match="missing"):
            freeze(SourceSection(path=path))


# --- object stores ---


@pytest.fixture(autouse=True)
def no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up within a second."""
    be_impatient(monkeypatch)


def put(port: int, key: str, data: bytes) -> None:
    where = object_store(f"s3://{BUCKET}", options(port), setting="the test")
    obstore.put(where, key, data)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """SeaweedFS with the ten records as JSONL in two parts, as Parquet, and things beside them."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as found:
        put(found, "corpus/lines/part-0 of 2.jsonl", lines_of(RECORDS[:4]))
        put(found, "corpus/lines/day=2/part-1.jsonl", lines_of(RECORDS[4:]))
        put(found, "corpus/lines/_SUCCESS", b"ok")
        put(found, "corpus/lines/_temporary/0.jsonl", lines_of(RECORDS))
        put(found, "corpus/lines-of-another/part.jsonl", lines_of(RECORDS))
        table = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(RECORDS), table)
        put(found, "corpus/all.parquet", table.getvalue().to_pybytes())
        put(found, "mixed/a.parquet", table.getvalue().to_pybytes())
        put(found, "mixed/b.jsonl", lines_of(RECORDS))
        rows = "id,text\n" + "".join(f"{record['id']},{record['text']}\n" for record in RECORDS)
        put(found, "corpus/lines/table.csv", rows.encode())
        put(found, "corpus/lines/notes.txt", b"not data")
        put(found, "corpus/tables/all.csv.gz", gzip.compress(rows.encode()))
        put(found, "broken/a.jsonl", lines_of(RECORDS[:1]) + b'{"text": "\xff"}\n' + lines_of(RECORDS[1:]))
        yield found


@pytest.mark.parametrize(
    "path",
    ["corpus/all.parquet", "corpus/lines", "corpus/lines/", "corpus/l*s/**/part-*.jsonl", "corpus/*.parquet",
     "corpus/lines/[a-z]*/part-?*.jsonl", "corpus/tables/all.csv.gz", "corpus/tables/*.gz"],
)  # fmt: skip
def test_an_object_store_gives_the_same_corpus_as_files(tmp_path: Path, port: int, path: str) -> None:
    local = freeze(SourceSection(path=write(tmp_path / "a.jsonl", RECORDS)))
    source = SourceSection(path=f"s3://{BUCKET}/{path}", storage_options=options(port, READER))
    remote = freeze(source)
    if path.startswith("corpus/lines/["):
        assert ids_of(remote) == ids_of(local)[4:]
    elif "*s/**" in path or "lines" in path:
        # `day=2/` sorts before `part-0`.
        assert ids_of(remote) == ids_of(local)[4:] + ids_of(local)[:4]
    else:
        assert remote.fingerprint == local.fingerprint


def test_credentials_may_come_from_the_environment(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER["secret_access_key"])
    given = {key: value for key, value in options(port).items() if key in ("endpoint", "region")}
    source = SourceSection(path=f"s3://{BUCKET}/corpus/all.parquet", storage_options=given, weight=0.5)
    assert len(freeze(source)) == 5


def test_a_broken_line_in_an_object_loses_one_record(tmp_path: Path, port: int) -> None:
    source = SourceSection(path=f"s3://{BUCKET}/broken/a.jsonl", storage_options=options(port))
    assert statuses_of(freeze(source)) == ["ok", "invalid_text", *["ok"] * 9]


@pytest.mark.parametrize(
    ("path", "says"),
    [("corpus/none.jsonl", "no object matches"), ("corpus/none/*.jsonl", "no object matches"),
     ("corpus/lin", "no object matches"), ("mixed", r"json, parquet(.|\n)*by a glob"),
     ("corpus/lines/_SUCCESS", "unknown kinds")],
)  # fmt: skip
def test_objects_that_cannot_be_a_source_are_named(tmp_path: Path, port: int, path: str, says: str) -> None:
    source = SourceSection(path=f"s3://{BUCKET}/{path}", storage_options=options(port))
    with pytest.raises(DataError, match=says):
        freeze(source)


def test_a_bucket_that_is_not_there_is_a_configuration_error(tmp_path: Path, port: int) -> None:
    with pytest.raises(MismatchError, match=r"bucket of s3://nowhere(.|\n)*corpus\.sources"):
        freeze(SourceSection(path="s3://nowhere/a.jsonl", storage_options=options(port)))


@pytest.mark.parametrize("path", ["corpus/all.parquet", "corpus/lines", "corpus/*.parquet"])
def test_wrong_credentials_are_told_apart(tmp_path: Path, port: int, path: str) -> None:
    wrong = options(port, {"access_key_id": "testkey", "secret_access_key": "wrong"})
    with pytest.raises(MismatchError, match=r"no access to s3://logits(.|\n)*credentials"):
        freeze(SourceSection(path=f"s3://{BUCKET}/{path}", storage_options=wrong))


def test_a_url_with_credentials_or_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="must not carry credentials"):
        freeze(SourceSection(path="s3://key:secret@bucket/a.jsonl"))
    source = SourceSection(path="s3://bucket/a.jsonl", storage_options={"endpiont": "x"})
    with pytest.raises(MismatchError, match=r"corpus\.sources"):
        freeze(source)


@pytest.fixture
def tiny() -> Iterator[TinyS3]:
    server = TinyS3()
    server.objects[f"{BUCKET}/a.jsonl"] = lines_of(RECORDS)
    yield server
    server.close()


def test_an_object_is_fetched_once(tmp_path: Path, tiny: TinyS3) -> None:
    source = SourceSection(path=f"s3://{BUCKET}/a.jsonl", storage_options=options(tiny.port))
    first = freeze(source)
    asked = len(tiny.requests)
    assert freeze(source).fingerprint == first.fingerprint
    assert len(tiny.requests) == asked + 1, "only its head is asked for"
    assert not list((tmp_path / "neo").rglob(".part-*"))


def test_a_damaged_copy_of_an_object_is_fetched_again(
    tmp_path: Path, tiny: TinyS3, caplog: pytest.LogCaptureFixture
) -> None:
    source = SourceSection(path=f"s3://{BUCKET}/a.jsonl", storage_options=options(tiny.port))
    first = freeze(source)
    (copy,) = (tmp_path / "neo/sources").glob("*/a.jsonl")
    whole = copy.read_bytes()
    for damaged in (copy, copy.with_name("a.jsonl.sha256")):
        data = bytearray(damaged.read_bytes())
        data[-4] ^= 1
        damaged.write_bytes(data)
        caplog.clear()
        assert freeze(source, seed=len(data)).fingerprint == first.fingerprint
        assert "fetched again" in caplog.text
        assert copy.read_bytes() == whole


def test_many_objects_are_fetched_side_by_side_in_order(
    tmp_path: Path, tiny: TinyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        tiny.objects[f"{BUCKET}/parts/{i}.jsonl"] = lines_of(RECORDS[i : i + 1])
    start = threading.Barrier(8, timeout=20)
    original = obstore.get
    asked = iter(range(100))

    def together(*arguments: Any) -> Any:
        if next(asked) < 8:
            start.wait()
        return original(*arguments)

    monkeypatch.setattr(obstore, "get", together)
    urls = [f"s3://{BUCKET}/parts/{i}.jsonl" for i in range(10)]
    files = [remote.find_remote(url, options(tiny.port), wanted=lambda _: True)[0] for url in urls]
    paths = remote.fetch(files, options(tiny.port), tmp_path)
    assert [path.read_bytes() for path in paths] == [lines_of(RECORDS[i : i + 1]) for i in range(10)]
    tiny.fault = lambda method, key, n: (403, b"") if key.endswith("7.jsonl") else None
    with pytest.raises(MismatchError, match="no access"):
        remote.fetch(files, options(tiny.port), tmp_path / "other")
    assert not list((tmp_path / "other").rglob(".part-*"))


def test_a_store_that_is_away_is_temporary(tmp_path: Path, tiny: TinyS3, impatient: None) -> None:
    source = SourceSection(path=f"s3://{BUCKET}/a.jsonl", storage_options=options(tiny.port))
    tiny.fault = lambda method, key, n: "before" if n > 1 else None
    with pytest.raises(TemporaryError, match="does not answer"):
        freeze(source)
    tiny.fault = lambda method, key, n: None
    assert len(freeze(source)) == 10


def test_a_stop_request_is_heard_while_a_store_hangs(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        source = SourceSection(path=f"s3://{BUCKET}/a.jsonl", storage_options=options(silent.getsockname()[1]))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        asked = time.monotonic()
        with pytest.raises(TemporaryError, match="SIGTERM"), stoppable():
            freeze(source)
    assert time.monotonic() - asked < 5


PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files_are_read_whole_and_by_line(tmp_path: Path, suffix: str) -> None:
    plain = freeze(SourceSection(path=write(tmp_path / "a.jsonl", RECORDS)))
    for name, records in (("b", RECORDS), ("c", [*RECORDS, {"id": "bad", "text": "\ud800"}])):
        path = f"{tmp_path}/{name}.jsonl{suffix}"
        with fsspec.open(path, "wb", compression=PACKED[suffix]) as file:
            file.write(lines_of(records))
        found = freeze(SourceSection(path=path))
        assert statuses_of(found)[:10] == ["ok"] * 10
        np.testing.assert_array_equal(found.input_ids, plain.input_ids)
    assert statuses_of(found)[10:] == ["invalid_text"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "when", "completion": "2024-01-01"},
        {"messages": [{"role": "user", "content": "when"}, {"role": "assistant", "content": "2024-01-01"}]},
    ],
)
def test_text_that_looks_like_a_date_stays_text(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [record, record])
    mixed = write(tmp_path / "b.jsonl", [record, {"id": "x", "prompt": "what", "completion": "it"}, record])
    dates, others = (freeze(SourceSection(path=path)), freeze(SourceSection(path=mixed)))
    np.testing.assert_array_equal(dates.sample(1).input_ids, others.sample(2).input_ids)
    assert statuses_of(dates) == ["ok", "ok"]


EXACT = [
    {"prompt": "quoted", "completion": '"42"'},
    {"prompt": ["no text"], "completion": "it"},
    {"prompt": "null", "completion": "null"},
    {"prompt": "list", "completion": '{"b": 1, "a": [1.0]}'},
    {"prompt": "day", "completion": "2024-01-01"},
]
"""Texts that are JSON, or a date, where one record makes the column mixed."""


@pytest.mark.parametrize("kind", ["lines", "list", "pretty list", "objects over lines", "mark", "directory"])
def test_json_is_read_as_it_is_written(tmp_path: Path, kind: str) -> None:
    """No text is decoded or taken for a time, and a bad record of a list is that record alone."""
    texts = {
        "list": json.dumps(EXACT),
        "pretty list": json.dumps(EXACT, indent=1),
        "objects over lines": "\n".join(json.dumps(record, indent=1) for record in EXACT),
        "mark": "\ufeff" + lines_of(EXACT).decode(),
    }
    file = tmp_path / ("data/train.json" if kind == "directory" else "a.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(texts.get(kind, lines_of(EXACT).decode()))
    corpus = freeze(SourceSection(path=str(file.parent if kind == "directory" else file)))
    assert statuses_of(corpus) == ["ok", "invalid_text", "ok", "ok", "ok"]
    tokenizer = tiny_tokenizer()
    supervised = [tokenizer.decode(sample.input_ids[sample.loss_mask]) for sample in map(corpus.sample, (0, 2, 3, 4))]
    assert [each.removesuffix(tokenizer.eos_token) for each in supervised] == [
        str(EXACT[i]["completion"]) for i in (0, 2, 3, 4)
    ]


def test_a_record_without_its_columns_is_empty(tmp_path: Path) -> None:
    """As one in which they are null, the first ones included; with something else in it, it is of another format."""
    records = [
        {},
        {"id": "a"},
        {"prompt": "how"},
        {"prompt": "what", "completion": "it"},
        {"completion": None},
        {"foo": 1},
    ]
    assert statuses_of(freeze(SourceSection(path=write(tmp_path / "a.jsonl", records)))) == [
        "empty", "empty", "empty", "ok", "empty", "invalid_text"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no known record format fits"):
        freeze(SourceSection(path=write(tmp_path / "b.jsonl", [{"foo": 1}] * 3)))


@pytest.mark.parametrize("split", ["train[:2]+train[8:]", "all", "train"])
@pytest.mark.parametrize("place", ["file", "directory"])
def test_several_parts_of_a_json_source_are_read(tmp_path: Path, place: str, split: str) -> None:
    """In the notation of `datasets`."""
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "train.jsonl", RECORDS)
    corpus = freeze(SourceSection(path=path if place == "file" else str(tmp_path / "data"), split=split))
    assert len(corpus) == (4 if "+" in split else 10)


def test_archives_and_other_encodings_of_a_directory_are_read_whole(tmp_path: Path) -> None:
    """What only `datasets` can take apart is left to it."""
    packed, latin = tmp_path / "packed", tmp_path / "latin"
    packed.mkdir()
    with zipfile.ZipFile(packed / "a.zip", "w") as archive:
        for name in ("a.jsonl", "b.jsonl"):
            archive.writestr(name, lines_of(RECORDS[:3]))
    assert len(freeze(SourceSection(path=str(packed)))) == 6
    latin.mkdir()
    (latin / "a.jsonl").write_bytes(json.dumps({"text": "\xe9"}, ensure_ascii=False).encode("latin-1"))
    (latin / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n  encoding: latin-1\n---\n"
    )
    assert statuses_of(freeze(SourceSection(path=str(latin)))) == ["ok"]


def test_a_list_that_is_torn_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "b"}')
    with pytest.raises(DataError, match=r"a\.json is no JSON(.|\n)*line 2"):
        freeze(SourceSection(path=str(tmp_path / "a.json")))


def test_numbers_of_tool_calls_keep_their_digits_and_order(tmp_path: Path) -> None:
    """Where some messages have calls and others have none; and no type of another call's argument."""
    calls = ['{"lat": 48.858370123456, "tiny": 1e-12}', '{"b": 5, "a": 5.5}', '{"a": 2, "b": "5"}']
    records = [
        {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "it", "arguments": json.loads(call)}}]}]}
        for call in calls
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", records)
    read = [record for _, record in open_source(SourceSection(path=path), find_source(SourceSection(path=path)),
                                                seed=0, cache=tmp_path).numbered]  # fmt: skip
    assert [json.dumps(record) for record in read] == [json.dumps(record) for record in records]


@pytest.mark.parametrize("place", ["file", "directory"])
def test_files_of_another_size_and_the_same_time_are_read_again(tmp_path: Path, place: str) -> None:
    """As archives leave them that set every time to one."""
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    for texts in (["what"], ["how", "so"]):
        pq.write_table(pa.table({"text": texts}), file)
        os.utime(file, (10**9, 10**9))
        assert len(freeze(SourceSection(path=str(file if place == "file" else file.parent)))) == len(texts)


@pytest.mark.parametrize("name", ["a.xlsx", "a.arrow.gz", "a"])
def test_a_file_of_another_kind_is_told_which_ones_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.ndjson, \.parquet"):
        freeze(SourceSection(path=str(tmp_path / name)))


@pytest.mark.parametrize("place", ["{mine}", "../mine.jsonl", "file://{mine}", "zip://a.jsonl::{mine}.zip"])
def test_a_dataset_whose_card_names_files_outside_of_it_is_refused(place: str, tmp_path: Path) -> None:
    """Who reads a stranger's dataset would have texts of its own in the dump. Older `datasets` look into no archive."""
    mine = write(tmp_path / "mine.jsonl", RECORDS)
    with zipfile.ZipFile(f"{mine}.zip", "w") as archive:
        archive.write(mine, "a.jsonl")
    write(tmp_path / "data" / "theirs.jsonl", RECORDS[:3])
    for files in (place.format(mine=mine), "theirs.jsonl"):
        card = {"configs": [{"config_name": "default", "data_files": files}]}
        (tmp_path / "data" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        if files == "theirs.jsonl":
            assert len(ids_of(freeze(tmp_path / "data"))) == 3
        else:
            with pytest.raises(DataError, match=r"names a file that is not its own|Unable to find"):
                freeze(tmp_path / "data")


def test_a_saved_dataset_that_names_files_outside_of_it_is_refused(tmp_path: Path) -> None:
    for name in ("mine", "data"):
        datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / name)
    assert len(ids_of(freeze(tmp_path / "data"))) == 10
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../mine/data-00000-of-00001.arrow"}]
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="names a file that is not its own"):
        freeze(tmp_path / "data")


def test_files_of_a_hub_dataset_are_those_of_its_repository() -> None:
    of_hub = "hf://datasets/org/name@0123/data/train.parquet"
    refuse_elsewhere("org/name", [of_hub, f"zip://a.jsonl::{of_hub}"])
    for file in ("/etc/x.jsonl", "https://host.example/x", "hf://datasets/org/other@0123/x", "s3://org/name@0123/x"):
        with pytest.raises(DataError, match="names a file that is not its own"):
            refuse_elsewhere("org/name", [of_hub, file])
