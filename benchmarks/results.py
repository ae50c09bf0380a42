"""What benchmarks share: how long and how much something takes, the table of what was found, and the machine."""

import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_AT_LEAST = ("tokens/s", "tokens per second", "loader / datasets")
"""In the names of rows of which more is better."""


def quiet() -> None:
    """What libraries say is no result."""
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def resident(which: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def table(file: Path, rows: Mapping[str, float], goals: Mapping[str, float]) -> list[str]:
    """Rows and goals as Markdown; the file gets them as `{row: {"value": x, "goal": y}}`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {name: {"value": value, "goal": goals.get(name)} for name, value in rows.items()}
    file.write_text(json.dumps(found, indent=2) + "\n")
    cells = [
        (name.replace("|", r"\|"), shown(value), shown(goals[name]) if name in goals else "")  # A bar would end it.
        for name, value in rows.items()
    ]
    return ["| | value | goal |", "|---|---:|---:|", *(f"| {' | '.join(cell)} |" for cell in cells)]


def refuse_missed(rows: Mapping[str, float], goals: Mapping[str, float]) -> None:
    """Exit with 1 if a goal is missed: speeds shall be at least theirs, all else at most."""
    missed = []
    for name, goal in goals.items():
        more = any(sign in name for sign in _AT_LEAST)
        if name not in rows or (rows[name] < goal if more else rows[name] > goal):
            missed.append(name)
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


def shown(value: float) -> str:
    """Short, without losing what matters."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """Architecture, model of the processor, cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{platform.machine()}, {name}, {os.cpu_count()} cores"


def versions(*packages: str) -> str:
    """Of Python and of those packages that are installed."""
    named = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    return ", ".join([f"Python {platform.python_version()}", *named])
