"""Plans: the numbers alone, what the pilot measures, and the forecast beside a real dump."""

import json
from pathlib import Path

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
from storage_schemas.targets import concatenate
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import run_dump
from teacher_dump.pilot import WIDTHS, end_heads, file_bytes, mass_at, plan_dump
from teacher_dump.plan import (
    WORKERS,
    Bytes,
    Pilot,
    UnitSize,
    choose_pilot,
    durations,
    forecast_bytes,
    relative_standard_error,
)
from teacher_dump.teachers.teacher import Teacher

ROOT = Path(__file__).parents[2]
SMOLLM = ROOT / "models" / "SmolLM2-135M-Instruct"
ESTIMATORS = {
    "topk": TopK(k=24),
    "adaptive": Adaptive(kind="adaptive"),
    "sampled": Sampled(kind="sampled"),
}
SAMPLES = 150

# The numbers alone


def lengths_of(samples: int) -> np.ndarray:
    """Long-tailed, and drifting from the beginning of the corpus to its end."""
    drift = np.linspace(0, 1, samples)
    return (np.random.default_rng(0).lognormal(4 + drift, 0.6) + 2).astype(np.int64)


def test_every_sample_may_come_into_the_pilot_with_the_same_probability():
    lengths, count, seeds = lengths_of(53), 9, 3000
    hits = np.zeros(len(lengths))
    for seed in range(seeds):
        chosen = choose_pilot(lengths, count, seed=seed)
        assert len(set(chosen.tolist())) == count
        assert chosen.tolist() == sorted(chosen.tolist())
        hits[chosen] += 1
    p = count / len(lengths)
    assert np.abs(hits / seeds - p).max() < 4.5 * np.sqrt(p * (1 - p) / seeds)


def test_the_pilot_is_spread_over_the_corpus_and_over_the_lengths():
    lengths, count = lengths_of(2000), 64
    means, simple = [], []
    for seed in range(200):
        chosen = choose_pilot(lengths, count, seed=seed)
        assert np.bincount(chosen * 8 // len(lengths), minlength=8).tolist() == [8] * 8
        means.append(lengths[chosen].mean())
        simple.append(np.random.default_rng(seed).choice(lengths, count, replace=False).mean())
    assert np.mean(means) == pytest.approx(lengths.mean(), rel=0.01)
    assert np.std(means) < np.std(simple) / 3
    assert choose_pilot(lengths, 64, seed=0).tolist() == choose_pilot(lengths, 64, seed=0).tolist()
    assert choose_pilot(lengths, 64, seed=0).tolist() != choose_pilot(lengths, 64, seed=1).tolist()


def test_a_small_corpus_is_its_own_pilot():
    assert choose_pilot(np.array([5, 3, 4]), 10, seed=3).tolist() == [0, 1, 2]
    assert choose_pilot(np.array([5, 3, 4]), 3, seed=3).tolist() == [0, 1, 2]


def linear(rows: int, tokens: int, supervised: int) -> UnitSize:
    sizes = Bytes(file=3000, rows=100 + 9 * rows, tokens=50 + 2 * tokens, targets=1000 + 80 * supervised)
    return UnitSize(rows, tokens, supervised, sizes)


@pytest.mark.parametrize("units", [1, 7, 40])
def test_bytes_follow_from_what_a_file_an_extra_row_and_an_extra_token_cost(units):
    """The corpus has other proportions than the pilot, and larger or smaller units."""
    pilot = Pilot(
        name="",
        configured=True,
        whole=[linear(20, 4000, 1500), linear(21, 4400, 2000)],
        halves=[linear(10, 1900, 700), linear(10, 2100, 800), linear(11, 2400, 1100), linear(10, 2000, 900)],
        entries=[1],
        supervised=[1],
        kept_mass=1,
    )
    found = forecast_bytes(pilot, units=units, rows=700, tokens=90_000, supervised=60_000)
    assert found == pytest.approx(units * 4150 + 9 * 700 + 2 * 90_000 + 80 * 60_000)


def test_units_of_one_row_are_taken_as_they_are():
    pilot = Pilot("", True, [linear(1, 100, 50), linear(1, 300, 150)], [], [1], [1], 1.0)
    found = forecast_bytes(pilot, units=10, rows=10, tokens=2000, supervised=1000)
    assert found == pytest.approx(10 * 3000 + 10 * 109 + 10 * 450 + 10 * 9000)


def test_hours_and_money():
    found = durations(teacher_tokens=3_600_000, units=10, tokens_per_second=100.0, price_per_hour=2.0)
    assert [each.devices for each in found] == list(WORKERS)
    # Of 10 units, 4 devices take 3 at most, 8 take 2, and from 10 devices on each takes one.
    assert [each.hours for each in found] == pytest.approx([10, 5, 3, 2, 1, 1, 1])
    assert [each.money for each in found] == pytest.approx([20, 20, 24, 32, 32, 64, 128])
    assert durations(teacher_tokens=1, units=1, tokens_per_second=1, price_per_hour=None)[0].money is None


def test_the_standard_error_is_the_scatter_of_pilots():
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        supervised = rng.integers(20, 200, 40)
        entries = (supervised * rng.normal(48, 10, 40)).astype(int)
        ratios.append(entries.sum() / supervised.sum())
        errors.append(relative_standard_error(entries.tolist(), supervised.tolist()))
    assert np.mean(errors) == pytest.approx(np.std(ratios) / np.mean(ratios), rel=0.05)
    assert relative_standard_error([5], [1]) is None


# The pilot


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
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


def settings(place: Path, url: Path, *, kind: str = "topk", samples_per_unit: int = 40, **changes) -> dict:
    return {
        "dump": DumpSection(url=str(url), samples_per_unit=samples_per_unit),
        "teacher": Teacher(TeacherSection(model=str(place / "teacher"), dtype="float32", device="cpu")),
        "corpus": CorpusSection(
            sources=[SourceSection(path=str(place / "corpus.jsonl"))], max_length=96, too_long="drop"
        ),
        "estimator": ESTIMATORS[kind],
        "temperatures": (1.0, 2.0) if kind == "topk" else (1.0,),
    } | changes


@pytest.mark.parametrize("estimator", [TopK(k=12), TopK(k=40, mass=0.7), TopK(k=VOCABULARY, mass=1.0), TopK(k=1)])
def test_cut_heads_are_those_of_the_estimator(place, tmp_path, estimator):
    teacher, temperatures = settings(place, tmp_path)["teacher"], (1.0, 2.0)
    corpus = freeze_corpus(settings(place, tmp_path)["corpus"], teacher.tokenizer, lm_head_rows=VOCABULARY)
    samples = [corpus.sample(i) for i in (2, 3)]
    widest = TopK(k=VOCABULARY, mass=1.0)
    wide, expected = (
        concatenate(teacher.targets(samples, Recipe(estimator=each, temperatures=temperatures, logsumexp=True)))
        for each in (widest, estimator)
    )
    found = end_heads(wide, estimator, temperatures=temperatures)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.head_size, expected.head_size)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LOGPROB)
    np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, atol=2e-4)


