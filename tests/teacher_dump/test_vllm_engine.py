"""The vLLM backend on the real engine, CPU build: `make test-vllm`. Every test but one starts it, 30 to 60 seconds."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from support.dump_checks import SAMPLES, assert_each_sample_once, rows_of, vllm_sections
from support.record_vllm import CPU
from support.tiny_teachers import save_teacher

from storage_schemas.common.errors import MismatchError, TemporaryError
from storage_schemas.targets import concatenate
from teacher_dump.compare import TOLERANCES, compare
from teacher_dump.dump import run_dump
from teacher_dump.teachers.open import open_teacher

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),  # An engine takes minutes to start where others use the cores.
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


@pytest.fixture(scope="module", autouse=True)
def small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), head_dim=32)


def test_a_dump_by_vllm_equals_that_of_transformers(
    tmp_path: Path, corpus_file: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts longer than a step of the engine are among them, so that it puts their log-probs together from parts.

    At the end the engine is killed, of which vLLM itself may say nothing; the next call gets a new one.
    """
    engine = {"max_num_batched_tokens": 32, "max_num_seqs": 8}
    job = vllm_sections(tmp_path / "vllm", corpus_file, model_folder, k=16, mass=0.95, vllm=engine)
    teacher = job["teacher"]
    running = open_teacher(teacher)
    summary = run_dump(**job | {"teacher": running})
    assert summary.statuses == {"empty": 1, "ok": 9, "too_long": 1}
    assert_each_sample_once(tmp_path / "vllm")
    provenance = json.loads((tmp_path / "vllm" / "run.json").read_text())
    assert provenance["engine"] == open_teacher(teacher).engine.model_dump()
    assert provenance["engine"]["name"] == "vllm"

    plain = teacher.model_copy(update={"backend": "transformers"})
    with pytest.raises(MismatchError, match=r"engine\.name"):
        run_dump(**job | {"teacher": plain})
    run_dump(**job | {"dump": job["dump"].model_copy(update={"url": str(tmp_path / "plain")}), "teacher": plain})
    ours, theirs = [], []
    for a, b in zip(rows_of(tmp_path / "vllm"), rows_of(tmp_path / "plain"), strict=True):
        assert (a.sample_id, a.status) == (b.sample_id, b.status)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        if b.targets is not None:
            ours, theirs = [*ours, a.targets], [*theirs, b.targets]
    assert max(len(row.input_ids) for row in rows_of(tmp_path / "vllm") if row.status == "ok") > 33
    found = compare(concatenate(theirs), concatenate(ours))
    tails = [np.exp(np.concatenate([t.tail_logprob for t in side]).astype(np.float64)) for side in (ours, theirs)]
    tail_error = float(np.abs(tails[0] - tails[1]).max())
    with capsys.disabled():
        print(f"\nKL {found.kl.mean():.2g}, log-probs {found.logprob.max():.2g}, gap {found.gap.max():.2g}")
        print(f"largest error of the tail's mass {tail_error:.2g}")
    assert len(found.kl) == summary.supervised_tokens > 70
    assert found.within(TOLERANCES["float32"])
    assert found.logprob.max() < 1e-4
    assert tail_error < 2e-5
    again = run_dump(**job)
    assert (again.rows, again.units_done_here) == (SAMPLES, 0)

    engines = active_children()
    assert engines, "where is the engine?"
    for engine in engines:
        engine.kill()
    later = job | {"dump": job["dump"].model_copy(update={"url": str(tmp_path / "later")}), "teacher": running}
    with pytest.raises(TemporaryError, match="engine died"):
        run_dump(**later)
    assert run_dump(**later).rows == SAMPLES
    running.close()
    assert not active_children()


def test_the_command_ends_with_its_own_exit_code(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    """An engine that is left to the interpreter's exit may abort the process."""
    job = vllm_sections(tmp_path / "dump", corpus_file, model_folder)
    sections = {name: job[name].model_dump(mode="json") for name in ("dump", "teacher", "corpus", "estimator")}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(sections))
    subprocess.run([sys.executable, "-m", "pipeline.cli", "dump", config], check=True, timeout=300)
    assert_each_sample_once(tmp_path / "dump")


def test_other_numbers_from_the_engine_stop_the_run(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    changed = {"hf_overrides": {"rms_norm_eps": 0.3}}
    with pytest.raises(MismatchError, match=r"(?s)disagree.*mean KL") as caught:
        run_dump(**vllm_sections(tmp_path, corpus_file, model_folder, vllm=changed))
    print(caught.value)
    assert not (tmp_path / "run.json").exists()


def test_a_model_that_the_engine_refuses_is_a_configuration_error(tmp_path: Path, corpus_file: Path) -> None:
    """The CPU build starts with heads of 8 and dies at the first prompt."""
    folder = save_teacher(tmp_path / "teacher")
    with pytest.raises(MismatchError, match="vLLM cannot run the teacher") as caught:
        run_dump(**vllm_sections(tmp_path / "dump", corpus_file, folder))
    print(caught.value)
    assert caught.value.exit_code == 78
    assert not list(tmp_path.glob("dump/data/*"))


def test_an_engine_argument_that_vllm_does_not_know_is_a_configuration_error(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    job = vllm_sections(tmp_path, corpus_file, model_folder, vllm={"tensor_paralel_size": 2}, vllm_check_samples=0)
    with pytest.raises(MismatchError, match="tensor_paralel_size"):
        run_dump(**job)
