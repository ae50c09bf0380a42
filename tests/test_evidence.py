"""What `make reproduce` and `make frontier` conclude from numbers, and the two of them as a whole on tiny models."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_student import VOCAB, tiny_llama, tiny_tokenizer, write_dump

from storage_schemas.config import TopK
from storage_schemas.reader import Dump
from storage_schemas.targets import decode
from storage_schemas.verify import verify
from student_train.results.measures import by_seed

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RATES = {"full_sft": 2e-5, "lora_sft": 2e-4, "full_kd": 2e-5, "lora_kd": 6e-4}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def verdicts(
    *, busy: str = "", scores: dict[str, dict[float, float]] | None = None, **kl: tuple[float, ...]
) -> dict[str, str]:
    """Of made-up KLs by seed; the CE is one more."""
    import reproduce

    found = {method: [{"kl_mean": x, "ce": x + 1} for x in values] for method, values in kl.items()}
    runs: dict[str, list[dict[str, Any]]] = {
        method: [{"peak_rss_bytes": 2**30, "state_bytes": 10 if method.startswith("lora") else 100}] for method in kl
    }
    # A step of the machine that was busy, in the one method or the other, moves no median.
    pace = {method: [[2.0] * 9 + [40.0 if method == busy else 2.0]] for method in kl}
    tried = scores or {method: {rate / 3: 2.0, rate: 1.0, 3 * rate: 1.5} for method, rate in RATES.items()}
    return dict(reproduce.verdicts(RATES, tried, runs, pace, found))


def test_a_claim_holds_only_where_seeds_agree() -> None:
    """By Student's t interval of paired differences; the threshold on KD's gain is that of the protocol."""
    told = verdicts(
        full_sft=(3.0, 3.1, 2.9), lora_sft=(2.5, 2.6, 2.4), full_kd=(1.0, 1.1, 0.9), lora_kd=(1.1, 1.2, 1.0)
    )
    assert told["Neo is closer to the teacher than LoRA (KL)"] == "holds"
    assert told["Neo has the quality of KD"].startswith("holds: 95% of")
    assert told["Neo costs what LoRA costs"].startswith("holds")
    assert told["Neo costs less than KD"].startswith("does not hold: 1.00 of the time, 1.00 of the memory")
    assert told["low rank wants ten times the learning rate"].startswith("holds: 10 (CE), 30")
    told = verdicts(
        full_sft=(3.0, 3.1, 2.9), lora_sft=(1.0, 2.6, 1.4), full_kd=(1.0, 1.1, 0.9), lora_kd=(1.5, 1.2, 1.3)
    )
    assert told["Neo is closer to the teacher than LoRA (KL)"].startswith("not shown")
    assert told["Neo has the quality of KD"].startswith("does not hold: 83% of")
    told = verdicts(
        full_sft=(1.0, 1.1, 0.9), lora_sft=(1.0, 1.1, 0.9), full_kd=(1.0, 1.1, 1.0), lora_kd=(1.3, 1.41, 1.2)
    )
    assert told["Neo is closer to the teacher than LoRA (KL)"] == "contradicted"
    assert told["Neo has the quality of KD"].startswith("does not hold: KD gains nothing")
    at_the_end = {method: {rate: 1.0, 3 * rate: 1.5} for method, rate in RATES.items()}
    once = {"full_sft": (1.0,), "lora_sft": (1.0,), "full_kd": (1.0,), "lora_kd": (0.3,)}
    told = verdicts(busy="lora_kd", scores=at_the_end, **once)
    assert told["Neo is closer to the teacher than SFT (KL)"] == "one seed says nothing"
    assert told["Neo costs what LoRA costs"].startswith("holds: 1.00 of the time")
    assert told["low rank wants ten times the learning rate"].startswith(
        "not decided, the best rate of SFT, LoRA, KD, Neo"
    )


def test_interval_by_seed_is_students() -> None:
    mean, ends = by_seed([1.0, 2.0, 3.0], [1.1, 2.3, 3.2])
    # t of 2 degrees of freedom, 4.303, times 0.1 / sqrt(3).
    assert (mean, ends) == (pytest.approx(0.2), pytest.approx((0.2 - 0.24843, 0.2 + 0.24843), abs=1e-4))


def test_contrast_holds_all_of_the_probability_in_its_entries(tmp_path: Path) -> None:
    """At T it is the teacher's softmax over the entries alone; a dump like any other, of another fingerprint."""
    from frontier import without_tail

    source = tmp_path / "rounded"
    write_dump(source, estimator=TopK(k=8, mass=1.0), temperatures=(1.0, 2.0))
    url = tmp_path / "alone"
    without_tail(Dump.open(str(source)), url)
    assert verify(str(url)).ok
    before, after = Dump.open(str(source)), Dump.open(str(url))
    assert before.fingerprint != after.fingerprint
    for index, temperature in enumerate((1.0, 2.0)):
        a, b = (
            decode(d.read_unit(0).targets, temperature_index=index, temperature=temperature) for d in (before, after)
        )
        np.testing.assert_array_equal(a.ids, b.ids)
        expected = (
            torch.from_numpy(before.read_unit(0).targets.logprobs.reshape(-1, 8) / temperature).double().softmax(1)
        )
        # Both are rounded, by the dump's gate.
        np.testing.assert_allclose(b.weights, expected, rtol=0.07)
        assert (b.weights * np.log(b.weights / expected.numpy())).sum(1).mean() < 5e-4
        assert not np.isfinite(b.tail_logprob).any()


