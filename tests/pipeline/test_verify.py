"""`llm-neo verify --recompute`: wiring of the comparison; what it finds is in tests/teacher_dump/test_recompute.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.dump_checks import rows_of, sections, write_corpus
from support.tiny_teachers import save_teacher

from storage_schemas.common.exits import Exit
from storage_schemas.reader import Dump
from storage_schemas.targets import concatenate
from storage_schemas.writer import DumpWriter
from teacher_dump.dump import run_dump

KEYS = {"ok", "sealed", "units", "rows", "supervised_tokens", "bytes", "errors", "orphans"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_teacher(folder / "teacher")
    write_corpus(folder / "corpus.jsonl")
    run_dump(**sections(folder / "dump", folder / "corpus.jsonl", folder / "teacher"))
    config = {
        "dump": {"url": "elsewhere"},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "device": "cpu"},
        "corpus": {"sources": [{"path": str(folder / "absent.jsonl")}], "max_length": 96, "too_long": "drop"},
        # The dump of this configuration that is looked at is the held-out one.
        "heldout": {"url": str(folder / "dump"), "sources": [{"path": str(folder / "corpus.jsonl")}]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_recomputed_rows_are_one_more_field(call, place):
    url = str(place / "dump")
    code, out, _ = call("verify", url, "--json")
    plain = json.loads(out)
    assert code == 0
    assert set(plain) == KEYS
    code, out, _ = call("verify", url, "--recompute", "3", "--seed", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert {key: found[key] for key in KEYS} == plain
    assert len(found["recompute"]["rows"]) == 3
    assert found["recompute"]["corpus_compared"] is False
    assert found["recompute"]["kl"][0] < found["recompute"]["kl_limit"]
    code, out, _ = call("verify", url, "--recompute", "3", "--seed", "1", "--config", place / "config.yaml", "--json")
    assert code == 0
    assert json.loads(out)["recompute"]["rows"] == found["recompute"]["rows"]
    assert json.loads(out)["recompute"]["corpus_compared"] is True


def test_targets_that_are_not_the_teachers_exit_65(call, place, tmp_path):
    """A shift by one that every hash of the dump agrees with."""
    run = Dump.open(str(place / "dump")).provenance
    writer = DumpWriter.open(str(tmp_path / "dump"), run)
    rows = rows_of(place / "dump")
    for i, row in enumerate(rows):
        if row.targets is not None:
            last = len(row.targets)
            rows[i] = replace(row, targets=concatenate([row.targets.slice(0, 1), row.targets.slice(0, last - 1)]))
    for unit in range(run.units):
        writer.commit_unit(unit, [rows[i] for i in run.unit_range(unit)])
    writer.seal()
    assert call("verify", tmp_path / "dump")[0] == 0
    code, out, _ = call("verify", tmp_path / "dump", "--recompute", "4", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (Exit.BAD_DATA, False)
    assert found["errors"] == found["recompute"]["errors"]
    assert found["errors"][0].startswith(f"row {found['recompute']['rows'][0]}, position ")


def test_a_teacher_that_is_not_here_or_another_exits_78_before_anything_is_read(call, place, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(place / "teacher", tmp_path / "copy"))
    save_teacher(tmp_path / "other", seed=1)
    monkeypatch.setattr("storage_schemas.verify.verify", None)
    url = str(place / "dump")
    code, _, err = call("verify", url, "--recompute", "1", "--model", tmp_path / "other")
    assert code == Exit.MISMATCH
    assert "is not the teacher that made the dump" in err
    (place / "teacher").rename(place / "moved")
    try:
        code, _, err = call("verify", url, "--recompute", "1")
        assert code == Exit.MISMATCH
        assert "the teacher that made the dump is not here" in err
        assert "--model DIR" in err
        monkeypatch.undo()
        assert call("verify", url, "--recompute", "1", "--model", copy)[0] == 0
    finally:
        (place / "moved").rename(place / "teacher")


def test_a_teacher_without_recompute_is_a_wrong_command_line(call, place):
    for option in (["--model", "x"], ["--config", place / "config.yaml"]):
        code, out, err = call("verify", place / "dump", *option)
        assert (code, out) == (Exit.USAGE, "")
        assert "--recompute" in err
