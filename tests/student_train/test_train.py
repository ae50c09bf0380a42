"""Whole trainings on two ranks: resuming, refusing, leaving together, and what a run leaves behind."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import plain_student
from peft import PeftModel
from support.distributed import run_ranks
from support.rounding import FORWARD, update_excess
from support.tiny_student import save_student, tiny_tokenizer, write_dump
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

Results = dict[str, list[dict[str, Any]]]
"""By name of the job: what each rank returned."""
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("zero0", {"zero_stage": 0}, {}),
    ("zero2", {"zero_stage": 2}, {}),
    ("zero3", {"zero_stage": 3}, {}),
    ("bf16", {"zero_stage": 2, "precision": "bf16"}, {}),
    ("pissa", {"zero_stage": 1, "weight_decay": 0.1}, {"variant": "pissa", "dropout": 0.2}),
    ("kd", {"zero_stage": 2, "arm": "kd"}, {}),
]
"""(name, train section, adapter) of the runs that are interrupted and go on where they were"""
OTHER = [("1", {"zero_stage": 1}), ("3", {"zero_stage": 3})]
"""(ZeRO stage by name, train section) that an interrupted run of stage 2 goes on with"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps, good and bad ones, and students."""
    folder = tmp_path_factory.mktemp("train")
    write_dump(folder / "dump")
    save_student(folder / "student")
    save_student(folder / "other-tokenizer")
    tiny_tokenizer("x").save_pretrained(folder / "other-tokenizer")
    shutil.copytree(folder / "dump", folder / "other-version")
    info = json.loads((folder / "dump" / "run.json").read_bytes())
    (folder / "other-version" / "run.json").write_text(json.dumps(info | {"format_version": 2}))
    shutil.copytree(folder / "dump", folder / "missing-shard")
    for file in (folder / "missing-shard" / "data").glob("unit-00000002-*"):
        file.unlink()
    for name in ("growing", "stalled"):
        write_dump(folder / name, units=range(2))
    write_dump(folder / "dump without targets", none_usable=True)
    write_dump(folder / "unsealed dump without targets", none_usable=True, seal=False)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """All trainings on two ranks, in one pair of processes."""
    windows = {"shuffle_window_units": 1, "shuffle_block_units": 1, "max_steps": 4}
    monitor = {"enabled": True, "output_path": str(folder / "logs"), "job_name": "run"}
    flat = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    (folder / "logs").mkdir()
    (folder / "logs" / "a file").touch()
    jobs: dict[str, dict[str, Any]] = {}
    for name, train, lora in SAME:
        jobs[f"{name} whole"] = {"train": train, "lora": lora}
        jobs[f"{name} half"] = {"train": train, "lora": lora, "stop_after": 3, "output": name}
        jobs[f"{name} rest"] = {"train": train | {"resume": "must"}, "lora": lora, "output": name}
    jobs["half"] = {"stop_after": 3}
    for name, train in OTHER:
        jobs[f"stage {name}"] = {"train": train, "copy": "half"}
    jobs |= {
        "again": {"output": "zero2 whole"},
        "no summary": {"copy": "zero2 whole", "spoil": "no summary"},
        "emptied": {"copy": "zero2 whole", "spoil": "empty final"},
        "changed": {"copy": "zero2 whole", "spoil": "change final"},
        "flipped": {"copy": "zero2 whole", "spoil": "flip newest"},
        "torn": {"copy": "zero2 whole", "spoil": "tear newest"},
        "none valid": {"copy": "zero2 whole", "spoil": "no commits"},
        "none left": {"copy": "zero2 whole", "spoil": "no checkpoints"},
        "must, but new": {"train": {"resume": "must"}},
        "never, but used": {"train": {"resume": "never"}, "output": "zero2 whole"},
        "never and new": {"train": {"resume": "never", "max_steps": 1}},
        "other rate": {"train": {"learning_rate": 2e-2}, "output": "zero2 whole"},
        "other dump": {"train": {}, "copy": "half", "dump": "growing"},
        "tokenizer": {"model": "other-tokenizer"},
        "version": {"dump": "other-version"},
        "shard": {"dump": "missing-shard", "train": {"shuffle_block_units": 1, "save_steps": 100}},
        "temperature": {"loss": {"temperature": 2.0}},
        "model": {"model": "nowhere"},
        "monitor": {"train": {"max_steps": 2, "deepspeed": {"csv_monitor": monitor}}},
        "broken monitor": {"train": {"max_steps": 2, "deepspeed": {"csv_monitor": monitor | {"job_name": "a file"}}}},
        "no monitor": {"train": {"deepspeed": {"csv_monitor": monitor | {"outputpath": "x"}}}},
        "trackers": {"train": {"max_steps": 2, "report_to": ["tensorboard", "wandb"]}},
        "no tracker": {"train": {"report_to": ["wandb"]}, "hide": "wandb"},
        "sealed": {"train": windows},
        "following": {"train": windows, "dump": "growing", "grow": (range(2, 4), range(4, 5))},
        "longer": {"copy": "zero2 whole", "train": {"max_steps": 9, "extend": True}},
        "longer again": {"output": "longer", "train": {"max_steps": 9, "extend": True}},
        "longer, unsaid": {"copy": "zero2 whole", "train": {"max_steps": 9}},
        "shorter": {"copy": "zero2 whole", "train": {"max_steps": 2, "extend": True}},
        "other order": {"copy": "half", "train": {"seed": 5, "extend": True}},
        "in one go": {"train": flat | {"max_steps": 5}},
        "first part": {"train": flat | {"max_steps": 3}},
        "extended": {"copy": "first part", "train": flat | {"max_steps": 5, "extend": True}},
        "other rate, said": {"copy": "half", "train": {"learning_rate": 1e-3, "precision": "bf16", "extend": True}},
        "not finite": {"train": {"learning_rate": 1e20}},
        "advice taken": {"output": "not finite", "train": {"max_steps": 1, "max_grad_norm": 0.5}},
        "late": {"train": windows, "dump": "late dump", "arrive": str(folder / "dump")},
        "no dump": {"train": {"data_wait_seconds": 0.5}, "dump": "never"},
        "stop at no dump": {"train": {"data_wait_seconds": 60.0}, "dump": "never", "stop_after": 0},
        "no model, no dump": {"dump": "never", "model": "nowhere"},
        "no tracker, no dump": {"dump": "never", "train": {"report_to": ["wandb"]}, "hide": "wandb"},
        "impossible, no dump": {"dump": "never", "train": {"deepspeed": {"data_types": {"grad_accum_dtype": "bf16"}}}},
        "none usable": {"dump": "dump without targets"},
        "none usable yet": {"dump": "unsealed dump without targets", "train": {"max_steps": 2}},
        "other estimator": {"stated": {"estimator.kind": "topk", "estimator.k": 9}},
        "other kind": {"stated": {"estimator.kind": "sampled", "estimator.draws": 9}},
        "other temperatures": {"stated": {"temperatures": [1.0, 2.0]}},
        "same estimator": {"stated": {"estimator.k": 8, "temperatures": [1.0]}, "train": {"max_steps": 1}},
        "stalled": {"train": windows | {"data_wait_seconds": 1.0}, "dump": "stalled"},
    }
    # The other dump differs in nothing that shows before its data is read, so it must be told by its records.
    write_dump(folder / "rewritten", samples=24, bad_samples=False)
    jobs["other dump"]["dump"] = "rewritten"
    full = [
        job | {
            "output": str(folder / job.get("output", name)),
            "dump": str(folder / job.get("dump", "dump")),
            "model": str(folder / job.get("model", "student")),
        } | ({"copy": str(folder / job["copy"])} if "copy" in job else {})
        for name, job in jobs.items()
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        by_rank = run_ranks("support.train_jobs:run_trainings", 2, jobs=full)
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(jobs)}


