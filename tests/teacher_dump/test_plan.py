"""Plans: the numbers alone, what the pilot measures, and the forecast beside a real dump."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.dump_checks import WORDS
from support.rounding import LOGPROB
from support.tiny_teachers import VOCABULARY, save_teacher, tiny_model

from storage_schemas.common.errors import DataError
from storage_schemas.config import Adaptive, DumpSection, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.reader import Dump
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import run_dump
from teacher_dump.plan import WIDTHS, WORKERS, durations, mass_at, plan_dump
from teacher_dump.teachers.teacher import Teacher

ROOT = Path(__file__).parents[2]
ESTIMATORS = {"topk": TopK(k=24), "adaptive": Adaptive(kind="adaptive"), "sampled": Sampled(kind="sampled")}
SAMPLES = 150

# The numbers alone


def test_hours_and_money() -> None:
    found = durations(teacher_tokens=3_600_000, units=10, tokens_per_second=100.0, price_per_hour=2.0)
    assert [each.devices for each in found] == list(WORKERS)
    # Of 10 units, 4 devices take 3 at most, 8 take 2, and from 10 devices on each takes one.
    assert [each.hours for each in found] == pytest.approx([10, 5, 3, 2, 1, 1, 1])
    assert [each.money for each in found] == pytest.approx([20, 20, 24, 32, 32, 64, 128])
    assert durations(teacher_tokens=1, units=1, tokens_per_second=1, price_per_hour=None)[0].money is None


# The pilot


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a corpus of many lengths; some of its samples have nothing to learn from or are too long."""
    folder = tmp_path_factory.mktemp("plan")
    save_teacher(folder / "teacher", max_position_embeddings=128)
    rng = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(SAMPLES):
            # Later questions are longer.
            question, answer = (" ".join(rng.choice(WORDS, rng.integers(1, n))) for n in (4 + i // 20, 16))
            answer = {0: None, 1: " ".join(WORDS * 9)}.get(i % 10, answer)
            turns = [{"role": "user", "content": question}]
            turns += [] if answer is None else [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"sample-{i}", "messages": turns}) + "\n")
    return folder


def settings(place: Path, url: Path, *, kind: str = "topk", samples_per_unit: int = 40, **changes: Any) -> dict:
    return {
        "dump": DumpSection(url=str(url), samples_per_unit=samples_per_unit),
        "teacher": Teacher(TeacherSection(model=str(place / "teacher"), dtype="float32", device="cpu")),
        "corpus": CorpusSection(
            sources=[SourceSection(path=str(place / "corpus.jsonl"))], max_length=96, too_long="drop"
        ),
        "estimator": ESTIMATORS[kind],
        "temperatures": (1.0, 2.0) if kind == "topk" else (1.0,),
    } | changes


def test_the_mass_of_the_k_largest_is_that_of_the_model(place: Path, tmp_path: Path) -> None:
    teacher = settings(place, tmp_path)["teacher"]
    corpus = freeze_corpus(settings(place, tmp_path)["corpus"], teacher.tokenizer, lm_head_rows=VOCABULARY)
    sample = corpus.sample(2)
    (wide,) = teacher.targets([sample], Recipe(estimator=TopK(k=256, mass=1.0), logsumexp=True))
    with torch.no_grad():
        model = tiny_model("llama", max_position_embeddings=128)
        logits = model(input_ids=torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0].double()
    p = torch.softmax(logits, 1)[np.flatnonzero(sample.loss_mask) - 1].sort(1, descending=True).values
    for k, mass in mass_at(wide, WIDTHS).items():
        assert mass == pytest.approx(float(p[:, :k].sum(1).mean()), abs=LOGPROB)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_forecast_is_that_of_the_real_dump(place: Path, tmp_path: Path, kind: str) -> None:
    """In units of the size of the pilot, a third of the corpus."""
    chosen = settings(place, tmp_path / "dump", kind=kind, samples_per_unit=50)
    plan = plan_dump(**chosen, samples=50)
    assert not (tmp_path / "dump").exists()
    real = run_dump(**chosen)
    assert (plan.samples, plan.units, plan.tokens) == (real.rows, real.units, real.tokens)
    assert (plan.supervised_tokens, plan.statuses) == (real.supervised_tokens, real.statuses)
    assert plan.teacher_tokens == real.tokens_here
    assert plan.pilot_samples < 50
    forecast = plan.estimators[0]
    assert forecast.configured
    assert forecast.bytes == pytest.approx(real.bytes, rel=0.1)
    assert forecast.bytes_per_supervised_token == pytest.approx(real.bytes_per_supervised_token, rel=0.1)
    assert forecast.kept_mass == pytest.approx(real.mean_kept_mass, abs=0.03)
    records = Dump.open(str(tmp_path / "dump")).read_records()
    entries = sum(record.entries for record in records.values()) / real.supervised_tokens
    assert forecast.entries_per_supervised_token == pytest.approx(entries, rel=0.05)


