"""A teacher that is spread over several processes or devices makes the targets of one that is whole."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from pydantic import ValidationError
from support.distributed import TESTS, environment, run_ranks
from support.dumps import ESTIMATORS, some_provenance, unit_rows
from support.rounding import LOGPROB
from support.tiny_teachers import sample_of, save_teacher, tiny_model

from pipeline.commands import run_plan
from pipeline.config import load_config
from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.config import Estimator, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.targets import Targets
from storage_schemas.verify import verify
from teacher_dump.config import TeacherSection
from teacher_dump.teachers import group
from teacher_dump.teachers.group import TENSOR_PARALLEL_FROM, Group, GroupTeacher, packed, unpacked
from teacher_dump.teachers.open import open_teacher
from teacher_dump.teachers.teacher import Teacher

ESTIMATOR = TopK(k=40, mass=1.0)
RECIPE = Recipe(estimator=ESTIMATOR, temperatures=(1.0, 2.0), logsumexp=True)
TENSOR_PARALLEL = Version(version("transformers")) >= TENSOR_PARALLEL_FROM
WAYS = [{"sharding": "tensor"}, {"sharding": "zero3"}, {"sharding": "zero3", "offload": True}][not TENSOR_PARALLEL :]

LENGTHS = [[9, 31], [90], [5, 6, 7], [90, 9]]
BATCHES = [[sample_of(length, index=length) for length in lengths] for lengths in LENGTHS]


def assert_close(found: list[Targets | None], expected: list[Targets | None]) -> None:
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        assert here is not None
        assert there is not None
        np.testing.assert_array_equal(here.ids, there.ids)
        for name in ("logprobs", "tail_logprob", "logsumexp"):
            np.testing.assert_allclose(getattr(here, name), getattr(there, name), atol=LOGPROB)


def check(folder: Path, architectures: list[str], *, mixture: str | None = None) -> None:
    """Every way of every architecture on two ranks, and of a `mixture` ZeRO-3 alone."""
    pairs = [*product(architectures, WAYS), *([] if mixture is None else [(mixture, WAYS[1])])]
    for name in {name for name, _ in pairs}:
        save_teacher(folder / name, name)
    cases = [{"model": str(folder / name), "device": "cpu"} | way for name, way in pairs]
    found = run_ranks("support.group_jobs:targets", 2, cases=cases, batches=BATCHES, estimator=ESTIMATOR)
    for number, (name, way) in enumerate(pairs):
        whole = Teacher(TeacherSection(model=str(folder / name), dtype="float32", device="cpu"))
        for batch, targets in zip(BATCHES, found[0][number][1], strict=True):
            assert_close(targets, whole.targets(batch, RECIPE))
        size = sum(parameter.numel() for parameter in tiny_model(name).parameters())
        for held in (rank[number][0] for rank in found):
            # A group of one layer's norms and the like is whole everywhere under tensor parallelism.
            assert held < 0.62 * size, (name, way)
        # Under ZeRO-3 each has its part of a batch, and something to do where there is none for it.
        shared = [[9, 90, 5, 6, 90], [31, 90, 7, 9]] if way["sharding"] == "zero3" else [list(chain(*LENGTHS))] * 2
        assert [rank[number][2] for rank in found] == shared, (name, way)
        assert [rank[number][3] for rank in found] == [way["sharding"] == "zero3"] * 2, (name, way)


def test_tensor_parallel_and_partitioned_teachers(tmp_path: Path) -> None:
    check(tmp_path, ["llama"])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(MismatchError, match=r"process 5, 4 GPUs(.|\n)*--nproc 4"):
        Group.join(4, 8, 4, device="cuda")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_head(tmp_path: Path) -> None:
    check(tmp_path, ["llama-tied", "qwen3", "gemma2"], mixture="mixtral")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_targets_arrive_as_they_were_sent(estimator: Estimator) -> None:
    rows = unit_rows(some_provenance(estimator=estimator, temperatures=(1.0,)), 0)
    sent = [None, *(row.targets for row in rows), None]
    assert sum(targets is not None for targets in sent) > 1
    for there, here in zip(unpacked(packed(sent)), sent, strict=True):
        assert (there is None) == (here is None)
        if there is not None and here is not None:
            for field in fields(Targets):
                np.testing.assert_array_equal(getattr(there, field.name), getattr(here, field.name))
    assert unpacked(packed([None, None])) == [None, None]


def ties(found: list[Targets | None]) -> int:
    """Neighbours of one token's head with the same log-prob: 16-bit logits are equal now and then, float32 ones not."""
    lines = [targets.logprobs.reshape(len(targets), -1) for targets in found if targets is not None]
    return sum(int((np.diff(np.sort(line, 1)) == 0).sum()) for line in lines)


