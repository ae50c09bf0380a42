"""Training on several dumps: the loss of each with its own alpha and estimator, on two ranks, resumed and refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import rows_of
from reference import unfused_loss
from support.distributed import Ranks
from support.engine_jobs import leave_start, train_section
from support.rounding import FORWARD, UNIT, update_excess
from support.tiny_student import VOCAB, save_student, write_dump
from test_train import Trainings, assert_refused, largest_difference

from storage_schemas.common.errors import MismatchError
from storage_schemas.config import Adaptive, Sampled
from storage_schemas.reader import Dump
from student_train.config import LoraSection, LossSection, Resolved, StudentSection, TrainSection
from student_train.data.batch import collate_mixed
from student_train.model.student import load_student
from student_train.training_run import open_run, weigh

ALPHAS = (0.5, 0.9, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps of one tokenizer with other samples and estimators, some that do not fit, and a student."""
    folder = tmp_path_factory.mktemp("mixed")
    write_dump(folder / "dump")
    write_dump(folder / "adaptive", samples=17, samples_per_unit=3, first=100, estimator=Adaptive(kind="adaptive"))
    write_dump(folder / "sampled", samples=9, samples_per_unit=4, first=200, estimator=Sampled(kind="sampled"))
    write_dump(folder / "growing", samples=17, samples_per_unit=3, first=100, units=range(2),
               estimator=Adaptive(kind="adaptive"))  # fmt: skip
    write_dump(folder / "useless", first=300, none_usable=True)
    save_student(folder / "student")
    return folder


