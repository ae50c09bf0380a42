"""The commands on a GPU: both stages, evaluation and merge, and what a user is told when memory runs out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpora import write_questions
from support.gpus import need_gpus
from support.tiny_teachers import save_teacher

from pipeline.prune import prune
from storage_schemas.common.exits import Exit
from storage_schemas.provenance import Recipe
from storage_schemas.reader import Dump
from student_train.metrics import read_events
from teacher_dump.config import TeacherSection
from teacher_dump.teachers.teacher import Teacher

pytestmark = [*need_gpus(), pytest.mark.timeout(300)]

TESTS = Path(__file__).parents[1]


def llm_neo(
    folder: Path, *arguments: str, code: int = 0, cpu: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    given = {**os.environ, "PYTHONPATH": path, **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    given |= env
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], cwd=folder, env=given, capture_output=True, text=True,
        check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its pruned copy, a corpus, and both dumps, made on the GPU."""
    folder = tmp_path_factory.mktemp("project")
    save_teacher(folder / "teacher", num_hidden_layers=4)
    prune(str(folder / "teacher"), folder / "student", layers=2)
    write_questions(folder / "train.jsonl", range(24))
    write_questions(folder / "heldout.jsonl", range(100, 108))
    (folder / "config.yaml").write_text(
        """
        dump: {url: dump, samples_per_unit: 8}
        teacher: {model: teacher, dtype: float32, batch_tokens: 512}
        estimator: {k: 16}
        corpus: {sources: [{path: train.jsonl}], max_length: 96}
        heldout: {url: dump-heldout, sources: [{path: heldout.jsonl}]}
        student: {model: student, lora: {r: 8}}
        train: {output: run, precision: fp32, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2,
                eval_steps: 3}
        """
    )
    llm_neo(folder, "dump", "config.yaml")
    return folder


def test_the_dump_is_that_of_the_cpu(project: Path) -> None:
    dump = Dump.open(str(project / "dump"))
    rows = [unit.row(i) for unit in map(dump.read_unit, range(dump.provenance.units)) for i in range(len(unit))]
    teacher = Teacher(TeacherSection(model=str(project / "teacher"), dtype="float32", device="cpu"))
    recipe = Recipe(estimator=dump.provenance.estimator, logsumexp=True)
    for row, expected in zip(rows, teacher.targets(rows, recipe), strict=True):
        assert row.targets is not None
        assert expected is not None
        assert row.targets.ids.tolist() == expected.ids.tolist()
        assert row.targets.logprobs == pytest.approx(expected.logprobs, abs=dump.provenance.logprob_step)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_that_of_the_cpu(stage: int, project: Path) -> None:
    losses: dict[str, list[float]] = {}
    for device in ("gpu", "cpu"):
        output = f"runs/{device}-{stage}"
        options = ["--set", f"train.output={output}", "--set", f"train.zero_stage={stage}"]
        llm_neo(project, "train", "config.yaml", "--nproc", "1", *options, cpu=device == "cpu")
        summary = json.loads((project / output / "summary.json").read_text())
        found = [event.loss for event in read_events(project / output / "events.jsonl")]
        losses[device] = found + [result["kl"] for result in summary["heldout"]]
    assert len(losses["gpu"]) == 6 + 3
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=2e-3)
    assert losses["gpu"][0] == pytest.approx(losses["cpu"][0], rel=1e-5)


def evaluated(project: Path, model: str) -> float:
    """KL of a model on the held-out samples."""
    told = llm_neo(project, "evaluate", "--model", model, "--dump", "dump-heldout", "--json")
    return float(json.loads(told.stdout)["kl_mean"])


def test_what_was_trained_is_evaluated_and_merged(project: Path) -> None:
    llm_neo(project, "train", "config.yaml", "--set", "train.output=runs/a", "--set", "train.precision=bf16")
    found = evaluated(project, "runs/a/final")
    last = json.loads((project / "runs/a/summary.json").read_text())["heldout"][-1]
    assert found == pytest.approx(last["kl"], rel=0.05)
    llm_neo(project, "merge", "runs/a/final", "runs/a/merged")
    assert evaluated(project, "runs/a/merged") == pytest.approx(found, rel=0.05)


def test_doctor_counts_the_gpus(project: Path) -> None:
    told = llm_neo(project, "doctor", "config.yaml").stdout
    assert torch.cuda.get_device_name() in told


LITTLE = "import torch; torch.cuda.set_per_process_memory_fraction(300e6 / torch.cuda.mem_get_info()[1])\n"


@pytest.mark.parametrize("stage", ["dump", "train"])
def test_out_of_memory_is_78_with_advice(stage: str, project: Path, tmp_path: Path) -> None:
    """Every Python process of the command has 300 MB of the GPU."""
    (tmp_path / "sitecustomize.py").write_text(LITTLE)
    changes = {
        "dump": ["--set", "dump.url=dump-large", "--set", "teacher.model=large"],
        "train": ["--set", "student.model=large", "--set", "train.output=runs/large"],
    }
    save_teacher(project / "large", intermediate_size=2_000_000, num_hidden_layers=1)
    path = os.pathsep.join(filter(None, [str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    told = llm_neo(project, stage, "config.yaml", *changes[stage], code=Exit.MISMATCH, PYTHONPATH=path).stderr
    assert "out of memory" in told
    assert "Traceback" not in told
    assert ("teacher.dtype" if stage == "dump" else "train.micro_batch_size") in told


@pytest.mark.parametrize("marks", [pytest.param(2, marks=need_gpus(2))])
def test_two_workers_and_two_ranks_have_a_gpu_each(marks: int, project: Path) -> None:
    changes: list[Any] = ["--set", "dump.url=dump-two", "--set", "train.output=runs/two"]
    llm_neo(project, "dump", "config.yaml", "--workers", str(marks), *changes)
    llm_neo(project, "train", "config.yaml", "--nproc", str(marks), *changes)
    llm_neo(project, "train", "config.yaml", "--nproc", "1", "--set", "train.output=runs/one")
    two, one = (read_events(project / f"runs/{name}/events.jsonl") for name in ("two", "one"))
    assert [event.loss for event in two] == pytest.approx([event.loss for event in one], rel=2e-3)
