"""What a dump or a verification has come to, for people; machines have `--json`."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from pipeline.views.inspect import counts, coverage
from pipeline.views.terminal import facts_table
from storage_schemas.common.secrets import visible

Lines = list[tuple[str, str]]


def print_parts(lines: Callable[[Mapping[str, Any]], Lines], found: Mapping[str, Any], console: Console) -> None:
    """Print what there is to say of a result, given as plain values, and of the held-out samples under `heldout`."""
    console.print(facts_table(lines(found)))
    if "heldout" in found:
        console.print(Group("", Text("held-out samples", "italic"), facts_table(lines(found["heldout"]))))


def dump_lines(found: Mapping[str, Any]) -> Lines:
    """(name, value) of what there is to say of one dump's `teacher_dump.dump.DumpSummary`."""
    lines = [
        ("dump", visible(found["url"])),
        ("fingerprint", found["fingerprint"]),
        ("samples", f"{found['rows']:,} ({counts(found['statuses'])}) in {found['units']:,} units{_cut(found)}"),
        ("tokens", f"{found['tokens']:,}, {found['supervised_tokens']:,} of them supervised"),
    ]
    if found["bytes_per_supervised_token"] is not None:
        lines += [
            ("bytes", f"{found['bytes']:,}, {found['bytes_per_supervised_token']:.1f} per supervised token"),
            ("coverage", coverage(found["mean_kept_mass"])),
        ]
    if found["tokens_per_second"] is None:
        return [*lines, ("done here", "nothing: all was there")]
    lost = f", {found['units_lost_here']:,} more lost to a faster worker" if found["units_lost_here"] else ""
    took = timedelta(seconds=round(found["seconds"]))
    done = f"{found['units_done_here']:,} units{lost}; {found['tokens_here']:,} tokens in {took}"
    return [*lines, ("done here", f"{done}, {found['tokens_per_second']:,.0f} tokens/s")]


def _cut(found: Mapping[str, Any]) -> str:
    return f", {found['truncated']:,} cut to corpus.max_length" if found["truncated"] else ""


def frozen_lines(found: Mapping[str, Any]) -> Lines:
    """(name, value) of what there is to say of one corpus of `pipeline.commands.run_freeze`."""
    return [
        ("corpus", visible(found["folder"])),
        ("fingerprint", found["fingerprint"]),
        ("samples", f"{found['samples']:,} ({counts(found['statuses'])}){_cut(found)}"),
        ("tokens", f"{found['tokens']:,}, {found['supervised_tokens']:,} of them supervised"),
        ("took", f"{found['seconds']:,.1f} s"),
    ]


def verify_lines(url: str, found: Mapping[str, Any]) -> Lines:
    """(name, value) of a dump's `storage_schemas.verify.VerifyReport`, and under `recompute` what computing rows again
    has found."""
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