def test_bfloat16_heads_give_float32_wherever_their_weight_is(tmp_path: Path) -> None:
    save_teacher(tmp_path / "llama")
    common = {"model": str(tmp_path / "llama"), "device": "cpu", "dtype": "bfloat16"}
    cases = [common | way for way in WAYS if "offload" not in way]
    ranks = run_ranks("support.group_jobs:targets", 2, cases=cases, batches=BATCHES, estimator=ESTIMATOR)
    answers = {way["sharding"]: answer for way, (_, answer, _, _) in zip(WAYS, ranks[0], strict=False)}
    place = {"sharding": "device_map", "max_memory": {"cpu": "90KB"}, "offload_folder": str(tmp_path / "offload")}
    teachers = {"none": {}, "device_map": place}
    for name, way in teachers.items():
        teacher = open_teacher(TeacherSection.model_validate(common | way))
        answers[name] = [teacher.targets(batch, RECIPE) for batch in BATCHES]
    assert {name: sum(map(ties, found)) for name, found in answers.items()} == dict.fromkeys(answers, 0)


def test_layers_on_disk(tmp_path: Path) -> None:
    """accelerate's hooks fetch what does not fit, the head too."""
    for name in ("llama", "llama-tied"):
        save_teacher(tmp_path / name, name)
        whole = Teacher(TeacherSection(model=str(tmp_path / name), dtype="float32", device="cpu"))
        section = TeacherSection(
            model=str(tmp_path / name), dtype="float32", device="cpu", sharding="device_map",
            max_memory={"cpu": "90KB"}, offload_folder=str(tmp_path / f"{name}-offload"),
        )  # fmt: skip
        spread = open_teacher(section)
        assert "disk" in spread.model.hf_device_map.values()
        for batch in BATCHES:
            assert_close(spread.targets(batch, RECIPE), whole.targets(batch, RECIPE))


