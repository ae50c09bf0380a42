"""What users do with a trained student: evaluate it, and merge it."""

import copy
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense import plain_student, rows_of
from peft import PeftModel
from safetensors import SafetensorError
from support.engine_jobs import some_event, train_section
from support.rounding import FORWARD
from support.tiny_student import VOCAB, save_student, teacher_logits, tiny_llama, tiny_tokenizer, write_dump
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from pipeline.cli import app
from storage_schemas.common.errors import DataError, MismatchError, NeoError, TemporaryError, UsageError
from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.logits import relative_difference
from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row
from storage_schemas.shift import supervised_positions
from student_train.config import LoraSection, LossSection, Resolved, StudentSection
from student_train.model.adapter import MIXER, plain_adapter
from student_train.model.load import load_model
from student_train.model.student import load_student, refuse_long_rows
from student_train.model.student_files import identity
from student_train.results import final
from student_train.results.end_of_turn import span_ends
from student_train.results.evaluate import evaluate
from student_train.results.final import refuse_other_logits, save_model, write_final
from student_train.results.measures import by_seed, paired, students_t
from student_train.results.merge import merge
from student_train.results.model_card import model_card
from student_train.results.saved import load_adapter, read_record, write_record
from student_train.train import _student
from student_train.training_run import open_run

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps, a student, the teacher as a student, and an adapter in `final/` whose base is in bf16."""
    folder = tmp_path_factory.mktemp("results")
    write_dump(folder / "dump", estimator=TopK(k=VOCAB, mass=1.0), temperatures=(1.0, 2.0), exact=True)
    write_dump(folder / "top8", temperatures=(1.0, 2.0))
    save_student(folder / "student", seed=1)
    save_student(folder / "teacher", seed=0)
    save_student(folder / "bf16", seed=1, dtype=torch.bfloat16)
    for name in ("student", "bf16"):
        _write_adapter(folder, name)
    return folder


def _write_adapter(
    folder: Path,
    name: str,
    name_of_final: str | None = None,
    *,
    files: bool = False,
    tokenizer: Mapping[str, bytes] | None = None,
    variant: Any = "lora",
    ends: Mapping[int, int] | None = None,
    precision: str = "fp32",
    **extra: Any,
) -> None:
    """`final-<name_of_final or name>`: an adapter with random weights, written as a run writes it."""
    dump = Dump.open(str(folder / "top8"))
    section = StudentSection(model=str(folder / name), lora=LoraSection(r=4, variant=variant, extra=extra))
    train, output = train_section(folder, precision=precision), folder / f"final-{name_of_final or name}"
    student = load_student(section, [LossSection()], train, dump.provenance)
    if files:
        student = dataclasses.replace(student, files=identity(section.model, None))
    torch.manual_seed(3)
    weights = {key: torch.randn_like(p) * 0.2 for key, p in student.module.trained()}
    with torch.no_grad():
        for key, parameter in student.module.trained():
            parameter.copy_(weights[key])
    write_final(
        output, student, section, train,
        weights=weights, tokenizer=tokenizer or dump.read_tokenizer(), ends=ends or {}, input_ids=IDS,
        card=model_card([dump], section, LossSection(), train, [some_event(1)], folder=output),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_evaluation_is_the_dense_one(folder: Path, temperature: float) -> None:
    """With k = V, each number is that of its definition on dense logits in float64."""
    dump = Dump.open(str(folder / "dump"))
    model = plain_student(str(folder / "student"), lora=False).eval()
    dense: list[dict[str, Any]] = []
    for row in rows_of(dump, range(24)):
        if row.targets is None:
            continue
        at, ids = supervised_positions(row.loss_mask), torch.from_numpy(row.input_ids.astype("int64"))
        teachers = teacher_logits(row.input_ids)[at.logits].double()
        students = model(input_ids=ids[None]).logits[0][at.logits].double()
        for place, (z_p, z_q, label) in enumerate(zip(teachers, students, ids[at.tokens].tolist(), strict=True)):
            log_p, log_q = (z_p / temperature).log_softmax(0), (z_q / temperature).log_softmax(0)
            best = [set(z.topk(5).indices.tolist()) for z in (z_p, z_q)]
            dense.append({
                "kl": float((log_p.exp() * (log_p - log_q)).sum()),
                "ce": -float(z_q.log_softmax(0)[label]),
                "label_ce": -float(log_p[label]),
                "overlap": float(torch.minimum(log_p.exp(), log_q.exp()).sum()),
                "first": int(z_p.argmax()) == int(z_q.argmax()),
                "top5": len(best[0] & best[1]) / 5,
                "entropy": -float((log_p.exp() * log_p).sum()),
                "confidence": float(z_q.softmax(0).max()),
                "correct": int(z_q.argmax()) == label,
                "place": place,
            })  # fmt: skip
    truth = {name: np.array([each[name] for each in dense]) for name in dense[0]}
    calls: list[tuple[int, int]] = []
    found = evaluate(
        folder / "student", dump, temperature=temperature, batch_tokens=40, progress=lambda *x: calls.append(x)
    ).result()
    assert calls == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    assert found.supervised_tokens == len(dense)
    means = {
        "kl_mean": "kl", "ce": "ce", "top1_agreement": "first", "top5_overlap": "top5",
        "acceptance_rate_min": "overlap", "acceptance_rate_max": "overlap",
    }  # fmt: skip
    for name, measure in means.items():
        assert getattr(found, name) == pytest.approx(truth[measure].mean(), rel=FORWARD), name
    for name, share in {"kl_p50": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_max": 1.0}.items():
        assert getattr(found, name) == pytest.approx(np.quantile(truth["kl"], share), rel=FORWARD), name
    assert found.teacher_ce_min == (pytest.approx(truth["label_ce"].mean(), rel=FORWARD) if temperature == 1 else None)
    assert found.labels_stored == 1
    assert 0 < found.top1_agreement < 1  # type: ignore[operator]
    bins = np.floor(truth["confidence"] * 15)
    off = [abs((truth["correct"][bins == b] - truth["confidence"][bins == b]).sum()) for b in range(15)]
    assert found.ece == pytest.approx(sum(off) / len(dense), rel=FORWARD)
    for groups, values in ((found.by_position, truth["place"]), (found.by_teacher_entropy, truth["entropy"])):
        assert len(groups) > (temperature == 1)
        assert sum(group.tokens for group in groups) == len(dense)
        for group, end in zip(groups, [*(group.least for group in groups[1:]), np.inf], strict=True):
            mine = (values >= group.least) & (values < end)
            assert group.tokens == mine.sum()
            assert group.kl == pytest.approx(truth["kl"][mine].mean(), rel=10 * FORWARD)


def test_evaluation_where_little_is_stored(folder: Path) -> None:
    """The teacher's cross-entropy is bounded from below, tokens that are stored are told, the head may be short."""
    full = evaluate(folder / "student", Dump.open(str(folder / "dump"))).result()
    few = evaluate(folder / "student", Dump.open(str(folder / "top8"))).result()
    assert 0 < few.labels_stored < 1
    assert few.teacher_ce_min is not None
    assert full.teacher_ce_min is not None
    assert 0 < few.teacher_ce_min < full.teacher_ce_min
    assert few.top5_overlap == pytest.approx(full.top5_overlap, abs=0.01)  # Rounding may make two entries equal.


