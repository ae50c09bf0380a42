"""Evaluation on held-out samples while training runs: what it says, and that it changes nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import Ranks
from support.engine_jobs import some_result, train_section
from support.rounding import FORWARD
from support.tiny_student import save_student, write_dump

from storage_schemas.canonical import canonical_json, with_checksum
from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from student_train import warm_start
from student_train.checkpoint import Checkpoints
from student_train.config import LoraSection, Resolved, StudentSection, TrainSection
from student_train.heldout import best, stops_early
from student_train.metrics import HeldoutResult, read_events
from student_train.results.evaluate import evaluate
from student_train.resume import LATER
from student_train.training_run import open_run, refuse_early

EVALUATED = {"eval_steps": 2, "max_steps": 6, "save_steps": 4}
WORSE = EVALUATED | {
    "eval_steps": 1,
    "max_steps": 4,
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
}
"""Training that is best after its first step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, held-out ones, and a student."""
    folder = tmp_path_factory.mktemp("heldout")
    write_dump(folder / "dump")
    write_dump(folder / "heldout", samples=13)
    write_dump(folder / "unsealed", samples=13, seal=False)
    write_dump(folder / "empty", samples=13, none_usable=True)
    write_dump(folder / "unsealed and empty", none_usable=True, seal=False)
    shutil.copytree(folder / "heldout", folder / "damaged")
    next((folder / "damaged" / "data").glob("unit-00000001-*")).unlink()
    save_student(folder / "student")
    save_student(folder / "other", seed=5)
    return folder


class Trainings:
    """Trainings on two ranks, which stay for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ranks = folder, {2: Ranks("support.train_jobs:trainer", 2)}
        self._done: dict[str, Any] = {}

    def __call__(self, name: str, *, ranks: int = 2, heldout: str | None = "heldout", **job: Any) -> dict[str, Any]:
        """What rank 0 says of a training in the directory `name`; run once for the same job."""
        key = f"{name} {ranks} {heldout} {job}"
        if key not in self._done:
            job |= {
                "dump": str(self.folder / job.get("dump", "dump")),
                "model": str(self.folder / job.get("model", "student")),
            }
            job |= {"output": str(self.folder / name), "heldout": heldout and str(self.folder / heldout)}
            if ranks not in self._ranks:
                self._ranks[ranks] = Ranks("support.train_jobs:trainer", ranks)
            found = self._ranks[ranks].call(job=job)
            assert {rank["code"] for rank in found} == {found[0]["code"]}
            self._done[key] = found[0]
        return self._done[key]  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the ranks."""
        for ranks in self._ranks.values():
            ranks.close()


@pytest.fixture(scope="module")
def training(folder: Path) -> Iterator[Trainings]:
    """Runs trainings."""
    trainings = Trainings(folder)
    yield trainings
    trainings.close()


def results_of(run: dict[str, Any]) -> list[HeldoutResult]:
    """All evaluations of a run that is done."""
    assert run["code"] == 0, run["message"]
    return [HeldoutResult.model_validate(result) for result in run["summary"]["heldout"]]


def numbers(result: HeldoutResult) -> dict[str, Any]:
    """All but the time and the dump."""
    return result.model_dump(exclude={"seconds", "dump"})


def test_evaluations_are_those_of_the_command(training: Trainings, folder: Path) -> None:
    """Before the first, every two and after the last step; the first and the last are what `evaluate` says."""
    run = training("plain", train=EVALUATED)
    results = results_of(run)
    assert [result.step for result in results] == [0, 2, 4, 6]
    dump = Dump.open(str(folder / "heldout"))
    for result, model in ((results[0], folder / "student"), (results[-1], folder / "plain" / "final")):
        again = evaluate(model, dump).result().model_dump()
        found = result.model_dump() | {"kl_mean": result.kl}
        shared = again.keys() & found.keys()
        assert shared >= {"kl_mean", "ce", "top1_agreement", "acceptance_rate_min", "acceptance_rate_max"}
        for name in shared:
            assert found[name] == pytest.approx(again[name], rel=10 * FORWARD), name
    assert results[-1].kl < results[0].kl
    assert run["summary"]["best_step"] == min(results[1:], key=lambda result: result.kl).step
    assert run["summary"]["final_step"] == 6
    assert 0 < run["summary"]["heldout_seconds"] < run["seconds"]


def test_evaluations_change_nothing_else(training: Trainings) -> None:
    """Losses, weights and moments are those of a run without, bit for bit."""
    with_dropout = {"lora": {"dropout": 0.3}}
    plain = training("with", train=EVALUATED, **with_dropout)
    without = training("without", train={"max_steps": 6}, heldout=None, **with_dropout)
    assert [e.loss for e in plain["events"]] == [e.loss for e in without["events"]]
    assert plain["state"].keys() == without["state"].keys()
    for key, tensor in plain["state"].items():
        assert torch.equal(tensor, without["state"][key]), key


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_world_size_or_stage(training: Trainings, ranks: int, stage: int) -> None:
    """The same weights give the same bits; trained ones what rounding leaves."""
    expected = results_of(training("plain", train=EVALUATED))
    found = results_of(training(f"{ranks} at {stage}", ranks=ranks, train=EVALUATED | {"zero_stage": stage}))
    assert numbers(found[0]) == numbers(expected[0])
    for one, other in zip(found, expected, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4)


def test_evaluations_stand_in_the_events(training: Trainings, folder: Path) -> None:
    """As in the log history of transformers; what reads the training's events leaves them out."""
    run = training("plain", train=EVALUATED)
    lines = [json.loads(line) for line in (folder / "plain" / "events.jsonl").read_text().splitlines()]
    told = [line for line in lines if "eval_kl" in line]
    assert [line["step"] for line in told] == [0, 2, 4, 6]
    assert [line["eval_kl"] for line in told] == [result.kl for result in results_of(run)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert len(read_events(folder / "plain" / "events.jsonl")) == 6


def test_resumed_run_has_the_same_evaluations(training: Trainings) -> None:
    """Stopped between two evaluations, and gone on: none is done twice or missing."""
    whole = training("plain", train=EVALUATED)
    half = training("halved", train=EVALUATED, stop_after=3)
    assert half["code"] == 75
    rest = training("halved", train=EVALUATED)
    assert [numbers(r) for r in results_of(rest)] == [numbers(r) for r in results_of(whole)]
    assert [e.loss for e in rest["events"]] == [e.loss for e in whole["events"]]


@pytest.mark.parametrize(("step", "evaluated"), [(2, 1), (6, 3)])
def test_evaluation_that_was_cut_short_is_done_by_the_next_start(
    training: Trainings, folder: Path, step: int, evaluated: int
) -> None:
    """What was trained is kept, and the run is done once the result is there."""
    whole, name = training("plain", train=EVALUATED), f"cut at {step}"
    cut = training(name, train=EVALUATED, stop_evaluating=step, evaluated=evaluated)
    assert (cut["code"], cut["step"]) == (75, step)
    stored = Checkpoints(str(folder / name / "checkpoints"))
    assert [result.step for result in stored.at(step).state.heldout] == list(range(0, step, 2))
    rest = training(name, train=EVALUATED)
    assert [numbers(r) for r in results_of(rest)] == [numbers(r) for r in results_of(whole)]
    assert training(name, train=EVALUATED, again=True)["summary"] == rest["summary"]


def test_best_checkpoint_is_kept_and_exported(training: Trainings, folder: Path) -> None:
    """Though it is not at a step of `save_steps` and older than `save_total_limit` allows."""
    settings = WORSE | {"load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 3}
    run = training("best", train=settings)
    results = results_of(run)
    found = run["summary"]["best_step"]
    assert found == run["summary"]["final_step"] == 1
    assert results[1].kl < results[-1].kl
    stored = Checkpoints(str(folder / "best" / "checkpoints"))
    assert stored.steps() == [1, 4]
    exported = evaluate(folder / "best" / "final", Dump.open(str(folder / "heldout"))).result()
    assert exported.kl_mean == pytest.approx(results[1].kl, rel=1e-4)
    saved = load_file(folder / "best" / "final" / "adapter_model.safetensors")
    masters = {key.split("/", 1)[1]: tensor for key, tensor in stored.at(1).tensors(("master",))}
    assert len(saved) == len(masters)
    for name, tensor in masters.items():
        assert torch.equal(tensor, saved[name.replace(".default", "")])


def test_early_stopping(training: Trainings, folder: Path) -> None:
    """Stops after two evaluations that are no better; is done then; goes on once it is told to be patient."""
    settings = WORSE | {"early_stopping_patience": 2, "max_steps": 9, "epochs": 3}
    run = training("impatient", train=settings)
    results = results_of(run)
    assert run["summary"]["steps"] == results[-1].step == run["summary"]["best_step"] + 2 < 9
    assert run["summary"]["planned_steps"] == 9
    again = training("impatient", train=settings, again=True)
    assert again["summary"] == run["summary"]
    assert again["seconds"] < 1.0
    for given in ({"max_steps": 12}, {"learning_rate": 0.1}):
        refused = training("impatient", train=settings | {"extend": True} | given)
        assert refused["code"] == 78
        assert "train.early_stopping_patience leaves nothing to train" in refused["message"]
    on = training("impatient", train=settings | {"early_stopping_patience": None})
    assert on["summary"]["steps"] == 9
    whole = training("patient", train=settings | {"early_stopping_patience": None})
    assert [e.loss for e in on["events"]] == [e.loss for e in whole["events"]]


def test_training_begins_from_an_adapter(training: Trainings, folder: Path) -> None:
    """What another run has left is what this one starts as, at ZeRO-2 and 3; a resumed run does not load it again."""
    first = results_of(training("plain", train=EVALUATED))
    adapter = str(folder / "plain" / "final")
    for stage in (2, 3):
        again = results_of(training(f"round two at {stage}", adapter=adapter, train=EVALUATED | {"zero_stage": stage}))
        assert again[0].kl == pytest.approx(first[-1].kl, rel=1e-5)
        assert again[-1].kl < again[0].kl
    assert (
        training("round two at 2", adapter=adapter, train=EVALUATED | {"zero_stage": 2})["summary"][
            "began_from_adapter"
        ]
        == adapter
    )
    half = training("round two, halved", adapter=adapter, train=EVALUATED, stop_after=3)
    assert half["code"] == 75
    rest = training("round two, halved", adapter=adapter, train=EVALUATED)
    whole = training("round two at 2", adapter=adapter, train=EVALUATED | {"zero_stage": 2})
    assert [e.loss for e in rest["events"]] == [e.loss for e in whole["events"]]
    other = training("round two at 2", train=EVALUATED | {"max_steps": 9, "extend": True})
    assert other["code"] == 78
    assert "student.adapter" in other["message"]


def updates_of(output: Path) -> int:
    """Adam's step count in the newest checkpoint."""
    newest = Checkpoints(str(output / "checkpoints")).newest()
    assert newest is not None
    return newest.state.updates


def assert_next_step(before: dict[str, Any], after: dict[str, Any], train: TrainSection, *, updates: int) -> None:
    """Whether a step of AdamW, by its definition in float64, lies between two states; its gradient is what has changed
    the first moment."""
    assert before.keys() == after.keys()
    names = [key.removeprefix("master/") for key in before if key.startswith("master/")]
    one, two, rate = train.adam_beta1, train.adam_beta2, train.learning_rate
    for name in names:
        weight, mean, square = (before[f"{kind}/{name}"].double() for kind in ("master", "exp_avg", "exp_avg_sq"))
        found, next_mean, next_square = (after[f"{k}/{name}"].double() for k in ("master", "exp_avg", "exp_avg_sq"))
        gradient = (next_mean - one * mean) / (1 - one)
        expected = two * square + (1 - two) * gradient**2
        assert torch.allclose(next_square, expected, rtol=1e-5, atol=1e-5 * float(expected.max())), name
        scale = (next_square / (1 - two**updates)).sqrt() + train.adam_epsilon
        moved = -rate * (train.weight_decay * weight + next_mean / (1 - one**updates) / scale)
        assert torch.allclose(found - weight, moved, rtol=1e-3, atol=1e-3 * rate), name


@pytest.mark.parametrize(
    "lora", [pytest.param({}, id="lora"), pytest.param({"variant": "pissa"}, id="pissa", marks=pytest.mark.slow)]
)
def test_training_begins_from_a_checkpoint(training: Trainings, folder: Path, lora: dict[str, Any]) -> None:
    """Of another run: its weights to the bit, its moments, at another stage and rate; and what differs is said."""
    name = f"cold {lora.get('variant', 'lora')}"
    first = training(name, train=EVALUATED, lora=lora)
    warm = {"warm_start": folder / name, "learning_rate": 2e-3, "max_steps": 3, "zero_stage": 3}
    again = training(f"warm after {name}", train=EVALUATED | warm, lora=lora, ranks=2)
    assert results_of(again)[0].kl == pytest.approx(results_of(first)[-1].kl, rel=1e-6)
    constant = {"max_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    for stage in (0, 2, 3):
        there = f"one step after {name} at {stage}"
        step = training(there, train=warm | constant | {"zero_stage": stage}, lora=lora, heldout=None)
        assert updates_of(folder / there) == updates_of(folder / name) + 1 == 7
        assert_next_step(first["state"], step["state"], train_section(folder, **warm), updates=7)
    # It is resumed from its own checkpoints, even if the other run is gone.
    half = training(f"warm halved after {name}", train=EVALUATED | warm, lora=lora, stop_after=2)
    assert half["code"] == 75
    (folder / name).rename(folder / f"{name} moved")
    rest = training(f"warm halved after {name}", train=EVALUATED | warm, lora=lora)
    (folder / f"{name} moved").rename(folder / name)
    for here, there in zip(rest["events"], again["events"], strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-5)
    began = rest["summary"]["began_from_checkpoint"]
    assert (began["source"], began["step"]) == (str(folder / name), 6)
    card = (folder / f"warm halved after {name}" / "final" / "README.md").read_text()
    assert f"| begun from | weights and moments of the run `{folder / name}` |" in card


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"train": {"warm_start": "no-run"}}, "no checkpoint to begin from"),
        ({"train": {"warm_start": "warm refused"}}, "the directory of this run"),
        ({"lora": {"r": 8}}, "has trained other weights: student.lora.alpha, student.lora.r"),
        ({"train": {"arm": "kd"}}, "has trained other weights: student.lora"),
        ({"model": "other"}, "of another student"),
        ({"adapter": "plain/final"}, "both say what training begins from"),
    ],
    ids=["nothing", "itself", "rank", "arm", "student", "adapter"],
)
def test_checkpoints_that_do_not_fit_are_refused(
    training: Trainings, folder: Path, job: dict[str, Any], says: str
) -> None:
    training("plain", train=EVALUATED)
    given = {"warm_start": "plain"} | job.get("train", {})
    given["warm_start"] = folder / given["warm_start"]
    job = job | ({"adapter": str(folder / job["adapter"])} if "adapter" in job else {})
    refused = training("warm refused", **job | {"train": EVALUATED | given})
    assert refused["code"] == 78, refused["message"]
    assert says in refused["message"]
    assert refused["events"] == []


