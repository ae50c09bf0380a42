"""Secrets that stand where they must not: refused with 78 or 64, and never seen again, whatever the command."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.config import Config, load_config
from pipeline.problems import keys
from storage_schemas.common.errors import NeoError

CANARY = "Canary0Canary0Canary"
NUMBER = 777123456789777
S3 = "s3://bucket/dump"
OPTIONS = [
    "secret_access_key", "aws_secret_access_key", "AWS_SECRET_ACCESS_KEY", "session_token", "aws_session_token",
    "token", "access_key_id", "access_key", "account_key", "azure_storage_account_key", "sas_key", "sas_token",
    "client_secret",
    "service_account_key", "google_service_account_key", "bearer_token", "password", "secret_acces_key",
    "sse_customer_key_base64",
]  # fmt: skip
BASE = {"dump": {"url": S3}, "student": {"model": "m"}, "train": {"output": "run"}}
PLACES = [{"dump": {"url": S3, "storage_options": {name: CANARY}}} for name in OPTIONS] + [
    # Of another type, nested wrongly, in another section, in a list, beside other mistakes.
    {"dump": {"url": S3, "storage_options": {"secret_access_key": NUMBER}}},
    {"dump": {"url": S3, "storage_options": {"aws": {"secret_access_key": CANARY}}}},
    {"dump": {"url": S3, "storage_options": {"secret_access_key": [CANARY]}}},
    {"dump": {"url": S3, "storage_options": [{"secret_access_key": CANARY}]}},
    {"dump": {"url": S3, "storage_options": f"secret_access_key={CANARY}"}},
    {"dump": {"url": S3, "secret_access_key": CANARY}},
    {"dump": {"url": S3}, "secret_access_key": CANARY},
    {"dump": {"url": S3}, "storage_options": {"secret_access_key": CANARY}},
    {"dump": {"url": S3}, "teacher": {"model": "m", "hf_token": CANARY}},
    {"dump": {"url": S3}, "corpus": {"sources": [{"path": "a", "storage_options": {"session_token": CANARY}}]}},
    {"dump": {"url": S3}, "heldout": {"url": "h", "sources": [{"path": "a", "storage_options": {"sas_key": CANARY}}]}},
    {"dump": {"url": S3, "samples_per_unit": "x", "storage_options": {"secret_access_key": CANARY}}, "loss": 3},
    {"dump": {"url": S3}, "train": {"output": "run", "deepspeed": {"wandb": {"api_key": CANARY}}}},
    # By its look.
    {"dump": {"url": S3}, "train": {"output": "run", "tags": [f"hf_{CANARY}{CANARY}"]}},
    {"dump": {"url": S3}, "train": {"output": "run", "run_name": "AKIACANARY0CANARY012"}},
    # In a URL.
    {"dump": {"url": f"s3://key:{CANARY}@bucket/dump"}},
    {"dump": {"url": f"s3://key:{CANARY}/x@bucket/dump"}},
    {"dump": {"url": f"s3://{CANARY}@bucket/dump"}},
    {"dump": {"url": f"https://account.blob.example/dump?sv=1&sig={CANARY}"}},
    {"dump": {"url": S3, "storage_options": {"endpoint": f"http://user:{CANARY}@host"}}},
    {"dump": {"url": S3}, "corpus": {"sources": [{"path": f"s3://key:{CANARY}@bucket/a"}]}},
    {"dump": {"url": S3}, "teacher": {"model": f"https://user:{CANARY}@hub.example/m"}},
    {"dump": {"url": S3}, "heldout": {"url": f"s3://key:{CANARY}@bucket/h", "sources": [{"path": "a"}]}},
    {"dump": {"url": S3}, "train": {"output": "run", "checkpoint_url": f"s3://key:{CANARY}@bucket/c"}},
    {"dump": {"url": S3}, "train": {"output": "run", "dumps": [{"url": f"s3://key:{CANARY}@bucket/h"}]}},
    # A token in a URL, as hubs and clouds sign theirs.
    *({"dump": {"url": S3}, "corpus": {"sources": [{"path": f"https://host.example/a.jsonl?x=1&{name}={CANARY}"}]}}
      for name in ("token", "access_token", "api_key", "key", "sig", "Signature", "X-Goog-Signature",
                   "X-Amz-Security-Token", "private-token", "AWSAccessKeyId")),
    # Elsewhere.
    {"dump": {"url": S3}, "heldout": {"url": "h", "storage_options": {"account_key": CANARY}}},
    {"dump": {"url": S3}, "train": {"output": "run", "dumps": [{"url": S3, "storage_options": {"token": CANARY}}]}},
    {"dump": {"url": S3}, "corpus": {"sources": [{"path": "a"}], "template_kwargs": {"api_token": CANARY}}},
    {"dump": {"url": S3}, "teacher": {"model": "m", "backend": "vllm", "vllm": {"hf_token": CANARY}}},
]  # fmt: skip
COMMAND_LINES = [
    ["train", "c.yaml", "--set", f"dump.storage_options.secret_access_key={CANARY}"],
    ["train", "c.yaml", "--set", f"dump.storage_options={{secret_access_key: {CANARY}}}"],
    ["train", "c.yaml", "--set", f"dump.storage_options={{secret_access_key: {CANARY}"],
    ["train", "c.yaml", "--set", f"dump.storage_options.secret_access_key:{CANARY}"],
    ["train", "c.yaml", "--set", f"dump.url=s3://key:{CANARY}@bucket/x"],
    ["train", "c.yaml", "--set", f"dump.storage_options.secret_access_key=*{CANARY}"],
    ["verify", S3, "--store", f"secret_access_key={CANARY}"],
    ["verify", S3, "--store", f"secret_access_key:{CANARY}"],
    ["verify", S3, "--store", f"endpoint=http://user:{CANARY}@host"],
    ["inspect", f"s3://key:{CANARY}@bucket/x"],
    ["status", S3, "--store", f"secret_access_key={CANARY}"],
    ["status", f"s3://key:{CANARY}@bucket/x"],
    ["doctor", "c.yaml", "--set", f"dump.storage_options.secret_access_key={CANARY}"],
    ["doctor", "c.yaml", "--set", f"dump.url=s3://key:{CANARY}@bucket/x"],
    ["evaluate", "--model", "m", "--dump", f"s3://key:{CANARY}@bucket/x", "--store", f"token={CANARY}"],
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: json.dumps(place).replace(CANARY, "-")[-60:])
def test_refused_where_it_stands(place: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE | place))
    with pytest.raises(NeoError) as caught:
        load_config(tmp_path / "c.yaml")
    assert caught.value.exit_code in (64, 78)
    assert CANARY[:8] not in str(caught.value)
    assert str(NUMBER) not in str(caught.value)
    assert "environment" in str(caught.value)


def test_a_url_with_a_password_is_refused_as_the_value_of_any_setting(tmp_path: Path) -> None:
    """Of each that there is, whatever it may hold otherwise."""
    places = list(keys(Config))
    assert len(places) > 100
    for path in places:
        value: object = f"https://user:{CANARY}@host/x"
        for part in reversed(path):
            value = {part: value}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
        with pytest.raises(NeoError) as caught:
            load_config(tmp_path / "c.yaml")
        assert "a secret must not stand here" in str(caught.value), path
        assert CANARY[:8] not in str(caught.value), path


def test_a_secret_in_a_file_that_the_configuration_names_is_refused(tmp_path: Path) -> None:
    """Its content is written to config.yaml, as that of `train.deepspeed` is."""
    (tmp_path / "ds.json").write_text(json.dumps({"comet": {"enabled": True, "api_key": CANARY}}))
    place = {"train": {"output": "run", "deepspeed": str(tmp_path / "ds.json")}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE | place))
    with pytest.raises(NeoError, match=r"train\.deepspeed\.comet\.api_key -> a secret must not stand here") as caught:
        load_config(tmp_path / "c.yaml")
    assert CANARY[:8] not in str(caught.value)


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=lambda arguments: arguments[-1].replace(CANARY, "-")[:60])
def test_refused_on_the_command_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capfd.readouterr()
    assert left.value.code in (64, 78), err
    assert CANARY[:8] not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_broken_line_is_not_shown(tmp_path: Path) -> None:
    for line in (f"secret_access_key: {CANARY}: x", f"secret_access_key: *{CANARY}", f"key: !{CANARY} x", f"'{CANARY}"):
        (tmp_path / "c.yaml").write_text(f"dump:\n  url: x\n  {line}\n")
        with pytest.raises(NeoError) as caught:
            load_config(tmp_path / "c.yaml")
        assert CANARY[:8] not in str(caught.value)
        assert "line" in str(caught.value)


def test_what_is_no_secret_is_taken(tmp_path: Path) -> None:
    options = {"skip_signature": "true", "endpoint": "http://127.0.0.1:9000", "region": "eu", "sas_token_file": "/x"}
    place = {"dump": {"url": "s3://bucket/d", "storage_options": options, "logsumexp": False}}
    vllm = {"model": "m", "backend": "vllm", "vllm": {"max_num_batched_tokens": 64, "tokenizer_mode": "auto"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE | place | {"teacher": vllm}))
    assert load_config(tmp_path / "c.yaml").dump.storage_options == options


def test_from_the_environment_a_secret_comes_out_nowhere(tmp_path: Path) -> None:
    """Neither in files nor in output nor in any process's command line; the configuration is its owner's alone."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE | {"dump": {"url": S3, "storage_options": {"region": "x"}}}))
    secrets = {"AWS_ACCESS_KEY_ID": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_SESSION_TOKEN": CANARY}
    command = [sys.executable, "-P", "-m", "pipeline.cli", "train", "c.yaml"]
    command += ["--set", "dump.storage_options.endpoint=http://127.0.0.1:1"]
    environment = os.environ | secrets | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    with (tmp_path / "output").open("wb") as output:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
        seen: set[bytes] = set()
        deadline = time.monotonic() + 60
        while not any(b"student_train.worker" in line and bytes(tmp_path) in line for line in seen):
            assert time.monotonic() < deadline
            assert job.poll() is None, (tmp_path / "output").read_text()
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(file.read_bytes())
                except OSError:
                    continue
            time.sleep(0.05)
        # What a launcher that is killed leaves behind is searched, too.
        job.kill()
        job.wait()
    assert not any(CANARY.encode() in line for line in seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "resolved.json" for path in files)
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
        if path.name in ("config.yaml", "resolved.json"):
            assert path.stat().st_mode & 0o777 == 0o600
