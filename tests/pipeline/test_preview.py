"""`llm-neo preview`: what it counts is what the dump will hold, and it needs no weights."""

import io
import json
from pathlib import Path

import datasets
import pytest
from rich.console import Console
from support.tiny_teachers import CHATML_GENERATION, VOCABULARY, save_teacher, tiny_tokenizer

from pipeline.views import preview
from storage_schemas.common.exits import Exit
from teacher_dump.config import CorpusSection
from teacher_dump.corpus.freeze import freeze_corpus


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


RECORDS = [
    chat("what is it", "the answer [bold]is[/bold] so"),
    chat("what is it", ""),
    chat("what is it", "the answer " * 40),
    chat("what", "so"),
    chat("what", "so"),
    {"messages": [{"role": "user", "content": "only a prompt"}]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = save_teacher(tmp_path_factory.mktemp("teacher"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def config(tmp_path, teacher) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "b.jsonl").write_text('{"text": "what is it"}\n' * 4)
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "dump": {"url": str(tmp_path / "dump")},
                "teacher": {"model": str(teacher), "dtype": "float32"},
                "corpus": {
                    "sources": [
                        {"path": str(tmp_path / "a.jsonl")},
                        {"path": str(tmp_path / "b.jsonl"), "weight": 0.5},
                    ],
                    "max_length": 60,
                },
                "heldout": {"url": str(tmp_path / "h"), "sources": [{"path": str(tmp_path / "b.jsonl")}]},
            }
        )
    )
    return path


def test_what_it_counts_is_what_the_dump_will_hold(config, call, tmp_path):
    code, out, _ = call("preview", config, "--json", "--samples", 3)
    assert code == Exit.DONE
    found = json.loads(out)
    section = CorpusSection.model_validate(json.loads(config.read_text())["corpus"])
    tokenizer = tiny_tokenizer()
    corpus = freeze_corpus(section, tokenizer, lm_head_rows=VOCABULARY)
    assert found["fingerprint"] == corpus.fingerprint
    chats, texts = found["sources"]
    assert (chats["format"], chats["columns"], chats["records"], chats["used"]) == ("messages", ["messages"], 6, 6)
    assert chats["statuses"] == {"empty": 1, "ok": 5}
    assert (texts["format"], texts["columns"], texts["records"], texts["used"]) == ("text", ["text"], 4, 2)
    assert (found["samples"], found["statuses"]) == (8, {"empty": 1, "ok": 7})
    assert found["duplicates"] == 2, "one conversation and one text"
    assert found["template"] == "located"
    usable = [corpus.sample(i) for i in range(8) if corpus.sample(i).status == "ok"]
    assert found["tokens"] == sum(len(sample.input_ids) for sample in usable)
    assert found["supervised_tokens"] == sum(int(sample.loss_mask.sum()) for sample in usable)
    assert found["supervised_share"] == pytest.approx(found["supervised_tokens"] / found["tokens"])
    assert found["over_max_length"] == 1
    assert found["lengths"]["max"] == corpus.lengths.max() > 60
    assert found["lengths"]["median"] in corpus.lengths
    assert [row["sample_index"] for row in found["rows"]] == [0, 3, 7]
    for row in found["rows"]:
        sample = corpus.sample(row["sample_index"])
        assert "".join(text for text, _ in row["parts"]) == tokenizer.decode(sample.input_ids)
        said = "".join(text for text, supervised in row["parts"] if supervised)
        assert said == tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert not (tmp_path / "dump").exists()


def test_a_pipe_gets_marks_and_a_terminal_colours(config, call):
    code, out, _ = call("preview", config, "--row", 0)
    assert code == Exit.DONE
    assert "{+the answer [bold]is[/bold] so<|im_end|>+}" in out
    assert "<|im_start|>user\nwhat is it<|im_end|>" in out
    assert "located by rendering" in out
    assert "3 of them" not in out
    assert "4 records, 2 of them used" in out
    for row, source in ((5, "a.jsonl: empty"), (6, "b.jsonl: ok"), (7, "b.jsonl: ok")):
        assert source in call("preview", config, "--row", row)[1]
    code, out, _ = call("preview", config, "--row", 2)
    assert "before it was cut" in out

    sample = preview.SampleView(
        sample_index=0, sample_id="a", source="a.jsonl", status="ok", tokens=3, supervised_tokens=1, length=3,
        parts=[("what ", False), ("so", True)],
    )  # fmt: skip
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard")
    console.print(preview._text(sample, colour=True))
    assert "\x1b[1;32mso" in screen.getvalue()
    assert "{+" not in screen.getvalue()


