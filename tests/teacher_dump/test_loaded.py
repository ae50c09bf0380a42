"""A teacher in memory is known by the weights that run: the same ones continue its dump, and no others do."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.dump_checks import SAMPLES, UNITS, assert_each_sample_once, rows_of, sections
from support.tiny_teachers import tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM

from pipeline.commands import recomputing
from storage_schemas import Dump, MismatchError
from storage_schemas.records import SEAL, record_key
from teacher_dump import LoadedTeacher, recompute_rows, run_dump
from teacher_dump.dump import tokenizer_files
from teacher_dump.teachers.loaded import tensors_sha256


def loaded(seed: int = 0, **changes: Any) -> LoadedTeacher:
    return LoadedTeacher(tiny_model("llama", seed=seed, **changes), tiny_tokenizer(), batch_tokens=200)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, model_folder: Path) -> dict[str, Any]:
    """Arguments of a dump of a model in memory, which is made."""
    folder = tmp_path_factory.mktemp("loaded")
    job = sections(folder / "dump", corpus_file, model_folder) | {"teacher": loaded()}
    assert run_dump(**job).units_done_here == UNITS
    return job


def test_targets_are_those_of_the_same_weights_in_files(job: dict[str, Any], tmp_path: Path) -> None:
    url, named = job["dump"].url, tmp_path / "files"
    job["teacher"].model.save_pretrained(named)
    job["teacher"].tokenizer.save_pretrained(named)
    other = sections(tmp_path / "dump", Path(job["corpus"].sources[0].path), named)
    run_dump(**other)
    assert_each_sample_once(url)
    for here, there in zip(rows_of(url), rows_of(tmp_path / "dump"), strict=True):
        assert here.input_ids.tolist() == there.input_ids.tolist()
        assert (here.targets is None) == (there.targets is None)
        if here.targets is not None:
            assert here.targets.ids.tolist() == there.targets.ids.tolist()
            assert here.targets.logprobs.tolist() == there.targets.logprobs.tolist()
    # Yet a model in memory is no file: neither continues the other's dump.
    with pytest.raises(MismatchError, match="weights_sha256"):
        run_dump(**other | {"teacher": job["teacher"]})


def test_truncation_and_padding_of_the_training_before_are_taken_off() -> None:
    """Else the dump's tokenizer would be another one before the first call than after it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer_files(LoadedTeacher(tiny_model("llama"), tokenizer).tokenizer)
    tokenizer("what is it")
    assert tokenizer_files(tokenizer) == before


def test_the_identity_is_that_of_the_tensors(job: dict[str, Any]) -> None:
    identity = Dump.open(job["dump"].url).provenance.teacher
    assert identity.in_memory
    again = loaded()
    assert again.identify() == job["teacher"].identify() == identity
    assert loaded(1).identify().weights_sha256 != identity.weights_sha256
    assert loaded(rope_theta=7.0).identify().config_sha256 != identity.config_sha256
    again.config.use_cache = not again.config.use_cache
    assert again.identify() == identity
    with torch.no_grad():
        again.model.model.norm.weight[3] += 1e-3
    assert again.identify() != identity, "asked anew each time"


def test_the_hash_is_of_names_dtypes_shapes_and_elements() -> None:
    one, other = torch.arange(6.0).view(2, 3), torch.arange(3, dtype=torch.bfloat16)
    found = tensors_sha256({"a": one, "b": other})
    same = [{"b": other.clone(), "a": one}, {"a": one.T.contiguous().T, "b": other}]
    assert all(tensors_sha256(tensors) == found for tensors in same)
    different = [
        {"a": one, "c": other}, {"a": one.view(3, 2), "b": other}, {"a": one, "b": other.view(torch.float16)},
        {"a": one + torch.eye(2, 3) * 1e-6, "b": other}, {"a": one}, {"a": one, "b": other, "d": torch.zeros(0)},
    ]  # fmt: skip
    assert len({found, *map(tensors_sha256, different)}) == len(different) + 1


def test_the_same_weights_continue_a_dump(job: dict[str, Any], tmp_path: Path) -> None:
    """A dump that lacks two units is completed by another object with the same weights, and by no other."""
    url, whole = tmp_path / "dump", Dump.open(job["dump"].url)
    shutil.copytree(whole.store.url, url)
    for file in [whole.read_record(1).file, whole.read_record(3).file, record_key(1), record_key(3), SEAL]:
        (url / file).unlink()
    begun = job | {"dump": job["dump"].model_copy(update={"url": str(url)})}
    with pytest.raises(MismatchError, match=r"teacher\.weights_sha256\.state_dict"):
        run_dump(**begun | {"teacher": loaded(1)})
    summary = run_dump(**begun | {"teacher": loaded()})
    assert (summary.units_done_here, summary.fingerprint) == (2, whole.fingerprint)


def test_its_rows_are_recomputed_with_the_model_alone(job: dict[str, Any], model_folder: Path) -> None:
    dump = Dump.open(job["dump"].url)
    report = recompute_rows(dump, loaded(), rows=SAMPLES)
    assert len(report.rows) == SAMPLES - 2
    assert report.errors == []
    with pytest.raises(MismatchError, match="is not the teacher that made the dump"):
        recompute_rows(dump, loaded(1), rows=1)
    for model in (None, str(model_folder)):
        with pytest.raises(MismatchError, match=r"a model in memory(.|\n)*LoadedTeacher\(model, tokenizer\)"):
            recomputing(dump.store.url, {}, rows=1, seed=0, config=None, model=model)


def test_it_leaves_the_model_as_it_was(job: dict[str, Any]) -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    recompute_rows(Dump.open(job["dump"].url), LoadedTeacher(model, tiny_tokenizer()), rows=3)
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_models_that_cannot_be_teachers_are_refused(job: dict[str, Any]) -> None:
    body = AutoModel.from_config(tiny_model("llama").config).eval()
    with torch.device("meta"):
        nowhere = AutoModelForCausalLM.from_config(body.config, dtype=torch.float32).eval()
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear")).eval()
    for model, says in (
        (adapted, r"merge_and_unload\(\)"),
        (adapted.get_base_model(), "adapter of peft"),
        (torch.nn.Linear(2, 2).eval(), "a Linear without config"),
        (body, "no language-model head"),
        (tiny_model("llama").train(), r"training mode(.|\n)*model\.eval\(\)"),
        (tiny_model("llama").double(), "float64"),
        (nowhere, "weights on disk"),
    ):
        with pytest.raises(MismatchError, match=says):
            LoadedTeacher(model, tiny_tokenizer())
    teacher = loaded()
    teacher.model.train()
    with pytest.raises(MismatchError, match="training mode"):
        run_dump(**job | {"teacher": teacher})
