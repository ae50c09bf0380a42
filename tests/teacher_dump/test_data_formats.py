"""docs/data_formats.md is true, and data as people have it: kinds of files, names, chat templates, chunks."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from pydantic import ValidationError
from support.chat_templates import CHATS
from support.corpora import freeze, ids_of, statuses_of, supervised_text, write_jsonl
from support.dump_checks import rows_of, sections
from support.engine_jobs import some_event, train_section
from support.tiny_teachers import CHATML, CHATML_GENERATION, VOCABULARY, save_teacher, tiny_tokenizer
from transformers import AutoTokenizer

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.rows import OK
from student_train.config import LossSection, StudentSection
from student_train.model.tokenizers import write_files
from student_train.results.chat import Chat
from student_train.results.model_card import model_card
from teacher_dump.config import CorpusSection, SourceSection
from teacher_dump.corpus import freeze as freezing
from teacher_dump.corpus import lines
from teacher_dump.corpus.formats import FORMATS
from teacher_dump.corpus.preview import preview
from teacher_dump.dump import run_dump

pytestmark = pytest.mark.usefixtures("own_cache")

PAGE = (Path(__file__).parents[2] / "docs/data_formats.md").read_text()
QUESTION = {"role": "user", "content": "why"}
ANSWER = {"role": "assistant", "content": "because"}


def examples() -> Iterator[Any]:
    """(kind of file, content, settings, what is supervised) of each example of the page."""
    for heading, section in re.findall(r"^#{2,3} (.+)\n((?:(?!^#{2,3} ).*\n?)*)", PAGE, re.MULTILINE):
        kind, content, settings = "", "", {}
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            if language == "yaml":
                settings = yaml.safe_load(block)
            elif language:
                kind, content, settings = language, block, {}
            else:
                yield pytest.param(heading, kind, content, settings, block, id=f"{heading}-{kind}")


@pytest.mark.parametrize(("heading", "kind", "content", "settings", "supervised"), [*examples()])
def test_the_page_says_what_is_supervised(
    tmp_path: Path, heading: str, kind: str, content: str, settings: dict[str, Any], supervised: str
) -> None:
    path = tmp_path / f"example.{kind}"
    path.write_text(content)
    (given,) = settings.pop("sources", [{}])
    tokenizer = tiny_tokenizer()
    source = SourceSection(path=str(path), **given)
    corpus = freeze(source, tokenizer=tokenizer, max_bad_share=0, **settings)
    rows = [corpus.sample(i) for i in range(len(corpus))]
    shown = [f"{row.sample_id}: {supervised_text(tokenizer, row)}" for row in rows]
    if kind == "txt":
        shown = [line.partition(": ")[2] for line in shown]
    assert shown == supervised.splitlines()
    if (name := heading.strip("`")) in FORMATS:
        stated = freeze(source.model_copy(update={"format": name}), max_bad_share=0, **settings)
        assert stated.fingerprint == corpus.fingerprint


def test_the_page_has_an_example_of_every_format() -> None:
    assert list(FORMATS) == re.findall(r"^### `(\w+)`", PAGE, re.MULTILINE)


GOLDEN: dict[str, tuple[list[dict[str, Any]], str]] = {
    "messages": (
        [
            {"messages": [QUESTION, ANSWER]},
            {"id": 7, "messages": [QUESTION, ANSWER, QUESTION, ANSWER], "system": "be brief", "mood": "x"},
        ],
        "b780e685e8290dcc20438e7f78b4469970fab41d8d4c80d829e4f7da96f46028",
    ),
    "conversations": (
        [{"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]}],
        "6a3159ac083fc802a32c1cb97f6bbb219d53af8e22d08cd37924446ed365d961",
    ),
    "alpaca": (
        [
            {"instruction": "why", "input": "", "output": "so"},
            {"instruction": "why", "input": "me", "output": "so", "system": "s"},
        ],
        "3d121f2a2823d4b8b7c60da46a490fec9195e461e06f7866c011192e828e249b",
    ),
    "prompt_completion": (
        [{"prompt": "why", "completion": "so"}, {"prompt": None, "completion": "so"}],
        "e9c5c02e2d6be84986fe239c0a2548a1161975c18bb6b33e2d680a0fd583a7c6",
    ),
    "text": (
        [
            {"text": "what is the answer to the question " * 12, "question": "a", "answer": "b"},
            {"text": "short", "id": "a"},
        ],
        "8780290fb9b719447f26653d230ea54528c0d5bc697189965749789de9e57f01",
    ),
    "tokens": (
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 6], "labels": [-100, 6]}],
        "392657b664e7f133f9d07141f377015662d436126def86ba44f7c785c9145177",
    ),
}
"""Made before there were other formats, names, templates and chunks: their dumps go on."""


@pytest.mark.parametrize("kind", GOLDEN)
def test_corpora_of_before_keep_their_fingerprints(tmp_path: Path, kind: str) -> None:
    records, fingerprint = GOLDEN[kind]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert freeze(path, max_length=48, max_bad_share=0).fingerprint == fingerprint


# --- kinds of files ---

TABLE = [
    {"id": "007", "question": 'what, "is" it', "answer": "NA"},
    {"id": "b", "question": "two\nlines", "answer": "2024-01-01"},
    {"id": "c", "question": "\u00fc\ttab", "answer": "1.50"},
    {"id": "d", "question": "nothing", "answer": ""},
]


def table(delimiter: str) -> bytes:
    rows = [["id", "question", "answer"], *(list(record.values()) for record in TABLE)]
    quoted = [delimiter.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    return ("\ufeff" + "\r\n".join(quoted) + "\r\n").encode()


def arrow(*, stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    rows = pa.Table.from_pylist(TABLE)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


FILES = {
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.csv.gz": gzip.compress(table(",")),
    "a.csv.bz2": bz2.compress(table(",")),
    "a.tsv.xz": lzma.compress(table("\t")),
    "a.csv.zst": zstandard.compress(table(",")),
    "a.arrow": arrow(stream=False),
    "b.arrow": arrow(stream=True),
    "a.feather": arrow(stream=False),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_corpus_of_the_same_lines(tmp_path: Path, name: str) -> None:
    expected = freeze(write_jsonl(tmp_path / "a.jsonl", TABLE))
    assert statuses_of(expected) == ["ok", "ok", "ok", "empty"]
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert freeze(path).fingerprint == expected.fingerprint
    half = {"weight": 0.5, "split": "train[1:]"}
    assert freeze(path, **half).fingerprint == freeze(tmp_path / "a.jsonl", **half).fingerprint


@pytest.mark.parametrize("packed", ["", ".zst"])
def test_lines_of_text(tmp_path: Path, packed: str) -> None:
    raw = b"what is it\r\n\n  the answer\n\xff\nso"
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(zstandard.compress(raw) if packed else raw)
    records = [{"text": "what is it"}, {"text": "  the answer"}, {"text": "so"}]
    expected = freeze(write_jsonl(tmp_path / "a.jsonl", records))
    found = freeze(path)
    assert statuses_of(found) == ["ok", "ok", "invalid_text", "ok"]
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    assert found.problems[0][0].startswith(f"{path}, record 3: not valid Unicode")


def test_a_row_of_a_table_that_is_not_utf8_loses_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nwhat\n\xff\nso\n")
    assert statuses_of(freeze(tmp_path / "a.csv")) == ["ok", "invalid_text", "ok"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"question,answer\nwhat,so\nwhat,so,more\n", r"a\.csv(.|\n)*Row #3: Expected 2 columns, got 3"),
        ("a.tsv", b"question\tanswer\nwhat\n", r"a\.tsv(.|\n)*Row #2: Expected 2 columns, got 1"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv(.|\n)*the name of another: text, text"),
        ("a.csv", b"", r"a\.csv(.|\n)*Empty CSV file"),
        ("a.csv", b"prompt,reply\na,b\n", r"a\.csv: no known record format(.|\n)*columns prompt, reply"),
        ("a.arrow", b"no arrow", r"cannot be read: \S*a\.arrow"),
        ("a.csv.gz", gzip.compress(b"text\nwhat\n", mtime=0)[:-6], r"cannot be read: \S*a\.csv\.gz(.|\n)*EOFError"),
        ("a.txt.zst", b"no zst", r"cannot be read: \S*a\.txt\.zst(.|\n)*ZstdError"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_row(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        freeze(tmp_path / name)


def test_values_may_hold_line_ends_wherever_a_block_of_the_file_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"a\n{'b' * (i % 7)}\n\nc" for i in range(40)]
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    whole = freeze(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 32)
    assert freeze(tmp_path / "a.csv", seed=1).fingerprint == whole.fingerprint
    (tmp_path / "b.csv").write_text(f"text\nshort\n{'x' * 100}\n")
    with pytest.raises(DataError, match=r"b\.csv"):
        freeze(tmp_path / "b.csv")


def test_files_of_text_have_no_other_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nwhat\n")
    with pytest.raises(DataError, match=r"Unknown split 'test'"):
        freeze(tmp_path / "a.csv", split="test")


# --- shapes ---


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
@pytest.mark.parametrize("columnar", [False, True])
def test_prompts_and_completions_of_messages(tmp_path: Path, template: str, columnar: bool) -> None:
    """The completion's answers are supervised, one of weight 0 is not, and answers of the prompt are context."""
    more = [{"role": "tool", "content": "x"}, ANSWER | {"content": "silent", "weight": 0}, ANSWER | {"content": "end"}]
    records = [
        {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER | {"content": "so"}, *more]},
        {"prompt": [QUESTION], "completion": []},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    if columnar:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records), path)
    tokenizer = tiny_tokenizer(template)
    corpus = freeze(path, tokenizer=tokenizer, max_bad_share=0)
    assert statuses_of(corpus) == ["ok", "empty"]
    assert supervised_text(tokenizer, corpus.sample(0)) == "so<|im_end|>end<|im_end|>"
    as_messages = [{"messages": [*record["prompt"], *record["completion"]]} for record in records]
    whole = freeze(write_jsonl(tmp_path / "b.jsonl", as_messages), tokenizer=tokenizer)
    np.testing.assert_array_equal(corpus.sample(0).input_ids, whole.sample(0).input_ids)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": [QUESTION], "completion": "so"}, "completion has another shape"),
        ({"prompt": "why", "completion": [ANSWER]}, "prompt has another shape"),
        ({"question": ["why"], "answer": "so"}, "question has another shape"),
        ({"instruction": "why", "context": {"a": 1}, "response": "so"}, "context has another shape"),
    ],
)
def test_a_record_of_another_shape_is_named_with_file_record_and_column(
    tmp_path: Path, record: dict[str, Any], says: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match=rf"a\.jsonl, record 1: {says}"):
        freeze(path, max_bad_share=0)