def test_marks_of_the_template_itself(config, call, tmp_path):
    folder = save_teacher(tmp_path / "marked", template=CHATML_GENERATION)
    code, out, _ = call("preview", config, "--json", "--samples", 0, "--set", f"teacher.model={folder}")
    assert code == Exit.DONE
    assert json.loads(out)["template"] == "marks"
    assert json.loads(out)["rows"] == []
    code, out, _ = call("preview", config, "--json", "--set", "corpus.mask=all")
    assert json.loads(out)["template"] is None


def test_a_doubled_beginning_of_text_is_counted(config, call, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [0, 0, 5]}\n{"input_ids": [0, 5, 1]}\n{"input_ids": [5]}\n')
    arguments = ("--json", "--set", f"corpus.sources=[{{path: {tmp_path}/ids.jsonl}}]")
    found = json.loads(call("preview", config, *arguments)[1])
    assert (found["begins_with_bos"], found["doubled_bos"], found["ends_with_eos"]) == (2, 1, 1)
    assert found["template"] is None


def test_held_out_samples_and_a_policy_that_would_stop_the_dump(config, call):
    code, out, _ = call("preview", config, "--json", "--heldout")
    assert [source["records"] for source in json.loads(out)["sources"]] == [4]
    code, out, _ = call("preview", config, "--json", "--set", "corpus.too_long=error")
    assert code == Exit.DONE
    assert json.loads(out)["statuses"] == {"empty": 1, "ok": 6, "too_long": 1}
    assert (json.loads(out)["over_max_length"], json.loads(out)["refused"]) == (1, True)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["corpus.too_long=error"], True),
        (["corpus.too_long=error", "corpus.max_length=1000"], False),
        (["corpus.too_long=drop"], False),
        ([], False),
    ],
)
def test_samples_that_dump_refuses_as_too_long_are_said_to_be(config, call, overrides, refused):
    code, out, _ = call("preview", config, *(word for one in overrides for word in ("--set", one)))
    assert (code, "`dump` refuses this: samples are too long" in out) == (Exit.DONE, refused)


def test_what_cannot_be_shown_is_told(config, call):
    code, _, err = call("preview", config, "--row", 8)
    assert code == Exit.USAGE
    assert "0 to 7" in err
    code, _, err = call("preview", config, "--set", "corpus.sources.0.path=none.jsonl")
    assert code == Exit.BAD_DATA
    assert "none.jsonl" in err
    assert call("preview", config, "--set", "corpus=null", "--set", "heldout=null")[0] == Exit.MISMATCH
    code, _, err = call("preview", config, "--set", "teacher.model=/nowhere")
    assert code == Exit.MISMATCH
    assert "teacher.model" in err


def test_ends_of_turns_empty_samples_and_records_that_cannot_be_used_are_explained(config, call, tmp_path, caplog):
    long = chat("what is it " * 60, "so")
    odd = [{"messages": [{"role": "critic", "content": "x"}]}, {"messages": "oops"}]
    records = [*RECORDS, long, {"messages": []}, *odd]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record | {"mood": "good"}) + "\n" for record in records))
    found = json.loads(call("preview", config, "--json")[1])
    assert sum("does not read: mood" in message for message in caplog.messages) == 1
    assert found["ends"] == {"<|im_end|>": 4, "</s>": 2, " the": 1}, "one answer is cut"
    assert found["empty"] == {
        "without content": 1, "cut before an answer begins": 1, "without an answer that is supervised": 1,
    }  # fmt: skip
    chats = found["sources"][0]
    assert (chats["unread"], chats["refused"], chats["statuses"]["invalid_text"]) == (["mood"], True, 2)
    assert "record 9: a message has an unknown role: 'critic'" in chats["problems"][0]
    code, out, _ = call("preview", config)
    assert code == Exit.DONE
    for said in (
        "'<|im_end|>' 4 times",
        "1 cut before an answer begins",
        "not known: mood",
        "record 10: ",
        "refuses this",
    ):
        assert said in out
    assert not json.loads(call("preview", config, "--json", "--set", "corpus.max_bad_share=0.2")[1])["sources"][0][
        "refused"
    ]
