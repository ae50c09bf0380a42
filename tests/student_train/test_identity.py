"""What makes two configurations the same run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_jobs import train_section
from support.tiny_student import save_student

from storage_schemas.common.errors import DataError, MismatchError
from student_train.checkpoint import TrainState
from student_train.config import LoraSection, Resolved, StudentSection
from student_train.model.load import load_model
from student_train.model.student import causal_of
from student_train.resume import FILES, consumed_root, identity_of, open_checkpoint
from student_train.train import _student
from student_train.training_run import TrainingRun, open_run, refuse_early


def opened(folder: Path, student: StudentSection, output: Path) -> TrainingRun:
    """A run that is not begun."""
    dump = {"url": str(folder / "dump")}
    return open_run(Resolved(dump=dump, student=student, loss={}, train=train_section(output)))


def run_of(folder: Path, **lora: Any) -> TrainingRun:
    """A run of that adapter."""
    student = StudentSection(model="any", lora=LoraSection(r=4, **lora))
    return opened(folder, student, folder / "run")


@pytest.mark.parametrize(("first", "then"), [(None, 8), (8.0, None), (None, None), (7.5, 7.5)])
def test_alpha_counts_by_its_value(first: float | None, then: float | None, folder: Path) -> None:
    """Null is 2 * r: a checkpoint of the one is resumed by the other, and by nothing else."""
    run = run_of(folder, alpha=first)
    state = TrainState(step=1, updates=1, consumed=consumed_root(run.dumps, run.mix, 1), identity=identity_of(run))
    run.checkpoints.save(state, [], keep=1)
    assert open_checkpoint(run_of(folder, alpha=then), 1, verify=True).step == 1
    with pytest.raises(MismatchError, match=r"student\.lora\.alpha"):
        open_checkpoint(run_of(folder, alpha=9), 1, verify=True)


def test_another_student_is_another_run(folder: Path, tmp_path: Path) -> None:
    """One weight, or a setting of config.json. Where it lies and with what it was saved is nothing."""
    first = save_student(tmp_path / "first")
    student = StudentSection(model=str(first), lora=LoraSection(r=4))
    run = opened(folder, student, tmp_path / "run")
    identity = identity_of(run) | {FILES: _student(run, None, None, main=True).files}
    state = TrainState(step=0, updates=0, consumed="", identity=identity)
    run.checkpoints.save(state, [], keep=1)

    def resume(change: Callable[[Path], object]) -> None:
        moved = shutil.copytree(first, tmp_path / f"moved-{len(list(tmp_path.iterdir()))}")
        change(moved)
        section = student.model_copy(update={"model": str(moved)})
        _student(replace(run, student=section), run.checkpoints.at(0), None, main=True)

    resume(lambda moved: with_config(moved, transformers_version="4.0.0", _name_or_path="elsewhere"))
    for change in (with_weight, lambda moved: with_config(moved, rms_norm_eps=0.01)):
        with pytest.raises(MismatchError, match=r"student\.files"):
            resume(change)


def with_config(folder: Path, **changes: Any) -> None:
    """The same model with other settings."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_weight(folder: Path) -> None:
    """The same model, but for one of 1,792 weights of a matrix."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("attention", "says"),
    [("sdap", "is not supported"), ("flash_attention_2", "FlashAttention2"), ("a/kernel", "kernels")],
)
def test_an_attention_that_is_not_there_is_refused_before_a_dump_is_awaited(
    attention: str, says: str, tmp_path: Path
) -> None:
    """Exit 78 with its setting: one that nobody has, one that is not installed, and a kernel of the hub."""
    student = StudentSection(model=str(save_student(tmp_path / "student")), attn_implementation=attention)
    with pytest.raises(MismatchError, match=r"student\.attn_implementation: ") as error:
        refuse_early(student, train_section(tmp_path / "run"))
    assert says in str(error.value.got)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_passed_on_and_no_other_run(attention: str, folder: Path, tmp_path: Path) -> None:
    """It changes the rounding, not what is trained."""
    section = StudentSection(model=str(save_student(tmp_path / "student")), lora=LoraSection(r=4))
    chosen = section.model_copy(update={"attn_implementation": attention})
    runs = [opened(folder, student, tmp_path / "run") for student in (section, chosen)]
    assert identity_of(runs[0]) == identity_of(runs[1])
    assert causal_of(_student(runs[1], None, None, main=True).module.student).config._attn_implementation == attention


@pytest.mark.parametrize("name", ["../mine.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin"])
def test_index_names_files_of_the_model_only(tmp_path: Path, name: str) -> None:
    save_student(tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").rename(tmp_path / "mine.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (tmp_path / "student" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside of the model"):
        load_model(str(tmp_path / "student"), None, dtype=torch.float32)


def test_another_variant_is_another_run(folder: Path) -> None:
    """Also where the parameters have the same names."""
    plain, other, same = (
        identity_of(run_of(folder, **lora)) for lora in ({}, {"variant": "rslora"}, {"variant": "lora"})
    )
    assert plain != other
    assert plain == same
