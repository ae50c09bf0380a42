"""Code that a model brings is run if the user says so and it is known which code that is."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.distributed import Ranks
from support.own_code import AUTO_MAP, bring_code, change_code, forget_code
from support.rounding import FORWARD
from support.tiny_student import save_student, write_dump
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline.cli import app
from storage_schemas.common.code import runs_code
from storage_schemas.common.errors import MismatchError
from student_train.config import LoraSection
from student_train.model.adapter import attach
from student_train.model.load import load_model, refuse_unloadable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(20)[None]


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A place of its own for code that transformers copies."""
    forget_code(monkeypatch, tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, and a student with code."""
    folder = tmp_path_factory.mktemp("own")
    write_dump(folder / "dump")
    bring_code(save_student(folder / "own"))
    return folder


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT + "0", COMMIT.upper(), "../" + COMMIT])
def test_a_revision_that_may_move_is_refused(revision: str | None) -> None:
    """Before the hub is asked for anything."""
    with pytest.raises(MismatchError, match="whatever code") as error:
        refuse_unloadable("some/model", revision, trust=True)
    assert "student.trust_remote_code" in str(error.value)
    assert runs_code(False, "some/model", revision, setting="x") is False
    assert runs_code(True, "some/model", COMMIT, setting="x") is True


def test_nothing_is_run_unasked(folder: Path) -> None:
    """The directory is refused, as it was; and loads where it is asked for, with what the code does."""
    with pytest.raises(MismatchError, match="cannot be loaded") as error:
        load_model(str(folder / "own"), None, dtype=torch.float32)
    assert "--trust-remote-code" in str(error.value)
    own = load_model(str(folder / "own"), None, dtype=torch.float32, trust=True).eval()
    assert type(own).__name__ == "OwnForCausalLM"
    plain = load_model(str(save_student(folder / "plain")), None, dtype=torch.float32).eval()
    with torch.no_grad():
        assert float((own(input_ids=IDS).logits - plain(input_ids=IDS).logits).abs().max()) > 0.1


@pytest.mark.parametrize("key", sorted(AUTO_MAP))
def test_code_of_another_model_is_refused(key: str, tmp_path: Path) -> None:
    """transformers fetches it from its main branch."""
    student = bring_code(save_student(tmp_path / "student"), AUTO_MAP | {key: f"other/model--{AUTO_MAP[key]}"})
    with pytest.raises(MismatchError, match="takes its code from another model"):
        refuse_unloadable(str(student), None, trust=True)


@pytest.mark.parametrize("line", ["import no_such_package_anywhere", "raise RuntimeError('mine')", "(", "FACTOR.x"])
def test_code_that_fails_is_told(line: str, tmp_path: Path) -> None:
    """78 with its words, before weights are loaded."""
    student = bring_code(save_student(tmp_path / "student"))
    with (student / "modeling_own.py").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(MismatchError, match=r"student\.trust_remote_code"):
        refuse_unloadable(str(student), None, trust=True)


def test_an_adapter_does_not_say_whose_code_is_run(folder: Path, tmp_path: Path) -> None:
    """Neither by a directory nor by a commit; the code of a base that the user names is run."""
    base = load_model(str(folder / "own"), None, dtype=torch.float32, trust=True)
    model = attach(base, LoraSection(r=2, target_modules=["q_proj"]), seed=0)
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    told = json.loads(config.read_text())
    for named in ({"base_model_name_or_path": str(folder / "own")},
                  {"base_model_name_or_path": "good/repo", "revision": COMMIT}):  # fmt: skip
        config.write_text(json.dumps(told | named))
        adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
        for command in (
            ["evaluate", "--model", adapter, "--dump", str(folder / "dump")],
            ["merge", adapter, out],
            ["chat", adapter, "--prompt", "w5", "--device", "cpu"],
        ):
            refused = CliRunner().invoke(app, [*command, "--trust-remote-code"])
            assert "would say whose code is run" in str(refused.exception), (command, refused.output)
    found = CliRunner().invoke(app, ["merge", adapter, out, "--trust-remote-code", "--base", str(folder / "own")])
    assert found.exit_code == 0, found.exception


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two, that have one empty place for code between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules of the ranks")))
        found = Ranks("support.train_jobs:trainer", 2, anew=True)
        yield found
        found.close()


def test_it_is_trained_resumed_evaluated_and_merged(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    """On two ranks, at ZeRO-3; with another number in its code it is another student."""
    job: dict[str, Any] = {
        "model": str(folder / "own"), "dump": str(folder / "dump"), "output": str(tmp_path / "run"), "trust": True,
        "train": {"zero_stage": 3, "max_steps": 4, "save_steps": 2},
    }  # fmt: skip
    assert ranks.call(job=job | {"trust": False, "output": str(tmp_path / "refused")})[0]["code"] == 78
    half = ranks.call(job=job | {"stop_after": 2})[0]
    assert half["code"] == 75, half["message"]
    moved = shutil.copytree(folder / "own", tmp_path / "moved")
    change_code(moved)
    other = ranks.call(job=job | {"model": str(moved)})[0]
    assert other["code"] == 78
    assert "student.files" in other["message"]
    done = ranks.call(job=job)[0]
    assert done["code"] == 0, done["message"]
    final = tmp_path / "run" / "final"
    assert "trust_remote_code=True)" in (final / "README.md").read_text().replace(', dtype="auto"', "")
    run = CliRunner().invoke
    asked = ["--trust-remote-code", "--base", str(folder / "own")]
    for command in (
        ["evaluate", "--model", str(final), "--dump", str(folder / "dump"), "--json"],
        ["merge", str(final), str(tmp_path / "merged")],
        ["chat", str(final), "--prompt", "w5", "--max-new-tokens", "2", "--device", "cpu"],
    ):
        refused = run(app, command)
        assert isinstance(refused.exception, MismatchError), refused.output
        found = run(app, [*command, *asked])
        assert found.exit_code == 0, (command, found.output, found.exception)
    other_base = run(app, ["merge", str(final), str(tmp_path / "again"), *asked[:2], str(moved)])
    assert "is not the model that the adapter" in str(other_base.exception)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "own", trust_remote_code=True)
        expected = PeftModel.from_pretrained(base, final).eval()(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
        assert (tmp_path / "merged" / "modeling_own.py").is_file()
        off = float((merged(input_ids=IDS).logits - expected).abs().max() / expected.abs().max())
        assert off < FORWARD