@pytest.mark.parametrize(
    "estimator", [Sampled(kind="sampled", draws=400), Adaptive(kind="adaptive", mass=0.3, k_max=4, tail_draws=200)]
)
def test_evaluation_on_draws(folder: Path, tmp_path: Path, estimator: Sampled | Adaptive) -> None:
    """Means are estimates of the exact ones; what a single token's draws cannot say is null."""
    write_dump(tmp_path / "drawn", estimator=estimator)
    found = evaluate(folder / "student", Dump.open(str(tmp_path / "drawn"))).result()
    exact = evaluate(folder / "student", Dump.open(str(folder / "dump"))).result()
    assert found.kl_mean == pytest.approx(exact.kl_mean, abs=0.05)
    assert found.acceptance_rate_min == pytest.approx(exact.acceptance_rate_min, abs=0.05)
    assert (found.ce, found.ece) == pytest.approx((exact.ce, exact.ece), rel=FORWARD)
    assert (found.kl_p50, found.kl_p90, found.kl_p99, found.kl_max, found.by_teacher_entropy) == (None,) * 4 + ((),)
    assert (found.top1_agreement is None) == (found.top5_overlap is None) == (estimator.kind == "sampled")


def test_two_models_are_compared_on_the_same_tokens(folder: Path) -> None:
    """The interval is that of differences by sample, narrower than what either model's spread would give."""
    dump = Dump.open(str(folder / "dump"))
    first, second = (evaluate(folder / name, dump) for name in ("student", "final-student"))
    found = second.less(first)["kl_mean"]
    assert found.difference == pytest.approx(second.result().kl_mean - first.result().kl_mean, rel=1e-6)
    assert found.interval is not None
    # By the jackknife over samples, which knows nothing of the formula.
    by_token = second.tokens.kl.astype(float) - first.tokens.kl
    left = np.array([by_token[first.sample != sample].mean() for sample in np.unique(first.sample)])
    error = students_t(len(left) - 1) * np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    assert found.interval == pytest.approx((found.difference - error, found.difference + error), rel=0.1)
    with pytest.raises(TemporaryError, match="has grown"):
        evaluate(folder / "student", dump, limit=5).less(first)
    same = first.less(first)["kl_mean"]
    assert (same.difference, same.interval) == (0, (0, 0))


