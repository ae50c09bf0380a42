"""Both stages on one machine, with evaluation, merge and report. Every step is skipped once its result lies there.

Each step that needs a model is a process of its own: its memory is free before the next one starts, which matters
more on one machine than the seconds it takes to import torch again. What a step found is kept as one JSON file in
`steps/` of the run directory, written when the step is done.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, need
from pipeline.launch import Nodes
from pipeline.processes import dump_workers, forwarded_signals, train_workers
from pipeline.report import QUALITY, write_report
from storage_schemas.errors import DataError, Exit, NeoError
from storage_schemas.verify import verify

log = logging.getLogger(__name__)


class StepFailedError(NeoError):
    """A step has failed and has printed why."""

    def __init__(self, step: str, code: int) -> None:
        self.exit_code = Exit(code) if code in tuple(Exit) else Exit.BUG
        super().__init__(f"the step `{step}` ended with exit code {int(self.exit_code)}; its message says why")


def run_pipeline(config: Config, path: Path, overrides: Sequence[str], *, workers: int, nproc: int) -> dict[str, Any]:
    """Dump, verify, evaluate, train, evaluate, merge, report.

    Args:
        config: the loaded configuration.
        path: the file it was loaded from, which the steps load again.
        overrides: as on the command line.
        workers: processes of stage one.
        nproc: ranks of stage two.

    Returns:
        What summary.json holds.
    """
    train, student = need(config.train, "train", "run"), need(config.student, "student", "run")
    teacher = need(config.teacher, "teacher", "run")
    heldout = need(config.heldout, "heldout", "run")
    steps = Steps(train.output / "steps", config)
    final, merged = train.output / "final", train.output / "merged"

    dumped = steps.do("dump", lambda: _dump(path, overrides, workers), redo=lambda found: not _sealed(config))
    for url in (config.dump.url, heldout.url):
        steps.do(f"verify-{hashlib.sha256(url.encode()).hexdigest()[:8]}", lambda url=url: _verify(config, url))
    before = steps.do("before", lambda: _evaluate(config, student.model, heldout.url))
    _check("train", train_workers(config, nproc=nproc, nodes=Nodes()))
    (train.output / "config.yaml").write_text(config.to_yaml())
    trained = json.loads((train.output / "summary.json").read_text())
    after = steps.do("after", lambda: _evaluate(config, str(final), heldout.url))
    if train.lora and not (merged / "config.json").is_file():
        _check("merge", _child(["merge", str(final), str(merged)])[0])

    summary = trained | {f"{QUALITY[name]}_before": before[name] for name in QUALITY}
    summary |= {f"{QUALITY[name]}_after": after[name] for name in QUALITY}
    summary |= {
        "dump_tokens_per_second": dumped["tokens_per_second"],
        "train_tokens_per_second": trained["tokens_per_second"],
        "bytes_per_supervised_token": dumped["bytes_per_supervised_token"],
        "heldout_supervised_tokens": after["supervised_tokens"],
        "train_steps": trained["steps"],
        "teacher": teacher.model,
        "student": student.model,
        "adapter": str(final) if train.lora else None,
        "merged": str(merged if train.lora else final),
        "report": str(train.output / "report.md"),
    }
    write_report(Path(summary["report"]), config, summary, dumped)
    _replace(train.output / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")
    Console().print(result_table(summary))
    Console().print(f"report: {summary['report']}", soft_wrap=True)
    return summary


class Steps:
    """What was done before, for one configuration."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._of = hashlib.sha256(config.to_yaml().encode()).hexdigest()

    def do(
        self, name: str, work: Callable[[], dict[str, Any]], *, redo: Callable[[dict[str, Any]], bool] = lambda _: False
    ) -> dict[str, Any]:
        """The result of `work`, now or from an earlier call with the same configuration."""
        file = self._folder / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept["configuration"] == self._of and not redo(kept["result"]):
                log.info("%s: done before", name)
                result: dict[str, Any] = kept["result"]
                return result
        log.info("%s: starting", name)
        result = work()
        self._folder.mkdir(parents=True, exist_ok=True)
        _replace(file, json.dumps({"configuration": self._of, "result": result}, indent=2, sort_keys=True) + "\n")
        return result


def result_table(summary: dict[str, Any]) -> Table:
    """Before and after, for a terminal."""
    table = Table(title=f"{summary['heldout_supervised_tokens']:,} held-out supervised tokens, against the teacher")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"kl": "KL(teacher || student), nats", "ce": "cross-entropy, nats", "top1": "same most likely token"}
    for key, name in names.items():
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        if before is None or after is None:
            continue
        form = "{:.1%}" if key == "top1" else "{:.3f}"
        table.add_row(name, form.format(before), form.format(after))
    return table


def _sealed(config: Config) -> bool:
    from storage_schemas.reader import Dump

    urls = [config.dump.url] + ([config.heldout.url] if config.heldout else [])
    try:
        return all(Dump.open(url, options=config.dump.storage_options).sealed() for url in urls)
    except DataError:
        return False


def _dump(path: Path, overrides: Sequence[str], workers: int) -> dict[str, Any]:
    code, summary = dump_workers(path, overrides, workers)
    _check("dump", code)
    return summary


def _verify(config: Config, url: str) -> dict[str, Any]:
    report = verify(url, options=config.dump.storage_options)
    if not report.ok:
        raise DataError(f"the dump {url} is damaged", got="; ".join(report.errors[:5]), fix="dump again elsewhere")
    return report.model_dump(mode="json")


def _evaluate(config: Config, model: str, url: str) -> dict[str, Any]:
    store = [word for key, value in config.dump.storage_options.items() for word in ("--store", f"{key}={value}")]
    code, text = _child(["evaluate", "--model", model, "--dump", url, "--json", *store])
    _check("evaluate", code)
    found: dict[str, Any] = json.loads(text)
    return found


def _child(arguments: Sequence[str]) -> tuple[int, str]:
    """Run one of our own commands; its exit code and standard output."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-m", "pipeline.cli", *arguments], stdout=output)
        with forwarded_signals(process.send_signal):
            code = process.wait()
        output.seek(0)
        return code, output.read()


def _check(step: str, code: int) -> None:
    if code:
        raise StepFailedError(step, code)


def _replace(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old or the new content."""
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(text)
    os.replace(staged, path)