def test_tools_beside_a_prompt_of_text_are_still_refused(tmp_path: Path) -> None:
    record = {"prompt": "why", "completion": "so", "tools": ["x"]}
    with pytest.raises(DataError, match=r"record 1: a column decides(.|\n)*tools"):
        freeze(write_jsonl(tmp_path / "a.jsonl", [record]))


# --- names ---

NOT_UTF8 = b'{"talk": "\xff"}\n'
"""A line for which a file is read line by line."""


@pytest.mark.parametrize("broken", [False, True])
def test_other_names_give_the_corpus_of_the_usual_ones(tmp_path: Path, broken: bool) -> None:
    """Read as a table and line by line; what had the usual name before is not read."""
    usual = [{"id": f"r{i}", "messages": [QUESTION, ANSWER], "system": "brief"} for i in range(3)]
    other = [
        {
            "key": record["id"],
            "id": 7,
            "talk": [
                {"from": "Bot" if turn is ANSWER else "x", "value": turn["content"]} for turn in record["messages"]
            ],
            "how": "brief",
        }
        for record in usual
    ]
    named = {"columns": {"id": "key", "messages": "talk", "system": "how"}, "roles": {"Bot": "assistant", "x": "user"}}
    path = write_jsonl(tmp_path / "b.jsonl", other)
    if broken:
        path.write_bytes(path.read_bytes() + NOT_UTF8 + b'{"id": "own", "messages": [], "mood": "x"}\n')
    found = freeze(path, **named, max_bad_share=0.5)
    expected = freeze(write_jsonl(tmp_path / "a.jsonl", usual))
    assert ids_of(found)[:3] == ids_of(expected)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
    if broken:
        assert statuses_of(found)[3:] == ["invalid_text"] * 2
        assert "own" not in ids_of(found)
    else:
        assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("broken", [False, True])
