"""Both stages on one machine, with evaluation, merge and report. What is done already is not done again.

Each step that needs a model is a process of its own: its memory, and its GPU, are free before the next one starts,
which is worth more on one machine than the seconds it takes to import torch again. What a step found is kept as one
JSON file in `steps/` of the run directory, with the inputs it was found from; other inputs make it run again.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, need
from pipeline.launch import Nodes, Placement
from pipeline.pairing import refuse_pair
from pipeline.processes import Command, dump_group, dump_workers, run_together, train_workers
from pipeline.views.report import quality, remarks, report
from storage_schemas.common.errors import DataError, NeoError
from storage_schemas.common.exits import combined, known, tell_deaths
from storage_schemas.common.publish import publish
from storage_schemas.reader import Dump
from storage_schemas.records import count_statuses
from storage_schemas.rows import OK
from storage_schemas.verify import verify
from student_train.config import StudentSection, sections_of
from student_train.metrics import EVENTS, read_events
from student_train.results.model_card import CARD, Evaluation, model_card
from student_train.summary import read_summary, write_summary

log = logging.getLogger(__name__)

_DOING = {
    "dump": "running the teacher over the corpus",
    "verify": "verifying the dump",
    "verify-heldout": "verifying the held-out dump",
    "before": "evaluating the student on the held-out samples before training",
    "after": "evaluating the trained student on the held-out samples",
    "merge": "merging the adapter into its base model",
}
"""What the log says of each step."""


class StepFailedError(NeoError):
    """A step has failed and has printed why."""

    def __init__(self, step: str, code: int) -> None:
        self.exit_code = known(code)
        super().__init__(f"the step `{step}` ended with exit code {int(self.exit_code)}; its message says why")


def run_pipeline(
    config: Config, path: Path, overrides: Sequence[str], *, workers: int, nproc: int, console: Console
) -> dict[str, Any]:
    """Dump, verify, evaluate, train, evaluate, merge, report; returns what summary.json holds.

    Stage one's `workers` load the configuration again, from `path` and `overrides`; stage two has `nproc` ranks.
    """
    train, student = need(config.train, "train", "run"), need(config.student, "student", "run")
    teacher, heldout = need(config.teacher, "teacher", "run"), need(config.heldout, "heldout", "run")
    need(config.corpus, "corpus", "run")
    final, merged = train.output / "final", train.output / "merged"
    steps = Steps(train.output / "steps")

    sealed = _sealed(config, config.dump.url) and _sealed(config, heldout.url)
    if not sealed:
        from student_train.training_run import refuse_early

        refuse_early(student, train)
        refuse_pair(config)
    known = steps.last("dump")
    dumped = steps.do(
        "dump", lambda: _dump(config, path, overrides, workers, nproc, known), _dump_inputs(config), redo=not sealed
    )
    against = {"dump": _sealed(config, heldout.url)}
    steps.do("verify", lambda: _verify(config, config.dump.url), {"dump": _sealed(config, config.dump.url)})
    steps.do("verify-heldout", lambda: _verify(config, heldout.url), against)
    trust = ["--trust-remote-code"] if student.trust_remote_code else []
    pinned = ["--revision", student.revision] if student.revision and not Path(student.model).is_dir() else []
    before_inputs = against | {"student": _state(student.model), "revision": student.revision, "trust": trust}
    before = steps.do("before", lambda: _evaluate(config, student.model, heldout.url, trust, pinned), before_inputs)

    # Whether training is done, its workers know best: they compare the checkpoint with the dump and the configuration.
    _check("train", train_workers(config, nproc=nproc, nodes=Nodes(), stdout=2 if console.stderr else None))
    publish(train.output / "config.yaml", config.to_yaml(), private=True)

    trained_inputs = before_inputs | {"final": _state(str(final))}
    # An adapter does not say whose code is run.
    named = [*trust, "--base", _folder(student)] if trust and train.lora else trust
    after = steps.do("after", lambda: _evaluate(config, str(final), heldout.url, named), trained_inputs)
    events = read_events(train.output / EVENTS)
    evaluated = Evaluation(url=heldout.url, before=before, after=after)
    places = sections_of(config.dump, train)
    trained_on = [Dump.open(place.url, options=place.storage_options) for place in places]
    card = model_card(trained_on, student, config.loss, train, events, folder=final, evaluation=evaluated)
    if not (final / CARD).is_file() or (final / CARD).read_text(encoding="utf-8") != card:
        publish(final / CARD, card)
    if train.lora:
        there = (merged / "config.json").is_file()
        steps.do("merge", lambda: _merge(final, merged, named), trained_inputs, redo=not there)

    trained = read_summary(train.output)
    assert trained is not None
    summary = trained.model_dump(mode="json") | quality(before, after)
    summary |= {
        "dump_tokens_per_second": dumped["tokens_per_second"],
        "train_tokens_per_second": trained.tokens_per_second,
        "bytes_per_supervised_token": dumped["bytes_per_supervised_token"],
        "heldout_supervised_tokens": after["supervised_tokens"],
        "heldout_dump": dumped["heldout"]["fingerprint"],
        "train_steps": trained.steps,
        "train_samples": sum(count_statuses(one.read_records()).get(OK, 0) for one in trained_on),
        "teacher": teacher.model,
        "student": student.model,
        "adapter": str(final) if train.lora else None,
        "merged": str(merged if train.lora else final),
        "report": str(train.output / "report.md"),
    }
    publish(Path(summary["report"]), report(config, summary, dumped), private=True)
    write_summary(train.output, summary)
    console.print(result_table(summary))
    for remark in remarks(config, summary):
        console.print(remark, soft_wrap=True, highlight=False)
    console.print(f"report: {summary['report']}", soft_wrap=True, highlight=False)
    return summary


class Steps:
    """Results of earlier steps, and what each was made from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def last(self, name: str) -> dict[str, Any] | None:
        """The latest result of a step, whatever it was made from."""
        file = self._folder / f"{name}.json"
        return json.loads(file.read_text())["result"] if file.is_file() else None

    def do(
        self, name: str, work: Callable[[], dict[str, Any]], inputs: Mapping[str, Any], *, redo: bool = False
    ) -> dict[str, Any]:
        """The result of `work`, now or from an earlier call with the same inputs: all that it depends on, as JSON.

        With `redo` it is done whatever was found before.
        """
        doing, file = _DOING.get(name, name), self._folder / f"{name}.json"
        of = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        if not redo and file.is_file() and (kept := json.loads(file.read_text()))["inputs"] == of:
            log.info("%s: done before", doing)
            found: dict[str, Any] = kept["result"]
            return found
        log.info("%s", doing)
        result = work()
        self._folder.mkdir(parents=True, exist_ok=True)
        publish(file, json.dumps({"inputs": of, "result": result}, indent=2, sort_keys=True) + "\n")
        return result


