"""How far a dump and a run are, for people: tables on a terminal, one line on a pipe."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live

from pipeline.status import DumpStatus, RunStatus, Status
from pipeline.views.terminal import facts_table
from storage_schemas.common.secrets import visible

_PATIENCE = 10
"""A watch rests so many times longer than it takes to look."""


def watch(look: Callable[[], Status], console: Console, *, seconds: float, as_json: bool) -> None:
    """Look again every so many seconds until nothing will change: on a terminal in place, else a line for each look.

    A dump whose listing takes long is looked at less often.
    """
    in_place = console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as screen:
        while True:
            began = time.monotonic()
            status = look()
            if screen is not None:
                screen.update(tables(status), refresh=True)
            else:
                print(
                    json.dumps(status.model_dump(mode="json"), sort_keys=True) if as_json else line(status), flush=True
                )
            if status.done:
                return
            time.sleep(max(seconds, _PATIENCE * (time.monotonic() - began)))


def tables(status: Status) -> RenderableType:
    """For people who read."""
    told = [(title, dump.url, dump_lines(dump)) for title, dump in status.dumps()]
    if status.run is not None:
        told.append(("run", status.run.output, run_lines(status.run)))
    tables = [facts_table([(title, visible(place)), *lines]) for title, place, lines in told]
    return Group(tables[0], *(part for table in tables[1:] for part in ("", table)))


def line(status: Status) -> str:
    """All of it in one line."""
    parts = []
    for title, dump in status.dumps():
        name = f"dump {dump.url}" if dump in status.others else title
        parts.append(f"{name}: {_dump_state(dump)}{_rest(dump)}")
    if (run := status.run) is not None:
        loss = "" if run.loss is None else f", loss {run.loss:.4f}"
        left = "" if run.finished or run.eta_seconds is None else f", {duration(run.eta_seconds)} left"
        parts.append(f"run: {_run_state(run)}{loss}{left}")
    return "; ".join(parts)


def dump_lines(dump: DumpStatus) -> list[tuple[str, str]]:
    """(name, value) of what there is to say."""
    lines = [("state", _dump_state(dump))]
    if not dump.begun:
        return lines
    about = "about " if dump.estimated else ""
    lines.append(("samples", f"{dump.samples_done:,} of {dump.samples:,}"))
    lines.append(("tokens", f"{about}{dump.tokens:,}, {dump.supervised_tokens:,} of them supervised"))
    lines.append(("bytes", f"{about}{decimal(dump.bytes)}"))
    if speed := _rest(dump).removeprefix(", "):
        lines.append(("speed", speed))
    if dump.seconds_since_last_unit is not None and not dump.stalled:
        lines.append(("last unit", f"{duration(dump.seconds_since_last_unit)} ago"))
    return lines


def _dump_state(dump: DumpStatus) -> str:
    if not dump.begun or dump.units is None:
        return "not begun"
    return f"{'sealed, ' if dump.sealed else ''}{dump.units_done:,} of {dump.units:,} units"


def _rest(dump: DumpStatus) -> str:
    """What goes on in an unfinished dump."""
    if dump.stalled and dump.seconds_since_last_unit is not None:
        return f", no unit in the last {duration(dump.seconds_since_last_unit)}"
    if dump.units_per_minute is None or dump.tokens_per_second is None:
        return ""
    left = "" if dump.eta_seconds is None else f", {duration(dump.eta_seconds)} left"
    return f", {dump.units_per_minute:,.2f} units/min, {dump.tokens_per_second:,.0f} tokens/s{left}"


def run_lines(run: RunStatus) -> list[tuple[str, str]]:
    """(name, value) of what there is to say."""
    lines = [("state", _run_state(run))]
    if run.loss is not None:
        lines.append(("loss", f"{run.loss:.4f}, cross-entropy {run.ce:.4f}, divergence {run.kl:.4f}"))
        for name, of in (run.dumps or {}).items():
            lines.append((f"  {name}", f"{of.loss:.4f}, cross-entropy {of.ce:.4f}, divergence {of.kl:.4f}"))
        left = "" if run.finished or run.eta_seconds is None else f", {duration(run.eta_seconds)} left"
        lines.append(("speed", f"{run.tokens_per_second:,.0f} tokens/s{left}"))
    if run.seconds_since_last_step is not None:
        lines.append(("last step", f"{duration(run.seconds_since_last_step)} ago"))
    if run.begun:
        ago = "" if run.seconds_since_checkpoint is None else f", {duration(run.seconds_since_checkpoint)} ago"
        lines.append(("checkpoint", "none yet" if run.checkpoint_step is None else f"step {run.checkpoint_step}{ago}"))
    return lines


def _run_state(run: RunStatus) -> str:
    if not run.begun:
        return "not begun"
    return f"{'finished, ' if run.finished else ''}step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")


def duration(seconds: float) -> str:
    """`0:12:05`."""
    return str(timedelta(seconds=round(seconds)))