def test_intervals_are_students() -> None:
    """At every number of samples; where each sample has one token, the interval is that of the mean of differences."""
    tabulated = {1: 12.706, 2: 4.303, 9: 2.262, 10: 2.228, 20: 2.086, 40: 2.021, 120: 1.980, 10**9: 1.960}
    assert {n: round(students_t(n), 3) for n in tabulated} == tabulated
    values = np.random.default_rng(0).normal(size=(2, 40))
    for count in (2, 3, 10, 11, 12, 40):
        first, second = values[:, :count]
        found = paired(first, second, np.arange(count))
        mean, ends = by_seed(first.tolist(), second.tolist())
        assert (found.difference, found.interval) == (pytest.approx(mean), pytest.approx(ends))
    assert by_seed([1.0], [2.0]) == (1.0, None)


def test_the_command_compares_two_models(folder: Path) -> None:
    """As a table for people, whole as JSON; a third one, or one twice, is refused."""
    words = ["evaluate", "--dump", str(folder / "dump"), "--limit", "6"]
    names = [str(folder / name) for name in ("student", "teacher")]
    told = CliRunner().invoke(app, [*words, "--model", names[0], "--model", names[1], "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert list(found["models"]) == sorted(names)
    assert found["differences"]["kl_mean"]["difference"] == pytest.approx(-found["models"][names[0]]["kl_mean"])
    told = CliRunner().invoke(app, [*words, "--model", names[0], "--model", names[1]], env={"COLUMNS": "200"})
    assert f"{found['differences']['kl_mean']['difference']:+.4f}" in told.output
    assert "place in the answer" in told.output
    for wrong in ([names[0]] * 2, [*names, "other"]):
        told = CliRunner().invoke(app, [*words, *(word for name in wrong for word in ("--model", name))])
        assert isinstance(told.exception, UsageError)


def test_evaluation_does_not_depend_on_batches(folder: Path) -> None:
    """One sample at a time, or all at once; a bucketed KL is below the full one."""
    dump = Dump.open(str(folder / "top8"))
    one, many = (evaluate(folder / "student", dump, batch_tokens=size).result() for size in (1, 100_000))
    apart = {"by_position", "by_teacher_entropy"}
    assert one.model_dump(exclude=apart) == pytest.approx(many.model_dump(exclude=apart), rel=FORWARD)
    assert [group.tokens for group in one.by_position] == [group.tokens for group in many.by_position]
    full = evaluate(folder / "student", Dump.open(str(folder / "dump"))).result()
    assert 0 < one.kl_mean < full.kl_mean
    assert one.acceptance_rate_min < full.acceptance_rate_min <= full.acceptance_rate_max < one.acceptance_rate_max
    assert one.ce == pytest.approx(full.ce, rel=FORWARD)


def test_evaluation_of_the_teacher(folder: Path) -> None:
    """Nothing between it and itself, within the fidelity gate."""
    dump = Dump.open(str(folder / "top8"))
    found = evaluate(folder / "teacher", dump).result()
    assert abs(found.kl_mean) <= dump.provenance.max_kl
    # Rounding may make two entries equal.
    assert found.top1_agreement is not None
    assert found.top1_agreement > 0.95


def test_evaluation_of_an_adapter(folder: Path) -> None:
    """The adapter's directory is enough: it names its base."""
    dump = Dump.open(str(folder / "top8"))
    base, adapted = (evaluate(folder / name, dump).result() for name in ("student", "final-student"))
    assert adapted.supervised_tokens == base.supervised_tokens
    assert abs(adapted.kl_mean - base.kl_mean) > 1e-2


def test_limit_and_drawn_targets(folder: Path) -> None:
    """The first samples only; no agreement without an exact head."""
    dump = Dump.open(str(folder / "top8"))
    rows = rows_of(dump, range(7))
    found = evaluate(folder / "student", dump, limit=7).result()
    assert found.supervised_tokens == sum(len(row.targets) for row in rows if row.targets is not None)
    dump.provenance = dump.provenance.model_copy(update={"estimator": Sampled(kind="sampled")})
    assert dump.provenance.temperature_index(1.0) == 0
    with pytest.raises(MismatchError):
        evaluate(folder / "student", dump, temperature=2.0)


def test_evaluation_refuses(folder: Path, tmp_path: Path) -> None:
    """Another tokenizer, a temperature or a device that is not there, nothing to evaluate on."""
    dump = Dump.open(str(folder / "top8"))
    save_student(tmp_path / "other")
    tiny_tokenizer("x").save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="tokenizer"):
        evaluate(tmp_path / "other", dump)
    with pytest.raises(MismatchError, match="temperature"):
        evaluate(folder / "student", dump, temperature=3.0)
    for device in ("tpu9", "meta"):
        with pytest.raises(MismatchError, match="device"):
            evaluate(folder / "student", dump, device=device)
    write_dump(tmp_path / "empty", units=range(4, 5))
    with pytest.raises(DataError, match="no supervised tokens"):
        evaluate(folder / "student", Dump.open(str(tmp_path / "empty")), limit=3, partial=True)
    write_dump(tmp_path / "none", none_usable=True)
    with pytest.raises(DataError, match="counts the dump's samples by status"):
        evaluate(folder / "student", Dump.open(str(tmp_path / "none")))


def test_a_model_that_is_not_finite_is_refused(folder: Path) -> None:
    """Where a sample has the token, whatever the others say."""
    dump = Dump.open(str(folder / "top8"))
    rows = [row for row in rows_of(dump, range(12)) if row.targets is not None]
    token = int(rows[-1].input_ids[0])
    first = next(row.sample_index for row in rows if token in row.input_ids)
    model = load_model(str(folder / "student"), None, dtype=torch.float32)
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(folder / "nan")
    shutil.copytree(folder / "student", folder / "nan", dirs_exist_ok=True, ignore=lambda _, names: [
        name for name in names if "token" not in name])  # fmt: skip
    with pytest.raises(DataError, match=f"first in sample {first}"):
        evaluate(folder / "nan", dump)


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype", "stored"), [("student", None, "float32"), ("bf16", None, "bfloat16"),
                                                       ("student", "bfloat16", "bfloat16")])  # fmt: skip