def result_table(summary: dict[str, Any]) -> Table:
    """Before and after, for a terminal."""
    table = Table(title=f"{summary['heldout_supervised_tokens']:,} held-out supervised tokens")
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


def _sealed(config: Config, url: str) -> str | None:
    """A hash of all that a sealed dump holds; None while it is not sealed or not there."""
    try:
        seal = Dump.open(url, options=config.dump.storage_options).read_seal()
    except DataError:
        return None
    return None if seal is None else f"{seal.fingerprint}:{seal.records_sha256}"


def _dump_inputs(config: Config) -> dict[str, Any]:
    """What decides the content of both dumps; stage one itself compares it with what lies there."""
    sections = ("dump", "teacher", "estimator", "temperatures", "corpus", "heldout")
    described = config.model_dump(mode="json", include=set(sections))
    # Not said, it is left out: a run that was begun before there was such a setting is still the same one.
    if config.heldout and config.heldout.estimator is None:
        del described["heldout"]["estimator"]
    sources = [source.path for part in (config, config.heldout_config()) for source in part.corpus.sources]  # type: ignore[union-attr]
    template = [str(config.corpus.template_file)] if config.corpus and config.corpus.template_file else []
    return described | {"files": {path: _state(path) for path in [described["teacher"]["model"], *sources, *template]}}


def _state(path: str) -> Any:
    """Sizes and times of a file, or of all files in a directory; null for what is not here, such as a hub id.

    A card decides nothing: it is written again once there is an evaluation to tell of.
    """
    here = Path(path)
    files = sorted(file for file in here.rglob("*") if file != here / CARD) if here.is_dir() else [here]
    return [
        [str(file.relative_to(here)), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
    ] or None


def _folder(student: StudentSection) -> str:
    """Where its files lie: a student on the hub was fetched to be trained."""
    from transformers.utils import cached_file

    return str(Path(str(cached_file(student.model, "config.json", revision=student.revision))).parent)


def _dump(
    config: Config, path: Path, overrides: Sequence[str], workers: int, nproc: int, known: dict[str, Any] | None
) -> dict[str, Any]:
    if need(config.teacher, "teacher", "run").grouped:
        code, summary = dump_group(path, overrides, nproc, node=Placement(0, 1))
    else:
        code, summary = dump_workers(path, overrides, workers, node=Placement(0, 1))
    _check("dump", code)
    # A call that found nothing left to do has measured no speed; the one that did the work has.
    if summary["tokens_per_second"] is None and known is not None and known["fingerprint"] == summary["fingerprint"]:
        summary["tokens_per_second"] = known["tokens_per_second"]
    return summary


def _verify(config: Config, url: str) -> dict[str, Any]:
    found = verify(url, options=config.dump.storage_options)
    if not found.ok:
        raise DataError(f"the dump {url} is damaged", got="; ".join(found.errors[:5]), fix="dump again elsewhere")
    return dict(found.model_dump(mode="json"))


def _evaluate(config: Config, model: str, url: str, *more: Sequence[str]) -> dict[str, Any]:
    store = [word for key, value in config.dump.storage_options.items() for word in ("--store", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "evaluation.json"
        _child("evaluate", ["--model", model, "--dump", url, "--result", str(result), *store, *chain(*more)])
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _merge(final: Path, merged: Path, more: Sequence[str]) -> dict[str, Any]:
    # Made from another adapter, or by nobody knows whom: the directory is ours.
    shutil.rmtree(merged, ignore_errors=True)
    _child("merge", [str(final), str(merged), *more])
    return {}


def _child(command: str, arguments: Sequence[str]) -> None:
    """Run one of our own commands."""
    argv = [sys.executable, "-P", "-m", "pipeline.entry", command, *arguments]
    codes = run_together([Command(argv, {}, subprocess.DEVNULL)])
    tell_deaths(codes, [f"llm-neo {command}"])
    _check(command, combined(codes))


def _check(step: str, code: int) -> None:
    if code:
        raise StepFailedError(step, code)