def test_small_files_have_their_own_overhead(place: Path, tmp_path: Path) -> None:
    """Of a corpus that is all in the pilot."""
    chosen = settings(place, tmp_path / "dump", samples_per_unit=2)
    plan = plan_dump(**chosen, samples=SAMPLES)
    real = run_dump(**chosen)
    (configured,) = [each for each in plan.estimators if each.configured]
    assert configured.bytes == pytest.approx(real.bytes, rel=0.02)


def test_the_other_kinds_are_planned_with_their_defaults(place: Path, tmp_path: Path) -> None:
    seen = []
    plan = plan_dump(
        **settings(place, tmp_path, kind="adaptive", estimator=Adaptive(kind="adaptive", k_max=3)),
        samples=12,
        progress=lambda *counts: seen.append(counts),
    )
    assert [each.estimator.split(" ")[0] for each in plan.estimators] == ["adaptive", "topk", "sampled"]
    assert [each.configured for each in plan.estimators] == [True, False, False]
    assert "k_max 3" in plan.estimators[0].estimator
    assert "k 64, mass 0.999" in plan.estimators[1].estimator
    assert seen[-1][0] == seen[-1][1]
    assert plan.measured
    assert list(plan.mass_at_k) == list(WIDTHS)
    masses = list(plan.mass_at_k.values())
    assert masses == sorted(masses)
    given = plan_dump(**settings(place, tmp_path), samples=5, tokens_per_second=1000.0, price_per_hour=3.0)
    assert (given.tokens_per_second, given.measured) == (1000.0, False)
    assert given.durations[0].hours == pytest.approx(given.teacher_tokens / 1000 / 3600)
    assert given.durations[0].money == pytest.approx(3 * given.durations[0].hours)


def test_a_pilot_without_anything_to_learn_from_is_an_error(place: Path, tmp_path: Path) -> None:
    lines = (place / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus.jsonl").write_text("".join([lines[0]] * 40 + lines[2:3]))
    corpus = CorpusSection(sources=[SourceSection(path=str(tmp_path / "corpus.jsonl"))], max_length=96)
    with pytest.raises(DataError, match="no sample of the pilot has targets"):
        plan_dump(**settings(place, tmp_path, corpus=corpus), samples=1, seed=1)


@pytest.mark.slow
def test_the_forecast_on_gsm8k_is_within_a_tenth(place: Path, tmp_path: Path) -> None:
    """Of every kind, with the pilot that the command takes by default."""
    folder = save_teacher(tmp_path / "teacher", max_position_embeddings=2048)
    source = SourceSection(path=str(ROOT / "benchmarks/data/gsm8k_150.jsonl"))
    chosen = settings(
        place,
        tmp_path / "dump",
        samples_per_unit=75,
        teacher=Teacher(TeacherSection(model=str(folder), dtype="float32", device="cpu", batch_tokens=2048)),
        corpus=CorpusSection(sources=[source], max_length=512),
        estimator=TopK(),
        temperatures=(1.0,),
    )
    plan = plan_dump(**chosen, samples=64)
    for forecast, estimator in zip(plan.estimators, (TopK(), *list(ESTIMATORS.values())[1:]), strict=True):
        url = str(tmp_path / estimator.kind)
        real = run_dump(**chosen | {"dump": DumpSection(url=url, samples_per_unit=75), "estimator": estimator})
        assert forecast.estimator.startswith(estimator.kind)
        assert forecast.bytes == pytest.approx(real.bytes, rel=0.1)
