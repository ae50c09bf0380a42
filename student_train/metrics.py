"""What a run says while it trains: events.jsonl, a progress bar or log lines, and the trackers of `report_to`."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from storage_schemas.common.errors import MismatchError, TemporaryError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.publish import publish
from student_train.heldout import HeldoutResult

log = logging.getLogger(__name__)

EVENTS = "events.jsonl"
LINE_SECONDS = 5.0
"""Seconds between two log lines where there is no terminal, at least."""


class Event(FrozenModel):
    """One line of events.jsonl: the steps since the line before."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: int
    """Optimizer steps done."""
    epoch: float
    """Passes over the dump done."""
    loss: float
    """(1 - alpha) * CE + alpha * T^2 * KL per supervised token, nats, as in `ce` and `kl`."""
    ce: float
    """Cross-entropy."""
    kl: float
    """The divergence that `loss.divergence` names, at T, without T^2; 0 for the arms without one."""
    learning_rate: float
    """Of the last of these steps."""
    grad_norm: float
    """Of the last of these steps, before clipping."""
    supervised_tokens: int
    """Of these steps, over all ranks."""
    tokens_per_second: float
    """Tokens that went through the student, over all ranks, padding not counted, per second of wall time."""
    data_wait_seconds: float
    """Of these steps: how long the slowest rank waited for data."""
    eta_seconds: float
    """Estimated time to the last step."""


PREFIX = "eval_"
"""Of the fields of an evaluation in events.jsonl, but for `step`, as in the log history of transformers' Trainer."""


class Meter:
    """Adds up steps until the next event. Means are per supervised token, so that steps weigh what they hold."""

    def __init__(self, *, start: int, stop: int, steps_per_epoch: int) -> None:
        """Begin after `start` of `stop` steps."""
        self._first, self._stop, self._steps_per_epoch = start, stop, steps_per_epoch
        self._begin = time.monotonic()
        self.paused = 0.0
        """Seconds since the beginning that were no training."""
        self.total_tokens = 0
        """Tokens since the beginning."""
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._loss = self._ce = self._kl = self._wait = 0.0
        self._steps = self._tokens = self._supervised = 0

    @property
    def empty(self) -> bool:
        """Whether no step was added since the last event."""
        return not self._steps

    @property
    def seconds(self) -> float:
        """Of training since the beginning."""
        return time.monotonic() - self._begin - self.paused

    def pause(self, seconds: float) -> None:
        """The last so many seconds were no training."""
        self.paused += seconds
        self._since += seconds

    def add(self, *, loss: float, ce: float, kl: float, supervised: int, tokens: int, wait: float) -> None:
        """One step: sums over its supervised tokens, its tokens, and seconds of waiting for data."""
        self._loss, self._ce, self._kl = self._loss + loss, self._ce + ce, self._kl + kl
        self._steps += 1
        self._wait += wait
        self._tokens += tokens
        self._supervised += supervised
        self.total_tokens += tokens

    def event(self, step: int, *, learning_rate: float, grad_norm: float) -> Event:
        """The event after `step` steps; starts the next one."""
        supervised, elapsed = max(1, self._supervised), max(1e-9, time.monotonic() - self._since)
        event = Event(
            step=step,
            epoch=step / self._steps_per_epoch,
            loss=self._loss / supervised,
            ce=self._ce / supervised,
            kl=self._kl / supervised,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            supervised_tokens=self._supervised,
            tokens_per_second=self._tokens / elapsed,
            data_wait_seconds=self._wait,
            eta_seconds=(self.seconds + self.paused) / max(1, step - self._first) * (self._stop - step),
        )
        self._reset()
        return event


class Sink(Protocol):
    """Somewhere that events go."""

    def write(self, event: Event) -> None:
        """Take one event."""

    def evaluated(self, result: HeldoutResult) -> None:
        """Take the result of one evaluation."""

    def close(self) -> None:
        """No more will come."""


