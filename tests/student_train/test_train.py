"""Whole trainings on two ranks: resuming, refusing, leaving together, and what a run leaves behind."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dense import plain_student
from peft import PeftModel
from support.distributed import Ranks
from support.rounding import FORWARD, update_excess
from support.tiny_student import save_student, tiny_tokenizer, write_dump
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from storage_schemas.config import DumpSection
from storage_schemas.reader import Dump
from teacher_dump.config import TeacherSection
from teacher_dump.foreign.bring import bring

SAME: dict[str, dict[str, Any]] = {
    "zero0": {"train": {"zero_stage": 0}},
    "zero2": {"train": {"zero_stage": 2}},
    "zero3": {"train": {"zero_stage": 3}},
    "bf16": {"train": {"zero_stage": 2, "precision": "bf16"}},
    "pissa": {"train": {"zero_stage": 1, "weight_decay": 0.1}, "lora": {"variant": "pissa", "dropout": 0.2}},
    "kd": {"train": {"zero_stage": 2, "arm": "kd", "deterministic": True}},
    "tokens": {"train": {"zero_stage": 2, "micro_batch_tokens": 60, "packing": True}},
}
"""Runs that are interrupted and go on where they were."""
WINDOWS = {"shuffle_window_units": 1, "shuffle_block_units": 1, "max_steps": 4}
FLAT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
KNOWN: dict[str, dict[str, Any]] = {
    **{f"{name} whole": job for name, job in SAME.items()},
    "tokens whole": {"train": SAME["tokens"]["train"] | {"profile": 2}},
    "half": {"stop_after": 3},
    "sealed": {"train": WINDOWS},
    "first part": {"train": FLAT | {"max_steps": 3}},
    "not finite": {"train": {"learning_rate": 1e20}},
    "longer": {"copy": "zero2 whole", "train": {"max_steps": 9, "extend": True}},
}
"""Runs that several tests look at or begin from. Everything else stands where it is tested."""


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
    # It differs in nothing that shows before its data is read, so it must be told by its records.
    write_dump(folder / "rewritten", samples=24, bad_samples=False)
    write_dump(folder / "dump without targets", none_usable=True)
    write_dump(folder / "unsealed dump without targets", none_usable=True, seal=False)
    (folder / "logs").mkdir()
    (folder / "logs" / "a file").touch()
    import_copy(folder / "dump", folder / "imported", teacher=folder / "student")
    return folder


def import_copy(url: Path, imported: Path, *, teacher: Path) -> None:
    """A dump's targets as lists, row j of which describes token j + 1, and these as a dump again."""
    dump, rows = Dump.open(str(url)), []
    for row in (row for u in map(dump.read_unit, range(dump.provenance.units)) for row in map(u.row, range(len(u)))):
        entries = [[[] for _ in row.input_ids] for _ in range(2)]
        for i, place in enumerate(row.positions.logits if row.targets is not None else ()):
            assert row.targets is not None
            part = row.targets.slice(i, i + 1)
            entries[0][place], entries[1][place] = part.ids.tolist(), part.logprobs.tolist()
        mask = row.loss_mask & (row.targets is not None)
        shared = {"input_ids": row.input_ids.tolist(), "mask": mask.astype(int).tolist()}
        rows.append(shared | {"token_ids": entries[0], "top_values": entries[1]})
    pq.write_table(pa.Table.from_pylist(rows), imported.with_suffix(".parquet"))
    bring(
        "lists",
        imported.with_suffix(".parquet"),
        DumpSection(url=str(imported), samples_per_unit=dump.provenance.samples_per_unit, logprob_step=0.0),
        teacher=TeacherSection(model=str(teacher)),
        claims={"shift": "next", "values": "logprobs", "tail": "implied", "temperature": 1.0, "mask": "mask"},
    )


@dataclass(frozen=True, slots=True)
class Training:
    """What the two ranks of a training returned."""

    ranks: list[dict[str, Any]]
    output: Path

    @property
    def codes(self) -> list[int]:
        """Exit code of each rank."""
        return [rank["code"] for rank in self.ranks]

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [event.loss for event in self["events"]]

    def __getitem__(self, name: str) -> Any:
        """What the first rank says."""
        return self.ranks[0][name]