def test_a_run_that_goes_on_keeps_the_name_of_where_it_began(training: Trainings, folder: Path) -> None:
    """Nothing need be there any more, and the same checkpoint may be elsewhere; a message names the right setting."""
    training("plain", train=EVALUATED)
    shutil.copytree(folder / "plain", folder / "plain copied")
    save_student(folder / "third", seed=7)

    def on(name: str, warm_start: str | None, steps: int, **job: Any) -> tuple[int, str]:
        train = {"max_steps": steps, "extend": True, "warm_start": warm_start and folder / warm_start}
        run = training(name, heldout=None, train=train, **job)
        return run["code"], run["message"]

    assert on("keeps", "plain copied", 1)[0] == on("keeps", "plain", 2)[0] == 0
    shutil.rmtree(folder / "plain copied")
    assert on("keeps", "plain copied", 3)[0] == 0
    assert on("starts cold", None, 1)[0] == 0
    for name, other, began in (
        ("keeps", "nowhere", "plain copied"), ("keeps", None, "plain copied"), ("starts cold", "plain", None)
    ):  # fmt: skip
        for steps in (4, 3 if began else 1):  # It is asked of a finished run, too.
            code, message = on(name, other, steps)
            assert code == 78, message
            assert "did not begin from train.warm_start" in message
            assert f"train.warm_start: {folder / began if began else 'null'}" in message
    code, message = on("keeps", "plain copied", 4, model="third")
    assert code == 78
    assert "the checkpoint is of another run: student.files" in message


