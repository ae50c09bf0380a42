"""What a run says while it trains: events.jsonl, a progress bar or log lines, and the trackers of `report_to`."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from storage_schemas.common.errors import MismatchError, TemporaryError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.publish import publish

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


class Step(NamedTuple):
    """What a step was, over all ranks."""

    loss: float
    """Sum over its supervised tokens, as the next two."""
    ce: float
    kl: float
    supervised: int
    """Supervised tokens."""
    tokens: int
    """All tokens that are not padding."""
    wait: float
    """Seconds that the slowest rank waited for data."""
    learning_rate: float
    grad_norm: float


class Meter:
    """Adds up steps until the next event. Means are per supervised token, so that steps weigh what they hold."""

    def __init__(self, *, start: int, stop: int, steps_per_epoch: int) -> None:
        """Begin after `start` of `stop` steps."""
        self._first, self._stop, self._steps_per_epoch = start, stop, steps_per_epoch
        self._begin = self._since = time.monotonic()
        self.total_tokens, self.total_wait = 0, 0.0
        """Tokens, and seconds of waiting for data, since the beginning."""
        self._steps: list[Step] = []

    @property
    def empty(self) -> bool:
        """Whether no step was added since the last event."""
        return not self._steps

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.monotonic() - self._begin

    def add(self, step: Step) -> None:
        """One step."""
        self._steps.append(step)
        self.total_tokens += step.tokens
        self.total_wait += step.wait

    def event(self, done: int) -> Event:
        """The event after `done` steps; starts the next one."""
        steps, self._steps = self._steps, []
        since, self._since = self._since, time.monotonic()
        supervised = sum(step.supervised for step in steps)
        return Event(
            step=done,
            epoch=done / self._steps_per_epoch,
            loss=sum(step.loss for step in steps) / max(1, supervised),
            ce=sum(step.ce for step in steps) / max(1, supervised),
            kl=sum(step.kl for step in steps) / max(1, supervised),
            learning_rate=steps[-1].learning_rate,
            grad_norm=steps[-1].grad_norm,
            supervised_tokens=supervised,
            tokens_per_second=sum(step.tokens for step in steps) / max(1e-9, self._since - since),
            data_wait_seconds=sum(step.wait for step in steps),
            eta_seconds=self.seconds / max(1, done - self._first) * (self._stop - done),
        )


def read_events(path: Path) -> list[Event]:
    """All events of a run. A line that is torn or damaged is left out with a warning: it decides nothing."""
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            found.append(Event.model_validate(json.loads(text)))
        except (ValueError, RecursionError):
            log.warning("line %d of %s is torn or damaged, and is left out", number, path)
    return found


Write = Callable[[Event], None]
"""Takes the events of a run, one after the other."""


@contextmanager
def event_log(path: Path, *, after: int) -> Iterator[Write]:
    """events.jsonl, without what was logged beyond step `after`: those steps are trained again.

    Raises:
        TemporaryError: the file cannot be written.
    """
    with _writing(path):
        lines = [_line(event) for event in read_events(path) if event.step <= after]
        publish(path, "".join(lines))
        file = path.open("a", encoding="utf-8")

    def write(event: Event) -> None:
        with _writing(path):
            file.write(_line(event))
            file.flush()  # So that others can follow.

    with file:
        yield write


def _line(event: Event) -> str:
    return json.dumps(event.model_dump()) + "\n"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TemporaryError(
            f"cannot write {path}",
            got=error.strerror,
            fix="free space or repair the file system, then run the same command again",
        ) from error


@contextmanager
def bar(console: Console, *, start: int, stop: int) -> Iterator[Write]:
    """A progress bar on a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(TextColumn("train"), *columns, console=console) as progress:
        task = progress.add_task("", total=stop, completed=start)

        def write(event: Event) -> None:
            speed = f"{event.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=event.step, description=f"{_losses(event)}  {speed}")

        yield write


def lines(console: Console, *, stop: int) -> Write:
    """One line every few seconds, and one for the first and the last step."""
    due = 0.0

    def write(event: Event) -> None:
        nonlocal due
        if time.monotonic() < due and event.step < stop:
            return
        due = time.monotonic() + LINE_SECONDS
        console.print(
            f"train step {event.step}/{stop}  {_losses(event)}  lr {event.learning_rate:.2e}  "
            f"{event.tokens_per_second:,.0f} tokens/s  eta {timedelta(seconds=int(event.eta_seconds))}",
            highlight=False,
            soft_wrap=True,
        )

    return write


def _losses(event: Event) -> str:
    return f"loss {event.loss:.4f}  ce {event.ce:.4f}  kl {event.kl:.4f}"


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


def _monitor(opened: Callable[[], Any]) -> Told:
    """One of DeepSpeed's own, with a run's events in place of the little that DeepSpeed tells it."""
    monitor = opened()
    return lambda values, step: monitor.write_events([(*pair, step) for pair in values.items()]), lambda: None


@contextmanager
def tracker(name: str, opened: Callable[[], Told]) -> Iterator[Write]:
    """What training does not depend on: once it fails, that is told once, and it is left alone."""
    told: Told | None = None

    def attempt(work: Callable[[], Any]) -> Any:
        nonlocal told
        try:
            return work()
        except Exception as error:
            told = None
            log.warning("%s logging failed and is off for this run; metrics continue in %s: %r", name, EVENTS, error)

    def write(event: Event) -> None:
        if told is not None:
            take, values = told[0], event.model_dump(exclude={"step"})
            attempt(lambda: take({f"train/{key}": value for key, value in values.items()}, event.step))

    told = attempt(opened)
    try:
        yield write
    finally:
        if told is not None:
            attempt(told[1])


@contextmanager
def reporting(
    output: Path,
    report_to: Sequence[str],
    *,
    start: int,
    stop: int,
    config: Mapping[str, Any],
    name: str,
    monitors: Mapping[str, Callable[[], Any]],
) -> Iterator[Write]:
    """All places that the rank that reports tells of its run, after `start` of `stop` steps; events.jsonl first.

    Args:
        output: run directory.
        report_to: trackers beside events.jsonl.
        config: shown by trackers that can.
        name: identity of the run, the same when it is resumed.
        monitors: DeepSpeed's own, by the name of their section: how each is opened.
    """
    trackers: dict[str, Callable[[], Told]] = {}
    if "tensorboard" in report_to:
        trackers["tensorboard"] = partial(_tensorboard, output, start=start)
    if "wandb" in report_to:
        trackers["wandb"] = partial(_wandb, output, config, name)
    for section, opened in monitors.items():
        trackers[f"DeepSpeed's {section}"] = partial(_monitor, opened)
    console = Console()
    with ExitStack() as stack:
        writes = [stack.enter_context(event_log(output / EVENTS, after=start))]
        if console.is_terminal:
            writes.append(stack.enter_context(bar(console, start=start, stop=stop)))
        else:
            writes.append(lines(console, stop=stop))
        writes += [stack.enter_context(tracker(*one)) for one in trackers.items()]

        def write(event: Event) -> None:
            for one in writes:
                one(event)

        yield write


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
