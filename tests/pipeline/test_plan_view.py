"""`llm-neo plan`: what machines and people get; whether the numbers are right is in tests/teacher_dump/test_plan.py."""

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from support.dump_checks import SAMPLES, write_corpus
from support.tiny_teachers import save_teacher

from pipeline.views import plan as forecast

OPTIONS = ("--pilot-samples", "6", "--tokens-per-second", "10", "--price-per-hour", "2.5", "--seed", "3")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_teacher(folder / "teacher")
    sections = {
        "dump": {"url": str(folder / "dump"), "samples_per_unit": 3},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "device": "cpu"},
        "corpus": {"sources": [{"path": str(write_corpus(folder / "corpus.jsonl"))}], "max_length": 96},
        "estimator": {"k": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder / "config.yaml"


def test_a_plan_is_json_or_tables_and_writes_nothing(config, call):
    code, out, _ = call("plan", config, *OPTIONS, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["samples"], found["units"]) == (SAMPLES, 4)
    assert (found["tokens_per_second"], found["measured"]) == (10.0, False)
    assert set(found["mass_at_k"]) == {"8", "16", "32", "64", "128", "256"}
    one = found["durations"][0]
    assert one["hours"] == pytest.approx(found["teacher_tokens"] / 36_000)
    assert one["money"] == pytest.approx(2.5 * one["hours"])
    assert [each["configured"] for each in found["estimators"]] == [True, False, False]
    _, shown, _ = call("plan", config, *OPTIONS)
    for part in (f"{found['supervised_tokens']:,}", "topk (k 8, mass", "k=256", f"{found['mass_at_k']['8']:.4f}"):
        assert part in shown
    assert not (config.parent / "dump").exists()


def test_a_plan_without_price_is_shown():
    plan = {
        "samples": 1,
        "statuses": {"ok": 1},
        "units": 1,
        "tokens": 3,
        "supervised_tokens": 2,
        "pilot_samples": 1,
        "pilot_supervised_tokens": 2,
        "estimators": [
            {
                "estimator": "topk (k 64, mass [red]0.999)",
                "configured": True,
                "entries_per_supervised_token": 48.0,
                "kept_mass": 0.99,
                "bytes_per_supervised_token": 90.0,
                "bytes": 180,
            }
        ],
        "mass_at_k": {8: 0.95},
        "tokens_per_second": 100.0,
        "devices_per_worker": 1,
        "measured": True,
        "durations": [{"devices": 1, "hours": 12.5, "money": None}],
    }
    screen = StringIO()
    forecast.print_plan(plan, Console(file=screen, width=120))
    for part in ("180 bytes", "12.50", "measured here", "mass [red]0.999"):
        assert part in screen.getvalue()
