"""report.md of a run: what came out, from what, and with which versions."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.views.inspect import coverage
from student_train.config import METHODS
from student_train.metrics import HeldoutResult
from student_train.results.model_card import package_version
from student_train.summary import Summary

QUALITY = {"kl_mean": "kl", "ce": "ce", "top1_agreement": "top1"}
"""Name in an evaluation's result -> name in summary.json, with `_before` and `_after`."""
PACKAGES = ("llm-neo", "torch", "transformers", "peft", "deepspeed", "pyarrow", "obstore", "datasets", "numpy")


def quality(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json says of two evaluations."""
    told = {"before": before, "after": after}
    return {f"{name}_{when}": found[measure] for when, found in told.items() for measure, name in QUALITY.items()}


def report(config: Config, summary: dict[str, Any], dumped: dict[str, Any]) -> str:
    """The report as Markdown, from what summary.json holds and the summary of stage one."""
    lines = [
        f"# {METHODS[summary['arm']]}: {Path(summary['student']).name} from {Path(summary['teacher']).name}",
        "",
        *_quality(summary, tokens=summary["heldout_supervised_tokens"], temperature=1.0),
        *[line for remark in remarks(config, summary) for line in (f"**{remark}**", "")],
        "## Cost",
        "",
        "| | |",
        "|---|---|",
        f"| teacher, tokens per second | {_number(summary['dump_tokens_per_second'])} |",
        f"| dump, bytes per supervised token | {summary['bytes_per_supervised_token']:.1f} |",
        f"| dump, coverage | {coverage(dumped['mean_kept_mass'])} |",
        f"| training, tokens per second | {_number(summary['train_tokens_per_second'])} |",
        f"| training, steps | {summary['train_steps']} |",
        f"| training, peak memory of a rank | {summary['peak_rss_bytes'] / 2**30:.2f} GiB |",
        "",
        "## Where things are",
        "",
        "| | |",
        "|---|---|",
        *[f"| {name} | `{summary[name]}` |" for name in ("teacher", "student", "adapter", "merged") if summary[name]],
        *_dumps(config, summary["fingerprint"], summary["dumps"]),
        f"| held-out dump | `{dumped['heldout']['url']}`, fingerprint `{dumped['heldout']['fingerprint']}` |",
        "",
        *_made_with(config),
    ]
    return "\n".join(lines) + "\n"


def training_report(config: Config, summary: Summary) -> str:
    """The report of a training that was evaluated before and after, where stage one is known by its dumps alone."""
    results = {result.step: result for result in summary.heldout}
    first, last = results[0], results[summary.final_step or 0]
    quality = {f"{name}_{when}": getattr(result, field) for when, result in (("before", first), ("after", last))
               for name, field in (("kl", "kl"), ("ce", "ce"), ("top1", "top1_agreement"))}  # fmt: skip
    seconds = summary.seconds + summary.heldout_seconds
    assert config.heldout is not None
    lines = [
        f"# {METHODS[summary.arm]}: {Path(summary.student).name}",
        "",
        *_quality(quality, tokens=last.supervised_tokens, temperature=last.temperature),
        *[line for remark in _no_closer(first.kl, last.kl, steps=last.step) for line in (f"**{remark}**", "")],
        "| step | KL | cross-entropy | same most likely token | acceptance rate of drafts |",
        "|---|---|---|---|---|",
        *map(_evaluation, summary.heldout),
        "",
        f"Trained {summary.steps} of {summary.planned_steps} steps; `final/` is that of step {summary.final_step}, the "
        f"best one is step {summary.best_step}.",
        "",
        "## Cost",
        "",
        "| | |",
        "|---|---|",
        f"| training, tokens per second | {_number(summary.tokens_per_second)} |",
        f"| evaluation on held-out samples, share of the time | {summary.heldout_seconds / max(1e-9, seconds):.1%} |",
        f"| training, peak memory of a rank | {summary.peak_rss_bytes / 2**30:.2f} GiB |",
        "",
        "## Where things are",
        "",
        "| | |",
        "|---|---|",
        f"| student | `{summary.student}` |",
        f"| result | `{summary.final}` |",
        *_dumps(config, summary.fingerprint, summary.model_dump()["dumps"]),
        f"| held-out dump | `{config.heldout.url}`, fingerprint `{last.dump}` |",
        "",
        *_made_with(config),
    ]
    return "\n".join(lines) + "\n"


def _dumps(config: Config, fingerprint: str, mixed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was trained on: the one dump, or those of `train.dumps` as the summary has them."""
    if not mixed:
        return [f"| dump | `{config.dump.url}`, fingerprint `{fingerprint}` |"]
    return [
        f"| dump | `{one['url']}`, fingerprint `{one['fingerprint']}`, weight {one['weight']:g}, alpha "
        f"{one['alpha']:g}, {one['samples']:,} samples |"
        for one in mixed.values()
    ]


def _evaluation(result: HeldoutResult) -> str:
    top1 = "-" if result.top1_agreement is None else f"{result.top1_agreement:.1%}"
    acceptance = f"{result.acceptance_rate_min:.1%} to {result.acceptance_rate_max:.1%}"
    return f"| {result.step} | {result.kl:.4f} | {result.ce:.4f} | {top1} | {acceptance} |"


def _quality(summary: dict[str, Any], *, tokens: int, temperature: float) -> list[str]:
    return [
        f"Against the teacher, on {tokens:,} supervised tokens of held-out samples.",
        f"KL is at temperature {temperature:g}: over the stored entries and one tail bucket a lower bound of that over "
        "the whole vocabulary, from drawn tokens an estimate of it.",
        "",
        "| | before | after | change |",
        "|---|---|---|---|",
        _row("KL(teacher, student), nats per token", summary, "kl", "{:.4f}"),
        _row("cross-entropy, nats per token", summary, "ce", "{:.4f}"),
        _row("same most likely token", summary, "top1", "{:.1%}"),
        "",
    ]


def _made_with(config: Config) -> list[str]:
    return [
        "## Configuration",
        "",
        "```yaml",
        config.to_yaml().rstrip(),
        "```",
        "",
        "## Versions",
        "",
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores.",
        "",
        "| package | version |",
        "|---|---|",
        *[f"| {name} | {package_version(name)} |" for name in PACKAGES],
    ]


def remarks(config: Config, summary: dict[str, Any]) -> list[str]:
    """What makes a result doubtful, in sentences."""
    found = []
    key = "ce" if summary["kl_after"] is None else "kl"
    found += _no_closer(summary[f"{key}_before"], summary[f"{key}_after"], steps=summary["train_steps"])
    wanted = config.train.global_batch_size if config.train else 0
    if summary["train_samples"] < wanted:
        found.append(
            f"The dump has {summary['train_samples']} samples that can be trained on, fewer than "
            f"train.global_batch_size ({wanted}): an epoch is one step. Lower it, or raise train.epochs."
        )
    return found


def _no_closer(before: float, after: float, *, steps: int) -> list[str]:
    """The remark that nothing was gained, if so: nats per token."""
    if after <= 0.99 * before:
        return []
    return [
        f"The student is not closer to the teacher than before: {before:.4f} and {after:.4f} nats per token after "
        f"{steps} steps. More data, epochs or another learning rate may change that."
    ]


def _row(title: str, summary: dict[str, Any], key: str, form: str) -> str:
    before, after = summary[f"{key}_before"], summary[f"{key}_after"]
    if before is None or after is None:
        return f"| {title} | - | - | - |"
    change = f"{(after - before) / before:+.0%}" if before else ""
    return f"| {title} | {form.format(before)} | {form.format(after)} | {change} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
