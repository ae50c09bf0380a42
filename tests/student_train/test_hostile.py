"""Code that a model or a dump brings with it never runs, whatever is answered on standard input."""

import ast
import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_student import VOCAB, save_student, tiny_tokenizer
from transformers import AutoModelForCausalLM

from storage_schemas.common.errors import DataError, MismatchError
from student_train.model.load import load_model
from student_train.model.tokenizers import load_tokenizer, refuse_tokenizer, write_files
from teacher_dump.config import TeacherSection
from teacher_dump.teachers.teacher import Teacher

PACKAGES = ("teacher_dump", "student_train", "pipeline", "storage_schemas")


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`yes |`, and a place of its own for modules that are fetched."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def hostile(folder: Path, marker: Path, file: str, auto_map: dict[str, Any], **changes: Any) -> None:
    """A directory whose `file` asks for code that leaves a marker."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content | {"auto_map": auto_map}))


def test_code_of_a_dump(tmp_path: Path) -> None:
    """In its tokenizer."""
    student, dump, marker = save_student(tmp_path / "student"), tmp_path / "dump", tmp_path / "marker"
    tiny_tokenizer().save_pretrained(dump)
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    hostile(dump, marker, "tokenizer_config.json", auto_map, tokenizer_class="EvilTokenizer")
    files = {file.name: file.read_bytes() for file in dump.iterdir()}
    with pytest.raises(DataError, match="none of a tokenizer"):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    del files["evil.py"]
    with pytest.raises(MismatchError, match="cannot be loaded"):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    with pytest.raises(MismatchError, match="cannot be loaded"):
        load_tokenizer(str(dump), None, fix="use another one")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../tokenizer.json", "/tmp/tokenizer.json", "evil.py", "adapter_model.bin", "adapter_model.safetensors",
        "config.json", "Config.json", "adapter_config.json", "generation_config.json", "llm-neo.json", "README.md",
        "model.safetensors.index.json", "tokenizer", "evil.so",
    ],
)  # fmt: skip
def test_files_among_those_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    """They would lie beside the trained weights in `final/`, where others load them: none is written."""
    (tmp_path / "final").mkdir()
    with pytest.raises(DataError, match="none of a tokenizer"):
        write_files(tmp_path / "final", {"tokenizer.json": b"{}", name: b"1"})
    assert [path.name for path in tmp_path.rglob("*")] == ["final"]


def test_files_of_every_tokenizer_of_transformers_are_written(tmp_path: Path) -> None:
    """By the names that its classes save, and those of all."""
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    names |= {"chat_template.jinja", "tekken.json", "qwen.tiktoken", "tokenizer.model"}
    for file in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        named = re.search(r"^VOCAB_FILES_NAMES *= *\{(.*?)\}", file.read_text(), re.MULTILINE | re.DOTALL)
        names |= set(re.findall(r": *\"([\w.-]+)\"", named[1])) if named else set()
    assert len(names) > 25
    write_files(tmp_path, dict.fromkeys(names, b"1"))
    assert {path.name for path in tmp_path.iterdir()} == names


def test_code_of_a_student(tmp_path: Path) -> None:
    """In its config, and in its tokenizer."""
    student, marker = save_student(tmp_path / "student"), tmp_path / "marker"
    files = {file.name: file.read_bytes() for file in student.glob("token*")}
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    hostile(student, marker, "config.json", auto_map, model_type="evil")
    with pytest.raises(MismatchError, match="cannot be loaded"):
        load_model(str(student), None, dtype=torch.float32)
    hostile(student, marker, "tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    with pytest.raises(MismatchError, match="cannot be loaded"):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    assert not marker.exists()


def test_a_config_that_names_a_kernel_on_the_hub(tmp_path: Path) -> None:
    """transformers would fetch it and run its code; what is asked for is the user's choice, or transformers' own."""
    student = save_student(tmp_path / "student")
    content = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(content | {"attn_implementation": "evil/kernel"}))
    with pytest.raises(ImportError, match="kernels"):
        AutoModelForCausalLM.from_pretrained(student)
    assert load_model(str(student), None, dtype=torch.float32).config._attn_implementation == "sdpa"
    section = TeacherSection(model=str(student), dtype="float32", device="cpu")
    assert Teacher(section).model.config._attn_implementation == "sdpa"


def test_damaged_tokenizer_is_not_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A student without a tokenizer is taken at its word; one whose tokenizer has lost its last byte is refused."""
    student = save_student(tmp_path / "student")
    files = {file.name: file.read_bytes() for file in student.glob("token*")}
    (student / "tokenizer.json").write_bytes(files["tokenizer.json"][:-1])
    with pytest.raises(MismatchError, match=r"tokenizer in .* cannot be loaded"):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    for name in files:
        (student / name).unlink()
    with caplog.at_level(logging.WARNING):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    assert "has no tokenizer" in caplog.text


def test_code_is_refused_in_every_call() -> None:
    """Of both stages: transformers asks on standard input where nothing is said."""
    root, calls = Path(__file__).parents[2], 0
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            # `kind` is the class that stage one's teacher is asked for.
            if function.startswith(("Auto", "kind.")) and function.endswith(".from_pretrained"):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                # `code` is a `Code` for mypy, which `runs_code` alone makes.
                assert said.get("trust_remote_code") in ("False", "code"), f"{path}:{call.lineno}"
                calls += 1
    assert calls >= 5


def test_nothing_else_says_that_code_is_run() -> None:
    """A `Code` is made in one file, and no variable called `code` that is passed on is anything else."""
    root = Path(__file__).parents[2]
    for path in (path for name in PACKAGES for path in (root / name).rglob("*.py")):
        text = path.read_text()
        if path.name != "code.py":
            assert not re.search(r"\bCode\(", text), path
        if "trust_remote_code=code" in text:
            given = re.findall(r"^ *code = (.*)$", text, re.MULTILINE)
            assert all(re.match(r"runs_code\(|self\.code$|NO_CODE if ", value) for value in given), path
            declared = re.findall(r"\bcode: ([\w.]+)", text)
            assert set(declared) <= {"Code", "bool"}, path
            assert "code: bool" not in text or path.name == "student_files.py", path
        # Nor is another model's, which a config.json may name.
        if re.search(r"from_pretrained\([^)]*trust_remote_code=code", text):
            assert re.search(r"\b(refuse_foreign_code|find_model)\(", text), path