def test_what_checkpoints_of_before_do_not_know_is_no_difference(
    training: Trainings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training("plain", train=EVALUATED)
    output, section = folder / "compared", StudentSection(model=str(folder / "student"), lora=LoraSection(r=4))
    given = EVALUATED | {"epochs": 2, "warmup_ratio": 0.2}
    train = train_section(output, **given)
    run = open_run(Resolved(dump={"url": str(folder / "dump")}, student=section, loss={}, train=train))
    newest = Checkpoints(str(folder / "plain" / "checkpoints")).newest()
    assert newest is not None
    older = {key: value for key, value in newest.state.identity.items() if key not in {f"train.{n}" for n in LATER}}
    newest.state = newest.state.model_copy(update={"identity": older})
    with caplog.at_level("INFO"):
        warm_start._compare(newest, run, folder / "plain")
    assert "training begins with" in caplog.text
    assert "there: " not in caplog.text


def test_a_warm_start_that_is_not_there_is_refused_before_a_dump_is_awaited(training: Trainings, folder: Path) -> None:
    """Unless the run has begun."""
    training("plain", train=EVALUATED)
    student = StudentSection(model=str(folder / "student"), lora=LoraSection(r=4))
    refuse_early(student, train_section(folder / "new", warm_start=folder / "plain"))
    with pytest.raises(MismatchError, match="no checkpoint to begin from") as error:
        refuse_early(student, train_section(folder / "new", warm_start=folder / "plian"))
    assert "train.checkpoint_url" in str(error.value)
    with pytest.raises(MismatchError, match="the directory of this run"):
        refuse_early(student, train_section(folder / "plain", warm_start=folder / "plain"))
    refuse_early(student, train_section(folder / "plain", warm_start=folder / "plian"))


def test_a_warm_start_is_no_training(training: Trainings, folder: Path) -> None:
    """Where the dump has nothing to learn from, which nobody knows before the end, also in two starts."""
    training("plain", train=EVALUATED)
    settings = {"warm_start": folder / "plain", "max_steps": 2, "save_steps": 1}
    for start in (1, 2):
        run = training("warm, nothing", heldout=None, dump="unsealed and empty", train=settings, again=start)
        assert run["code"] == 65, run["message"]
        assert "nothing can be learned" in run["message"]


def test_a_run_may_end_without_evaluating_its_last_step(training: Trainings, folder: Path) -> None:
    """With evaluations switched off on the way: done, and nothing is said of a quality that nobody has measured."""
    assert training("switched off", train=EVALUATED, stop_after=3)["code"] == 75
    rest = training("switched off", train={"max_steps": 6}, heldout=None)
    assert (rest["code"], rest["summary"]["heldout"], rest["summary"]["final_step"]) == (0, [], 6)


def test_schedules_may_change_on_the_way(training: Trainings) -> None:
    """A run of before there were warm-up steps or arguments of schedules, too."""
    assert training("extended", heldout=None, train={"max_steps": 4})["code"] == 0
    other = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}, "warmup_steps": 1}
    refused = training("extended", heldout=None, train={"max_steps": 6} | other)
    assert refused["code"] == 78
    assert "train.lr_scheduler_kwargs" in refused["message"]
    longer = training("extended", heldout=None, train={"max_steps": 6, "extend": True} | other)
    assert longer["code"] == 0, longer["message"]
    wrong = training("wrong schedule", heldout=None, train={"lr_scheduler_kwargs": {"min_lr_rate": 0.5}})
    assert (wrong["code"], wrong["events"]) == (78, [])