def test_merged_model(name: str, dtype: str | None, stored: str, folder: Path, tmp_path: Path) -> None:
    """Plain transformers loads it, in the base's dtype or the one asked for, with the adapter's logits."""
    output = tmp_path / "merged"
    output.mkdir()
    assert merge(folder / f"final-{name}", output, dtype) == stored
    base = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    before = base(input_ids=IDS).logits
    expected = PeftModel.from_pretrained(base, folder / f"final-{name}").eval()(input_ids=IDS).logits
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert str(model.dtype) == f"torch.{stored}"
    off = float((model.float()(input_ids=IDS).logits - expected).abs().max() / expected.abs().max())
    assert off < (FORWARD if stored == "float32" else 0.03)
    assert float((before - expected).abs().max() / expected.abs().max()) > 0.2
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()
    assert (output / "generation_config.json").is_file()
    assert not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_the_code_in_the_cards_loads_the_models(folder: Path, tmp_path: Path) -> None:
    """Both cards hold code that works; the adapter is merged by the command in its own card."""

    def commands(file: Path) -> list[list[str]]:
        """Of a shell, as words."""
        blocks = re.findall(r"```sh\n(.*?)```", file.read_text(), re.DOTALL)
        return [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]

    (words,) = commands(folder / "final-bf16/README.md")
    assert words == ["llm-neo", "merge", str(folder / "final-bf16"), "merged"]
    done = CliRunner().invoke(app, [*words[1:3], str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert "is a plain model in bfloat16; `llm-neo docs serving` says" in " ".join(done.output.split())
    page = [line[:2] for line in commands(Path(__file__).parents[2] / "docs/serving.md")]
    serving = commands(tmp_path / "merged/README.md")
    assert [line[2] for line in serving] == [str(tmp_path / "merged")] * 2
    assert all(line[:2] in page for line in [words, *serving])
    logits = []
    for where in (folder / "final-bf16", tmp_path / "merged"):
        code = re.findall(r"```python\n(.*?)```", (where / "README.md").read_text(), re.DOTALL)
        assert len(code) == 1
        names: dict[str, Any] = {}
        exec(code[0], names)
        assert names["tokenizer"].get_vocab() == tiny_tokenizer().get_vocab()
        logits.append(names["model"].float()(input_ids=IDS).logits)
    assert float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) < 0.03


def test_merge_refuses(folder: Path, tmp_path: Path) -> None:
    """A directory with content, something that is no adapter, a dtype that does not exist, another base."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        merge(folder / "final-student", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    with pytest.raises(UsageError, match="dtype"):
        merge(folder / "final-student", tmp_path / "x", "int4")
    with pytest.raises(MismatchError, match="not an adapter"):
        merge(folder / "student", tmp_path / "x")
    _write_adapter(folder, "student", "biases", lora_bias=True)
    with pytest.raises(MismatchError, match="cannot be folded"):
        merge(folder / "final-biases", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def _with_sink(folder: Path) -> Path:
    """A model in bf16 whose attention is as sharp as that of real models on their sinks: a unit in the last place of an
    activation moves much of it to another token."""
    model = tiny_llama(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 30
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lora", "pissa", "moslora"])
def test_bf16_activations_judge_nothing(folder: Path, tmp_path: Path, variant: str) -> None:
    """What is right is neither refused when it is saved nor when it is merged, though bf16 moves its logits by far more
    than 5 % of the largest."""
    shutil.copytree(folder / "top8", tmp_path / "top8")
    sink = _with_sink(tmp_path / "sink")
    _write_adapter(tmp_path, "sink", variant=variant, precision="bf16")
    assert merge(tmp_path / "final-sink", tmp_path / "merged") == "bfloat16"
    base, model = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (sink, tmp_path / "merged"))
    adapted = PeftModel.from_pretrained(base, tmp_path / "final-sink").eval()
    for one, other in ((adapted, model), (model, copy.deepcopy(model).float())):
        assert relative_difference(one(input_ids=IDS).logits, other(input_ids=IDS).logits) > 0.05


@pytest.mark.parametrize("variant", ["lora", "pissa", "moslora"])
def test_wrong_final_is_refused(folder: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If what was saved has other logits than what was trained, it does not become `final/`: a wrong sign for PiSSA, a
    mixer that is left out, a wrong scale."""

    def wrong(model: Any, weights: Any, initial: Any) -> Any:
        weights = {key: torch.eye(4) if key.endswith(MIXER) else value for key, value in weights.items()}
        initial = {name: -value if ".lora_B." in name else value for name, value in initial.items()}
        config, state = plain_adapter(model, weights, initial)
        config.lora_alpha *= 2 if variant == "lora" else 1
        return config, state

    monkeypatch.setattr(final, "plain_adapter", wrong)
    shutil.copytree(folder / "top8", tmp_path / "top8")
    save_student(tmp_path / "student", seed=1, dtype=torch.bfloat16)
    with pytest.raises(DataError, match="does not give the logits"):
        _write_adapter(tmp_path, "student", variant=variant, precision="bf16")
    assert not (tmp_path / "final-student").exists()
    with pytest.raises(DataError):
        refuse_other_logits(tmp_path, torch.tensor([torch.nan]), torch.ones(1))


@torch.no_grad()
def test_it_stops_where_it_was_taught_to(folder: Path, tmp_path: Path) -> None:
    """A base that ends with token 1, a template whose turns end with another special token: the merged model stops
    there, and its config, generation config and tokenizer agree. A token that is not special ends nothing."""
    prompt, length = torch.tensor([[3, 8]]), 24
    for name in ("top8", "student"):
        shutil.copytree(folder / name, tmp_path / name)
    _write_adapter(tmp_path, "student")
    merge(tmp_path / "final-student", tmp_path / "plain")
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").generate(
        prompt, max_new_tokens=length, do_sample=False, eos_token_id=None
    )
    end = next(i for i in free[0, 4:].tolist() if i != 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{end}"]})
    tokenizer.save_pretrained(tmp_path / "own")
    files = {file.name: file.read_bytes() for file in (tmp_path / "own").iterdir()}
    _write_adapter(tmp_path, "student", "taught", ends={end: 9, 17: 11}, tokenizer=files)
    merge(tmp_path / "final-taught", tmp_path / "taught")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "taught")
    said = model.generate(prompt, max_new_tokens=length, do_sample=False)[0].tolist()
    assert said == free[0, : free[0].tolist().index(end, 2) + 1].tolist()
    assert len(said) < len(free[0])
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [end, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "taught").eos_token_id in model.config.eos_token_id
    assert json.loads((tmp_path / "final-taught" / "generation_config.json").read_text())["eos_token_id"] == [end, 1]


