"""What a configuration comes to: every setting and its origin, two of them compared, old names and other spellings."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator
from support.command_lines import Call

from pipeline.config import Config, load, load_config
from pipeline.problems import keys
from pipeline.settings import schema, settings_of
from storage_schemas.common.exits import Exit
from student_train.config import ARMS

TEXT = """
dump: {url: runs/d}
teacher: {model: t, dtype: bf16}
estimator: {k: 8}
corpus: {sources: [{path: a.jsonl}, {path: b.jsonl, split: test}]}
train: {output: runs/a, arm: kd, deepspeed: zero3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    return path


def test_every_setting_is_shown_with_who_states_it(call: Call, file: Path) -> None:
    overrides = ["--set", "train.seed=3", "--set", "dump.storage_options.region=eu", "--set", "corpus.sources.1.name=n"]
    code, out, _ = call("config", "show", str(file), *overrides, "--json")
    found = json.loads(out)
    assert code == 0
    stated = {name: setting["origin"] for name, setting in found.items() if setting["origin"] != "default"}
    assert stated == {
        "dump.url": "file", "dump.storage_options": "--set", "teacher.model": "file", "teacher.dtype": "file",
        "estimator.k": "file", "corpus.sources.0.path": "file", "corpus.sources.1.path": "file",
        "corpus.sources.1.split": "file", "corpus.sources.1.name": "--set", "train.output": "file",
        "train.method": "file", "train.deepspeed": "file", "train.seed": "--set",
    }  # fmt: skip
    values = {name: setting["value"] for name, setting in found.items()}
    assert values["teacher.dtype"] == "bfloat16"
    assert values["train.method"] == "full_kd"
    assert values["train.deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert values["estimator.mass"] == 0.999
    assert values["student"] is None
    lines = call("config", "show", str(file), *overrides)[1].splitlines()
    assert "train.seed = 3  # --set" in lines
    assert "train.epochs = 1" in lines
    assert len(lines) == len(found)


def test_no_setting_is_left_out_and_each_may_be_set(file: Path) -> None:
    mixed = TEXT.replace("deepspeed: zero3", "deepspeed: zero3, dumps: [{url: runs/d}, {url: runs/e}]")
    file.write_text(mixed + "student: {model: s}\nheldout: {url: runs/h, sources: [{path: c}], estimator: {k: 8}}\n")
    shown = settings_of(load(file))
    plain = {".".join(part for part in name.split(".") if not part.isdecimal()) for name in shown}
    known = {".".join(path) for path in keys(Config, "topk")}
    sections = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    assert plain == known - sections
    for name, setting in shown.items():
        text = json.dumps(setting.value)
        assert settings_of(load(file, [f"{name}={text}"]))[name].value == setting.value


def test_secrets_are_not_shown(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-the-environment")
    sets = ["--set", "train.run_name=canary-of-the-environment", "--set", "train.deepspeed={x_signature: canary-2}"]
    code, out, err = call("config", "show", str(file), *sets)
    assert code == 0
    assert 'train.run_name = "***"' in out
    assert "canary" not in out + err
    code, out, err = call("config", "show", str(file), "--set", "dump.storage_options.secret_access_key=canary-3")
    assert code == Exit.MISMATCH
    assert "canary" not in out + err
    token = "hf_" + "Canary" * 6
    code, out, err = call("config", "show", str(file), "--set", f"train.tags=[a, {token}]")
    assert (code, "train.tags.1 -> a secret must not stand here" in err) == (Exit.MISMATCH, True)
    assert "Canary" not in out + err


def test_two_configurations_are_compared_after_defaults(call: Call, file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    same = load_config(file)
    (run / "config.yaml").write_text(same.to_yaml())
    assert call("config", "diff", str(file), str(run)) == (0, "no difference\n", "")
    other = load_config(file, ["train.epochs=2", "estimator.kind=sampled", "corpus=null"])
    (run / "config.yaml").write_text(other.to_yaml())
    found = json.loads(call("config", "diff", str(file), str(run), "--json")[1])
    assert found["train.epochs"] == {"a": 1, "b": 2}
    assert found["estimator.kind"] == {"a": "topk", "b": "sampled"}
    assert found["estimator.k"] == {"a": 8}
    assert found["corpus"] == {"b": None}
    assert {name.split(".")[0] for name in found} == {"train", "estimator", "corpus"}
    out = call("config", "diff", str(file), str(run))[1]
    assert "train.epochs\n  A  1\n  B  2\n" in out
    assert "estimator.k\n  A  8\n  B  absent\n" in out


def test_what_cannot_be_compared_is_said(call: Call, file: Path, tmp_path: Path) -> None:
    code, _, err = call("config", "diff", str(file), str(tmp_path))
    assert (code, "is no run directory" in err) == (Exit.USAGE, True)
    assert call("config", "diff", str(file), str(tmp_path / "absent"))[0] == Exit.USAGE


def test_the_schema_is_printed_and_takes_what_is_read(call: Call) -> None:
    code, out, _ = call("config", "schema")
    assert (code, out) == (0, schema())
    validator = Draft7Validator(json.loads(out))
    for taken in ("arm: kd", "method: kd", "method: full-kd", "arm: lora-sft"):
        assert not list(validator.iter_errors(yaml.safe_load(TEXT.replace("arm: kd", taken))))
    for taken in ("bf16", "torch.bfloat16", "half", "torch.float32", "float16"):
        assert not list(validator.iter_errors(yaml.safe_load(TEXT.replace("bf16", taken))))
    assert not list(validator.iter_errors(yaml.safe_load(TEXT.replace("arm: kd", "precision: torch.float32"))))
    for wrong in (
        "train: {output: o, method: x}",
        "train: {output: o, arm: x}",
        "teacher: {model: t, dtype: int8}",
        "estimator: {kind: none}",
    ):
        assert list(validator.iter_errors(yaml.safe_load("dump: {url: d}\n" + wrong)))


@pytest.mark.parametrize("arm", ["sft", "lora", "kd", "neo"])
def test_a_method_is_known_by_its_old_name(call: Call, file: Path, arm: str) -> None:
    method = next(new for new, old in ARMS.items() if old == arm)
    found = [
        load_config(file, [f"train.{said}"]).train
        for said in (f"arm={arm}", f"arm={method}", f"method={arm}", f"method={method.replace('_', '-')}")
    ]
    assert {(train.method, train.arm, train.lora, train.distils) for train in found if train} == {
        (method, arm, arm in ("lora", "neo"), arm in ("kd", "neo"))
    }
    # What is written has the new name alone.
    written = yaml.safe_load(load_config(file, [f"train.arm={arm}"]).to_yaml())
    assert written["train"]["method"] == method
    assert "arm" not in written["train"]


def test_the_old_name_is_told_once_and_does_not_contradict_the_new_one(
    call: Call, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = "train.arm is called train.method now (here: full_kd); the old name is still read"
    call("train", str(file))
    assert caplog.messages == [told]
    caplog.clear()
    call("train", str(file), "--set", "train.method=full_kd")
    assert caplog.messages == []
    file.write_text(TEXT.replace("arm: kd", "method: full_kd, arm: kd"))
    code, _, err = call("train", str(file))
    assert code == Exit.MISMATCH
    assert "has 1 problem" in err
    assert "train.arm -> old name of train.method; give one" in err


@pytest.mark.parametrize(
    ("said", "dtype", "precision"),
    [("bf16", "bfloat16", "bf16"), ("bfloat16", "bfloat16", "bf16"), ("torch.bfloat16", "bfloat16", "bf16"),
     ("fp32", "float32", "fp32"), ("float32", "float32", "fp32")],
)  # fmt: skip
def test_data_types_have_the_same_names_everywhere(file: Path, said: str, dtype: str, precision: str) -> None:
    """And what is recorded in dumps and checkpoints stays what it was."""
    config = load_config(file, [f"teacher.dtype={said}", f"train.precision={said}"])
    assert config.teacher is not None
    assert config.train is not None
    assert (config.teacher.dtype, config.train.precision) == (dtype, precision)