def test_a_named_column_that_is_not_there_is_refused(tmp_path: Path, broken: bool) -> None:
    records: list[Any] = [{"talk": [QUESTION, ANSWER]}] * 200
    path = write_jsonl(tmp_path / "a.jsonl", records)
    if broken:
        path.write_bytes(path.read_bytes() + NOT_UTF8)
    with pytest.raises(DataError, match=r"a\.jsonl has no column sys(.|\n)*system: sys"):
        freeze(path, columns={"messages": "talk", "system": "sys"})
    (tmp_path / "a.csv").write_text("q,a\nwhy,so\n")
    with pytest.raises(DataError, match=r"a\.csv has no column z(.|\n)*columns a, q"):
        freeze(tmp_path / "a.csv", columns={"question": "q", "answer": "z"})
    assert statuses_of(freeze(tmp_path / "a.csv", columns={"question": "q", "answer": "a"})) == ["ok"]


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="system"):
        SourceSection(path="a.jsonl", roles={"bot": "robot"})  # type: ignore[dict-item]
    with pytest.raises(ValidationError, match=r"mesages(.|\n)*messages"):
        SourceSection(path="a.jsonl", columns={"mesages": "talk"})


# --- chat templates ---

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' "
    "and enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think></think>' }}{% endif %}{% endif %}"
)
CHAT = {"id": "a", "messages": [QUESTION, ANSWER]}