def test_a_model_that_has_diverged_is_told(training: Trainings) -> None:
    """By the evaluation, with what was trained kept."""
    run = training("diverged", train={"eval_steps": 1, "max_steps": 6, "learning_rate": 1e18, "warmup_ratio": 0.0})
    assert run["code"] == 65
    assert "not finite" in run["message"]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"lora": {"r": 8}}, "another one than student.lora describes: r, lora_alpha"),
        ({"lora": {"target_modules": ["q_proj"]}}, "target_modules"),
        ({"train": {"arm": "kd"}}, "the method full_kd trains all weights"),
        ({"model": "other"}, "was trained on another model"),
        ({"adapter": "student"}, "is not an adapter"),
    ],
    ids=["rank", "modules", "arm", "base", "model"],
)
def test_adapters_that_do_not_fit_are_refused(
    training: Trainings, folder: Path, job: dict[str, Any], said: str
) -> None:
    """Before the first step, with what differs."""
    training("plain", train=EVALUATED)
    found = {"adapter": "plain/final"} | job
    found["adapter"] = str(folder / found["adapter"])
    name = f"refused adapter {said[:9]}"
    run = training(name, heldout=None, **found | {"train": {"max_steps": 2} | found.get("train", {})})
    assert run["code"] == 78, run["message"]
    assert said in run["message"]


