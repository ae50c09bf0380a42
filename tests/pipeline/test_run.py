"""`llm-neo run` end to end with tiny models: everything is made, and made once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from support.corpora import write_questions
from support.own_code import bring_code
from support.tiny_teachers import save_teacher
from transformers import AutoModelForCausalLM

from pipeline.config import load_config
from pipeline.prune import prune
from pipeline.run import Steps, _dump_inputs, _state
from pipeline.views.report import remarks
from storage_schemas.reader import Dump
from student_train.metrics import read_events
from student_train.results.model_card import CARD

TESTS = Path(__file__).parents[1]
SUMMARY = [
    "kl_before", "kl_after", "ce_before", "ce_after", "top1_before", "top1_after", "dump_tokens_per_second",
    "train_tokens_per_second", "bytes_per_supervised_token", "train_steps", "teacher", "student", "adapter", "merged",
    "report",
]  # fmt: skip
"""Names that scripts outside of the project rely on."""


def test_a_step_is_done_once_for_the_same_inputs(tmp_path: Path) -> None:
    steps, calls = Steps(tmp_path / "steps"), []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"call": len(calls)}

    assert steps.do("a", work, {"x": [1, "b"]}) == {"call": 1}
    assert Steps(tmp_path / "steps").do("a", work, {"x": [1, "b"]}) == {"call": 1}
    assert steps.do("b", work, {"x": [1, "b"]}) == {"call": 2}
    assert steps.do("a", work, {"x": [2, "b"]}) == {"call": 3}
    assert steps.do("a", work, {"x": [2, "b"]}, redo=True) == {"call": 4}
    with pytest.raises(ZeroDivisionError):
        steps.do("c", lambda: {"never": 1 // 0}, {})
    assert steps.do("c", work, {}) == {"call": 5}


def test_a_chat_template_that_changes_is_another_dump(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    sources = f"[{{path: {tmp_path / 'a.jsonl'}}}]"
    (tmp_path / "c.yaml").write_text(
        f"dump: {{url: {tmp_path / 'dump'}}}\nteacher: {{model: x}}\nheldout: {{url: y, sources: {sources}}}\n"
        f"corpus: {{sources: {sources}, chat_template: {template}}}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    before = _dump_inputs(config)
    assert _dump_inputs(config) == before
    template.write_text("{{ messages[0] }}")
    assert _dump_inputs(config) != before


def test_the_state_of_a_model_is_that_of_all_its_files(tmp_path: Path) -> None:
    """Code in folders of it too, but not its card."""
    (tmp_path / "code").mkdir()
    files = [tmp_path / "config.json", tmp_path / "code" / "modeling.py", tmp_path / CARD]
    states = []
    for file in [*files, *files]:
        with file.open("a") as opened:
            opened.write("x")
        states.append(_state(str(tmp_path)))
    assert len({json.dumps(state) for state in states}) == 4
    assert states[1] == states[2]
    assert states[4] == states[5]


AUDIT = "audit.log"
CANARY = "Canary1Canary1Canary"
SECRETS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_OWN_PASSWORD",
)  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS / "support/audit"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ours = {"PYTHONPATH": path, "LLM_NEO_AUDIT": str(folder / AUDIT)}
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **cpu, **ours, **dict.fromkeys(SECRETS, CANARY)}


def llm_neo(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pipeline.cli", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


@contextmanager
def listening_elsewhere() -> Iterator[set[str]]:
    """Processes below this one that listen on other interfaces than the loopback one, meanwhile."""
    found: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    for open_socket in process.net_connections("inet"):
                        if open_socket.status == psutil.CONN_LISTEN and open_socket.laddr.ip not in (
                            "127.0.0.1",
                            "::1",
                        ):
                            found.add(f"{open_socket.laddr} {' '.join(process.cmdline())}")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a teacher, its pruned copy, a corpus and a configuration."""
    folder = tmp_path_factory.mktemp("project")
    save_teacher(folder / "teacher", num_hidden_layers=4)
    prune(str(folder / "teacher"), folder / "student", layers=2)
    # Processes of ours must not import what a user has in the working directory.
    (folder / "pipeline.py").write_text("raise ImportError('the file of the user')\n")
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
        train: {output: run, precision: fp32, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2}
        """
    )
    return folder


@pytest.fixture(scope="module")
def finished(project: Path) -> Path:
    """The directory after `llm-neo run`."""
    with listening_elsewhere() as found:
        done = llm_neo(project, "run", "config.yaml", "--workers", "2", "--nproc", "2", "--json")
    (project / "listening.json").write_text(json.dumps(sorted(found)))
    (project / "printed.txt").write_text(done.stdout + done.stderr)
    # With --json, nothing else is on standard output.
    assert json.loads(done.stdout) == json.loads((project / "run/summary.json").read_text())
    return project


def test_no_class_is_unpickled_and_nobody_else_can_connect(finished: Path) -> None:
    """Neither by the two workers of stage one nor by evaluation, the two ranks and merge."""
    lines = (finished / AUDIT).read_text().splitlines()
    started = [line for line in lines if line.startswith("start ")]
    for word, processes in {"entry dump": 2, "entry evaluate": 2, "student_train.worker": 2, "entry merge": 1}.items():
        assert len([line for line in started if word in line]) == processes, started
    assert [line for line in lines if line not in started] == []
    assert json.loads((finished / "listening.json").read_text()) == []


def test_no_secret_of_the_environment_is_in_what_is_left(finished: Path) -> None:
    """Neither in dumps, records, configuration, events, summary, report and card nor in what was printed."""
    files = {path.relative_to(finished).as_posix(): path for path in finished.rglob("*") if path.is_file()}
    assert {"dump/run.json", "dump/SEALED.json", "run/config.yaml", "run/events.jsonl", "run/summary.json"} <= set(
        files
    )
    assert {"run/report.md", "run/final/README.md", "run/merged/README.md", "printed.txt"} <= set(files)
    assert [name for name, path in files.items() if CANARY.encode() in path.read_bytes()] == []


def test_status_of_both_dumps_and_the_run(finished: Path, tmp_path: Path) -> None:
    found = json.loads(llm_neo(finished, "status", "config.yaml", "--json").stdout)
    assert [found[name]["sealed"] for name in ("dump", "heldout")] == [True, True]
    assert (found["dump"]["units_done"], found["dump"]["samples_done"]) == (3, 24)
    run = found["run"]
    assert (run["finished"], run["step"], run["steps"], run["checkpoint_step"]) == (True, 6, 6, 6)
    last = read_events(finished / "run/events.jsonl")[-1]
    assert [run[name] for name in ("loss", "ce", "kl", "epoch")] == [last.loss, last.ce, last.kl, last.epoch]
    assert llm_neo(finished, "status", "config.yaml", "--watch").stdout.endswith(f"loss {last.loss:.4f}\n")
    # As it was before its end, and before the last steps were logged.
    copy = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (copy / "summary.json").unlink()
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(lines[:4]))
    run = json.loads(llm_neo(finished, "status", "config.yaml", str(copy), "--json").stdout)["run"]
    assert (run["finished"], run["step"], run["steps"], run["checkpoint_step"]) == (False, 6, 6, 6)
    assert 0 <= run["seconds_since_last_step"] < 60
    assert run["seconds_since_checkpoint"] >= 0


def test_the_students_cluster_reports_without_the_teacher(finished: Path) -> None:
    """It knows the two dumps alone; evaluations while it trains are those of `llm-neo evaluate`."""
    (finished / "student.yaml").write_text(
        """
        dump: {url: dump}
        heldout: {url: dump-heldout}
        student: {model: student, lora: {r: 8}}
        train: {output: alone, precision: fp32, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2,
                eval_steps: 4, load_best_model_at_end: true}
        """
    )
    printed = llm_neo(finished, "train", "student.yaml", "--nproc", "1").stdout
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("held-out")] == [
        f"held-out samples after step {step}" for step in (0, 4, 6)
    ]
    with_teacher, alone = (json.loads((finished / name / "summary.json").read_text()) for name in ("run", "alone"))
    first, last = alone["heldout"][0], alone["heldout"][-1]
    assert first["kl"] == pytest.approx(with_teacher["kl_before"], rel=1e-4)
    assert last["kl"] == pytest.approx(with_teacher["kl_after"], rel=1e-4)
    report = (finished / "alone/report.md").read_text()
    assert report.startswith("# lora_kd: student\n")
    assert f"| {first['kl']:.4f} | {last['kl']:.4f} | " in report
    assert "share of the time" in report
    assert "teacher, tokens per second" not in report
    card = (finished / "alone/final/README.md").read_text()
    assert f"| {first['kl']:.4f} | {last['kl']:.4f} |" in card


@pytest.mark.slow
def test_the_summary_has_the_documented_names_and_the_student_improves(finished: Path) -> None:
    summary = json.loads((finished / "run/summary.json").read_text())
    assert set(SUMMARY) <= set(summary)
    assert all(summary[name] is not None for name in SUMMARY)
    assert summary["kl_after"] < summary["kl_before"]
    assert summary["train_steps"] == 6
    for name in ("teacher", "student", "adapter", "merged", "report"):
        assert (finished / summary[name]).exists()
    assert len(read_events(finished / "run/events.jsonl")) == 6
    assert (finished / "run/config.yaml").is_file()


@pytest.mark.slow
def test_the_report_tells_results_configuration_and_versions(finished: Path) -> None:
    report = (finished / "run/report.md").read_text()
    assert report.startswith("# lora_kd: student from teacher\n")
    summary = json.loads((finished / "run/summary.json").read_text())
    assert f"{summary['kl_before']:.4f} | {summary['kl_after']:.4f}" in report
    assert summary["fingerprint"] in report
    assert "learning_rate: 0.01" in report
    assert f"| torch | {torch.__version__}" in report
    assert remarks(load_config(finished / "config.yaml"), summary) == []


def test_a_run_that_has_improved_nothing_says_so(project: Path) -> None:
    config = load_config(project / "config.yaml")
    summary = {"kl_before": 5.344, "kl_after": 2.0, "ce_before": 5.0, "ce_after": 4.99, "train_steps": 1}
    assert remarks(config, summary | {"train_samples": 4}) == []
    (few,) = remarks(config, summary | {"train_samples": 3})
    assert "3 samples" in few
    assert "train.global_batch_size (4)" in few
    for same in ({"kl_after": 5.343}, {"kl_after": 6.0}, {"kl_after": float("nan")}, {"kl_after": None}):
        (nothing,) = remarks(config, summary | {"train_samples": 4} | same)
        assert "not closer to the teacher than before" in nothing


@pytest.mark.slow
def test_merged_model_and_adapter_load_plainly_and_agree(finished: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished / "run/merged")
    base = AutoModelForCausalLM.from_pretrained(finished / "student")
    ids = torch.arange(20)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, finished / "run/final")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, before, atol=1e-2)


@pytest.mark.slow
def test_both_cards_tell_the_evaluation(finished: Path) -> None:
    summary = json.loads((finished / "run/summary.json").read_text())
    for folder, library in (("final", "peft"), ("merged", "transformers")):
        card = (finished / "run" / folder / "README.md").read_text()
        assert f"library_name: {library}\n" in card
        assert f"| {summary['kl_before']:.4f} | {summary['kl_after']:.4f} |" in card
        assert summary["fingerprint"] in card


@pytest.mark.slow
def test_running_again_does_nothing_anew(finished: Path) -> None:
    kept = ["dump/data/*", "dump/commits/*", "dump-heldout/*/*", "run/steps/*", "run/final/*", "run/merged/*"]
    before = {path: path.stat().st_mtime_ns for pattern in kept for path in finished.glob(pattern)}
    summary = json.loads((finished / "run/summary.json").read_text())
    done = llm_neo(finished, "run", "config.yaml", "--workers", "2", "--nproc", "2")
    assert done.stderr.count(": done before") == 6
    assert {path: path.stat().st_mtime_ns for pattern in kept for path in finished.glob(pattern)} == before
    assert json.loads((finished / "run/summary.json").read_text()) == summary
    assert "KL(teacher || student)" in done.stdout
    assert "report: run/report.md" in done.stdout


@pytest.mark.slow
def test_another_configuration_for_the_same_run_is_refused_and_nothing_is_lost(finished: Path) -> None:
    kept = {
        path: path.read_bytes()
        for path in (finished / "run").rglob("*")
        if path.is_file() and "exit" not in path.parts and not path.name.startswith(".lock")
    }
    done = llm_neo(finished, "run", "config.yaml", "--set", "train.learning_rate=0.5", code=78)
    assert "learning_rate" in done.stderr
    assert "the step `train` ended with exit code 78" in done.stderr
    done = llm_neo(finished, "run", "config.yaml", "--set", "estimator.k=8", code=78)
    assert "estimator" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.slow
def test_a_signal_stops_training_with_a_checkpoint_and_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("run")))
    command = [
        sys.executable,
        "-P",
        "-m",
        "pipeline.cli",
        "train",
        "config.yaml",
        "--nproc",
        "2",
        "--set",
        "train.save_steps=99",
    ]
    process = subprocess.Popen(command, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "run/events.jsonl").is_file() or not read_events(folder / "run/events.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("training was done before the signal came")
    assert process.returncode == 75, err[-2000:]
    assert "Traceback" not in err
    stopped = len(read_events(folder / "run/events.jsonl"))
    assert 1 <= stopped < 6
    llm_neo(folder, "train", "config.yaml", "--nproc", "1", "--set", "train.save_steps=99")
    uninterrupted = read_events(finished / "run/events.jsonl")
    resumed = read_events(folder / "run/events.jsonl")
    assert [event.step for event in resumed] == [event.step for event in uninterrupted]
    for one, other in zip(resumed, uninterrupted, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


@pytest.mark.slow
def test_two_nodes_meet_at_an_address_and_train_the_same(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("run")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-P", "-m", "pipeline.cli", "train", "config.yaml", "--nproc", "1", "--nnodes", "2"]
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), "--rdzv-endpoint", endpoint],
            cwd=folder, env=environment(folder) | {"GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for node in nodes:
        _, err = node.communicate(timeout=240)
        assert node.returncode == 0, err[-2000:]
    assert [line for line in (folder / AUDIT).read_text().splitlines() if not line.startswith("start ")] == []
    for one, other in zip(
        read_events(folder / "run/events.jsonl"), read_events(finished / "run/events.jsonl"), strict=True
    ):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)


@pytest.mark.slow
def test_models_with_code_of_their_own(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, the evaluations and the merge run it where that is asked for, and nothing does where it is not."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("teacher", "student"):
        bring_code(shutil.copytree(project / name, project / f"own-{name}"))
    sets = ["dump.url=own-dump", "heldout.url=own-heldout", "train.output=own-run", "train.max_steps=4"]
    sets += ["teacher.model=own-teacher", "student.model=own-student"]
    command = ["run", "config.yaml", "--nproc", "2", *(word for value in sets for word in ("--set", value))]
    llm_neo(project, *command, code=78)
    llm_neo(project, *command, "--set", "teacher.trust_remote_code=true", code=78)
    assert not (project / "own-run" / "checkpoints").exists()
    asked = [f"--set={name}.trust_remote_code=true" for name in ("teacher", "student")]
    llm_neo(project, *command, *asked)
    assert (project / "own-run" / "merged" / "modeling_own.py").is_file()
    assert set(Dump.open(str(project / "own-dump")).provenance.teacher.code_sha256 or {}) == {
        "configuration_own.py", "modeling_own.py",
    }  # fmt: skip
