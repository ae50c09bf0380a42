"""The frozen corpus on real files of every kind, good and bad."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpora import freeze, ids_of, statuses_of, write_jsonl
from support.tiny_teachers import CHATML, VOCABULARY, tiny_tokenizer

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.freeze import Corpus

pytestmark = pytest.mark.usefixtures("own_cache")

RECORDS = [
    {"id": f"r{i}", "messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "so " * i}]}
    for i in range(1, 6)
]


def supervised(corpus: Corpus, i: int, tokenizer: Any = None) -> str:
    sample = corpus.sample(i)
    return (tokenizer or tiny_tokenizer(CHATML)).decode(sample.input_ids[sample.loss_mask])


def test_jsonl_json_parquet_and_directories_give_the_same_corpus(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", RECORDS)
    corpus = freeze(lines)
    assert ids_of(corpus) == ["r1", "r2", "r3", "r4", "r5"]
    assert statuses_of(corpus) == ["ok"] * 5
    assert supervised(corpus, 1) == "so so <|im_end|>"
    for other in ("a.json", "a.parquet", "saved", "splits", "folder"):
        assert freeze(tmp_path / other).fingerprint == corpus.fingerprint, other


def test_sources_are_concatenated_in_order_and_may_differ_in_format(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", RECORDS[:2])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": "what is the answer"}])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "what ", "completion": "so"}])
    corpus = freeze(chat, plain, pairs)
    assert len(corpus) == 4
    assert supervised(corpus, 3) == "so</s>"
    assert corpus.sample(3).sample_index == 3
    assert freeze(plain, chat, pairs).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("broken", [False, True])
def test_splits_can_be_cut(tmp_path: Path, broken: bool) -> None:
    lone = [{"id": "bad", "messages": [{"role": "user", "content": "\ud800"}]}] if broken else []
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS + lone)
    assert ids_of(freeze(path, split="train[:2]")) == ["r1", "r2"]
    assert ids_of(freeze(path, split="train[3:5]")) == ["r4", "r5"]


def test_the_fingerprint_follows_ids_masks_and_statuses(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    renamed = write_jsonl(tmp_path / "b.jsonl", [RECORDS[0] | {"id": "other"}, *RECORDS[1:]])
    limit = len(freeze(path).sample(2).input_ids)
    prints = [
        freeze(path).fingerprint,
        freeze(renamed).fingerprint,
        freeze(path, mask="all").fingerprint,
        freeze(path, max_length=limit).fingerprint,
        freeze(path, max_length=limit, too_long="drop").fingerprint,
        freeze(path, split="train[:4]").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    again = write_jsonl(tmp_path / "elsewhere.jsonl", RECORDS)
    assert freeze(again).fingerprint == prints[0], "where a file lies does not matter"


def test_records_without_id_are_named_by_content_and_ids_may_repeat(tmp_path: Path) -> None:
    bare = [{"text": "what is it"}, {"text": "the answer"}, {"text": "what is it"}]
    corpus = freeze(write_jsonl(tmp_path / "a.jsonl", bare))
    assert ids_of(corpus)[0] == ids_of(corpus)[2] != ids_of(corpus)[1]
    assert len(ids_of(corpus)[0]) == 16
    repeated = freeze(write_jsonl(tmp_path / "b.jsonl", [{"id": 7, "text": "what"}, {"id": 7, "text": "it is"}]))
    assert ids_of(repeated) == ["7", "7"]


def test_over_long_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    whole = freeze(path)
    limit = len(whole.sample(2).input_ids)
    assert len(whole.sample(3).input_ids) > limit
    cut = freeze(path, max_length=limit)
    assert statuses_of(cut) == ["ok"] * 5
    assert (whole.truncated, cut.truncated) == (0, 2)
    assert f"2 of 5 samples are cut to corpus.max_length {limit}" in caplog.text
    np.testing.assert_array_equal(cut.sample(4).input_ids, whole.sample(4).input_ids[:limit])
    np.testing.assert_array_equal(cut.sample(2).input_ids, whole.sample(2).input_ids)
    dropped = freeze(path, max_length=limit, too_long="drop")
    assert statuses_of(dropped) == ["ok", "ok", "ok", "too_long", "too_long"]
    assert dropped.longest == limit
    assert dropped.truncated == 0
    with pytest.raises(DataError, match=rf"record 4(.|\n)*at most {limit}"):
        freeze(path, max_length=limit, too_long="error")


def test_samples_without_supervised_tokens_are_empty(tmp_path: Path) -> None:
    records = [
        RECORDS[0],
        {"id": "prompt only", "messages": [{"role": "user", "content": "what"}]},
        {"id": "nothing", "messages": []},
        {"id": "cut", "messages": [{"role": "user", "content": "what " * 50}, {"role": "assistant", "content": "so"}]},
    ]
    corpus = freeze(write_jsonl(tmp_path / "a.jsonl", records), max_length=40)
    assert statuses_of(corpus) == ["ok", "empty", "empty", "empty"]
    assert len(corpus.sample(1).input_ids) > 0
    assert not corpus.loss_mask[corpus.offsets[1] :].any()


def test_lone_surrogates_in_jsonl_lose_one_record(tmp_path: Path) -> None:
    bad = {"id": "half", "messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "so"}]}
    corpus = freeze(write_jsonl(tmp_path / "a.jsonl", [RECORDS[0], bad, RECORDS[1]]))
    assert statuses_of(corpus) == ["ok", "invalid_text", "ok"]
    assert ids_of(corpus) == ["r1", "half", "r2"]
    only_good = freeze(write_jsonl(tmp_path / "b.jsonl", [RECORDS[0], RECORDS[1]]))
    np.testing.assert_array_equal(corpus.sample(2).input_ids, only_good.sample(1).input_ids)


def test_bytes_that_are_not_utf8_lose_one_record(tmp_path: Path) -> None:
    lines = [json.dumps(record).encode() for record in RECORDS[:2]]
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b'\n{"messages": "\xff\xfe"}\n\n' + lines[1] + b"\n")
    assert statuses_of(freeze(tmp_path / "a.jsonl")) == ["ok", "invalid_text", "ok"]
    invalid = pa.Array.from_buffers(pa.string(), 3, pa.array([b"what is", b"\xff\xfe", b"it is"]).buffers())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
    assert statuses_of(freeze(tmp_path / "a.parquet")) == ["ok", "invalid_text", "ok"]


@pytest.mark.parametrize("split", ["train[:oops]", "validation"])
def test_an_unknown_split_is_a_clear_error(tmp_path: Path, split: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "splits")
    for source in (path, tmp_path / "splits"):
        with pytest.raises(DataError, match="cannot be read"):
            freeze(source, split=split)


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    path.write_text(path.read_text() + '{"messages": [{"ro')
    with pytest.raises(DataError, match="line 6"):
        freeze(path)


ODD = [
    ({"messages": "oops"}, "another shape"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "unknown role: 'critic'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content has another shape"),
    ({"messages": [{"content": "no role"}]}, "unknown role: None"),
]


@pytest.mark.parametrize(("odd", "says"), ODD)
def test_one_odd_record_is_a_row_with_a_status_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: Any, says: Any
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*RECORDS, odd])
    corpus = freeze(path)
    assert statuses_of(corpus) == ["ok"] * 5 + ["invalid_text"]
    ((problem,),) = corpus.problems
    assert problem.startswith(f"{path}, record 6: ")
    assert says in problem
    assert f"1 of 6 records of {path} cannot be used" in caplog.text
    assert says in caplog.text
    with pytest.raises(DataError, match=r"1 of 6(.|\n)*record 6(.|\n)*max_bad_share"):
        freeze(path, max_bad_share=0)


def test_too_many_odd_records_stop_the_start_and_the_first_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [RECORDS[0], *(odd for odd, _ in ODD)])
    fine = write_jsonl(tmp_path / "b.jsonl", RECORDS * 100)
    with pytest.raises(DataError, match=r"4 of 5 records(.|\n)*record 2: (.|\n)*record 5: "):
        freeze(fine, path)
    corpus = freeze(fine, path, max_bad_share=0.8)
    assert statuses_of(corpus)[-5:] == ["ok"] + ["invalid_text"] * 4


def test_records_of_another_known_format_are_told_by_their_own_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = [
        {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "so " * i}]}
        for i in range(1, 6)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*RECORDS, *shared, {"text": "what is it"}])
    corpus = freeze(path)
    assert statuses_of(corpus) == ["ok"] * 11
    np.testing.assert_array_equal(corpus.sample(7).input_ids, corpus.sample(2).input_ids)
    assert "several formats: 5 messages, 5 conversations, 1 text" in caplog.text


def test_records_of_other_formats_in_columnar_files(tmp_path: Path) -> None:
    """There every record has the columns of all, null or empty."""
    conversation = RECORDS[0]["messages"]
    records = [
        {"messages": conversation, "text": "", "reply": None, "labels": None},
        {"messages": [], "text": "what is it", "reply": None, "labels": None},
        {"messages": None, "text": None, "reply": "so", "labels": None},
    ]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(path))
    with pytest.raises(DataError, match="record 3: the record is not of format `messages`: columns reply"):
        freeze(path, max_bad_share=0.0)
    assert statuses_of(freeze(path)) == ["ok", "ok", "invalid_text"]
    assert statuses_of(freeze(path, ignore_columns=["reply"])) == ["ok", "ok", "empty"]


def test_files_of_a_directory_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "data" / "a.jsonl", RECORDS)
    write_jsonl(tmp_path / "data" / "more" / "b.jsonl", RECORDS)
    write_jsonl(tmp_path / "data" / ".hidden" / "c.jsonl", RECORDS)
    assert len(freeze(tmp_path / "data")) == 2 * len(RECORDS)
    assert "leaves out" not in caplog.text
    datasets.Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "data" / "c.parquet"))
    assert len(freeze(tmp_path / "data")) == 2 * len(RECORDS)
    assert "files that split train leaves out: c.parquet" in caplog.text


def test_a_very_long_sample_is_cut(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "what is it " * 40_000}, {"text": "what is it"}])
    corpus = freeze(path, max_length=100)
    assert [len(corpus.sample(i).input_ids) for i in range(2)] == [100, len(corpus.sample(1).input_ids)]


def test_pretokenised_records(tmp_path: Path) -> None:
    records = [{"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]}, {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = freeze(path)
    np.testing.assert_array_equal(corpus.sample(0).input_ids, [5, 6, 7])
    np.testing.assert_array_equal(corpus.sample(0).loss_mask, [False, False, True])
    assert statuses_of(corpus) == ["ok", "empty"]
    np.testing.assert_array_equal(freeze(path, mask="all").sample(1).loss_mask, [False, True, True])
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"input_ids": [5, 6, 7]}])
    np.testing.assert_array_equal(freeze(bare).sample(0).loss_mask, [False, True, True])
    for wrong in (VOCABULARY, -1, 2**40):
        outside = write_jsonl(tmp_path / "outside.jsonl", [{"input_ids": [5, wrong]}])
        with pytest.raises(DataError, match="outside of the teacher's vocabulary"):
            freeze(outside)


def test_a_corpus_without_any_usable_sample_says_why(tmp_path: Path) -> None:
    only_prompts = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "what"}]}] * 3)
    with pytest.raises(DataError, match="3 empty"):
        freeze(only_prompts)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="no records"):
        freeze(empty)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "no/such/dataset"])
def test_a_missing_source_is_a_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"missing|cannot be read"):
        freeze(tmp_path / name)


def test_a_stated_format_is_not_guessed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "what is it", "messages": []}, {"text": "so", "messages": []}])
    assert statuses_of(freeze(path, format="text")) == ["ok", "ok"]
    with pytest.raises(DataError, match="alpaca"):
        freeze(path, format="alpaca")


def test_a_column_that_decides_a_sample_is_refused_and_an_unknown_one_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = [record | {"mood": "good", "images": None if i else ["a.png"]} for i, record in enumerate(RECORDS)]
    path = write_jsonl(tmp_path / "a.jsonl", odd)
    with pytest.raises(DataError, match=r"record 1: a column decides(.|\n)*images(.|\n)*ignore_columns"):
        freeze(path)
    assert statuses_of(freeze(path, ignore_columns=["images"])) == ["ok"] * 5
    assert caplog.text.count("does not read: mood") == 1


def test_tool_calls_of_columnar_files_are_those_of_lines(tmp_path: Path) -> None:
    """Columnar files give each tool and each call the keys of all others, as nulls; older pyarrow sorts them."""
    given = [("get", {"city": "it"}), ("mul", {"a": 1, "b": 2})]
    records = [
        {
            "tools": [{"type": "function", "function": {"name": name, "parameters": dict.fromkeys(arguments, "x")}}],
            "messages": [
                {"role": "user", "content": "what"},
                {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments, "name": name}}]},
            ],
        }
        for name, arguments in given
    ]
    template = (
        "{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}{% for m in messages %}<|im_start|>"
        "{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    lines = freeze(write_jsonl(tmp_path / "a.jsonl", records), tokenizer=tokenizer)
    columns = freeze(tmp_path / "a.parquet", tokenizer=tokenizer)
    np.testing.assert_array_equal(columns.input_ids, lines.input_ids)
    assert columns.fingerprint == lines.fingerprint
    assert supervised(columns, 0, tokenizer) == '{"arguments": {"city": "it"}, "name": "get"}<|im_end|>'
    assert "null" not in tokenizer.decode(columns.input_ids)