def test_damaged_unit_ends_training_with_what_was_trained(training: Trainings, folder: Path) -> None:
    """One rank meets an error in the middle of an evaluation: all leave, and go on once it is mended."""
    settings = EVALUATED | {"eval_steps": 3}
    first = training("mended", train=settings, heldout="damaged", copy=None)
    assert first["code"] == 65
    assert "unit-00000001" in first["message"]
    for file in (folder / "heldout" / "data").glob("unit-00000001-*"):
        shutil.copy(file, folder / "damaged" / "data" / file.name)
    assert [r.step for r in results_of(training("mended", train=settings, heldout="damaged"))] == [0, 3, 6]


@pytest.mark.parametrize(
    ("heldout", "settings", "code", "said"),
    [
        ("dump", {}, 78, "of the very samples that are trained on"),
        ("unsealed", {"data_wait_seconds": 0.1}, 75, "there is no complete held-out dump"),
        ("missing", {"data_wait_seconds": 0.1}, 75, "there is no complete held-out dump"),
        ("empty", {}, 65, "nothing can be evaluated on"),
        ("other tokenizer", {}, 78, "another tokenizer"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused(
    training: Trainings, folder: Path, heldout: str, settings: dict[str, Any], code: int, said: str
) -> None:
    """Before the first step."""
    if heldout == "other tokenizer" and not (folder / heldout).exists():
        shutil.copytree(folder / "heldout", folder / heldout)
        file = folder / heldout / "run.json"
        content = json.loads(file.read_text())
        content["tokenizer"]["vocab_sha256"] = "0" * 64
        del content["checksum"]
        file.write_bytes(canonical_json(with_checksum(content), indent=2))
    run = training(f"refused {heldout}", train=EVALUATED | settings, heldout=heldout)
    assert (run["code"], run["events"]) == (code, []), run["message"]
    assert said in run["message"]


def test_best_and_early_stopping_are_functions_of_the_results() -> None:
    """The untrained student is no candidate; of equals the earliest is the best; patience counts those after it."""
    results = [
        some_result(0, 0.1),
        some_result(1, 3.0),
        some_result(2, 2.0, ce=3.0),
        some_result(3, 2.0),
        some_result(4, 2.5),
    ]
    assert best(results[:1], "kl") is None
    assert best(results, "kl") == results[2]
    assert best(results, "ce") == results[1]
    assert [stops_early(results, "kl", patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    assert not stops_early([], "kl", 1)


def test_settings_that_need_evaluations(tmp_path: Path) -> None:
    """Without `eval_steps` they would do nothing."""
    for setting in ({"load_best_model_at_end": True}, {"early_stopping_patience": 1}):
        with pytest.raises(ValueError, match="needs evaluations: set eval_steps"):
            TrainSection(output=tmp_path, **setting)
