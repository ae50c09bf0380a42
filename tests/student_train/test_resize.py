"""A dump of a teacher with more tokens than the student: more rows, trained, saved and merged."""

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.distributed import run_ranks
from support.engine_jobs import train_section
from support.rounding import FORWARD
from support.tiny_student import VOCAB, save_student, tiny_llama, tiny_tokenizer, write_dump
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipeline.cli import app
from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.reader import Dump
from student_train.config import LoraSection, Resolved, StudentSection
from student_train.results.merge import merge
from student_train.results.resize import MULTIPLE, resize
from student_train.train import _student
from student_train.training_run import open_run

OLD = 70
"""Tokens and rows of the students before."""
IDS = torch.arange(20)[None]


def small_student(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """One that lacks the last tokens of the dumps here."""
    tiny_llama(1, tied=tied, vocab=OLD).to(dtype).save_pretrained(folder)
    tiny_tokenizer(vocab=OLD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """Of 96 tokens, all of which occur."""
    folder = tmp_path_factory.mktemp("dump")
    write_dump(folder / "dump")
    return Dump.open(str(folder / "dump"))


@torch.no_grad()
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_old_rows_stay_and_new_ones_begin_at_the_mean(
    tied: bool, dtype: torch.dtype, dump: Dump, tmp_path: Path
) -> None:
    """To the bit; the tokenizer is the dump's, and the same call gives the same file."""
    student = small_student(tmp_path / "student", tied=tied, dtype=dtype)
    found = [resize(str(student), tmp_path / name, dump) for name in ("one", "two")]
    assert found == [(OLD, 2 * MULTIPLE)] * 2
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (student, tmp_path / "one"))
    assert after.dtype == dtype
    assert after.config.vocab_size == 2 * MULTIPLE
    ends = [(m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (before, after)]
    assert (ends[1][0] is ends[1][1]) is tied
    for old, new in zip(*ends, strict=True):
        assert torch.equal(new[:OLD], old)
        mean = old.double().mean(0)
        assert float((new[OLD:].double() - mean).abs().max()) < (1e-3 if dtype == torch.float32 else 2**-8)
    assert AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab() == tiny_tokenizer().get_vocab()
    assert "26 new tokens" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_new_rows_are_trained_saved_and_merged(tied: bool, dump: Dump, tmp_path: Path) -> None:
    """On two ranks at ZeRO-3; refused before."""
    student = small_student(tmp_path / "student", tied=tied)
    done = CliRunner().invoke(
        app, ["resize", str(student), str(tmp_path / "larger"), "--dump", dump.store.url]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "128 rows in place of 70" in done.output
    job = {
        "dump": dump.store.url, "lora": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "train": {"max_steps": 3, "zero_stage": 3, "weight_decay": 0.0},
    }  # fmt: skip
    jobs = [job | {"model": str(tmp_path / n), "output": str(tmp_path / f"run-{n}")} for n in ("student", "larger")]
    refused, trained = run_ranks("support.train_jobs:run_trainings", 2, jobs=jobs)[0]
    assert refused["code"] == 78
    assert "llm-neo resize" in refused["message"]
    assert trained["code"] == 0, trained["message"]
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
        begin = start.get_output_embeddings().weight.clone()
        final = tmp_path / "run-larger" / "final"
        expected = PeftModel.from_pretrained(start, final).eval()(input_ids=IDS + 70).logits
        merge(final, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        off = float((merged(input_ids=IDS + 70).logits - expected).abs().max() / expected.abs().max())
        assert off < FORWARD
        moved = (merged.get_output_embeddings().weight - begin).abs().amax(1)
        assert float(moved[:VOCAB].min()) > 1e-3
        # Padding does not exist for the loss: as a head it never moves, and no row is looked up.
        assert float(moved[VOCAB:].max()) == 0


def test_what_needs_no_rows_is_refused(dump: Dump, tmp_path: Path) -> None:
    """A student that has them, one of another tokenizer, and a directory in use."""
    with pytest.raises(MismatchError, match="has a row for each token"):
        resize(str(save_student(tmp_path / "student")), tmp_path / "out", dump)
    assert not (tmp_path / "out").exists()
    tiny_llama(1, vocab=OLD).save_pretrained(tmp_path / "other")
    tiny_tokenizer("x", vocab=OLD).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="is not the teacher's"):
        resize(str(tmp_path / "other"), tmp_path / "out", dump)
    with pytest.raises(UsageError, match="is not empty"):
        resize(str(small_student(tmp_path / "small")), tmp_path / "other", dump)


@pytest.mark.parametrize(
    ("names", "tied", "warned"),
    [
        ([], False, True),
        (["embed_tokens"], False, True),
        (["lm_head"], False, True),
        (["embed_tokens", "lm_head"], False, False),
        (["embed_tokens"], True, False),
    ],
)
def test_frozen_rows_of_new_tokens_are_warned_of(
    names: list[str], tied: bool, warned: bool, dump: Dump, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that is padded has rows for them, as embeddings have: they stay noise unless they are trained."""
    student = tmp_path / "student"
    tiny_llama(1, tied=tied).save_pretrained(student)
    tiny_tokenizer(vocab=OLD).save_pretrained(student)
    section = StudentSection(model=str(student), lora=LoraSection(r=4, modules_to_save=names))
    train = train_section(tmp_path / "run")
    run = open_run(Resolved(dump={"url": dump.store.url}, student=section, loss={}, train=train))
    with caplog.at_level(logging.WARNING):
        _student(run, None, None, main=True)
    assert ("26 tokens of the dump are new to the student's tokenizer, such as w70, w71, w72" in caplog.text) is warned
