"""A plan for people: tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipeline.views.inspect import counts
from pipeline.views.terminal import facts_table


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what `teacher_dump.plan.Plan` holds, given as plain values."""
    samples = f"{plan['samples']:,} ({counts(plan['statuses'])}) in {plan['units']:,} units"
    tokens = f"{plan['tokens']:,}, {plan['supervised_tokens']:,} of them supervised"
    pilot = f"{plan['pilot_samples']:,} samples, {plan['pilot_supervised_tokens']:,} supervised tokens"
    console.print(facts_table([("samples", samples), ("tokens", tokens), ("pilot", pilot)]))
    for title, table in (_estimators(plan), _masses(plan), _durations(plan)):
        console.print("", Text(title, style="italic"), table)


def _estimators(plan: dict[str, Any]) -> tuple[str, Table]:
    table = Table()
    for name in ("estimator", "entries", "coverage", "bytes per supervised token", "bytes"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for each in plan["estimators"]:
        table.add_row(
            Text(each["estimator"], style="bold" if each["configured"] else ""),
            f"{each['entries_per_supervised_token']:.1f}",
            f"{each['kept_mass']:.4f}" if each["kept_mass"] else "none",
            f"{each['bytes_per_supervised_token']:.1f}",
            decimal(each["bytes"]),
        )
    return "Bytes: all columns and files, within about 10 %; coverage is the probability that is stored exactly", table


def _masses(plan: dict[str, Any]) -> tuple[str, Table]:
    table = Table()
    for k in plan["mass_at_k"]:
        table.add_column(f"k={k}", justify="right")
    table.add_row(*(f"{mass:.4f}" for mass in plan["mass_at_k"].values()))
    return "Coverage by the k most likely tokens", table


def _durations(plan: dict[str, Any]) -> tuple[str, Table]:
    how = "measured here" if plan["measured"] else "as given"
    held = plan["devices_per_worker"]
    worker = "device" if held == 1 else f"{held} devices, which hold it together"
    title = f"Time of the teacher at {plan['tokens_per_second']:,.0f} tokens/s per {worker}, {how}; without loading it"
    table, priced = Table(), plan["durations"][0]["money"] is not None
    for name in ("devices", "hours", *(["money"] if priced else [])):
        table.add_column(name, justify="right")
    for each in plan["durations"]:
        table.add_row(str(each["devices"]), f"{each['hours']:,.2f}", *([f"{each['money']:,.2f}"] if priced else []))
    return title, table