def test_ends_of_supervised_spans_are_counted() -> None:
    mask = np.array([0, 1, 1, 0, 0, 1, 1], dtype=bool)
    row = Row(
        sample_index=0, sample_id="", status=OK, input_ids=np.arange(7, dtype=np.int32), loss_mask=mask, targets=None
    )
    assert span_ends([row, row]) == {2: 2, 6: 2}


@pytest.mark.parametrize("damage", ["weights", "config", "gone", "record", "checksum"])
def test_damaged_final_is_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    """By evaluation and merging, with the file's name; the card is the user's, and a foreign adapter has no record."""
    final = shutil.copytree(folder / "final-student", tmp_path / "final")
    (final / "README.md").write_text("mine")
    dump = Dump.open(str(folder / "top8"))
    evaluate(final, dump, limit=2)
    names = {"weights": "adapter_model.safetensors", "config": "adapter_config.json", "gone": "tokenizer.json"}
    file = final / names.get(damage, "llm-neo.json")
    data = bytearray(file.read_bytes())
    match damage:
        case "gone":
            file.unlink()
        case "config":
            file.write_bytes(data.replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
        case "weights":
            data[-2] ^= 64
            file.write_bytes(data)
        case "record":
            file.write_bytes(data.replace(b"adapter_model", b"adapter_muddle"))
        case "checksum":
            file.write_bytes(data[:-9])
    for work in (lambda: evaluate(final, dump, limit=2), lambda: merge(final, tmp_path / "merged")):
        with pytest.raises(DataError, match=file.name):
            work()
    assert not (tmp_path / "merged").exists()
    (final / "llm-neo.json").unlink()
    if damage == "config":
        evaluate(final, dump, limit=2)


def test_torn_files_are_named(folder: Path, tmp_path: Path) -> None:
    """65 for what is torn, 78 for weights that could run code; never a traceback."""
    final = shutil.copytree(folder / "final-student", tmp_path / "final")
    (final / "llm-neo.json").unlink()
    dump = Dump.open(str(folder / "top8"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        data = (final / name).read_bytes()
        (final / name).write_bytes(data[: len(data) // 2])
        for work in (lambda: evaluate(final, dump), lambda: merge(final, tmp_path / "merged")):
            with pytest.raises(DataError, match=name):
                work()
        (final / name).write_bytes(data)
    (final / "adapter_model.safetensors").rename(final / "adapter_model.bin")
    with pytest.raises(MismatchError, match=r"no adapter_model\.safetensors"):
        evaluate(final, dump)
    student = shutil.copytree(folder / "student", tmp_path / "student")
    (student / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(DataError, match=r"model\.safetensors is torn"):
        evaluate(student, dump)


def test_base_that_moved(folder: Path, tmp_path: Path) -> None:
    """`--base` says where it lies now; another model there is refused, if the run has recorded what it was."""
    for name in ("top8", "student"):
        shutil.copytree(folder / name, tmp_path / name)
    _write_adapter(tmp_path, "student", files=True)
    (tmp_path / "student").rename(tmp_path / "moved")
    dump, final = Dump.open(str(folder / "top8")), tmp_path / "final-student"
    with pytest.raises(MismatchError, match="--base DIR"):
        evaluate(final, dump)
    assert evaluate(final, dump, base=tmp_path / "moved", limit=3).result().supervised_tokens
    done = CliRunner().invoke(app, ["merge", str(final), str(tmp_path / "out"), "--base", str(tmp_path / "moved")])
    assert done.exit_code == 0, done.output
    with pytest.raises(MismatchError, match="is not the model that the adapter"):
        merge(final, tmp_path / "other", base=folder / "teacher")
    with pytest.raises(MismatchError, match="no directory nowhere"):
        merge(final, tmp_path / "other", base=Path("nowhere"))
    # One that cannot be had is not called another one.
    record, config = read_record(final), json.loads((final / "adapter_config.json").read_text())
    assert record is not None
    (final / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/gone"}))
    (final / "llm-neo.json").unlink()
    write_record(final, record.base)
    with pytest.raises(MismatchError, match="some/gone cannot be loaded"):
        evaluate(final, dump)


@pytest.mark.parametrize(("positions", "refused"), [(63, True), (64, False)])
def test_learned_positions_end_somewhere(folder: Path, tmp_path: Path, positions: int, refused: bool) -> None:
    """Told by the dump's longest row, which may have 64 tokens, and not by an index error in the middle."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=positions, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    dump = Dump.open(str(folder / "top8"))
    if not refused:
        assert evaluate(tmp_path / "gpt2", dump, limit=2).result().supervised_tokens
        return
    with pytest.raises(MismatchError, match=r"rows of up to 64 tokens[^$]*at most 63"):
        evaluate(tmp_path / "gpt2", dump)
    student = {"model": str(tmp_path / "gpt2"), "lora": {"r": 4}}
    train = train_section(tmp_path / "run")
    run = open_run(Resolved(dump={"url": str(folder / "top8")}, student=student, loss={}, train=train))
    with pytest.raises(MismatchError, match="learned positions"):
        _student(run, None, None, main=True)


def test_rotary_positions_are_warned_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(1)
    refuse_long_rows(model, 128)
    assert not caplog.text
    refuse_long_rows(model, 129)
    assert "129 tokens" in caplog.text
    assert "128 positions" in caplog.text


def test_growing_dump_is_evaluated_on_request_only(folder: Path, tmp_path: Path) -> None:
    """And then the result says of how many samples it is. What `limit` asks for may be there already."""
    write_dump(tmp_path / "growing", units=range(2))
    dump = Dump.open(str(tmp_path / "growing"))
    with pytest.raises(TemporaryError, match="10 of 24 samples"):
        evaluate(folder / "student", dump)
    found = evaluate(folder / "student", dump, partial=True).result()
    assert (found.samples, found.dump_samples) == (10, 24)
    assert evaluate(folder / "student", dump, limit=10).result() == found


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(28, "No space left"), TemporaryError), (OSError(30, "Read-only file system"), MismatchError),
     (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), TemporaryError)],
)  # fmt: skip
def test_what_cannot_be_written(
    folder: Path, tmp_path: Path, error: Exception, kind: type[NeoError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and with a code that says whether to try again; nothing is left behind."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    (tmp_path / "file").touch()
    with pytest.raises(MismatchError, match="file/merged"):
        merge(folder / "final-student", tmp_path / "file" / "merged")
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(kind, match=r"cannot write .*merged"):
        merge(folder / "final-student", tmp_path / "merged")
    monkeypatch.undo()
    for name in ("top8", "student"):
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.setattr(final, "save_file", full)
    with pytest.raises(kind, match=r"cannot write .*final-student"):
        _write_adapter(tmp_path, "student")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "top8", "student"}


def test_final_that_is_a_link_is_replaced(folder: Path, tmp_path: Path) -> None:
    """The link, not what lies behind it."""
    for name in ("top8", "student"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "final-student").symlink_to(tmp_path / "mine")
    _write_adapter(tmp_path, "student")
    assert (tmp_path / "final-student" / "adapter_config.json").is_file()
    assert not (tmp_path / "final-student").is_symlink()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_model_that_is_saved_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single weight, or a setting."""
    save_model(tmp_path / "right", tiny_llama(1), torch.bfloat16, IDS, GenerationConfig())
    other = tiny_llama(1).to(torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] *= 1 + 2**-7
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda *_: other)
    with pytest.raises(DataError, match=r"does not give the (logits|weights)"):
        save_model(tmp_path / "weight", tiny_llama(1), torch.bfloat16, IDS, GenerationConfig())
    monkeypatch.undo()
    saved = LlamaForCausalLM.save_pretrained

    def lossy(self: LlamaForCausalLM, folder: str, **options: Any) -> None:
        saved(self, folder, **options)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
    with pytest.raises(DataError, match="does not give the logits"):
        save_model(tmp_path / "setting", tiny_llama(1), torch.bfloat16, IDS, GenerationConfig())


def test_adapter_says_where_it_belongs(folder: Path) -> None:
    """Its base is the student, by an absolute path; its weights are fp32 and named as peft names them."""
    config = json.loads((folder / "final-student" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((folder / "student").resolve())
    assert config["inference_mode"] is True
    base = load_model(str(folder / "student"), None, dtype=torch.float32)
    model = load_adapter(base, folder / "final-student")
    plain_config, state = plain_adapter(model, {k: p for k, p in model.named_parameters() if "lora_" in k}, {})
    assert plain_config.r == 4
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32"}
    assert np.isfinite([float(tensor.detach().norm()) for tensor in state.values()]).all()


@pytest.mark.parametrize("kind", ["XLORA", "SHADOW", "PROMPT_TUNING"])
def test_adapters_of_kinds_that_name_other_files_are_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    """X-LoRA and Shadow name other models, in any format; prompts a tokenizer, with what is passed to it."""
    adapter = Path(shutil.copytree(folder / "final-student", tmp_path / "adapter"))
    (adapter / "llm-neo.json").unlink()
    config = {"peft_type": kind, "base_model_name_or_path": str(folder / "student"), "task_type": "CAUSAL_LM"}
    more = {"XLORA": {"hidden_size": 32, "adapters": {"a": str(tmp_path)}}, "PROMPT_TUNING": {"num_virtual_tokens": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config | more.get(kind, {})))
    with pytest.raises(MismatchError, match="of a kind that is not read") as caught:
        evaluate(str(adapter), Dump.open(str(folder / "dump")), device="cpu")
    assert kind in str(caught.value)
