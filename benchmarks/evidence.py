"""What `reproduce.py` and `frontier.py` are made of: dumps, trainings and evaluations by the commands that users type.

Each is done once: its result is a line that names what it was made from, and another start goes on after it. These
lines name no place, so that another machine can go on after them too.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from results import machine
from storage import find_teacher

from pipeline.processes import end_with_parent
from pipeline.prune import prune
from pipeline.views.report import PACKAGES, quality
from storage_schemas.common.publish import publish
from storage_schemas.config import DumpSection, Estimator
from storage_schemas.reader import Dump
from student_train.checkpoint import Checkpoints
from student_train.metrics import EVENTS, read_events
from student_train.model.student_files import sha256
from student_train.results.evaluate import evaluate
from student_train.results.model_card import package_version
from student_train.summary import SUMMARY
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.dump import run_dump

EVALUATION = 20.0
"""Training steps that an evaluation takes as long as."""
BATCH = 8
SETTINGS = {"precision": "bf16", "global_batch_size": BATCH, "micro_batch_size": 4, "warmup_ratio": 0.1}
"""Of all trainings."""
RESULTS = "results.jsonl"
"""In the directory: a line for each training and each evaluation that is done."""
Result = dict[str, Any]


def parser(prog: str, description: str | None, *, out: str) -> argparse.ArgumentParser:
    """Arguments that both programs take; `out` is the default directory."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    made.add_argument("--train", type=Path, help="conversations to train on, JSONL; default: the demo's")
    made.add_argument("--heldout", type=Path, help="conversations to evaluate on")
    made.add_argument("--out", type=Path, default=Path(out), help="directory of everything")
    made.add_argument("--teacher", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    made.add_argument("--layers", type=int, default=15, help="layers of the student")
    made.add_argument("--smoke", action="store_true", help="a few steps of everything, in two minutes")
    return made


def prepared(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> "tuple[Lab, Path, Path]":
    """Models, and files to train and to evaluate on: those that were named, or the demo's."""
    if (chosen.train is None) != (chosen.heldout is None):
        parser.error("--train and --heldout go together")
    train, heldout = chosen.train, chosen.heldout
    if train is None:
        sys.path.insert(0, "examples/demo")
        import demo

        demo.prepare()
        train, heldout = demo.DATA / "train.jsonl", demo.DATA / "heldout.jsonl"
    about = f"`{parser.prog}` with `--train {train.name} --heldout {heldout.name}`"
    return Lab(chosen.out, teacher=chosen.teacher, layers=chosen.layers, about=about), train, heldout


@dataclass(frozen=True)
class LazyDump:
    """A dump, which is made when it is first opened: where all results are known, none is."""

    url: Path
    made_from: Mapping[str, Any]
    """What determines its content, and names no place."""
    make: Callable[[], object]

    @cached_property
    def opened(self) -> Dump:
        """The dump, made if it is not there."""
        self.make()
        return Dump.open(str(self.url))


class Lab:
    """A directory of results, what they are made of, and how far the work is."""

    def __init__(self, folder: Path, *, teacher: Path, layers: int, about: str) -> None:
        """Make teacher and student, unless they are there; `about` names the command and its data for people."""
        folder = folder.resolve()  # Results name what they were made from: however it was written, it is the same.
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.teacher, self.student = folder, find_teacher(teacher), folder / "student"
        self.layers, self.about = layers, about
        self._results: dict[str, Result] = {}
        file = folder / RESULTS
        if file.is_file():
            self._results = {line["name"]: line for line in map(json.loads, file.read_text().splitlines())}
        prune(str(self.teacher), self.student, layers=layers)
        self._teacher_sha256 = sha256(self.teacher / "model.safetensors")
        self._planned, self._done, self._measured, self._seconds = 0.0, 0.0, 0.0, 0.0

    def plan(self, cost: float) -> None:
        """Announce work, in training steps or what takes as long."""
        self._planned += cost

    def dump(
        self, name: str, data: Path, estimator: Estimator, *, temperatures: Sequence[float] = (1.0,), **dump: Any
    ) -> LazyDump:
        """The teacher's targets of a file of conversations; `dump` are settings of that section."""
        url = self.folder / name
        sources = [SourceSection(path=str(data))]

        def make() -> None:
            if not (url / "SEALED.json").is_file():
                self._say(f"dump {name}")
            run_dump(
                dump=DumpSection(url=str(url), samples_per_unit=20, **dump),
                teacher=TeacherSection(model=str(self.teacher), dtype="bfloat16", device="cpu"),
                corpus=CorpusSection(sources=sources, max_length=512),
                estimator=estimator,
                temperatures=temperatures,
            )

        made_from = {
            "teacher": self._teacher_sha256,
            "data": sha256(data),
            "estimator": estimator.model_dump(mode="json"),
            "temperatures": temperatures,
            **dump,
        }
        return LazyDump(url, made_from, make)

    def measured(self, name: str, dump: LazyDump, work: Callable[[Dump], Result]) -> Result:
        """What `work` finds in a dump."""
        return self._once(f"{name}-of-{dump.url.name}", dump.made_from, cost=0.0, work=lambda: work(dump.opened))

    def train(
        self,
        name: str,
        dump: LazyDump,
        heldout: LazyDump,
        *,
        student: Mapping[str, Any] = {"lora": {"r": 16}},
        loss: Mapping[str, Any] = {"alpha": 0.5},
        **train: Any,
    ) -> Result:
        """Train once; `heldout` is for the page, `student`, `loss` and `train` are sections of the configuration.

        Returns:
            The summary, sizes, and the directory of what came out.
        """
        output, settings = self.folder / name, SETTINGS | train

        def work() -> Result:
            config = {
                "dump": {"url": dump.opened.store.url},
                "heldout": {"url": heldout.opened.store.url},
                "student": {"model": str(self.student), **student},
                "loss": dict(loss),
                "train": {"output": str(output), "save_steps": 50, "save_total_limit": 1, **settings},
            }
            file = self.folder / "configs" / f"{name}.json"
            if not file.is_file() or json.loads(file.read_text()) != config:
                shutil.rmtree(output, ignore_errors=True)
                file.parent.mkdir(exist_ok=True)
                publish(file, json.dumps(config, indent=1))  # JSON is YAML.
            self._command("train", str(file), "--nproc", "1", log=name)
            summary = json.loads((output / SUMMARY).read_text())
            newest = Checkpoints(str(output / "checkpoints")).newest()
            assert newest is not None
            return {
                **{key: summary[key] for key in ("final_record", "loss", "ce", "kl", "peak_rss_bytes")},
                "trained_parameters": sum(t.numel() for _, t in newest.tensors(("master",))),
                "state_bytes": sum(
                    t.numel() * t.element_size() for _, t in newest.tensors(("master", "exp_avg", "exp_avg_sq"))
                ),
                "step_seconds": step_seconds(output),
            }

        made_from = {
            "dump": dump.made_from,
            "student": {"layers": self.layers, **student},
            "loss": dict(loss),
            "train": settings,
        }
        found = self._once(name, made_from, cost=float(train["max_steps"]), work=work)
        # A gigabyte where all weights are trained.
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        return found | {"name": name, "directory": str(output / "final")}

    def untrained(self) -> Result:
        """The student, to be evaluated like what `train` returns."""
        return {"name": "student", "directory": str(self.student), "final_record": None}

    def evaluate(self, name: str, runs: Sequence[Result], heldout: LazyDump) -> Result:
        """What `llm-neo evaluate` says of one training; of two, how far the second differs on the same tokens."""

        def work() -> Result:
            found = [evaluate(run["directory"], heldout.opened, batch_tokens=4096) for run in runs]
            if len(found) == 1:
                return found[0].result().model_dump(mode="json")
            first, second = found
            return {measure: each.model_dump(mode="json") for measure, each in second.less(first).items()}

        made_from = {
            "models": {run["name"]: run["final_record"] for run in runs},
            "heldout": heldout.made_from,
        }
        return self._once(f"{name}-on-{heldout.url.name}", made_from, cost=EVALUATION * len(runs), work=work)

    def made(self, title: str) -> list[str]:
        """How a page of results begins: command, machine, versions, and the day of the last result."""
        days, machines = ({line[key] for line in self._results.values()} for key in ("day", "machine"))
        packages = ", ".join(f"{name} {package_version(name)}" for name in PACKAGES if name != "llm-neo")
        return [
            f"# {title}",
            "",
            f"{self.about}, as [docs/design/evidence.md](../docs/design/evidence.md) lays down.",
            "",
            f"- teacher: {self.teacher.name}; student: {self.layers} of its layers",
            f"- machine: {'; '.join(sorted(machines))}",
            f"- versions: Python {platform.python_version()}, {packages}",
            f"- finished: {max(days)}",
            "",
        ]

    def page(self, runs: Sequence[tuple[Result, Result]], before: Result) -> None:
        """`llm-neo report` of trainings and what `evaluate` says of each, whose summary then says so too.

        Of those that were made elsewhere there is nothing but the result.
        """
        folders = []
        for run, after in runs:
            folder = Path(run["directory"]).parent
            if not (folder / SUMMARY).is_file():
                print(f"{run['name']} was trained elsewhere, and is not on the page")
                continue
            told = json.loads((folder / SUMMARY).read_text()) | quality(before, after)
            publish(folder / SUMMARY, json.dumps(told, indent=1))
            folders.append(str(folder))
        if not folders:
            return
        page = self.folder / "report.html"
        self._command("report", *folders, "--html", str(page), log="report")
        print(f"{page}: these runs side by side")

    def forget(self, name: str) -> None:
        """Remove the weights of a training whose result is known."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _once(self, name: str, made_from: Mapping[str, Any], *, cost: float, work: Callable[[], Result]) -> Result:
        made_from = json.loads(json.dumps(made_from))
        known = self._results.get(name)
        if known is None or known["made_from"] != made_from:
            self._say(name)
            began = time.monotonic()
            result = work()
            self._measured += cost
            self._seconds += time.monotonic() - began
            known = {
                "name": name,
                "day": time.strftime("%Y-%m-%d", time.gmtime()),
                "machine": machine(),
                "made_from": made_from,
                "result": result,
            }
            self._results[name] = known
            publish(self.folder / RESULTS, "".join(f"{json.dumps(line)}\n" for line in self._results.values()))
        self._done += cost
        found: Result = known["result"]
        return found

    def _say(self, what: str) -> None:
        minutes = max(0.0, self._planned - self._done) * self._seconds / max(1e-9, self._measured) / 60
        eta = f", about {minutes:.0f} min left" if self._measured else ""
        share = self._done / self._planned if self._planned else 0.0
        print(f"{time.strftime('%H:%M:%S')} {share:4.0%}  {what}{eta}", flush=True)

    def _command(self, *words: str, log: str) -> None:
        file = self.folder / "logs" / f"{log}.log"
        file.parent.mkdir(exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        with file.open("w") as out:
            argv = [sys.executable, "-P", "-m", "pipeline.entry", *words]
            # Stopped with this program, it goes on from its last checkpoint when that is started again.
            code = subprocess.run(
                argv, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads, preexec_fn=end_with_parent
            ).returncode
        if code:
            sys.stderr.write("".join(file.read_text().splitlines(keepends=True)[-25:]))
            raise SystemExit(code)


def split(file: Path, folder: Path, *, held: int, limit: int | None = None) -> tuple[Path, Path]:
    """Conversations to train on, and the last ones, `held` or a fifth of them, on which settings are chosen."""
    lines = _lines(file)[:limit]
    cut = len(lines) - min(held, len(lines) // 5)
    return _written(folder / "train.jsonl", lines[:cut]), _written(folder / "tuning.jsonl", lines[cut:])


def first(file: Path, target: Path, count: int) -> Path:
    """The first conversations of a file, in a file of their own."""
    return _written(target, _lines(file)[:count])


def _lines(file: Path) -> list[str]:
    return [f"{line}\n" for line in file.read_text().split("\n") if line.strip()]


def _written(target: Path, lines: Sequence[str]) -> Path:
    if not target.is_file() or target.read_text() != "".join(lines):
        publish(target, "".join(lines))
    return target


def step_seconds(output: Path) -> list[float]:
    """Of each step of a training, by its events: the time to write a checkpoint lies outside of most."""
    return [round(event.tokens / event.tokens_per_second, 3) for event in read_events(output / EVENTS)]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}"


def interval(found: tuple[float, tuple[float, float] | None]) -> str:
    """A difference with its interval, in words."""
    mean, ends = found
    return f"{mean:+.4f}" + (f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else "")
