"""Names of other trainers lead to settings that exist, wherever they are written."""

import re
from pathlib import Path

import pytest
from support.command_lines import COMMANDS as OURS

from pipeline.config import Config, load_config
from pipeline.elsewhere import COMMANDS, SETTINGS, VALUES, setting
from pipeline.hints import meant
from pipeline.problems import keys
from storage_schemas.common.errors import MismatchError

KNOWN = {".".join(path) for path in keys(Config)}


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
        lines = [line.split() for line in re.findall("`llm-neo (.+?)`", here)]
        assert lines
        for command, *inner in lines:
            assert command in OURS
            assert not inner or inner[0] in OURS[command].commands
        assert meant(f"No such command '{name}'.", [name, "x.yaml"]) == f"that is {here}"


@pytest.mark.parametrize(
    ("given", "places", "note"),
    [
        ("loss.type", ["loss.divergence"], ""),
        ("estimator.type", ["estimator.kind"], ""),
        ("student.lora.type", ["student.lora.variant"], ""),
        ("corpus.sources.type", ["corpus.sources[].format"], ""),
        ("heldout.sources.type", ["heldout.sources[].format"], ""),
        ("teacher.quantization", ["teacher.vllm", "teacher.dtype"], "vLLM takes it"),
        ("dump.quantization", ["dump.logprob_step"], ""),
        ("corpus.num_samples", ["corpus.sources[].split", "corpus.sources[].weight"], "takes the first"),
        ("estimator.num_samples", ["estimator.draws"], ""),
        ("heldout.dataset", ["heldout.sources"], ""),
        ("dataset", ["corpus.sources"], ""),
        ("teacher.batch_size", ["teacher.batch_tokens"], ""),
        ("batch_size", ["train.global_batch_size", "train.micro_batch_size"], "over all ranks"),
        ("train_batch_size", ["train.global_batch_size", "train.micro_batch_size"], "over all ranks"),
        ("student.model_name_or_path", ["student.model"], ""),
        ("teacher.attn_impl", ["teacher.attn_implementation"], ""),
        ("kd_alpha", ["loss.alpha"], "weight of the divergence; the cross-entropy gets 1 - alpha"),
        ("max_steps_per_epoch", ["train.max_steps"], "steps of the whole run"),
        ("evals_per_epoch", ["train.eval_steps"], "number of steps between"),
        ("saves_per_epoch", ["train.save_steps"], "number of steps between"),
        ("val_set_size", ["heldout.sources"], "No share"),
    ],
)  # fmt: skip
def test_what_a_name_means_depends_on_its_section(given: str, places: list[str], note: str) -> None:
    *section, name = given.split(".")
    hint = setting(name, section) or ""
    assert hint.startswith(f"did you mean {' or '.join(places)}?")
    assert note in hint


@pytest.mark.parametrize("given", ["type", "quantization", "num_samples", "kd_ce_alpha"])
def test_a_name_of_many_meanings_leads_nowhere_outside_of_its_section(given: str) -> None:
    assert "did you mean" not in (setting(given) or "")


def test_every_value_leads_to_one_that_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("dump: {url: d}\n")
    for place, values in VALUES.items():
        for said, here in values.items():
            load_config(file, [f"{place}={here}"])
            with pytest.raises(MismatchError, match=rf"did you mean {here}\?"):
                load_config(file, [f"{place}={said}"])


@pytest.mark.parametrize(
    ("told", "words", "hint"),
    [
        ("No such option: --seed", "dump x --seed 3", "--set estimator.seed=VALUE or --set train.seed=VALUE"),
        ("No such option: --lora.r", "train x --lora.r=8", "--set student.lora.r=VALUE"),
        ("No such option: --a.b", "train x --a.b 8", "settings are given as --set A.B=VALUE"),
        ("No such option: --epochs", "train x --epochs", "--set train.epochs=VALUE"),
        ("No such option: --frobnicate", "train x --frobnicate 1", None),
        ("No such command 'frobnicate'.", "frobnicate", None),
        ("Got unexpected extra argument(s) (y)", "train x y", None),
        ("Got unexpected extra argument(s) (a.b=1)", "train x --set c.d=2 a.b=1", "--set a.b=VALUE"),
        ("No such option: --loss.type", "train x --loss.type kl", "mean loss.divergence? Settings are given as"),
        ("No such option: --kd-alpha", "train x --kd-alpha 1", "gets 1 - alpha. Settings are given as"),
        ("Missing argument 'CONFIG'.", "train", None),
    ],
)
def test_what_may_have_been_meant(told: str, words: str, hint: str | None) -> None:
    found = meant(told, words.split())
    assert found is None if hint is None else hint in str(found)
