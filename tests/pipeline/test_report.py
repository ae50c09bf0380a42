"""`llm-neo report`: finished runs side by side, as a table and as a page that needs nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.engine_jobs import some_event
from support.tiny_student import save_student, write_dump
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.views.run_page import figures, run_page, samples_of
from pipeline.views.runs import differences, markdown, read_run
from storage_schemas.common.errors import DataError, UsageError
from storage_schemas.config import TopK
from storage_schemas.reader import Dump
from student_train.metrics import EVENTS, HeldoutResult, event_log
from student_train.results.evaluate import evaluate
from student_train.summary import SUMMARY, Summary, write_summary


def held(step: int, kl: float, dump: str = "h") -> HeldoutResult:
    return HeldoutResult(
        step=step, kl=kl, ce=kl + 1, top1_agreement=0.5, acceptance_rate_min=0.4, acceptance_rate_max=0.6,
        supervised_tokens=9, seconds=1.0, temperature=1.0, dump=dump,
    )  # fmt: skip


def finished(folder: Path, *, kl: float, seed: int = 0, heldout_dump: str = "h", **train: Any) -> Path:
    """The directory of a run of six steps that ended at a held-out KL."""
    folder.mkdir(parents=True)
    config = {
        "dump": {"url": str(folder.parent / "dump")},
        "heldout": {"url": str(folder.parent / "heldout")},
        "student": {"model": str(folder.parent / "student")},
        "loss": {},
        "train": {"output": str(folder), "seed": seed, **train},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with event_log(folder / EVENTS, after=0) as write:
        for step in range(1, 7):
            write(some_event(step, kl=3 - step / 4))
    summary = Summary(
        arm="neo", steps=6, epochs=1.0, loss=1.0, ce=1.0, kl=1.0, supervised_tokens=60, tokens_per_second=1234.0,
        seconds=2.0, data_wait_seconds=0.0, peak_rss_bytes=2**30, world_size=2, zero_stage=2, resumed_from=None,
        fingerprint="f" * 64, student="some/student", final=str(folder / "final"), final_record="r",
        heldout=(held(0, 4.0, heldout_dump), held(6, kl, heldout_dump)), final_step=6,
    )  # fmt: skip
    write_summary(folder, summary.model_dump(mode="json"))
    return folder


def test_runs_are_put_side_by_side(tmp_path: Path) -> None:
    names = [str(finished(tmp_path / "a", kl=1.5)), str(finished(tmp_path / "b", kl=1.25, learning_rate=1e-3))]
    told = CliRunner().invoke(app, ["report", *names])
    assert told.exit_code == 0, told.output
    assert f"| `{names[0]}` | `{names[1]}` |" in told.output
    assert "| learning rate | 0.0002 | 0.001 |" in told.output
    assert "| KL, before and after | 4.0000 -> 1.5000 | 4.0000 -> 1.2500 |" in told.output
    assert f"{names[1]} less {names[0]}, over 1 shared seeds: KL -0.2500; one seed gives no interval" in told.output


def test_seeds_give_an_interval(tmp_path: Path) -> None:
    """Of pairs with one seed, whatever the order of the directories."""
    first = [finished(tmp_path / f"a{seed}", kl=2 + seed / 10, seed=seed) for seed in range(3)]
    second = [finished(tmp_path / f"b{seed}", kl=1 + seed / 5, seed=seed, learning_rate=1e-3) for seed in (2, 0, 1)]
    told = "\n".join(differences([read_run(folder) for folder in [*first, *second]]))
    assert "and 2 more of its kind: KL 2.1000, standard deviation 0.1000 over seeds." in told
    # -1, -0.9, -0.8: mean -0.9, 4.303 * 0.1 / sqrt(3) on either side.
    assert "over 3 shared seeds: KL -0.9000, 95 % interval -1.1484 to -0.6516." in told


def test_many_seeds_give_an_interval_too(tmp_path: Path) -> None:
    first = [finished(tmp_path / f"a{seed}", kl=2.0, seed=seed) for seed in range(11)]
    second = [finished(tmp_path / f"b{seed}", kl=1 + seed / 10, seed=seed, learning_rate=1e-3) for seed in range(11)]
    told = "\n".join(differences([read_run(folder) for folder in [*first, *second]]))
    # -1, -0.9, ... 0: mean -0.5, standard deviation 0.33166; 2.228 * that / sqrt(11) on either side.
    assert "over 11 shared seeds: KL -0.5000, 95 % interval -0.7228 to -0.2772." in told


def test_runs_that_were_not_evaluated_hide_no_comparison(tmp_path: Path) -> None:
    """And what `llm-neo run` has evaluated before and after is compared with what training itself has."""
    folders = [
        finished(tmp_path / name, kl=1.0, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3))
    ]
    for folder, more in zip(folders, ({}, {"heldout_dump": "h", "kl_before": 4.0, "kl_after": 1.5}), strict=False):
        summary = json.loads((folder / SUMMARY).read_text())
        write_summary(folder, summary | {"heldout": []} | more)
    told = "\n".join(differences([read_run(folder) for folder in folders]))
    assert told == f"{folders[2]} less {folders[1]}, over 1 shared seeds: KL -0.5000; one seed gives no interval."
    assert differences([read_run(folders[0])])[0].startswith("No run has held-out results: `train.eval_steps`")


def test_names_of_runs_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stands in the legend as it is; a method without distillation has no line of divergence."""
    monkeypatch.chdir(tmp_path)
    names = ["x$_$", "_a", "x$a$b"]
    runs = [read_run(finished(tmp_path / f"run{i}", kl=1.0).rename(name)) for i, name in enumerate(names)]
    sft = read_run(finished(tmp_path / "sft", kl=1.0, method="lora_sft"))
    for _, figure in figures(runs):
        assert {name for name in names if f"\u200b{name}</text>" in figure} == set(names)
    for run, has_line in ((runs[0], True), (sft, False)):
        assert (figures([run])[0] != figures([run._replace(events=())])[0]) is has_line