def test_guidelines_hold_beyond_the_spread_of_seeds_alone() -> None:
    from guidelines import verdicts

    def told(
        ranks: list[float],
        rates: list[float],
        variants: list[float],
        *,
        spread: float = 0.01,
        scores: dict[int, dict[float, float]] | None = None,
    ) -> dict[str, str]:
        curve = {str(rank): {"kl_mean": kl} for rank, kl in zip((4, 16, 64), ranks, strict=True)}
        of = {name: {"kl_mean": kl} for name, kl in zip(("lora", "dora"), variants, strict=True)}
        best = dict(zip((4, 16, 64), rates, strict=True))
        tried = {rank: {rate / 3: 2.0, rate: 1.0, 3 * rate: 2.0} for rank, rate in best.items()}
        return dict(verdicts(spread, tried | (scores or {}), best, curve, curve, of))

    good = told([1.0, 0.9, 0.8], [2e-3, 2e-3, 6e-4], [1.0, 1.015])
    assert [said.split(":")[0] for said in good.values()] == ["holds"] * 4
    bad = told([1.0, 0.9, 0.92], [6e-4, 2e-3, 6e-4], [1.0, 1.03])
    assert list(bad.values()) == [
        "contradicted",
        "does not hold: r = 4: 6.0e-04, r = 16: 2.0e-03, r = 64: 6.0e-04",
        "does not hold: dora",
        "contradicted",
    ]
    assert told([1.0, 0.99, 0.9], [2e-3] * 3, [1.0, 1.0])["a larger rank is better"].startswith("not shown")
    end = told([1.0, 0.9, 0.8], [2e-3, 2e-3, 6e-4], [1.0, 1.0], scores={64: {6e-4: 1.0, 2e-3: 2.0}})
    assert end["a larger rank wants a lower rate"].startswith("not decided, the best rate of rank 64 lies at the end")


def test_aim_is_the_spread_of_the_full_distribution() -> None:
    from frontier import FULL, Point, aim

    def point(name: str, size: float, *kl: float) -> Point:
        return Point(name=name, bytes_per_token=size, runs=[], results=[{"kl_mean": x} for x in kl])

    full = point(FULL, 9e4, 0.50, 0.52, 0.54)
    near, far, large = (
        point("near", 26, 0.52, 0.53, 0.55),
        point("far", 20, 0.55, 0.56, 0.57),
        point("large", 40, 0.5, 0.5, 0.5),
    )
    told = aim([large, near, far], full, default=60.0)
    assert told[0].endswith("reached by near. The default has 60.0 bytes; of less than half of that: near.")
    assert told[2:] == ["- far: 20.0 bytes, +2.0 standard deviations", "- near: 26.0 bytes, +0.7 standard deviations"]
    assert "of less than half of that: none." in aim([near], full, default=50.0)[0]
    assert aim([far, large], full, default=60.0)[0].endswith("no such setting.")


def test_bytes_are_those_of_one_file(tmp_path: Path) -> None:
    """Of the same rows in one unit or in many."""
    from frontier import bytes_per_supervised_token

    sizes = []
    for units in (2, 16):
        write_dump(tmp_path / str(units), samples=16, samples_per_unit=16 // units)
        sizes.append(bytes_per_supervised_token(Dump.open(str(tmp_path / str(units)))))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reproduce", "guidelines", "frontier"])
def test_smoke(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it with a few steps, on tiny models; what is there is not made again, nor what others have made."""
    import importlib

    tiny_llama(0, layers=3).save_pretrained(tmp_path / "teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }} {% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    draw = random.Random(0)
    for file, count in (("train", 60), ("heldout", 12)):
        texts = [[" ".join(f"w{draw.randrange(VOCAB)}" for _ in range(8)) for _ in "ab"] for _ in range(count)]
        lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in texts]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--smoke", "--layers", "2", "--out", str(tmp_path / "out")]
    for option in ("train", "heldout"):
        words += [f"--{option}", str(tmp_path / f"{option}.jsonl")]
    module = importlib.import_module(name)
    module.main([*words, "--teacher", str(tmp_path / "teacher")])
    report = (tmp_path / "out" / f"{name}.md").read_text()
    said = {"reproduce": "| Neo - KD |", "guidelines": "| more data is better |", "frontier": "k = 4, renormalised |"}
    assert said[name] in report
    capsys.readouterr()
    module.main([*words, "--teacher", str(tmp_path / "teacher")])
    assert "%  " not in capsys.readouterr().out
    assert (tmp_path / "out" / f"{name}.md").read_text() == report
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "out" / "results.jsonl", elsewhere)
    module.main([*words, "--teacher", str(tmp_path / "teacher"), "--out", str(elsewhere)])
    assert "%  " not in capsys.readouterr().out
    assert (elsewhere / f"{name}.md").read_text() == report
