"""An evaluation for people: tables on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MEASURES = {
    "kl_mean": ("KL(teacher || student), nats", "{:.4f}"),
    "kl_p50": ("  median of the tokens", "{:.4f}"),
    "kl_p90": ("  90th percentile", "{:.4f}"),
    "kl_p99": ("  99th percentile", "{:.4f}"),
    "kl_max": ("  largest", "{:.4f}"),
    "ce": ("cross-entropy, nats", "{:.4f}"),
    "teacher_ce_min": ("  the teacher's, at least", "{:.4f}"),
    "top1_agreement": ("same most likely token", "{:.1%}"),
    "top5_overlap": ("overlap of the five most likely tokens", "{:.1%}"),
    "acceptance_rate_min": ("acceptance rate of drafts, at least", "{:.1%}"),
    "acceptance_rate_max": ("  at most", "{:.1%}"),
    "ece": ("expected calibration error", "{:.1%}"),
    "supervised_tokens": ("supervised tokens", "{:,}"),
}
"""Name in an evaluation's result -> what people call it, and its format."""
GROUPS = {"by_position": "place in the answer, from", "by_teacher_entropy": "teacher's entropy in nats, from"}


def print_evaluation(results: dict[str, dict[str, Any]], differences: dict[str, Any], console: Console) -> None:
    """Print what `student_train.results.evaluate` found, as plain values.

    Args:
        results: model -> its `EvalResult`.
        differences: measure -> `Difference` of the second model from the first one; empty for one model.
        console: where to.
    """
    table = Table()
    table.add_column("mean over supervised tokens")
    for model in results:
        table.add_column(Text(model), justify="right", overflow="fold")
    if differences:
        table.add_column("difference, 95 % interval", justify="right")
    for name, (title, form) in MEASURES.items():
        row = ["-" if found[name] is None else form.format(found[name]) for found in results.values()]
        table.add_row(title, *row, *([_difference(differences.get(name))] if differences else []))
    console.print(table)
    for model, found in results.items():
        if len(results) > 1:
            console.print()
            console.print(Text(model, style="bold"))
        for name, title in GROUPS.items():
            console.print(_groups(title, found[name]))


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = found["interval"]
    return f"{found['difference']:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")


def _groups(title: str, groups: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for name in (title, "tokens", "KL", "cross-entropy", "same first", "acceptance"):
        table.add_column(name, justify="right")
    for group in groups:
        same = group["top1_agreement"]
        table.add_row(
            f"{group['least']:g}",
            f"{group['tokens']:,}",
            f"{group['kl']:.4f}",
            f"{group['ce']:.4f}",
            "-" if same is None else f"{same:.1%}",
            f"{group['acceptance_rate_min']:.1%} to {group['acceptance_rate_max']:.1%}",
        )
    return table
