"""Finished runs side by side: what each was, what came out, and what their differences are worth."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Config, load_config
from storage_schemas.canonical import parse_json
from storage_schemas.common.errors import DataError, UsageError
from student_train.config import METHODS
from student_train.metrics import EVENTS, Event, read_events
from student_train.results.measures import by_seed
from student_train.summary import SUMMARY, Summary, read_summary

_OF_A_SEED = {
    "output", "seed", "run_name", "tags", "project", "report_to", "checkpoint_url", "cache_dir", "cache_bytes",
    "resume", "save_steps", "save_minutes", "save_total_limit", "snapshot_bytes", "logging_steps", "profile",
    "data_wait_seconds",
}  # fmt: skip
"""Settings of `train` in which runs of one kind may differ."""


class Run(NamedTuple):
    """A finished run, as its directory tells it."""

    name: str
    config: Config
    summary: Summary
    content: Mapping[str, Any]
    """All of summary.json: with what `llm-neo run` has added."""
    events: Sequence[Event]

    def before_and_after(self) -> dict[str, tuple[float, float]]:
        """Measure -> on held-out samples before the first step, and of what lies in `final`; empty if unknown."""
        by_step = {result.step: result for result in self.summary.heldout}
        first, last = by_step.get(0), by_step.get(self.summary.final_step or -1)
        if first is not None and last is not None:
            pairs = {name: (getattr(first, name), getattr(last, name)) for name in ("kl", "ce", "top1_agreement")}
        else:
            pairs = {
                name: (self.content.get(f"{key}_before"), self.content.get(f"{key}_after"))
                for name, key in (("kl", "kl"), ("ce", "ce"), ("top1_agreement", "top1"))
            }
        return {name: pair for name, pair in pairs.items() if None not in pair}

    def evaluated_on(self) -> tuple[object, float]:
        """The held-out dump and the temperature of its numbers: by fingerprint, or as configured where it has none."""
        if self.summary.heldout:
            return self.summary.heldout[0].dump, self.summary.heldout[0].temperature
        return self.content.get("heldout_dump") or (self.config.heldout and self.config.heldout.url), 1.0

    def kind(self) -> str:
        """The same for runs that differ in their seed alone."""
        assert self.config.train is not None
        train = self.config.train.model_dump(mode="json", exclude=_OF_A_SEED)
        rest = self.config.model_dump(mode="json", exclude={"train", "teacher", "corpus", "heldout"})
        return repr((rest, train))


def read_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        UsageError: it is none, or the run is not done.
        DataError: what lies there is damaged.
    """
    summary = read_summary(folder) if folder.is_dir() else None
    if summary is None:
        raise UsageError(
            f"{folder} is not the directory of a finished run",
            got=f"no {SUMMARY}" if folder.is_dir() else "no directory",
            expected="`train.output` of a run that is done",
            fix="`llm-neo status CONFIG` says how far a run is",
        )
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} has no config.yaml", got="none", fix="give the directory as training has left it")
    return Run(
        name=str(folder),
        config=load_config(folder / "config.yaml"),
        summary=summary,
        content=parse_json((folder / SUMMARY).read_bytes(), name=str(folder / SUMMARY)),
        events=read_events(folder / EVENTS),
    )


def facts(run: Run) -> dict[str, str]:
    """What a run was and cost, by name."""
    assert run.config.train is not None
    train, summary = run.config.train, run.summary
    shown = {
        "method": METHODS[summary.arm],
        "student": Path(summary.student).name,
        "dump": ", ".join(one.fingerprint[:12] for one in summary.dumps.values()) or summary.fingerprint[:12],
        "learning rate": f"{train.learning_rate:g}",
        "rank": str(run.config.student.lora.r) if train.lora and run.config.student else "-",
        "seed": str(train.seed),
        "steps": f"{summary.steps:,}",
        "supervised tokens": f"{summary.supervised_tokens:,}",
    }
    found = run.before_and_after()
    measures = {"kl": ("KL", ".4f"), "ce": ("cross-entropy", ".4f"), "top1_agreement": ("same first token", ".1%")}
    for name, (title, form) in measures.items():
        told = " -> ".join(f"{value:{form}}" for value in found.get(name, ()))
        shown[f"{title}, before and after"] = told or "-"
    return shown | {
        "tokens per second": f"{summary.tokens_per_second:,.0f}",
        "peak memory of a rank": f"{summary.peak_rss_bytes / 2**30:.2f} GiB",
        "ranks, ZeRO stage": f"{summary.world_size}, {summary.zero_stage}",
    }


def differences(runs: Sequence[Run]) -> list[str]:
    """Sentences on what seeds say: the spread of runs of one kind, and intervals between two kinds with the same seeds.

    Held-out results are compared on one dump only; a sentence says so where they are not. Runs without are left out.
    """
    runs = [run for run in runs if "kl" in run.before_and_after()]
    if not runs:
        return ["No run has held-out results: `train.eval_steps` makes them, and `llm-neo run`."]
    if len({run.evaluated_on() for run in runs}) > 1:
        return ["The runs were evaluated on different held-out dumps, or at different temperatures: no comparison."]
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind(), []).append(run)
    told, groups = [], []
    for group in kinds.values():
        after = {run.config.train.seed: run.before_and_after()["kl"][1] for run in group}  # type: ignore[union-attr]
        groups.append((group[0].name, after))
        if len(after) > 1:
            told.append(
                f"{group[0].name} and {len(after) - 1} more of its kind: KL {statistics.fmean(after.values()):.4f}, "
                f"standard deviation {statistics.stdev(after.values()):.4f} over seeds."
            )
    first, of_first = groups[0]
    for name, other in groups[1:]:
        seeds = sorted(of_first.keys() & other.keys())
        if not seeds:
            continue
        mean, ends = by_seed([of_first[seed] for seed in seeds], [other[seed] for seed in seeds])
        sure = f", 95 % interval {ends[0]:+.4f} to {ends[1]:+.4f}" if ends else "; one seed gives no interval"
        told.append(f"{name} less {first}, over {len(seeds)} shared seeds: KL {mean:+.4f}{sure}.")
    return told


def markdown(runs: Sequence[Run]) -> str:
    """The comparison as a table, a column for each run."""
    columns = [facts(run) for run in runs]
    lines = [
        "| | " + " | ".join(f"`{run.name}`" for run in runs) + " |",
        "|---|" + "---|" * len(runs),
        *(f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]),
    ]
    return "\n".join([*lines, "", *differences(runs)]).rstrip() + "\n"