class EventLog:
    """events.jsonl."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Open it, dropping what was logged beyond step `after`: those steps are trained again.

        Raises:
            TemporaryError: the file cannot be written.
        """
        self._path = path
        try:
            kept = [line for line in _lines(path) if line.step <= after]
            publish(path, "".join(_line(what) for what in kept))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, event: Event) -> None:
        """Append and flush, so that others can follow."""
        self._append(event)

    def evaluated(self, result: HeldoutResult) -> None:
        """Append an evaluation."""
        self._append(result)

    def _append(self, what: Event | HeldoutResult) -> None:
        try:
            self._file.write(_line(what))
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> list[Event]:
    """All events of a run, but for its evaluations. A line that is torn or damaged is left out with a warning."""
    return [line for line in _lines(path) if isinstance(line, Event)]


def _line(what: Event | HeldoutResult) -> str:
    fields = what.model_dump()
    if isinstance(what, HeldoutResult):
        fields = {name if name == "step" else f"{PREFIX}{name}": value for name, value in fields.items()}
    return json.dumps(fields) + "\n"


def _lines(path: Path) -> list[Event | HeldoutResult]:
    """What `_line` has written; what cannot be read is left out, since these lines decide nothing."""
    if not path.is_file():
        return []
    found: list[Event | HeldoutResult] = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            fields = json.loads(text)
            kind = HeldoutResult if f"{PREFIX}ce" in fields else Event
            found.append(kind.model_validate({name.removeprefix(PREFIX): value for name, value in fields.items()}))
        except (ValueError, RecursionError, AttributeError, TypeError):
            log.warning("line %d of %s is torn or damaged, and is left out", number, path)
    return found


