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
from support.tiny_student import VOCAB, save_student, tiny_tokenizer

from storage_schemas.common.errors import MismatchError
from student_train.model.load import load_model
from student_train.model.tokenizers import refuse_tokenizer

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
    with pytest.raises(MismatchError, match="cannot be loaded"):
        refuse_tokenizer(str(student), None, files, head_rows=VOCAB)
    assert not marker.exists()


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