class Trainings:
    """Trainings on two ranks, which stay for all tests; each is run when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranks = Ranks("support.train_jobs:trainer", 2)
        self._done: dict[str, Training] = {}

    def __call__(self, name: str, **job: Any) -> Training:
        """The training of this name, in the directory of this name: one of KNOWN, or the job that is given."""
        if name not in self._done:
            job = job or KNOWN[name]
            for before in {job.get("copy"), job.get("output")} & set(KNOWN):
                self(before)
            output = self.folder / job.get("output", name)
            self._done[name] = Training(self._ranks.call(job=job | paths(self.folder, job, output)), output)
        return self._done[name]

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()


def paths(folder: Path, job: Mapping[str, Any], output: Path) -> dict[str, str]:
    """The names in a job as paths."""
    found = {"output": str(output), "dump": str(folder / job.get("dump", "dump"))}
    found["model"] = str(folder / job.get("model", "student"))
    return found | ({"copy": str(folder / job["copy"])} if "copy" in job else {})


@pytest.fixture(scope="module")
def training(folder: Path) -> Iterator[Trainings]:
    """Runs trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        trainings = Trainings(folder)
        yield trainings
        trainings.close()


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all tensors."""
    assert set(found) == set(expected)
    assert expected
    return max(float((found[key] - value).abs().max()) for key, value in expected.items())


def excess(found: Mapping[str, Tensor], training: Trainings) -> float:
    """Of a run that went on from "half", over rounding, against the one that was never stopped."""
    whole, half = training("zero2 whole")["state"], training("half")["state"]
    return update_excess(found, whole, first=half, rate=1e-2, steps=3)


@pytest.mark.parametrize("name", SAME)
def test_resumed_run_is_the_uninterrupted_one(name: str, training: Trainings) -> None:
    """2N steps = N + resume + N, bit for bit, in every loss, weight and moment."""
    job = SAME[name]
    whole = training(f"{name} whole")
    half = training(f"{name} half", **job, stop_after=3, output=name)
    rest = training(f"{name} rest", **job | {"train": job["train"] | {"resume": "must"}}, output=name)
    assert (whole.codes, half.codes, rest.codes) == ([0, 0], [75, 75], [0, 0])
    assert 0 < half["step"] < 6
    assert rest.losses == whole.losses
    assert largest_difference(rest["state"], whole["state"]) == 0
    assert rest["summary"]["resumed_from"] == half["step"]
    assert rest["summary"]["supervised_tokens"] == whole["summary"]["supervised_tokens"]


def test_a_step_is_agreed_on_while_the_one_before_runs(training: Trainings) -> None:
    """Unless it is the first one, or follows a checkpoint."""
    usual, first = ["begin", "update", "reach"], ["update", "reach"]
    assert training("zero2 whole")["order"] == ["reach", *3 * usual, *first, *usual, "update"]


def test_deterministic_kernels_are_asked_for_by_a_switch(training: Trainings) -> None:
    assert training("kd whole")["deterministic"]
    assert not training("zero2 whole")["deterministic"]


def test_micro_batches_of_tokens_change_nothing(training: Trainings) -> None:
    """But the order in which sums are taken."""
    found, expected = training("tokens whole"), training("zero2 whole")
    assert found.losses == pytest.approx(expected.losses, rel=FORWARD)
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    assert update_excess(found["state"], expected["state"], first=training("half")["state"], rate=1e-2, steps=6) < 1


def test_a_few_steps_of_each_rank_are_recorded(training: Trainings) -> None:
    """Those after the first three, and nothing of the others."""
    for rank in range(2):
        trace = json.loads((training("tokens whole").output / "profile" / f"rank-{rank}.json").read_bytes())
        steps = [e["name"] for e in trace["traceEvents"] if str(e.get("name")).startswith("ProfilerStep#")]
        assert sorted(set(steps)) == ["ProfilerStep#3", "ProfilerStep#4"]
        assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_at_another_stage(stage: int, training: Trainings) -> None:
    """fp32: losses and parameters within what rounding explains."""
    found = training(f"stage {stage}", train={"zero_stage": stage}, copy="half")
    assert found.losses == pytest.approx(training("zero2 whole").losses, rel=FORWARD)
    assert excess(found["state"], training) < 1


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 3), pytest.param(3, 2, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_resume_at_another_world_size(ranks: int, stage: int, training: Trainings, folder: Path) -> None:
    """Stopped on two ranks at stage 2, continued on one or three, at another stage too."""
    assert training("half").codes == [75, 75]
    job = {"copy": "half", "train": {"zero_stage": stage}}
    others = Ranks("support.train_jobs:trainer", ranks)
    found = others.call(job=job | paths(folder, job, folder / f"on {ranks} at {stage}"))[0]
    others.close()
    assert found["code"] == 0, found["message"]
    assert [e.loss for e in found["events"]] == pytest.approx(training("zero2 whole").losses, rel=FORWARD)
    assert excess(found["state"], training) < 1


def test_finished_run_does_nothing(training: Trainings) -> None:
    """The same summary, at once, with nothing trained or written."""
    whole = training("zero2 whole")
    again = training("again", output="zero2 whole")
    assert again.codes == [0, 0]
    assert again["summary"] == whole["summary"]
    assert again["seconds"] < 1.0
    assert again["events"] == whole["events"]


@pytest.mark.parametrize("how", ["no summary", "empty final", "change final"])
def test_interrupted_or_damaged_final_is_written_again(how: str, training: Trainings) -> None:
    """Without its summary a run is not finished, and what lies in `final/` is not trusted without proof."""
    run = training(how, copy="zero2 whole", spoil=how)
    assert run.codes == [0, 0]
    assert run["summary"]["steps"] == 6
    found, expected = (
        {file.name: file.read_bytes() for file in (output / "final").iterdir() if file.name != "README.md"}
        for output in (run.output, training("zero2 whole").output)
    )
    assert found == expected
    assert "adapter_model.safetensors" in found


@pytest.mark.parametrize("how", ["flip newest", "tear newest"])
def test_damaged_checkpoint_is_passed_over(how: str, training: Trainings) -> None:
    """The one before is complete: training goes on from there, to the same end."""
    run, whole = training(how, copy="zero2 whole", spoil=how), training("zero2 whole")
    assert run.codes == [0, 0]
    assert run["summary"]["resumed_from"] == 4
    assert run.losses == whole.losses
    assert largest_difference(run["state"], whole["state"]) == 0


REFUSED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "none valid": (66, "no valid checkpoint", {"copy": "zero2 whole", "spoil": "no commits"}),
    "none left": (66, "no valid checkpoint", {"copy": "zero2 whole", "spoil": "no checkpoints"}),
    "must, but new": (66, "no valid checkpoint", {"train": {"resume": "must"}}),
    "never, but used": (78, "has been used", {"train": {"resume": "never"}, "output": "zero2 whole"}),
    "other rate": (78, "train.learning_rate = 0.02", {"train": {"learning_rate": 2e-2}, "output": "zero2 whole"}),
    "other dump": (65, "has changed since", {"train": {}, "copy": "half", "dump": "rewritten"}),
    "tokenizer": (78, "tokenizer", {"model": "other-tokenizer"}),
    "version": (78, "format version", {"dump": "other-version"}),
    "temperature": (78, "temperature", {"loss": {"temperature": 2.0}}),
    "model": (78, "nowhere", {"model": "nowhere"}),
    "longer, unsaid": (78, "train.extend: true", {"copy": "zero2 whole", "train": {"max_steps": 9}}),
    "shorter": (78, "has done 6 steps already", {"copy": "zero2 whole", "train": {"max_steps": 2, "extend": True}}),
    "nothing left": (
        78, "train.max_steps or train.epochs leaves nothing to train",
        {"copy": "zero2 whole", "train": {"learning_rate": 1e-3, "extend": True}},
    ),
    "nothing left, no summary": (
        78, "got:      6 steps done; loss.alpha = 0.1\n",
        {"copy": "zero2 whole", "spoil": "no summary", "train": {"extend": True}, "loss": {"alpha": 0.1}},
    ),
    "other order": (78, "train.seed = 5", {"copy": "half", "train": {"seed": 5, "extend": True}}),
    "no dump": (75, "there is no dump at", {"train": {"data_wait_seconds": 0.5}, "dump": "never"}),
    "stop at no dump": (
        75, "there is no dump at", {"train": {"data_wait_seconds": 60.0}, "dump": "never", "stop_after": 0},
    ),
    "no model, no dump": (78, "the model", {"dump": "never", "model": "nowhere"}),
    "no tracker, no dump": (78, "pip install", {"dump": "never", "train": {"report_to": ["wandb"]}, "hide": "wandb"}),
    "impossible, no dump": (
        78, "grad_accum_dtype",
        {"dump": "never", "train": {"deepspeed": {"data_types": {"grad_accum_dtype": "bf16"}}}},
    ),
    "other estimator": (
        78, "other settings: estimator.k\n  got:      estimator.k = 9",
        {"stated": {"estimator.kind": "topk", "estimator.k": 9}},
    ),
    "other kind": (
        78, "other settings: estimator.kind\n  got:      estimator.kind = sampled",
        {"stated": {"estimator.kind": "sampled", "estimator.draws": 9}},
    ),
    "other temperatures": (78, "other settings: temperatures", {"stated": {"temperatures": [1.0, 2.0]}}),
    "no tracker": (
        78, "pip install 'llm-neo[wandb]'", {"train": {"report_to": ["wandb"]}, "hide": "wandb"},
    ),
    "no monitor": (
        78, "outputpath", {"train": {"deepspeed": {"csv_monitor": {"enabled": True, "outputpath": "x"}}}},
    ),
}  # fmt: skip


def assert_refused(run: Training, code: int, says: str) -> None:
    """Every rank leaves with the code; one rank has the message, the others know that it does."""
    assert run.codes == [code, code]
    assert says in run["message"]
    assert [rank["peer"] for rank in run.ranks] == [False, True]


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, training: Trainings) -> None:
    code, says, job = REFUSED[name]
    assert_refused(training(name, **job), code, says)


def test_never_starts_anew(training: Trainings) -> None:
    """`resume: never` in a new directory trains."""
    assert training("never and new", train={"resume": "never", "max_steps": 1}).codes == [0, 0]


def test_deepspeeds_monitors_get_the_events(training: Trainings, folder: Path) -> None:
    """And one that cannot be opened ends no run."""
    monitor = {"enabled": True, "output_path": str(folder / "logs"), "job_name": "run"}
    blocked = monitor | {"job_name": "a file"}
    run = training("monitor", train={"max_steps": 2, "deepspeed": {"csv_monitor": monitor}})
    broken = training("broken monitor", train={"max_steps": 2, "deepspeed": {"csv_monitor": blocked}})
    assert run.codes == broken.codes == [0, 0]
    lines = [line.split(",") for line in (folder / "logs" / "run" / "train_loss.csv").read_text().splitlines()]
    assert lines[0] == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in lines[1:]] == list(enumerate(run.losses, 1))
    written = {path.stem for path in (folder / "logs" / "run").iterdir()}
    assert {"train_kl", "train_learning_rate", "train_grad_norm"} <= written
    assert len(broken.losses) == 2


def test_trackers_get_the_run_of_the_rank_that_reports(training: Trainings) -> None:
    run = training("trackers", train={"max_steps": 2, "report_to": ["tensorboard", "wandb"]})
    assert run.codes == [0, 0]
    found = EventAccumulator(str(run.output / "tensorboard")).Reload().Scalars("train/loss")
    assert [point.value for point in found] == pytest.approx(run.losses)
    assert len(list((run.output / "wandb").glob("offline-run-*"))) == 1


def test_work_before_a_bad_shard_is_kept(training: Trainings) -> None:
    """A checkpoint of the steps before it, though none was due."""
    run = training("shard", dump="missing-shard", train={"shuffle_block_units": 1, "save_steps": 100})
    assert_refused(run, 65, "unit-00000002")
    assert 0 < run["step"] == len(run["events"])


def test_an_imported_dump_trains_like_the_one_it_was_made_of(training: Trainings) -> None:
    """Up to what rounding of the first has moved: its heads and tails sum to 1 within a few thousandths."""
    imported = training("imported", dump="imported", train={"zero_stage": 2})
    assert imported.codes == [0, 0]
    assert imported.losses == pytest.approx(training("zero2 whole").losses, rel=5e-3)


def test_following_makes_no_difference(training: Trainings, folder: Path) -> None:
    """Training while the dump is written sees the same samples at each step as training afterwards."""
    sealed = training("sealed")
    # Its ranks have shared decoded units, and left none.
    (shared,) = (sealed.output / "cache").glob("decoded-*")
    assert not list(shared.glob("*.rows"))
    following = training("following", train=WINDOWS, dump="growing", grow=(range(2, 4), range(4, 5)))
    late = training("late", train=WINDOWS, dump="late dump", arrive=str(folder / "dump"))
    assert sealed.codes == following.codes == late.codes == [0, 0]
    assert sealed.losses == following.losses == late.losses
    assert max(event.data_wait_seconds for event in following["events"]) > 0.5


def test_a_finished_run_is_extended(training: Trainings) -> None:
    """With what has changed on record; and then it is finished, and the same command does nothing."""
    longer, whole = training("longer"), training("zero2 whole")
    found = longer["summary"]
    assert (found["steps"], found["resumed_from"]) == (9, 6)
    assert found["extended"] == [{"step": 6, "before": {"train.max_steps": 6}, "after": {"train.max_steps": 9}}]
    assert longer.losses[:6] == whole.losses
    assert found["supervised_tokens"] > whole["summary"]["supervised_tokens"]
    again = training("longer again", output="longer", train={"max_steps": 9, "extend": True})
    assert again["summary"] == found


def test_an_extended_run_is_the_longer_one(training: Trainings) -> None:
    """Bit for bit, where the schedule of the steps that were done does not depend on their number."""
    once = training("in one go", train=FLAT | {"max_steps": 5})
    extended = training("extended", copy="first part", train=FLAT | {"max_steps": 5, "extend": True})
    assert once.codes == extended.codes == [0, 0]
    assert extended.losses == once.losses
    assert largest_difference(extended["state"], once["state"]) == 0


def test_the_loss_of_a_run_is_of_steps_that_have_one(training: Trainings) -> None:
    """Where the last step holds samples without targets alone."""
    run = training("nothing in the end", train={"global_batch_size": 23, "max_steps": 2, "seed": 10})
    first, last = run["events"]
    assert last.supervised_tokens == 0 < first.supervised_tokens
    for name in ("loss", "ce", "kl"):
        assert run["summary"][name] == getattr(first, name) > 0


def test_a_run_may_be_ended_where_it_is(training: Trainings) -> None:
    """By fewer steps than were planned."""
    run = training("ended", copy="half", train={"max_steps": 3, "extend": True})
    assert run.codes == [0, 0]
    assert run["summary"]["steps"] == training("half")["step"] == 3


def test_optimisation_may_change_on_the_way(training: Trainings) -> None:
    changed = {"learning_rate": 1e-3, "precision": "bf16"}
    run = training("other rate, said", copy="half", train=changed | {"extend": True})
    assert run.codes == [0, 0]
    assert set(run["summary"]["extended"][0]["after"]) == {f"train.{name}" for name in changed}


def test_where_nothing_was_trained_settings_may_change(training: Trainings) -> None:
    """What the message about a loss that is not finite advises can be done."""
    assert_refused(training("not finite"), 65, "is not finite")
    run = training("advice taken", output="not finite", train={"max_steps": 1, "max_grad_norm": 0.5})
    assert run.codes == [0, 0]
    assert run["summary"]["resumed_from"] is None


def test_a_stated_estimator_that_is_the_dumps_is_no_contradiction(training: Trainings) -> None:
    stated = {"estimator.k": 8, "temperatures": [1.0]}
    assert training("same estimator", stated=stated, train={"max_steps": 1}).codes == [0, 0]


def test_a_dump_without_a_usable_sample_leaves_nothing_trained(training: Trainings) -> None:
    """Sealed it is refused before the student is loaded; followed, at the end."""
    sealed = training("none usable", dump="dump without targets")
    assert_refused(sealed, 65, "nothing can be learned")
    assert sealed["step"] is None
    followed = training("none usable yet", dump="unsealed dump without targets", train={"max_steps": 2})
    assert_refused(followed, 65, "nothing can be learned")
    assert not (followed.output / "final").exists()


def test_stalled_dump_keeps_the_work(training: Trainings) -> None:
    """A checkpoint of the last step that could be trained."""
    run = training("stalled", dump="stalled", train=WINDOWS | {"data_wait_seconds": 1.0})
    assert_refused(run, 75, "timed out waiting for the dump")
    assert run["step"] == len(run["events"]) > 0


def test_events_and_summary(training: Trainings) -> None:
    """What the files of a run say agrees with each other."""
    run, summary = training("zero2 whole").output, training("zero2 whole")["summary"]
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    names = {
        "step", "epoch", "loss", "ce", "kl", "learning_rate", "grad_norm", "supervised_tokens", "tokens",
        "tokens_per_second", "data_wait_seconds", "save_wait_seconds", "eta_seconds", "padding",
    }  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == names for line in lines)
    assert 0 < max(line["padding"] for line in lines) < 0.7
    assert all(line["tokens"] > line["supervised_tokens"] for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["kl"], rel=FORWARD)
    # Warm-up over 2 of 6 steps, then a cosine.
    assert [line["learning_rate"] for line in lines][:3] == pytest.approx([0.5e-2, 1e-2, 1e-2])
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["loss"] == lines[-1]["loss"]
    assert summary["supervised_tokens"] == sum(line["supervised_tokens"] for line in lines)
    assert summary["peak_rss_bytes"] > 100e6
    assert summary["tokens_per_second"] > 0
    assert summary["save_wait_seconds"] > sum(line["save_wait_seconds"] for line in lines) > 0  # And the last one.
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


@torch.no_grad()
def test_final_adapter_is_the_trained_one(training: Trainings, folder: Path) -> None:
    """A plain `PeftModel` from `final/` has the logits of the master weights in the last checkpoint."""
    trained = plain_student(str(folder / "student"), lora=True).eval()
    parameters = dict(trained.named_parameters())
    for key, value in training("zero2 whole")["state"].items():
        if key.startswith("master/"):
            parameters[key.removeprefix("master/")].copy_(value)
    ids = torch.arange(20)[None]
    expected = trained(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    before = base(input_ids=ids).logits
    final = training("zero2 whole").output / "final"
    found = PeftModel.from_pretrained(base, final).eval()(input_ids=ids).logits
    assert float((expected - before).abs().max()) > 0.1
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "student")
    assert (final / "tokenizer.json").read_bytes() == (folder / "dump" / "tokenizer" / "tokenizer.json").read_bytes()


@torch.no_grad()
def test_final_model_of_a_full_arm(training: Trainings, folder: Path) -> None:
    """It holds the master weights, and loads with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(training("kd whole").output / "final", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, training("kd whole")["state"][f"master/{name}"])


@torch.no_grad()
def test_pissa_becomes_a_plain_adapter(training: Trainings, folder: Path) -> None:
    """On the unchanged base model, with twice the rank."""
    final = training("pissa whole").output / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["init_lora_weights"] is True
    assert training("pissa whole").codes == [0, 0]  # The run itself has compared the logits.