def mixed(folder: Path, *names: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """The setting `train.dumps`; `changes` are those of a dump's entry, by name."""
    return {"dumps": [{"url": str(folder / name)} | changes.get(name, {}) for name in names]}


@pytest.mark.parametrize("arm", ["neo", "kd"])
@pytest.mark.parametrize("names", [("dump", "adaptive", "sampled"), ("sampled", "dump", "adaptive")])
def test_loss_and_gradient_are_those_of_each_dumps_own_loss(names: tuple[str, ...], arm: str, folder: Path) -> None:
    """One micro-batch with samples of three estimators, against dense float64 losses of each."""
    dumps = [Dump.open(str(folder / name)) for name in names]
    losses = [LossSection(alpha=alpha) for alpha in ALPHAS]
    student = StudentSection(model=str(folder / "student"), lora=LoraSection(r=4))
    module = load_student(student, losses, train_section(folder, arm=arm), dumps[0].provenance).module
    if arm == "neo":
        leave_start(module)
    module = module.double()
    rows = [rows_of(dump, range(count)) for dump, count in zip(dumps, (5, 1, 4), strict=True)]
    batch = collate_mixed(rows, temperature_indices=[0, 0, 0], temperature=1.0, vocab_size=VOCAB)
    assert [part.has_draws for part in batch.parts] == [name != "dump" for name in names]
    assert batch.supervised == sum(map(len, batch.parts)) == int(sum(
        row.loss_mask.sum() for some in rows for row in some if row.targets is not None
    ))  # fmt: skip
    loss, parts = module(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.trained()}
    module.zero_grad()

    hidden = module.hidden(batch)
    weight, first, expected = module.student.get_output_embeddings().weight, 0, []
    for targets, own in zip(batch.parts, losses, strict=True):
        piece = hidden[first : first + len(targets)]
        expected.append(unfused_loss(piece, weight, targets, loss=own, head=module.head.spec))
        first += len(targets)
    total = sum(of[0] for of in expected)
    # Decoded weights are rounded to float32; nothing else is.
    assert loss.item() == pytest.approx(total.item(), rel=UNIT)
    each = parts[:-2].view(3, -1)
    for row, of, own in zip(each, expected, losses, strict=True):
        # A divergence is not computed where its weight is 0.
        assert row[:3].tolist() == pytest.approx([x.item() if own.alpha or i < 2 else 0.0 for i, x in enumerate(of)])
    total.backward()
    for name, p in module.trained():
        assert float((found[name] - p.grad).abs().max()) <= 8 * UNIT * float(p.grad.abs().max()), name


def test_a_filler_and_a_batch_of_one_dump_alone(folder: Path) -> None:
    """Every rank does a forward and a backward pass, whatever dumps its samples are of."""
    dumps = [Dump.open(str(folder / name)) for name in ("dump", "adaptive")]
    student = StudentSection(model=str(folder / "student"), lora=LoraSection(r=4))
    losses = [LossSection(), LossSection(alpha=1.0)]
    module = load_student(student, losses, train_section(folder), dumps[0].provenance).module
    for rows in ([[], []], [[], rows_of(dumps[1], range(2))], [rows_of(dumps[0], range(2)), []]):
        batch = collate_mixed(rows, temperature_indices=[0, 0], temperature=1.0)
        loss, _ = module(batch)
        loss.backward()
        assert (loss.item() > 0) == (batch.supervised > 0)


@pytest.fixture(scope="module")
def training(folder: Path) -> Iterator[Trainings]:
    """Runs trainings on two ranks."""
    trainings = Trainings(folder)
    yield trainings
    trainings.close()


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of two dumps: 24 samples, and 17 of which each epoch sees 26; the second of another estimator and alpha."""
    weighted = mixed(folder, "dump", "adaptive", adaptive={"weight": 1.5, "alpha": 0.9})
    return {"train": weighted | {"max_steps": 12} | changes.pop("train", {})} | changes


def whole(training: Trainings) -> Any:
    """The run that was never stopped; it goes into a second epoch."""
    return training("whole", **job(training.folder))


def test_what_a_run_says_of_its_dumps(training: Trainings, folder: Path) -> None:
    """Losses of each dump in events and summary, of which those of the run are the means; and the model card."""
    run = whole(training)
    assert run.codes == [0, 0], run["message"]
    seen = {"dump": 0, "adaptive": 0}
    for event in run["events"]:
        parts = event.dumps
        for name, alpha in (("dump", 0.5), ("adaptive", 0.9)):
            losses = parts[name]
            assert losses.loss == pytest.approx((1 - alpha) * losses.ce + alpha * losses.kl, rel=FORWARD)
            seen[name] += losses.supervised_tokens
        assert sum(part.supervised_tokens for part in parts.values()) == event.supervised_tokens
        for field in ("loss", "ce", "kl"):
            total = sum(getattr(part, field) * part.supervised_tokens for part in parts.values())
            assert getattr(event, field) == pytest.approx(total / event.supervised_tokens, rel=FORWARD)
    summary = run["summary"]["dumps"]
    # Twelve steps are one epoch of 9, whose last one is short, and 3 of the second.
    assert [summary[name]["samples"] for name in ("dump", "adaptive")] == [24 + 9, 26 + 9]
    assert summary["adaptive"]["weight"] == 1.5
    assert summary["adaptive"]["losses"] == run["events"][-1].dumps["adaptive"].model_dump()
    assert {of["fingerprint"] for of in summary.values()} == {
        Dump.open(str(folder / name)).fingerprint for name in ("dump", "adaptive")
    }
    counts = {}
    for name in seen:
        dump = Dump.open(str(folder / name))
        n = dump.provenance.corpus.samples
        targets = [len(row.targets) if row.targets is not None else 0 for row in rows_of(dump, range(n))]
        counts[name] = min(targets), sum(targets)
    assert counts["dump"][1] <= seen["dump"] <= 2 * counts["dump"][1]
    card = (run.output / "final" / "README.md").read_text()
    for name in seen:
        assert f"{folder / name}`, fingerprint `{Dump.open(str(folder / name)).fingerprint}`" in card
    assert "weight 1.5, alpha = 0.9" in card


def test_resumed_in_the_middle_it_is_the_uninterrupted_run(training: Trainings, folder: Path) -> None:
    """On as many ranks bit for bit, on one and three, with other micro-batches, up to rounding."""
    expected = whole(training)
    half = training("half", **job(folder), stop_after=5)
    assert half.codes == [75, 75]
    again = training("again", copy="half", **job(folder))
    assert again.codes == [0, 0], again["message"]
    assert again.losses == expected.losses
    assert largest_difference(again["state"], expected["state"]) == 0
    assert again["summary"]["resumed_from"] == half["step"]
    for ranks, stage in ((1, 3), (3, 2)):
        others = Ranks("support.train_jobs:trainer", ranks)
        asked = job(folder, train={"zero_stage": stage, "micro_batch_size": 3})
        places = {"dump": str(folder / "dump"), "model": str(folder / "student"), "copy": str(half.output)}
        found = others.call(job=asked | places | {"output": str(folder / f"on {ranks}")})[0]
        others.close()
        assert found["code"] == 0, found["message"]
        losses = [event.loss for event in found["events"]]
        assert losses == pytest.approx(expected.losses, rel=20 * FORWARD)
        assert [event.supervised_tokens for event in found["events"]] == [
            event.supervised_tokens for event in expected["events"]
        ]
        assert update_excess(found["state"], expected["state"], first=half["state"], rate=1e-2, steps=7) < 1


def test_following_one_of_two_makes_no_difference(training: Trainings, folder: Path) -> None:
    """A sealed dump beside one that is being written: the same samples at each step, and a wait for them."""
    windows = {"shuffle_window_units": 1, "shuffle_block_units": 1, "max_steps": 6, "epochs": 1}
    sealed = training("sealed", train=mixed(folder, "dump", "adaptive") | windows)
    estimator = Adaptive(kind="adaptive")
    shape = {"samples": 17, "samples_per_unit": 3, "first": 100, "estimator": estimator}
    following = training(
        "following", train=mixed(folder, "dump", "growing") | windows,
        grow=(range(2, 4), range(4, 6)), grows=str(folder / "growing"), shape=shape,
    )  # fmt: skip
    assert sealed.codes == following.codes == [0, 0], following["message"]
    assert sealed.losses == following.losses
    assert max(event.data_wait_seconds for event in following["events"]) > 0.5


def test_a_dump_that_stalls_is_named(training: Trainings, folder: Path) -> None:
    write_dump(folder / "stalled", samples=17, samples_per_unit=3, first=100, units=range(2))
    windows = {"shuffle_window_units": 1, "shuffle_block_units": 1, "data_wait_seconds": 1.0}
    run = training("stalls", train=mixed(folder, "dump", "stalled") | windows)
    assert_refused(run, 75, "stalled: 2 of 6")
    assert "dump: 5 of 5" in run["message"]
    assert run["step"] == len(run["events"]) > 0


OTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "weight": ("train.dumps.1.weight = 2.0", {"names": ("dump", "adaptive"), "adaptive": {"weight": 2.0}}, {}),
    "alpha": ("train.dumps.1.alpha = 0.1", {"names": ("dump", "adaptive"), "adaptive": {"alpha": 0.1}}, {}),
    "order": ("train.dumps.0.fingerprint", {"names": ("adaptive", "dump")}, {}),
    "another": ("train.dumps.1.fingerprint", {"names": ("dump", "sampled")}, {}),
    "one more": ("train.dumps.2.weight = 1.0", {"names": ("dump", "adaptive", "sampled")}, {}),
    "one alone": ("dump.fingerprint", {"names": ()}, {}),
    "weight, extended": (
        "train.dumps.1.weight = 2.0", {"names": ("dump", "adaptive"), "adaptive": {"weight": 2.0}}, {"extend": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_list_is_another_run(name: str, training: Trainings, folder: Path) -> None:
    """It is told what has changed."""
    says, entries, more = OTHER[name]
    whole(training)
    changes = {"adaptive": {"weight": 1.5, "alpha": 0.9} | entries.get("adaptive", {})}
    train = mixed(folder, *entries["names"], **changes) | {"max_steps": 12} | more
    run = training(f"other {name}", copy="whole", train=train)
    assert_refused(run, 78, "another run")
    assert says in run["message"]


def test_alpha_may_change_where_a_run_is_extended(training: Trainings, folder: Path) -> None:
    whole(training)
    train = mixed(folder, "dump", "adaptive", adaptive={"weight": 1.5, "alpha": 0.1}) | {"max_steps": 13}
    run = training("extended", copy="whole", train=train | {"extend": True})
    assert run.codes == [0, 0], run["message"]
    assert run["summary"]["extended"][0]["after"] == {"train.dumps.1.alpha": 0.1, "train.max_steps": 13}


UNFIT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tokenizer": ("tokenizer.vocab_sha256", {"vocab_sha256": "1" * 64}, {}),
    "head": ("lm_head_rows = 128", {"lm_head_rows": 128}, {}),
    "temperature": ("holds no tail mass for this temperature", {}, {"temperature": 2.0}),
    "draws": ("only the forward KL is unbiased", {"estimator": Sampled(kind="sampled")}, {"divergence": "jsd"}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_dumps_that_do_not_fit_together(name: str, folder: Path, tmp_path: Path) -> None:
    """Told before the student is loaded: which dump, what, and what is expected."""
    says, changes, loss = UNFIT[name]
    temperatures = (1.0, 2.0)
    write_dump(tmp_path / "first", samples=5, temperatures=temperatures)
    write_dump(tmp_path / "other", samples=5, first=50, **changes)
    with pytest.raises(MismatchError, match=says) as error:
        opened(tmp_path, train_section(tmp_path / "run", **mixed(tmp_path, "first", "other")), LossSection(**loss))
    assert name in ("temperature", "draws") or f"{tmp_path}/other cannot be mixed with" in str(error.value)


def opened(folder: Path, train: TrainSection, loss: LossSection | None = None, heldout: str | None = None) -> Any:
    """A run that is not begun."""
    given = {"student": {"model": "m"}, "loss": loss or {}, "heldout": heldout and {"url": heldout}}
    return open_run(Resolved(dump={"url": train.dumps[0].url}, train=train, **given))


def test_what_no_mix_can_be_made_of(folder: Path, tmp_path: Path) -> None:
    """One dump under two names, one that is evaluated on as well, and one without a usable sample."""
    (tmp_path / "link").symlink_to(folder / "dump")
    twice = {"dumps": [{"url": str(folder / "dump")}, {"url": str(tmp_path / "link")}]}
    with pytest.raises(MismatchError, match="names one dump twice"):
        opened(folder, train_section(tmp_path / "run", **twice))
    train = train_section(tmp_path / "run", **mixed(folder, "dump", "adaptive"), eval_steps=1)
    with pytest.raises(MismatchError, match="very samples that are trained on"):
        opened(folder, train, heldout=str(folder / "adaptive"))
    with pytest.raises(Exception, match=r"nothing can be learned from .*useless"):
        weigh(opened(folder, train_section(tmp_path / "run", **mixed(folder, "dump", "useless"))))
    for names in (["dump"], ["dump", "dump"]):
        with pytest.raises(ValueError, match="two dumps or more, each once"):
            train_section(tmp_path / "run", **mixed(folder, *names))


def test_stated_settings_are_those_of_the_dump_that_is_made_here(folder: Path, tmp_path: Path) -> None:
    """The others may come from anywhere."""
    train = train_section(tmp_path / "run", **mixed(folder, "adaptive", "dump"))
    given = {"student": {"model": "m"}, "loss": {}, "train": train, "stated": {"estimator.kind": "topk"}}
    open_run(Resolved(dump={"url": str(folder / "dump")}, **given))
    with pytest.raises(MismatchError, match="made with other settings"):
        open_run(Resolved(dump={"url": str(folder / "adaptive")}, **given))


@torch.no_grad()
def test_a_weight_is_how_often_samples_are_seen(folder: Path, tmp_path: Path) -> None:
    """Samples of an epoch, and its steps."""
    changes = {"adaptive": {"weight": 2.0}, "sampled": {"weight": 0.01}}
    train = train_section(tmp_path / "run", **mixed(folder, "dump", "adaptive", "sampled", **changes), epochs=3)
    run = opened(folder, train)
    assert run.mix.shares == (24, 34, 1)
    assert run.steps == 3 * 10
    assert [source.name for source in run.sources] == ["dump", "adaptive", "sampled"]
