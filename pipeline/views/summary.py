"""What a dump or a verification has come to, for people; machines have `--json`."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.views.inspect import counts
from pipeline.views.terminal import facts_table
from storage_schemas.common.secrets import visible


def print_dumps(found: Mapping[str, Any], console: Console) -> None:
    """Print what `teacher_dump.dump.DumpSummary` holds, given as plain values, and under `heldout` the same of those
    samples."""
    parts = {"": found} | ({"held-out samples": found["heldout"]} if "heldout" in found else {})
    for title, one in parts.items():
        if title:
            console.print()
            console.print(Text(title, "italic"))
        console.print(facts_table(dump_lines(one)))


def dump_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what there is to say of one dump."""
    lines = [
        ("dump", visible(found["url"])),
        ("fingerprint", found["fingerprint"]),
        ("samples", f"{found['rows']:,} ({counts(found['statuses'])}) in {found['units']:,} units{_cut(found)}"),
        ("tokens", f"{found['tokens']:,}, {found['supervised_tokens']:,} of them supervised"),
    ]
    if found["bytes_per_supervised_token"] is not None:
        lines += [
            ("bytes", f"{found['bytes']:,}, {found['bytes_per_supervised_token']:.1f} per supervised token"),
            ("coverage", f"{found['mean_kept_mass']:.4f} of the probability is stored exactly, on average"),
        ]
    if found["tokens_per_second"] is None:
        return [*lines, ("done here", "nothing: all was there")]
    lost = f", {found['units_lost_here']:,} more lost to a faster worker" if found["units_lost_here"] else ""
    took = timedelta(seconds=round(found["seconds"]))
    done = f"{found['units_done_here']:,} units{lost}; {found['tokens_here']:,} tokens in {took}"
    return [*lines, ("done here", f"{done}, {found['tokens_per_second']:,.0f} tokens/s")]


def _cut(found: Mapping[str, Any]) -> str:
    return f", {found['truncated']:,} cut to corpus.max_length" if found["truncated"] else ""


def print_frozen(found: Mapping[str, Any], console: Console) -> None:
    """Print what `pipeline.commands.run_freeze` returns."""
    for one in [found, *([found["heldout"]] if "heldout" in found else [])]:
        if one is not found:
            console.print()
            console.print(Text("held-out samples", "italic"))
        lines = [
            ("corpus", visible(one["folder"])),
            ("fingerprint", one["fingerprint"]),
            ("samples", f"{one['samples']:,} ({counts(one['statuses'])}){_cut(one)}"),
            ("tokens", f"{one['tokens']:,}, {one['supervised_tokens']:,} of them supervised"),
            ("took", f"{one['seconds']:,.1f} s"),
        ]
        console.print(facts_table(lines))


def print_verified(url: str, found: Mapping[str, Any], console: Console) -> None:
    """Print what `storage_schemas.verify.VerifyReport` holds, given as plain values, and under `recompute` what
    computing rows again has found."""
    console.print(facts_table(verify_lines(url, found)))


def verify_lines(url: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what verifying a dump has found."""
    errors = found["errors"]
    verdict = "intact" if found["ok"] else f"{len(errors):,} error{'s' * (len(errors) != 1)}"
    lines = [
        ("dump", visible(url)),
        ("verdict", verdict if found["sealed"] else f"not sealed; {verdict}"),
        ("verified", f"{found['units']:,} units, {found['rows']:,} rows, {found['bytes']:,} bytes"),
        ("supervised", f"{found['supervised_tokens']:,} tokens"),
    ]
    if (again := found.get("recompute")) is not None:
        kl = ", ".join(f"{value:.1e}" for value in again["kl"])
        lines += [
            ("recomputed", f"{len(again['rows']):,} rows, {again['supervised_tokens']:,} supervised tokens"),
            ("  KL", f"{kl} nats per token, recomputed || stored; allowed are {again['kl_limit']:.1e}"),
            ("  same entries", f"{again['heads_equal']:.1%} of the tokens"),
            ("  corpus", "compared" if again["corpus_compared"] else "not compared: --config says which it was"),
        ]
        if again["draws_equal"] is not None:
            lines.append(("  same draws", f"{again['draws_equal']:.1%}"))
    lines += [("error", visible(error)) for error in errors]
    return [*lines, *(("orphan", f"{visible(name)}: `llm-neo dump` removes it") for name in found["orphans"])]
