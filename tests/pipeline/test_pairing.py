"""A student whose ids mean something else is refused before the teacher runs, wherever both are at hand."""

import json
from pathlib import Path

import pytest
from support.command_lines import Call
from support.dump_checks import write_corpus
from support.tiny_student import save_student
from support.tiny_teachers import save_teacher, tiny_tokenizer

from pipeline.pairing import teacher_vocabulary
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.exits import Exit
from storage_schemas.reader import Dump
from teacher_dump.config import TeacherSection


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_NEO_CACHE", str(tmp_path / "neo"))
    save_teacher(tmp_path / "teacher")
    save_student(tmp_path / "student")
    path = tmp_path / "config.yaml"
    settings = {
        "dump": {"url": str(tmp_path / "dump"), "samples_per_unit": 4},
        "teacher": {"model": str(tmp_path / "teacher"), "dtype": "float32", "device": "cpu"},
        "corpus": {"sources": [{"path": str(write_corpus(tmp_path / "corpus.jsonl"))}], "max_length": 60},
        "student": {"model": str(tmp_path / "student")},
        "heldout": {"url": str(tmp_path / "heldout"), "sources": [{"path": str(tmp_path / "corpus.jsonl")}]},
        "train": {"output": str(tmp_path / "run")},
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("command", [("dump",), ("dump", "--workers", "2"), ("run",)])
def test_it_is_refused_before_the_weights_are_looked_at(
    command: tuple[str, ...], config: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "teacher" / "model.safetensors").unlink()
    code, _, err = call(command[0], config, *command[1:])
    assert code == Exit.MISMATCH
    assert "the student's tokenizer is not the teacher's" in err
    assert "choose a student with the teacher's tokenizer" in err
    assert not (tmp_path / "dump").exists()


def test_a_teacher_that_cannot_be_loaded_is_refused_before_anything_is_started(config: Path, tmp_path: Path) -> None:
    """Although its tokenizer can be."""
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "unheard"}))
    with pytest.raises(MismatchError, match="cannot be loaded"):
        teacher_vocabulary(TeacherSection(model=str(tmp_path / "teacher")))


def test_a_student_that_is_elsewhere_keeps_no_dump_from_being_made(
    config: Path, tmp_path: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    elsewhere = f"student.model={tmp_path}/nowhere"
    code, _, err = call("dump", config, "--set", elsewhere, "--set", "heldout=null")
    assert code == 0, err
    assert "compared when training begins" in caplog.text
    assert Dump.open(str(tmp_path / "dump")).is_sealed()
    code, _, err = call("dump", config, "--set", "heldout=null")
    assert code == 0, "whether the student fits a dump that has begun is asked by training"


def test_a_tokenizer_that_cannot_be_had_keeps_none_either(
    config: Path, tmp_path: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hub that answers badly, or a directory that is not whole; and a head that is too small is mended later."""
    caplog.set_level("INFO")
    save_teacher(tmp_path / "student", vocab_size=100)
    (tmp_path / "student" / "tokenizer.json").write_text("{")
    code, _, err = call("dump", config, "--set", "heldout=null")
    assert code == 0, err
    assert "compared when training begins" in caplog.text
    caplog.clear()
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    code, _, err = call("dump", config, "--set", "heldout=null", "--set", f"dump.url={tmp_path}/other")
    assert code == 0, err
    assert "compared when" not in caplog.text


def test_doctor_compares_them_too(config: Path, tmp_path: Path, call: Call) -> None:
    code, out, _ = call("doctor", config)
    assert code == Exit.MISMATCH
    assert "the student's tokenizer is not the teacher's" in " ".join(out.split())
    save_teacher(tmp_path / "student")
    code, out, _ = call("doctor", config)
    assert code == 0
    assert "the student's is that of the teacher" in " ".join(out.split())