def test_what_does_not_go_together_is_refused() -> None:
    def section(**changes: object) -> TeacherSection:
        return TeacherSection.model_validate({"model": "m"} | changes)

    for changes, says in (
        ({"sharding": "tensor", "backend": "vllm"}, "tensor_parallel_size"),
        ({"max_memory": {"cpu": "1GB"}}, "is for sharding: device_map"),
        ({"sharding": "tensor", "offload": True}, "is for sharding: zero3"),
        ({"sharding": "zero3", "offload_folder": "x"}, "is for sharding: device_map"),
        ({"sharding": "tensor", "device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ):
        with pytest.raises(ValidationError, match=says):
            section(**changes)
    with pytest.raises(UsageError, match="--nproc N"):
        open_teacher(section(sharding="zero3"))


def grouped(folder: Path, sharding: str, size: int) -> GroupTeacher:
    """The leader of a group that has not met."""
    section = TeacherSection.model_validate({"model": str(save_teacher(folder)), "device": "cpu", "sharding": sharding})
    none: Any = None
    return GroupTeacher(section, Group(rank=0, size=size, local_rank=0, on_gpu=False, control=none, answers=none))


def test_tensor_parallelism_of_an_older_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would spread the head too, or knows no `tp_size`."""
    monkeypatch.setattr(group, "version", lambda _: "5.20.2")
    with pytest.raises(MismatchError, match=r"transformers 5\.20\.2\n  expected: 5\.21 or newer"):
        grouped(tmp_path, "tensor", 2).refuse_unloadable()
    grouped(tmp_path, "zero3", 2).refuse_unloadable()


@pytest.mark.parametrize(("sharding", "size", "fits"), [("tensor", 2, True), ("tensor", 4, False), ("zero3", 3, True)])
def test_heads_that_cannot_be_dealt_are_refused_before_the_corpus_is_read(
    tmp_path: Path, sharding: str, size: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher has four heads, and two of keys and values."""
    monkeypatch.setattr(group, "version", lambda _: "5.21")
    with nullcontext() if fits else pytest.raises(MismatchError, match="num_key_value_heads = 2"):
        grouped(tmp_path, sharding, size).refuse_unloadable()


def test_a_batch_that_does_not_fit_is_told_with_what_to_change(tmp_path: Path) -> None:
    section = TeacherSection(model=str(save_teacher(tmp_path)), dtype="float32", device="cpu", sharding="zero3")
    none: Any = None
    teacher = GroupTeacher(section, Group(rank=1, size=2, local_rank=1, on_gpu=False, control=none, answers=none))
    teacher.__dict__["model"] = tiny_model("llama")

    def no_memory(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    teacher.model.get_decoder().register_forward_pre_hook(no_memory)
    with pytest.raises(MismatchError, match=r"does not fit into (.|\n)*lower teacher.batch_tokens, or start more"):
        teacher.launch(BATCHES[0], RECIPE)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of 12 documents in 6 units."""
    save_teacher(tmp_path / "teacher")
    lines = [json.dumps({"text": "some words and some more of them " * (2 + i % 3)}) for i in range(12)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    settings = {
        "dump": {"url": str(tmp_path / "dump"), "samples_per_unit": 2},
        "teacher": {
            "model": str(tmp_path / "teacher"),
            "dtype": "float32",
            "device": "cpu",
            "sharding": WAYS[0]["sharding"],
        },
        "corpus": {"sources": [{"path": str(tmp_path / "corpus.jsonl")}], "mask": "all", "max_length": 64},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    return tmp_path / "config.yaml"


def llm_neo(*arguments: str, **more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(**more), stdout=pipe, stderr=pipe, text=True)


def test_the_command_line_starts_the_group_and_a_second_call_has_nothing_to_do(config: Path) -> None:
    """And no process unpickles what another one sends."""
    audit = config.parent / "audit.log"
    path = os.pathsep.join([str(TESTS / "support/audit"), environment()["PYTHONPATH"]])
    for done in (6, 0):
        process = llm_neo("dump", str(config), "--nproc", "2", "--json", PYTHONPATH=path, LLM_NEO_AUDIT=str(audit))
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        summary = json.loads(out)
        assert (summary["units_done_here"], summary["units"]) == (done, 6)
    assert verify(str(config.parent / "dump")).ok
    lines = audit.read_text().splitlines()
    assert len([line for line in lines if line.startswith("start ") and "dump_group" in line]) == 4
    assert [line for line in lines if not line.startswith("start ")] == []


def test_a_plan_of_a_teacher_that_no_process_holds_alone(config: Path) -> None:
    """The pilot runs in a group, as the dump will: two devices are one worker, the numbers those of a whole teacher."""
    words = ["plan", str(config), "--pilot-samples", "4", "--price-per-hour", "3", "--json", "--nproc", "2"]
    process = llm_neo(*words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    shared = json.loads(out)
    whole = run_plan(load_config(config, ["teacher.sharding=none"]), {"samples": 4, "price_per_hour": 3.0})
    assert (shared["devices_per_worker"], whole["devices_per_worker"]) == (2, 1)
    assert [each["devices"] for each in shared["durations"][:3]] == [2, 4, 8]
    one = shared["durations"][0]
    assert one["hours"] == pytest.approx(shared["teacher_tokens"] / shared["tokens_per_second"] / 3600)
    assert one["money"] == pytest.approx(2 * 3 * one["hours"])
    assert (
        shared["estimators"][0]["entries_per_supervised_token"]
        == whole["estimators"][0]["entries_per_supervised_token"]
    )
    assert shared["mass_at_k"] == pytest.approx(whole["mass_at_k"])
    assert not (config.parent / "dump").exists()


def test_a_stop_and_an_error_end_all_with_their_code(config: Path) -> None:
    """SIGTERM to the command is 75; what the leader finds wrong is its own code, once it has found it."""
    corpus = config.parent / "corpus.jsonl"
    corpus.write_text("\n".join([corpus.read_text()] * 400))
    process = llm_neo("dump", str(config), "--nproc", "2")
    commits = config.parent / "dump" / "commits"
    deadline = time.monotonic() + 200
    while not commits.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped before the dump was complete" in err

    process = llm_neo("dump", str(config), "--nproc", "2", "--set", "estimator.k=7")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 78, err
    assert "estimator.k" in err