def test_other_held_out_samples_are_not_compared(tmp_path: Path) -> None:
    runs = [read_run(finished(tmp_path / name, kl=1.0, heldout_dump=name)) for name in "ab"]
    assert "different held-out dumps" in markdown(runs)
    assert "less" not in markdown(runs)


def test_a_page_without_its_held_out_dump_says_so(tmp_path: Path) -> None:
    """Curves need no dump."""
    folder, file = finished(tmp_path / "a", kl=1.5), tmp_path / "report.html"
    told = CliRunner().invoke(app, ["report", str(folder), "--html", str(file)])
    assert told.exit_code == 0, told.output
    assert "the page has no samples" in told.stderr
    assert file.read_text().count("<svg") == 4


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        read_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no summary\.json"):
        read_run(tmp_path / "empty")
    (finished(tmp_path / "a", kl=1.0) / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_run(tmp_path / "a")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """Curves as figures, and held-out samples with the numbers of an evaluation; nothing is loaded from elsewhere."""
    write_dump(tmp_path / "heldout", estimator=TopK(k=8, mass=1.0))
    folders = [finished(tmp_path / name, kl=1.5) for name in ("a", "b <i>")]
    save_student(folders[0] / "final")
    file = tmp_path / "pages" / "report.html"
    told = CliRunner().invoke(app, ["report", *map(str, folders), "--html", str(file), "--samples", "2"])
    assert told.exit_code == 0, told.output
    page = file.read_text()
    assert page.count("<svg") == 4
    assert "b &lt;i&gt;" in page
    assert "<i>" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*|@import|<script""", page)
    assert "row 0, id" in page
    assert "row 2, id" not in page

    found = evaluate(folders[0] / "final", Dump.open(str(tmp_path / "heldout")), limit=2)
    samples = samples_of(found)
    assert sum(len(sample.student) for sample in samples) == len(found.tokens.kl)
    for sample in samples:
        assert len(sample.student) == len(sample.row.supervised)
        mine = found.sample == sample.row.sample_index
        assert sum(token.kl for token in sample.student) == pytest.approx(float(found.tokens.kl[mine].sum()), rel=1e-5)
        for token in sample.student[:3]:
            assert f">{token.p:.4f}</span>" in page
    runs = [read_run(folder) for folder in folders]
    assert run_page(runs, samples, heldout=str(tmp_path / "heldout")) == page