def test_arguments_reach_the_template_and_the_mask_and_a_records_own_come_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT, CHAT | {"chat_template_kwargs": {"enable_thinking": True}}])
    tokenizer = tiny_tokenizer(THINKING)
    corpus = freeze(path, tokenizer=tokenizer, template_kwargs={"enable_thinking": False})
    shown = [tokenizer.decode(corpus.sample(i).input_ids) for i in range(2)]
    assert ["<think></think>" in text for text in shown] == [True, False]
    # Where the model begins to write, the template has closed the thoughts: they are not supervised.
    assert [supervised_text(tokenizer, corpus.sample(i)) for i in range(2)] == ["because<|im_end|>"] * 2
    without = freeze(write_jsonl(tmp_path / "b.jsonl", [CHAT]), tokenizer=tokenizer)
    np.testing.assert_array_equal(without.sample(0).input_ids, corpus.sample(1).input_ids)
    assert tokenizer.chat_template == THINKING


@pytest.mark.parametrize(
    "value", [True, None, 3, 0.5, 'it\'s "so" \u00fc {% %}\n\U0001f600', [1, None, {"a": False}], {"b": "x"}]
)
def test_every_value_arrives_as_it_is(tmp_path: Path, value: Any) -> None:
    """In loops and in macros too."""
    template = (
        "{% macro say() %}{{ given | tojson }}{% endmacro %}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{{ given | tojson }}{{ say() }}"
        "{{ '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    corpus = freeze(path, chat_template=template, template_kwargs={"given": value}, mask="all", tokenizer=tokenizer)
    text = tokenizer.decode(corpus.sample(0).input_ids)
    written = json.dumps(value, ensure_ascii=False)
    assert text == f"<|im_start|>user\nwhy{written * 2}<|im_end|><|im_start|>assistant\nbecause{written * 2}<|im_end|>"


def test_thoughts_are_kept_by_a_template_that_keeps_them(tmp_path: Path) -> None:
    """DeepSeek-R1's own template cuts them out, so that they are neither rendered nor supervised."""
    r1, v3 = CHATS["deepseek-r1"], CHATS["deepseek-v3"]
    thinking = {"messages": [QUESTION, ANSWER | {"content": "<think>hm</think>so"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [thinking])
    tokenizer = r1.tokenizer()
    file = tmp_path / "keeps.jinja"
    file.write_text(v3.template)
    for options, answer in ({}, "so"), ({"chat_template": str(file)}, "<think>hm</think>so"):
        corpus = freeze(path, tokenizer=tokenizer, lm_head_rows=len(tokenizer), **options)
        assert supervised_text(tokenizer, corpus.sample(0)) == answer + tokenizer.eos_token


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chat_template": "none.jinja"}, r"none\.jinja: No such file"),
        ({"chat_template": "{% for x in %}"}, r"not valid Jinja(.|\n)*line 1"),
        ({"template_kwargs": {"enable_thoughts": True}}, "does not read(.|\n)*enable_thoughts"),
        ({"template_kwargs": {"if": True}}, "does not read(.|\n)*it reads: add_generation_prompt, messages"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(MismatchError, match=says):
        freeze(path, **options)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "a-b", "x is defined"])
def test_what_is_no_argument_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="no argument of a template"):
        CorpusSection(sources=[SourceSection(path="a.jsonl")], template_kwargs={name: True})


def test_of_several_templates_each_has_the_arguments_and_processes_do_the_same(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT, CHAT | {"tools": tools}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": THINKING, "tool_use": "{{ tools[0].function.name }}|" + THINKING}
    options: dict[str, Any] = {"tokenizer": tokenizer, "template_kwargs": {"enable_thinking": False}}
    corpus = freeze(path, **options)
    texts = [tokenizer.decode(corpus.sample(i).input_ids) for i in range(2)]
    assert ["<think></think>" in text for text in texts] == [True, True]
    assert [text.startswith("look|") for text in texts] == [False, True]
    assert freeze(path, **options, num_proc=2).fingerprint == corpus.fingerprint


def test_a_base_tokenizer_takes_the_configured_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    base = tiny_tokenizer(None)
    expected = freeze(path)
    assert freeze(path, tokenizer=base, chat_template=CHATML).fingerprint == expected.fingerprint
    with pytest.raises(MismatchError, match="needs a chat template"):
        freeze(path, tokenizer=base, template_kwargs={"x": 1})


def test_the_template_goes_with_the_dump_to_who_is_trained_on_it(tmp_path: Path) -> None:
    """Whoever renders with its tokenizer gets its tokens, knowing nothing of the corpus; no other one continues it."""
    model = save_teacher(tmp_path / "teacher")
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    job = sections(tmp_path / "dump", path, model)
    options = {"chat_template": THINKING, "template_kwargs": {"enable_thinking": False}}
    job["corpus"] = job["corpus"].model_copy(update=options)
    run_dump(**job)
    dump = Dump.open(str(tmp_path / "dump"))
    final = Path(shutil.copytree(model, tmp_path / "final"))
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (final / name).unlink()
    write_files(final, dump.read_tokenizer())
    kept = AutoTokenizer.from_pretrained(final)
    (row,) = rows_of(tmp_path / "dump")
    assert row.status == OK
    assert kept.apply_chat_template([QUESTION, ANSWER], return_dict=False) == row.input_ids.tolist()
    prompt = kept.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    assert prompt == row.input_ids[: np.flatnonzero(row.loss_mask)[0]].tolist()
    assert Chat(final, device="cpu")._encoded([QUESTION])["input_ids"][0].tolist() == prompt
    head = "{% if enable_thinking is not defined %}{% set enable_thinking = False %}{% endif %}\n"
    assert kept.chat_template == head + THINKING
    told = model_card(
        [dump], StudentSection(model="org/x"), LossSection(), train_section(final), [some_event(1)], folder=final
    )
    assert f"sha256 `{hashlib.sha256((head + THINKING).encode()).hexdigest()}`" in told
    run_dump(**job)
    for other in ({"template_kwargs": {"enable_thinking": True}}, {"chat_template": None, "template_kwargs": {}}):
        with pytest.raises(MismatchError, match="chat_template_sha256"):
            run_dump(**job | {"corpus": job["corpus"].model_copy(update=other)})


def test_preview_shows_what_the_template_makes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "why", "answer": "because"}])
    section = CorpusSection(sources=[SourceSection(path=str(path))], chat_template=CHATML_GENERATION)
    whole, (shown,) = preview(section, tiny_tokenizer(None), lm_head_rows=VOCABULARY, row=None, samples=1)
    assert whole.template == "marks"
    assert [text for text, supervised in shown.parts if supervised] == ["because<|im_end|>"]