class Bar:
    """A progress bar on a terminal."""

    def __init__(self, console: Console, *, start: int, stop: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(TextColumn("train"), *columns, console=console)
        self._task = self._progress.add_task("", total=stop, completed=start)
        self._progress.start()

    def write(self, event: Event) -> None:
        """Move on."""
        text = f"loss {event.loss:.4f}  ce {event.ce:.4f}  kl {event.kl:.4f}  {event.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=event.step, description=text)

    def evaluated(self, result: HeldoutResult) -> None:
        """A line above the bar."""
        self._progress.console.print(_evaluated(result), highlight=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Lines:
    """One line every few seconds, and one for the first and the last step."""

    def __init__(self, console: Console, *, stop: int) -> None:
        self._console, self._stop = console, stop
        self._next = 0.0

    def write(self, event: Event) -> None:
        """Print a line, if it is time."""
        if time.monotonic() < self._next and event.step < self._stop:
            return
        self._next = time.monotonic() + LINE_SECONDS
        self._console.print(
            f"train step {event.step}/{self._stop}  loss {event.loss:.4f}  ce {event.ce:.4f}  kl {event.kl:.4f}  "
            f"lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tokens/s  "
            f"eta {_duration(event.eta_seconds)}",
            highlight=False,
            soft_wrap=True,
        )

    def evaluated(self, result: HeldoutResult) -> None:
        """A line."""
        self._console.print(_evaluated(result), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to do."""


Values = dict[str, float]
Told = tuple[Callable[[Values, int], object], Callable[[], object]]
"""Of a tracker: what takes the values of a step, and what ends it."""


def _tensorboard(output: Path, *, start: int) -> Told:
    """Scalars in `tensorboard/` of the run directory."""
    from torch.utils.tensorboard import SummaryWriter

    # Steps after `start` that an earlier attempt has told are hidden.
    writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)

    def write(values: Values, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(output: Path, config: Mapping[str, Any], name: str) -> Told:
    """A run of Weights & Biases that is continued when training is."""
    run: Any = import_module("wandb").init(
        dir=str(output), id=name, name=output.name, resume="allow", config=dict(config)
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _monitor(monitor: Any) -> Told:
    """One of DeepSpeed's own, with a run's events in place of the little that DeepSpeed tells it."""
    return lambda values, step: monitor.write_events([(*pair, step) for pair in values.items()]), lambda: None


class Tracker:
    """A sink that training does not depend on: once it fails, it is told so once and left alone."""

    def __init__(self, name: str, opened: Callable[[], Told]) -> None:
        self._name = name
        self._told: Told | None = None
        with self._forgiven():
            self._told = opened()

    def write(self, event: Event) -> None:
        """Pass all fields on, unless it has failed before."""
        self._tell("train", event.model_dump())

    def evaluated(self, result: HeldoutResult) -> None:
        """Pass its numbers on."""
        self._tell("eval", result.model_dump(exclude={"dump", "temperature"}, exclude_none=True))

    def _tell(self, group: str, values: Values) -> None:
        with self._forgiven():
            if self._told is not None:
                step = int(values.pop("step"))
                self._told[0]({f"{group}/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        """Close it, unless it has failed before."""
        with self._forgiven():
            if self._told is not None:
                self._told[1]()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._told = None
            log.warning(
                "%s logging failed and is off for this run; metrics continue in %s: %r", self._name, EVENTS, error
            )


class Reporter:
    """All sinks of a run, events.jsonl first."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, event: Event) -> None:
        """Tell every sink."""
        for sink in self._sinks:
            sink.write(event)

    def evaluated(self, result: HeldoutResult) -> None:
        """Tell every sink of an evaluation."""
        for sink in self._sinks:
            sink.evaluated(result)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_reporter(
    output: Path,
    report_to: Sequence[str],
    *,
    start: int,
    stop: int,
    config: Mapping[str, Any],
    name: str,
    monitors: Mapping[str, Callable[[], Any]] | None = None,
) -> Reporter:
    """The sinks of the rank that reports.

    Args:
        output: run directory.
        report_to: trackers beside events.jsonl.
        start: steps done.
        stop: steps in all.
        config: shown by trackers that can.
        name: identity of the run, the same when it is resumed.
        monitors: DeepSpeed's own, by the name of their section: how each is opened.
    """
    console = Console()
    sinks: list[Sink] = [EventLog(output / EVENTS, after=start)]
    sinks.append(Bar(console, start=start, stop=stop) if console.is_terminal else Lines(console, stop=stop))
    if "tensorboard" in report_to:
        sinks.append(Tracker("tensorboard", lambda: _tensorboard(output, start=start)))
    if "wandb" in report_to:
        sinks.append(Tracker("wandb", lambda: _wandb(output, config, name)))
    for section, opened in (monitors or {}).items():
        sinks.append(Tracker(f"DeepSpeed's {section}", lambda opened=opened: _monitor(opened())))  # type: ignore[misc]
    return Reporter(sinks)


def refuse_missing_trackers(report_to: Sequence[str]) -> None:
    """Raise MismatchError if a tracker's package is not installed."""
    for tracker in report_to:
        if find_spec(tracker) is None:  # Also the name of our extra.
            raise MismatchError(
                f"train.report_to names {tracker}, which is not installed",
                got=f"no package {tracker}",
                expected=f"train.report_to: {list(report_to)} to be usable",
                fix=f"pip install 'llm-neo[{tracker}]', or take it out of train.report_to",
            )


def _evaluated(result: HeldoutResult) -> str:
    top1 = "" if result.top1_agreement is None else f"  top-1 {result.top1_agreement:.1%}"
    least, most = result.acceptance_rate_min, result.acceptance_rate_max
    return (
        f"held-out samples after step {result.step}: kl {result.kl:.4f}  ce {result.ce:.4f}{top1}  "
        f"acceptance {least:.1%} to {most:.1%}  ({result.supervised_tokens:,} tokens in {result.seconds:.1f} s)"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _cannot_write(path: Path, error: OSError) -> TemporaryError:
    return TemporaryError(
        f"cannot write {path}",
        got=error.strerror,
        fix="free space or repair the file system, then run the same command again",
    )