def codes(results: Results, name: str) -> list[int]:
    """Exit code of each rank."""
    return [rank["code"] for rank in results[name]]


def losses(results: Results, name: str) -> list[float]:
    """Loss of each step."""
    return [event.loss for event in results[name][0]["events"]]


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Over all tensors."""
    assert set(found) == set(expected)
    assert expected
    return max(float((found[key] - value).abs().max()) for key, value in expected.items())


def excess(found: Mapping[str, torch.Tensor], results: Results) -> float:
    """Of a run that went on from "half", over rounding, against the one that was never stopped."""
    whole, half = results["zero2 whole"][0]["state"], results["half"][0]["state"]
    return update_excess(found, whole, first=half, rate=1e-2, steps=3)


@pytest.mark.parametrize("name", [name for name, _, _ in SAME])
def test_resumed_run_is_the_uninterrupted_one(name: str, results: Results) -> None:
    """2N steps = N + resume + N, bit for bit, in every loss, weight and moment."""
    assert codes(results, f"{name} whole") == [0, 0]
    assert codes(results, f"{name} half") == [75, 75]
    assert 0 < results[f"{name} half"][0]["step"] < 6
    assert codes(results, f"{name} rest") == [0, 0]
    assert losses(results, f"{name} rest") == losses(results, f"{name} whole")
    whole, rest = (results[f"{name} {part}"][0] for part in ("whole", "rest"))
    assert largest_difference(rest["state"], whole["state"]) == 0
    assert rest["summary"]["resumed_from"] == results[f"{name} half"][0]["step"]
    assert rest["summary"]["supervised_tokens"] == whole["summary"]["supervised_tokens"]


@pytest.mark.parametrize("stage", [name for name, _ in OTHER])
def test_resume_at_another_stage(stage: str, results: Results) -> None:
    """fp32: losses and parameters within what rounding explains."""
    assert losses(results, f"stage {stage}") == pytest.approx(losses(results, "zero2 whole"), rel=FORWARD)
    assert excess(results[f"stage {stage}"][0]["state"], results) < 1


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 3), pytest.param(3, 2, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_resume_at_another_world_size(ranks: int, stage: int, results: Results, folder: Path) -> None:
    """Stopped on two ranks at stage 2, continued on one or three, at another stage too."""
    assert codes(results, "half") == [75, 75]
    job = {
        "output": str(folder / f"on {ranks} at {stage}"), "copy": str(folder / "half"), "dump": str(folder / "dump"),
        "model": str(folder / "student"), "train": {"zero_stage": stage},
    }  # fmt: skip
    found = run_ranks("support.train_jobs:run_trainings", ranks, jobs=[job])[0][0]
    assert found["code"] == 0, found["message"]
    assert [e.loss for e in found["events"]] == pytest.approx(losses(results, "zero2 whole"), rel=FORWARD)
    assert excess(found["state"], results) < 1


def test_finished_run_does_nothing(results: Results) -> None:
    """The same summary, at once, with nothing trained or written."""
    again, whole = results["again"][0], results["zero2 whole"][0]
    assert codes(results, "again") == [0, 0]
    assert again["summary"] == whole["summary"]
    assert again["seconds"] < 1.0
    assert again["events"] == whole["events"]


@pytest.mark.parametrize("name", ["no summary", "emptied", "changed"])
def test_interrupted_or_damaged_final_is_written_again(name: str, results: Results, folder: Path) -> None:
    """Without its summary a run is not finished, and what lies in `final/` is not trusted without proof."""
    assert codes(results, name) == [0, 0]
    assert results[name][0]["summary"]["steps"] == 6
    found, expected = (
        {file.name: file.read_bytes() for file in (folder / run / "final").iterdir() if file.name != "README.md"}
        for run in (name, "zero2 whole")
    )
    assert found == expected
    assert "adapter_model.safetensors" in found


@pytest.mark.parametrize("name", ["flipped", "torn"])
def test_damaged_checkpoint_is_passed_over(name: str, results: Results) -> None:
    """The one before is complete: training goes on from there, to the same end."""
    assert codes(results, name) == [0, 0]
    assert results[name][0]["summary"]["resumed_from"] == 4
    assert losses(results, name) == losses(results, "zero2 whole")
    assert largest_difference(results[name][0]["state"], results["zero2 whole"][0]["state"]) == 0


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("none valid", 66, "no valid checkpoint"),
        ("none left", 66, "no valid checkpoint"),
        ("must, but new", 66, "no valid checkpoint"),
        ("never, but used", 78, "has been used"),
        ("other rate", 78, "train.learning_rate = 0.02"),
        ("other dump", 65, "has changed since"),
        ("tokenizer", 78, "tokenizer"),
        ("version", 78, "format version"),
        ("shard", 65, "unit-00000002"),
        ("temperature", 78, "temperature"),
        ("model", 78, "nowhere"),
        ("stalled", 75, "is not written as far"),
        ("longer, unsaid", 78, "train.extend: true"),
        ("shorter", 78, "has done 6 steps already"),
        ("other order", 78, "train.seed = 5"),
        ("not finite", 65, "is not finite"),
        ("no dump", 75, "there is no dump at"),
        ("stop at no dump", 75, "there is no dump at"),
        ("no model, no dump", 78, "the model"),
        ("no tracker, no dump", 78, "pip install"),
        ("impossible, no dump", 78, "grad_accum_dtype"),
        ("none usable", 65, "nothing can be learned"),
        ("none usable yet", 65, "nothing can be learned"),
        ("other estimator", 78, "other settings: estimator.k\n  got:      estimator.k = 9"),
        ("other kind", 78, "other settings: estimator.kind\n  got:      estimator.kind = sampled"),
        ("other temperatures", 78, "other settings: temperatures"),
    ],
)
def test_refusals(name: str, code: int, says: str, results: Results) -> None:
    """Every rank leaves with the code; one rank has the message, the others know that it does."""
    assert codes(results, name) == [code, code]
    assert says in results[name][0]["message"]
    assert [rank["peer"] for rank in results[name]] == [False, True]


def test_never_starts_anew(results: Results) -> None:
    """`resume: never` in a new directory trains."""
    assert codes(results, "never and new") == [0, 0]


def test_deepspeeds_monitors_get_the_events(results: Results, folder: Path) -> None:
    """And one that cannot be opened ends no run."""
    assert codes(results, "monitor") == codes(results, "broken monitor") == [0, 0]
    lines = [line.split(",") for line in (folder / "logs" / "run" / "train_loss.csv").read_text().splitlines()]
    assert lines[0] == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in lines[1:]] == list(enumerate(losses(results, "monitor"), 1))
    written = {path.stem for path in (folder / "logs" / "run").iterdir()}
    assert {"train_kl", "train_learning_rate", "train_grad_norm"} <= written
    assert len(losses(results, "broken monitor")) == 2
    assert codes(results, "no monitor") == [78, 78]


def test_trackers_get_the_run_of_the_rank_that_reports(results: Results, folder: Path) -> None:
    assert codes(results, "trackers") == [0, 0]
    found = EventAccumulator(str(folder / "trackers" / "tensorboard")).Reload().Scalars("train/loss")
    assert [point.value for point in found] == pytest.approx(losses(results, "trackers"))
    assert len(list((folder / "trackers" / "wandb").glob("offline-run-*"))) == 1


def test_missing_tracker_is_told(results: Results) -> None:
    assert codes(results, "no tracker") == [78, 78]
    assert "pip install 'llm-neo[wandb]'" in results["no tracker"][0]["message"]


def test_work_before_a_bad_shard_is_kept(results: Results) -> None:
    """A checkpoint of the steps before it, though none was due."""
    step = results["shard"][0]["step"]
    assert 0 < step == len(results["shard"][0]["events"])


def test_following_makes_no_difference(results: Results) -> None:
    """Training while the dump is written sees the same samples at each step as training afterwards."""
    assert codes(results, "following") == codes(results, "late") == codes(results, "sealed") == [0, 0]
    assert losses(results, "following") == losses(results, "late") == losses(results, "sealed")
    assert max(event.data_wait_seconds for event in results["following"][0]["events"]) > 0.5


def test_a_finished_run_is_extended(results: Results) -> None:
    """With what has changed on record; and then it is finished, and the same command does nothing."""
    found, whole = results["longer"][0]["summary"], results["zero2 whole"][0]
    assert (found["steps"], found["resumed_from"]) == (9, 6)
    assert found["extended"] == [{"step": 6, "before": {"train.max_steps": 6}, "after": {"train.max_steps": 9}}]
    assert losses(results, "longer")[:6] == losses(results, "zero2 whole")
    assert found["supervised_tokens"] > whole["summary"]["supervised_tokens"]
    assert results["longer again"][0]["summary"] == found


def test_an_extended_run_is_the_longer_one(results: Results) -> None:
    """Bit for bit, where the schedule of the steps that were done does not depend on their number."""
    assert codes(results, "first part") == codes(results, "extended") == [0, 0]
    assert losses(results, "extended") == losses(results, "in one go")
    assert largest_difference(results["extended"][0]["state"], results["in one go"][0]["state"]) == 0


def test_optimisation_may_change_on_the_way(results: Results) -> None:
    assert codes(results, "other rate, said") == [0, 0]
    assert set(results["other rate, said"][0]["summary"]["extended"][0]["after"]) == {
        "train.learning_rate",
        "train.precision",
    }


def test_where_nothing_was_trained_settings_may_change(results: Results) -> None:
    """What the message about a loss that is not finite advises can be done."""
    assert codes(results, "advice taken") == [0, 0]
    assert results["advice taken"][0]["summary"]["resumed_from"] is None


def test_a_stated_estimator_that_is_the_dumps_is_no_contradiction(results: Results) -> None:
    assert codes(results, "same estimator") == [0, 0]


def test_a_dump_without_a_usable_sample_leaves_nothing_trained(results: Results, folder: Path) -> None:
    """Sealed it is refused before the student is loaded; followed, at the end."""
    assert results["none usable"][0]["step"] is None
    assert not (folder / "none usable yet" / "final").exists()


def test_stalled_dump_keeps_the_work(results: Results) -> None:
    """A checkpoint of the last step that could be trained."""
    assert results["stalled"][0]["step"] == len(results["stalled"][0]["events"]) > 0


def test_events_and_summary(results: Results, folder: Path) -> None:
    """What the files of a run say agrees with each other."""
    run, summary = folder / "zero2 whole", results["zero2 whole"][0]["summary"]
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    names = {
        "step", "epoch", "loss", "ce", "kl", "learning_rate", "grad_norm", "supervised_tokens", "tokens_per_second",
        "data_wait_seconds", "eta_seconds",
    }  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == names for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["kl"], rel=FORWARD)
    # Warm-up over 2 of 6 steps, then a cosine.
    assert [line["learning_rate"] for line in lines][:3] == pytest.approx([0.5e-2, 1e-2, 1e-2])
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["loss"] == lines[-1]["loss"]
    assert summary["supervised_tokens"] == sum(line["supervised_tokens"] for line in lines)
    assert summary["peak_rss_bytes"] > 100e6
    assert summary["tokens_per_second"] > 0
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


@torch.no_grad()
def test_final_adapter_is_the_trained_one(results: Results, folder: Path) -> None:
    """A plain `PeftModel` from `final/` has the logits of the master weights in the last checkpoint."""
    trained = plain_student(str(folder / "student"), lora=True).eval()
    parameters = dict(trained.named_parameters())
    for key, value in results["zero2 whole"][0]["state"].items():
        if key.startswith("master/"):
            parameters[key.removeprefix("master/")].copy_(value)
    ids = torch.arange(20)[None]
    expected = trained(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    before = base(input_ids=ids).logits
    final = folder / "zero2 whole" / "final"
    found = PeftModel.from_pretrained(base, final).eval()(input_ids=ids).logits
    assert float((expected - before).abs().max()) > 0.1
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "student")
    assert (final / "tokenizer.json").read_bytes() == (folder / "dump" / "tokenizer" / "tokenizer.json").read_bytes()


@torch.no_grad()
def test_final_model_of_a_full_arm(results: Results, folder: Path) -> None:
    """It holds the master weights, and loads with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "kd whole" / "final", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, results["kd whole"][0]["state"][f"master/{name}"])


@torch.no_grad()
def test_pissa_becomes_a_plain_adapter(results: Results, folder: Path) -> None:
    """On the unchanged base model, with twice the rank."""
    final = folder / "pissa whole" / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["init_lora_weights"] is True
    assert codes(results, "pissa whole") == [0, 0]  # The run itself has compared the logits.
