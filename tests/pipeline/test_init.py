"""Recipes: valid, written once, and known to editors; `test_packaging.py` finds them in the wheel."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator
from support.command_lines import Call

from pipeline.config import load_config
from pipeline.init import FOLDER, SCHEMA, recipes, write_recipe
from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.common.exits import Exit
from storage_schemas.config import Sampled, TopK

ROOT = Path(__file__).parents[2]
NAMES = ["smollm2-demo", "llama-3.1-8b-to-3.2-1b", "own", "qwen3"]


def test_without_a_recipe_they_are_listed(call: Call) -> None:
    code, out, _ = call("init")
    assert code == 0
    assert sorted(line.split()[0] for line in out.splitlines()) == sorted(NAMES)
    assert sorted(recipes()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_whole_configuration_that_editors_know(call: Call, tmp_path: Path, name: str) -> None:
    file = tmp_path / "new" / "x.yaml"
    code, out, _ = call("init", name, "--out", str(file))
    assert code == 0
    assert f"llm-neo doctor {file}" in out
    config = load_config(file)
    for section in ("teacher", "corpus", "heldout", "student", "train"):
        assert getattr(config, section) is not None
    assert config.estimator == (TopK() if name == "smollm2-demo" else Sampled(kind="sampled"))
    assert load_config(file, ["estimator={kind: topk}", "temperatures=[1, 2]", "loss.temperature=2"])
    first, second = file.read_text().splitlines()[:2]
    assert second == f"# {recipes()[name]}"
    # Relative to the configuration, as language servers read it.
    named = file.parent / first.removeprefix("# yaml-language-server: $schema=")
    schema = json.loads(named.read_text())
    Draft7Validator.check_schema(schema)
    data = yaml.safe_load(file.read_text())
    assert not list(Draft7Validator(schema).iter_errors(data))
    data["train"]["learning_rat"] = 1
    assert list(Draft7Validator(schema).iter_errors(data))


def test_by_default_a_recipe_is_written_here_under_its_name(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("init", "qwen3")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [SCHEMA, "qwen3.yaml"]


def test_a_slash_at_the_end_names_a_directory(call: Call, tmp_path: Path) -> None:
    for folder in (tmp_path / "new" / "deeper", tmp_path):
        code, out, _ = call("init", "qwen3", "--out", f"{folder}/")
        assert (code, out.startswith(f"{folder}/qwen3.yaml: ")) == (0, True)
        assert (folder / "qwen3.yaml").read_bytes() == (FOLDER / "qwen3.yaml").read_bytes()
        assert call("init", "qwen3", "--out", f"{folder}/")[0] == Exit.USAGE


def test_nothing_is_overwritten(call: Call, tmp_path: Path) -> None:
    file, folder = tmp_path / "x.yaml", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    for out in (file, folder):
        code, _, err = call("init", "qwen3", "--out", str(out))
        assert code == Exit.USAGE
        assert "is there already" in err
    assert file.read_text() == "mine"
    assert not (tmp_path / SCHEMA).exists()
    (tmp_path / SCHEMA).write_text('{"title": "somebody else\'s"}')
    with pytest.raises(UsageError, match="no schema of ours"):
        write_recipe("qwen3", tmp_path / "y.yaml")
    # One of another version is ours.
    (tmp_path / SCHEMA).write_text('{\n  "title": "llm-neo configuration"\n}')
    write_recipe("qwen3", tmp_path / "y.yaml")
    assert (tmp_path / SCHEMA).read_text() == (FOLDER / SCHEMA).read_text()


def test_what_cannot_be_written_or_is_not_known_is_said(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MismatchError, match=r"cannot write(.|\n)*correct --out"):
        write_recipe("qwen3", tmp_path / "file" / "x.yaml")
    code, _, err = call("init", "qwen")
    assert (code, "did you mean qwen3?" in err) == (Exit.USAGE, True)
    assert call("init", "--out", "x.yaml")[0] == Exit.USAGE


def test_the_examples_are_the_recipes() -> None:
    for name in ("demo.yaml", "llama-8b-to-1b.yaml", SCHEMA):
        example = ROOT / "examples" / name
        assert example.is_symlink()
        assert example.resolve().parent == FOLDER
