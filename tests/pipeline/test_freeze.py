"""`llm-neo freeze`: what it leaves in the cache is what a dump finds there, and what it cannot leave is an error."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from support.dump_checks import write_corpus
from support.tiny_teachers import save_teacher

from pipeline import cli
from pipeline.commands import run_dumps
from pipeline.config import load_config
from pipeline.launch import Placement
from storage_schemas.common.exits import Exit
from storage_schemas.reader import Dump
from teacher_dump.corpus import freeze as corpus_module

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(str(left.value.code)), printed.out, printed.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a teacher whose weights have not been fetched, and files that nobody writes to."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LLM_NEO_CACHE", str(tmp_path / "neo"))
    save_teacher(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "weights")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"text": "what is it"}\n' * 4)
    for file in (write_corpus(tmp_path / "corpus.jsonl"), heldout):
        os.utime(file, (1e9, 1e9))
    path = tmp_path / "config.yaml"
    settings = {
        "dump": {"url": str(tmp_path / "dump"), "samples_per_unit": 4},
        "teacher": {"model": str(tmp_path / "teacher"), "dtype": "float32", "device": "cpu"},
        "corpus": {"sources": [{"path": str(tmp_path / "corpus.jsonl")}], "max_length": 60},
        "heldout": {"url": str(tmp_path / "h"), "sources": [{"path": str(heldout)}]},
    }
    path.write_text(json.dumps(settings))
    return path


def test_a_dump_finds_what_was_frozen(config: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = call("freeze", config, "--json")
    assert code == Exit.DONE, err
    found = json.loads(out)
    code, out, _ = call("freeze", config)
    assert code == Exit.DONE
    assert found["fingerprint"] in out
    assert found["heldout"]["fingerprint"] in out

    def never(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(corpus_module, "tokenise", never)
    (config.parent / "weights").rename(config.parent / "teacher" / "model.safetensors")
    summary = run_dumps(load_config(config, ()), Placement(0, 1))
    for url, frozen, dumped in (("dump", found, summary), ("h", found["heldout"], summary["heldout"])):
        dump = Dump.open(str(config.parent / url))
        assert Path(frozen["folder"]).parent == config.parent / "neo" / "corpora"
        assert frozen["fingerprint"] == dump.provenance.corpus.fingerprint
        assert (frozen["samples"], frozen["statuses"]) == (dumped["rows"], dumped["statuses"])
        assert (frozen["tokens"], frozen["supervised_tokens"]) == (dumped["tokens"], dumped["supervised_tokens"])
        assert frozen["truncated"] == dumped["truncated"]


def test_what_cannot_be_kept_is_an_error_before_it_is_tokenised(
    config: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_tokenise_part", None)
    code, _, err = call("freeze", config, "--set", f"corpus.cache_dir={config}")
    assert code == Exit.MISMATCH
    assert "correct corpus.cache_dir" in err
    (config.parent / "corpus.jsonl").touch()
    code, _, err = call("freeze", config, "--set", "heldout=null")
    assert code == Exit.TEMPORARY
    assert "corpus.jsonl was written a moment ago" in err


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("corpus.max_length=200000", Exit.MISMATCH, "max_position_embeddings"),
        ("heldout.sources.0.path={corpus}", Exit.BAD_DATA, "the held-out samples are in the training corpus"),
    ],
)
def test_what_a_dump_would_refuse_is_refused(config: Path, call: Call, change: str, code: int, says: str) -> None:
    corpus = config.parent / "corpus.jsonl"
    if "max_length" in change:
        corpus.write_text(json.dumps({"text": "what is it " * 4000}) + "\n")
        os.utime(corpus, (1e9, 1e9))
    left, _, err = call("freeze", config, "--set", change.format(corpus=corpus))
    assert left == code
    assert says in err