# --- chunks ---


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("limit", [3, 4, 7, 50, 64])
def test_chunks_supervise_each_token_once(tmp_path: Path, bos: bool, limit: int) -> None:
    tokenizer = tiny_tokenizer()
    begin = "<s>" if bos else ""
    texts = [begin + "what is the answer to the question and how " * n for n in (1, 2, 5)] + [begin + "so"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)])
    whole = freeze(path, tokenizer=tokenizer, max_length=10_000)
    corpus = freeze(path, tokenizer=tokenizer, max_length=limit, too_long="chunk")
    assert corpus.truncated == 0
    assert corpus.source_records == [4]
    assert corpus.source_samples == [len(corpus)]
    for i in range(len(texts)):
        text = whole.sample(i)
        rows = [row for row in map(corpus.sample, range(len(corpus))) if row.sample_id.split("#")[0] == f"t{i}"]
        assert [row.sample_id for row in rows] == (
            [f"t{i}"] if len(rows) == 1 else [f"t{i}#{n}/{len(rows)}" for n in range(1, len(rows) + 1)]
        )
        assert all(len(row.input_ids) == limit for row in rows[:-1])
        supervised = np.concatenate([row.input_ids[row.loss_mask] for row in rows])
        np.testing.assert_array_equal(supervised, text.input_ids[1:])
        context = 1 + bos
        for before, row in pairwise(rows):
            assert row.input_ids[:context].tolist() == [0] * bos + [before.input_ids[-1]]
            assert row.loss_mask.tolist() == [False] * context + [True] * (len(row.input_ids) - context)
        assert all(row.status == OK for row in rows)


