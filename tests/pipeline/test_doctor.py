"""`llm-neo doctor`: what it finds on this machine, in real stores and in configurations, and what it leaves there."""

import json
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.command_lines import Call
from support.s3_servers import BUCKET, READER, WRITER, TinyS3, be_impatient, options, seaweedfs
from support.tiny_student import VOCAB, save_student, tiny_tokenizer, write_dump

from pipeline import doctor
from pipeline.config import Config
from pipeline.doctor import Finding, examine, exit_code
from storage_schemas.common.exits import Exit
from storage_schemas.stores.store import Store

MACHINE = ["python", "packages", "torch", "devices", "DeepSpeed", "ranks", "hub cache"]
LAUNCHER = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI", "PMI", "SKYPILOT", "JOB_COMPLETION")


@pytest.fixture(autouse=True)
def nothing_ambient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith((*LAUNCHER, "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def found(call: Call, *arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """Findings by subject."""
    left, out, err = call("doctor", *arguments, "--json")
    assert left == code, out
    told = json.loads(out)
    assert set(told) == {"ok", "findings"}
    assert told["ok"] == (code == 0)
    assert all(set(finding) == {"subject", "state", "said", "fix", "temporary"} for finding in told["findings"])
    assert err == ""
    return {finding["subject"]: finding for finding in told["findings"]}


def write_config(folder: Path, **sections: Any) -> Path:
    (folder / "c.yaml").write_text(yaml.safe_dump(sections))
    return folder / "c.yaml"


def test_this_machine(call: Call) -> None:
    findings = found(call)
    assert list(findings) == MACHINE
    assert all(finding["state"] == "ok" for finding in findings.values())
    assert torch.__version__ in findings["torch"]["said"]
    assert "everything runs on the CPU" in findings["devices"]["said"]
    code, out, _ = call("doctor")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * len(MACHINE), "one line each"


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1", "peft>=99", "no-such-package>=1; python_version > '3'", "neither; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    (finding,) = doctor._packages()
    assert finding.state == "failure"
    assert f"peft>=99, got {version('peft')}" in finding.said
    assert "no-such-package>=1, got none" in finding.said
    assert "numpy" not in finding.said
    assert "neither" not in finding.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs")
def test_gpus_that_torch_cannot_use(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    findings = found(call, code=Exit.MISMATCH)
    failures = {subject: finding for subject, finding in findings.items() if finding["state"] == "failure"}
    assert list(failures) == ["torch"]
    assert "2 visible" in failures["torch"]["said"]
    assert "pip install torch" in failures["torch"]["fix"]


def test_without_a_compiler_deepspeed_builds_nothing(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    script = "import os; from pipeline.doctor import _deepspeed; print(*_deepspeed(os.environ))"
    environment = os.environ | {"PATH": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "state='warning'" in done.stdout
    assert "a C++ compiler" in done.stdout


@pytest.mark.parametrize(
    ("env", "state", "said"),
    [
        ({}, "ok", "one process"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "warning", "`dump` is worker 3 of 8, by torchrun"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "warning", "`dump` is worker 1 of 2, by Slurm"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"},
            "warning",
            "torchrun says 3 of 8; Slurm says 0 of 1; `dump` is worker 3 of 8, by torchrun; `train` is node 0 of 1; "
            "they disagree",
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
             "SLURM_STEP_NODELIST": "gpu[1-2]"},
            "ok", "`train` is node 1 of 2, by Slurm",
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "warning", "each `train` would be alone"),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "4"}, "warning", "`dump` is worker 2 of 4, by Kubernetes"),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4"}, "ok", "`dump` is worker 2 of 4, by Kubernetes"),
    ],
)  # fmt: skip
def test_launchers(env: Mapping[str, str], state: str, said: str) -> None:
    (finding,) = doctor._ranks(env)
    assert finding.state == state
    assert said in finding.said
    assert (finding.fix is None) == (state == "ok")


def test_a_launcher_that_says_half(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    finding = found(call, code=Exit.MISMATCH)["ranks"]
    assert finding["state"] == "failure"
    assert "WORLD_SIZE" in finding["said"]


def test_a_real_object_store_by_writer_and_reader(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{BUCKET}/deep/a"
    with seaweedfs(tmp_path) as port:
        public = {name: value for name, value in options(port).items() if name in ("endpoint", "region")}
        config = write_config(tmp_path, dump={"url": url, "storage_options": public})
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER["access_key_id"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER["secret_access_key"])
        finding = found(call, config)["dump"]
        assert finding["state"] == "ok"
        assert "no dump is there yet; read, write and put-if-absent work" in finding["said"]
        assert list(Store(url, options=options(port)).heads("")) == [], "the probe is gone"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER["access_key_id"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER["secret_access_key"])
        finding = found(call, config)["dump"]
        assert finding["state"] == "ok"
        assert "read only" in finding["said"]
        config.write_text(config.read_text() + "teacher: {model: t}\n")
        finding = found(call, config, code=Exit.MISMATCH)["dump"]
        assert (finding["state"], finding["fix"] is None) == ("warning", False)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
        code, out, err = call("doctor", config)
        assert code == Exit.MISMATCH
        assert "failure dump" in out
        assert "wrong-and-secret" not in out + err
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER["secret_access_key"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER["access_key_id"])
        gone = found(call, config, "--set", "dump.url=s3://no-such-bucket/a", code=Exit.MISMATCH)["dump"]
        assert "does not exist" in gone["said"]


def test_a_store_without_conditions_and_one_that_is_away(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER["secret_access_key"])
    be_impatient(monkeypatch)
    server = TinyS3(conditional=False)
    where = {"endpoint": f"http://127.0.0.1:{server.port}", "region": "us-east-1"}
    config = write_config(tmp_path, dump={"url": f"s3://{BUCKET}/a", "storage_options": where})
    finding = found(call, config, code=Exit.MISMATCH)["dump"]
    assert "put-if-absent" in finding["said"]
    server.conditional = True
    finding = found(call, config)["dump"]
    assert finding["state"] == "warning", "it knows no DeleteObjects"
    assert list(server.objects)[-1].removeprefix(f"{BUCKET}/a/") in finding["said"]
    server.close()
    finding = found(call, config, code=Exit.TEMPORARY)["dump"]
    assert (finding["state"], finding["temporary"]) == ("failure", True)


def test_local_folders_are_left_as_they_were(tmp_path: Path, call: Call) -> None:
    config = write_config(tmp_path, dump={"url": str(tmp_path / "new/dump")}, train={"output": str(tmp_path / "run")})
    findings = found(call, config)
    assert "it can be made there" in findings["dump"]["said"]
    assert findings["run directory"]["state"] == findings["disk of the dump"]["state"] == "ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]
    write_dump(tmp_path / "dump", samples=5)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    finding = found(call, config, "--set", f"dump.url={tmp_path}/dump")["dump"]
    assert "a dump is there; read, write and put-if-absent work" in finding["said"]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    finding = found(call, config, "--set", f"dump.url={config}/dump", code=Exit.MISMATCH)["dump"]
    assert finding["state"] == "failure"


def test_a_dump_that_may_only_be_read_is_enough_for_a_student() -> None:
    with tempfile.TemporaryDirectory() as name:
        dump = Path(name) / "dump"
        write_dump(dump, samples=5)
        Path(name).chmod(0o755)
        (dump / "probe").chmod(0o555)
        dump.chmod(0o555)
        section = Config.model_validate({"dump": {"url": str(dump)}})
        uid = os.geteuid()
        try:
            if uid == 0:  # Whom nothing is forbidden.
                os.seteuid(65534)
            (finding,) = doctor._store("dump", section.dump, section)
        finally:
            os.seteuid(uid)
            dump.chmod(0o755)
    assert finding.state == "ok"
    assert "a dump is there; read only" in finding.said


def test_the_teacher_is_looked_for(tmp_path: Path, call: Call) -> None:
    """Where nothing is trained a missing one is a failure: nothing could be done here."""
    place = {"dump": {"url": str(tmp_path / "dump")}, "teacher": {"model": str(tmp_path / "teacher")}}
    config = write_config(tmp_path, **place)
    finding = found(call, config, code=Exit.MISMATCH)["teacher"]
    assert (finding["state"], "cannot be loaded" in finding["said"]) == ("failure", True)
    assert found(call, config, "--set", f"train.output={tmp_path}/run")["teacher"]["state"] == "warning"
    save_student(tmp_path / "teacher")
    finding = found(call, config)["teacher"]
    assert (finding["state"], "weights are there" in finding["said"]) == ("ok", True)
    (tmp_path / "teacher/model.safetensors").unlink()
    assert "no model.safetensors" in found(call, config, code=Exit.MISMATCH)["teacher"]["said"]


def test_what_dump_would_refuse_is_found(tmp_path: Path, call: Call) -> None:
    """A failure, or a warning where the configuration trains: stage one may run elsewhere."""
    save_student(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("{}\n")
    config = write_config(
        tmp_path,
        dump={"url": str(tmp_path / "dump")},
        teacher={"model": str(tmp_path / "teacher")},
        corpus={"sources": [{"path": str(tmp_path / "data.jsonl")}, {"path": "some/dataset"}]},
    )
    assert found(call, config)["corpus"]["said"] == "files that are there: 1; not looked into: some/dataset"
    for change, subject, said in (
        (f"corpus.sources.0.path={tmp_path}/absent.jsonl", "corpus", "absent.jsonl"),
        (f"corpus.chat_template={tmp_path}/absent.jinja", "corpus", "absent.jinja"),
        (f"estimator.k={VOCAB + 1}", "teacher", f"k = {VOCAB + 1}"),
        ("teacher.device=cuda:7", "teacher", "no device cuda:7"),
    ):
        finding = found(call, config, "--set", change, code=Exit.MISMATCH)[subject]
        assert (finding["state"], said in finding["said"]) == ("failure", True), change
        finding = found(call, config, "--set", change, "--set", f"train.output={tmp_path}/run")[subject]
        assert (finding["state"], said in finding["said"]) == ("warning", True), change
    if find_spec("vllm") is None:
        changes = ("--set", "teacher.backend=vllm", "--set", "dump.logsumexp=false")
        assert "needs vllm" in found(call, config, *changes, code=Exit.MISMATCH)["teacher"]["said"]


def test_places_that_hold_something_else_are_failures(tmp_path: Path, call: Call) -> None:
    """What `dump` and `train` refuse at once: a model's directory, a file, a torn model."""
    save_student(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    place = {"dump": {"url": str(tmp_path / "model")}, "teacher": {"model": str(tmp_path / "model")}}
    assert "holds something else" in found(call, write_config(tmp_path, **place), code=Exit.MISMATCH)["dump"]["said"]
    place["dump"]["url"] = str(tmp_path / "dump")
    config = write_config(tmp_path, **place)
    for output in ("file", "model"):
        told = found(call, config, "--set", f"train.output={tmp_path}/{output}", code=Exit.MISMATCH)
        assert told["run directory"]["state"] == "failure"
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "is torn" in found(call, config, code=Exit.MISMATCH)["teacher"]["said"]


def test_dumps_at_two_kinds_of_places_are_told(tmp_path: Path) -> None:
    """One on this machine, the other in a bucket: whoever trains elsewhere will not find the first."""
    for url, heldout, told in (("s3://b/d", "runs/h", "heldout.url lies on this machine"),
                               ("runs/d", "gs://b/h", "dump.url lies on this machine"),
                               ("runs/d", "runs/h", ""), ("s3://b/d", "s3://b/h", "")):  # fmt: skip
        config = Config.model_validate({"dump": {"url": url}, "heldout": {"url": heldout}})
        findings = list(doctor._places(config))
        assert [told in finding.said for finding in findings] == ([True] if told else [])


def test_a_student_that_is_not_there_is_one_failure(tmp_path: Path, call: Call) -> None:
    """Nothing is said of its tokenizer."""
    write_dump(tmp_path / "dump", samples=5)
    config = write_config(tmp_path, dump={"url": str(tmp_path / "dump")}, student={"model": str(tmp_path / "absent")})
    findings = found(call, config, code=Exit.MISMATCH)
    assert [name for name, finding in findings.items() if finding["state"] == "failure"] == ["student"]
    assert "tokenizer" not in findings


def test_the_tokenizers_of_dump_and_student(tmp_path: Path, call: Call) -> None:
    save_student(tmp_path / "student")
    config = write_config(
        tmp_path,
        dump={"url": str(tmp_path / "dump")},
        heldout={"url": str(tmp_path / "heldout"), "sources": [{"path": "x"}]},
        student={"model": str(tmp_path / "student")},
        train={"output": str(tmp_path / "run")},
    )
    assert "before the dump has begun" in found(call, config)["tokenizer"]["said"]
    write_dump(tmp_path / "dump", samples=5)
    findings = found(call, config)
    assert [findings[name]["state"] for name in ("configuration", "dump", "held-out dump", "student", "tokenizer")] \
        == ["ok"] * 5  # fmt: skip
    assert findings["tokenizer"]["said"] == "the student's is that of the dump"
    for file in (tmp_path / "student").glob("tokenizer*"):
        file.unlink()
    assert found(call, config)["tokenizer"]["state"] == "warning"
    tiny_tokenizer("other", vocab=VOCAB).save_pretrained(tmp_path / "student")
    finding = found(call, config, code=Exit.MISMATCH)["tokenizer"]
    assert (finding["state"], finding["temporary"]) == ("failure", False)
    assert "not the teacher's" in finding["said"]
    impossible = found(call, config, "--set", "train.deepspeed={zero: 1}", code=Exit.MISMATCH)["student"]
    assert "train.deepspeed.zero" in impossible["said"]


def test_a_wrong_configuration_is_one_finding_of_many(tmp_path: Path, call: Call) -> None:
    findings = found(call, write_config(tmp_path, dump={"urll": "x"}, loss=3), code=Exit.MISMATCH)
    assert list(findings) == ["configuration", *MACHINE]
    assert "did you mean dump.url?" in findings["configuration"]["said"]
    assert "\n" not in findings["configuration"]["said"]
    assert call("doctor", tmp_path / "absent.yaml")[:2] == (Exit.USAGE, "")


def test_a_disk_that_fills_is_temporary(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for free, state, code in ((2**29, "failure", Exit.TEMPORARY), (2**32, "warning", 0), (2**40, "ok", 0)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        assert found(call, code=code)["hub cache"]["state"] == state


def test_what_a_check_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "canary0canary0canary"
    monkeypatch.setenv("MY_API_KEY", secret)

    def fail(_: object) -> Any:
        raise RuntimeError(f"cannot connect with {secret}\nTraceback")

    monkeypatch.setattr(doctor, "_ranks", fail)
    (finding,) = [each for each in examine(None, (), os.environ) if each.state == "failure"]
    assert finding.subject == "ranks"
    assert "RuntimeError: cannot connect" in finding.said
    assert secret not in str(finding)


def test_the_exit_code() -> None:
    states = {
        name: Finding(subject="x", state=state, said="", temporary=temporary)  # type: ignore[arg-type]
        for name, (state, temporary) in {
            "fine": ("ok", False), "doubt": ("warning", False), "bad": ("failure", False), "away": ("failure", True),
        }.items()
    }  # fmt: skip
    cases = {"fine": 0, "fine doubt": 0, "away doubt": 75, "away away": 75, "bad": 78, "bad away": 78}
    for names, code in cases.items():
        assert exit_code([states[name] for name in names.split()]) == code


@pytest.mark.parametrize(
    ("sections", "state"), [({}, "warning"), ({"teacher": {"model": "t"}}, "warning"), (None, "failure")]
)
def test_what_training_alone_needs(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Any, state: str
) -> None:
    """Missing it is a failure where nothing but training can be meant; on the teacher's cluster it is none."""
    monkeypatch.setattr(doctor, "installed", lambda package: package != "deepspeed")
    training = {"student": {"model": "nowhere"}, "train": {"output": str(tmp_path / "run")}}
    config = write_config(tmp_path, dump={"url": str(tmp_path / "dump")}, **training, **(sections or {}))
    words = [config] if sections != {} else []
    finding = found(call, *words, code=Exit.MISMATCH if state == "failure" else 0)["DeepSpeed"]
    assert (finding["state"], "pip install 'llm-neo[train]'" in finding["fix"]) == (state, True)
    assert finding["said"].startswith("deepspeed not installed")
