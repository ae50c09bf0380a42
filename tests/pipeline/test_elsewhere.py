"""Names of other trainers lead to settings that exist, wherever they are written."""

import re
from pathlib import Path

import pytest
from support.command_lines import COMMANDS as OURS

from pipeline.config import Config, load_config
from pipeline.elsewhere import COMMANDS, SETTINGS
from pipeline.hints import meant
from pipeline.problems import keys
from storage_schemas.common.errors import MismatchError

KNOWN = {".".join(path) for kind in ("topk", "adaptive", "sampled") for path in keys(Config, kind)}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_name_leads_to_settings_that_exist(name: str) -> None:
    here = SETTINGS[name]
    named = re.findall(r"\b(?:train|teacher|student|loss|corpus|dump|estimator)(?:\.[a-z_0-9]+)+\b", here.note)
    assert {*here.places, *named} <= KNOWN
    assert here.places or here.note


def test_a_name_is_answered_wherever_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "dump: {url: d}\nper_device_train_batch_size: 4\ntrain: {output: o, gradient-accumulation-steps: 2}\n"
    )
    with pytest.raises(MismatchError) as caught:
        load_config(file, ["loss.KD_alpha=0.5", "corpus.sources=[{path: a, type: chat}]", "lmbda=1"])
    told = str(caught.value)
    assert "per_device_train_batch_size -> unknown key; did you mean train.micro_batch_size?" in told
    assert "did you mean train.global_batch_size? It counts samples per optimizer step over all ranks" in told
    assert "loss.KD_alpha -> unknown key; did you mean loss.alpha?" in told
    assert "corpus.sources.0.type -> unknown key; did you mean corpus.sources[].format?" in told
    assert "lmbda -> unknown key; there is no such setting: training is off-policy" in told


def test_commands_of_others_lead_to_commands_that_exist() -> None:
    for name, here in COMMANDS.items():
        assert name not in OURS
        assert here.split(",")[0].split()[0] in OURS
        assert meant(f"No such command '{name}'.", [name, "x.yaml"]) == f"that is `llm-neo {here}`"


@pytest.mark.parametrize(
    ("told", "words", "hint"),
    [
        ("No such option: --seed", "dump x --seed 3", "--set estimator.seed=3 or --set train.seed=3"),
        ("No such option: --lora.r", "train x --lora.r=8", "--set student.lora.r=8"),
        ("No such option: --a.b", "train x --a.b 8", "settings are given as --set A.B=VALUE"),
        ("No such option: --epochs", "train x --epochs", "--set train.epochs=VALUE"),
        ("No such option: --frobnicate", "train x --frobnicate 1", None),
        ("No such command 'frobnicate'.", "frobnicate", None),
        ("Got unexpected extra argument(s) (y)", "train x y", None),
        ("Got unexpected extra argument(s) (a.b=1)", "train x --set c.d=2 a.b=1", "--set a.b=1"),
        ("Missing argument 'CONFIG'.", "train", None),
    ],
)
def test_what_may_have_been_meant(told: str, words: str, hint: str | None) -> None:
    found = meant(told, words.split())
    assert found is None if hint is None else hint in str(found)