def test_chunks_are_of_texts_alone(tmp_path: Path) -> None:
    long = "what is the answer " * 20
    chat = {"id": "c", "messages": [QUESTION, ANSWER | {"content": long}]}
    path = write_jsonl(tmp_path / "a.jsonl", [chat, {"id": "p", "prompt": "", "completion": long}])
    fits = write_jsonl(tmp_path / "b.jsonl", [{"id": "t", "text": "so"}])
    chunked = freeze(path, fits, max_length=20, too_long="chunk")
    assert ids_of(chunked) == ["c", "p", "t"]
    assert chunked.fingerprint == freeze(path, fits, max_length=20).fingerprint
    with pytest.raises(ValidationError, match="max_length of 3"):
        freeze(path, max_length=2, too_long="chunk")


def test_an_interrupted_start_goes_on_behind_the_records_of_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": f"t{i}", "text": f"what is {i} " * 9} for i in range(40)])
    os.utime(path, (time.time() - 60,) * 2)
    options: dict[str, Any] = {"max_length": 8, "too_long": "chunk"}
    expected = freeze(path, **options, cache_dir=str(tmp_path / "other"))
    monkeypatch.setattr(freezing, "_BATCH", 4)
    monkeypatch.setattr(freezing, "_PART_SAMPLES", 1)
    asked = iter(range(1000))

    def check() -> None:
        if next(asked) == 5:
            raise TemporaryError("stopped")

    section = CorpusSection(sources=[SourceSection(path=str(path))], **options)
    with pytest.raises(TemporaryError):
        freezing.freeze_corpus(section, tiny_tokenizer(), lm_head_rows=VOCABULARY, check=check)
    made: list[int] = []
    original = freezing.tokenise

    def counted(records: Any, *arguments: Any, **named: Any) -> Any:
        made.append(len(records))
        return original(records, *arguments, **named)

    monkeypatch.setattr(freezing, "tokenise", counted)
    found = freeze(path, **options)
    assert 0 < sum(made) < 40
    assert (found.fingerprint, ids_of(found)) == (expected.fingerprint, ids_of(expected))