def test_the_mass_of_the_k_largest_is_that_of_the_model(place, tmp_path):
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


def test_every_byte_of_a_file_is_counted_once(place, tmp_path):
    run_dump(**settings(place, tmp_path / "dump"))
    for path in (tmp_path / "dump" / "data").glob("*"):
        data = path.read_bytes()
        found = file_bytes(data)
        assert sum(found) == len(data)
        assert min(found) > 0
        # What is no column is the footer, whose length stands before the last four bytes, and the page index.
        assert 0 < found.file - int.from_bytes(data[-8:-4], "little") < 1000


@pytest.mark.parametrize(
    ("kind", "samples_per_unit"),
    [
        ("topk", 13),
        ("topk", 1000),
        ("adaptive", 60),
        ("sampled", 30),
        *(pytest.param(kind, size, marks=pytest.mark.slow) for kind in ESTIMATORS for size in (1, 2, 13, 30, 60, 1000)),
    ],
)
def test_the_forecast_is_that_of_the_real_dump(place, tmp_path, kind, samples_per_unit):
    """In units that are smaller, somewhat larger and far larger than the pilot of a third of the corpus.

    The corpus is tiny: about 300 supervised tokens in the pilot, and a tenth of the bytes are the files' own.
    """
    chosen = settings(place, tmp_path / "dump", kind=kind, samples_per_unit=samples_per_unit)
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
    records = Dump.open(str(tmp_path / "dump")).records()
    entries = sum(record.entries for record in records.values()) / real.supervised_tokens
    assert forecast.entries_per_supervised_token == pytest.approx(entries, rel=0.05)


def test_the_other_kinds_are_planned_with_their_defaults(place, tmp_path):
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


def test_a_pilot_without_anything_to_learn_from_is_an_error(place, tmp_path):
    lines = (place / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus.jsonl").write_text("".join([lines[0]] * 40 + lines[2:3]))
    corpus = CorpusSection(sources=[SourceSection(path=str(tmp_path / "corpus.jsonl"))], max_length=96)
    with pytest.raises(DataError, match="no sample of the pilot has targets"):
        plan_dump(**settings(place, tmp_path, corpus=corpus), samples=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_forecast_on_gsm8k_is_within_a_tenth(place, tmp_path):
    """With the demo's teacher if it is here, else with a tiny one; the pilot is a third of the corpus."""
    folder = SMOLLM if SMOLLM.is_dir() else save_teacher(tmp_path / "teacher", max_position_embeddings=2048)
    source = SourceSection(path=str(ROOT / "benchmarks/data/gsm8k_150.jsonl"), split="train[:40]")
    chosen = settings(
        place,
        tmp_path / "dump",
        teacher=Teacher(TeacherSection(model=str(folder), dtype="float32", device="cpu", batch_tokens=2048)),
        corpus=CorpusSection(sources=[source], max_length=512),
        estimator=TopK(),
        temperatures=(1.0,),
    )
    plan = plan_dump(**chosen, samples=12)
    for forecast, estimator in zip(plan.estimators, (TopK(), *list(ESTIMATORS.values())[1:]), strict=True):
        url = str(tmp_path / estimator.kind)
        real = run_dump(**chosen | {"dump": DumpSection(url=url, samples_per_unit=40), "estimator": estimator})
        assert forecast.estimator.startswith(estimator.kind)
        assert forecast.bytes == pytest.approx(real.bytes, rel=0.1)
