"""What a run says while it trains: events.jsonl, a progress bar or log lines, and the trackers of `report_to`."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from storage_schemas.common.errors import TemporaryError
from storage_schemas.common.extras import refuse_missing
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.publish import publish

if TYPE_CHECKING:
    from student_train.utilisation import Work

log = logging.getLogger(__name__)

EVENTS = "events.jsonl"
LINE_SECONDS = 5.0
"""Seconds between two log lines where there is no terminal, at least."""


class DumpLosses(FrozenModel):
    """Of one of several dumps: means over its supervised tokens in the steps since the line before."""

    model_config = ConfigDict(allow_inf_nan=True)

    loss: float
    """With the dump's own alpha; without what routers add."""
    ce: float
    kl: float
    supervised_tokens: int
    """Over all ranks."""


class Event(FrozenModel):
    """One line of events.jsonl: the steps since the line before."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: int
    """Optimizer steps done."""
    epoch: float
    """Passes over the dump done."""
    loss: float
    """(1 - alpha) * CE + alpha * T^2 * KL per supervised token, nats, as in `ce` and `kl`; and `router_aux` times its
    coefficient."""
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
    tokens: int = 0
    """That went through the student in these steps, over all ranks, padding not counted."""
    tokens_per_second: float
    """The same per second of wall time."""
    data_wait_seconds: float
    """Of these steps: how long the slowest rank waited for data."""
    eta_seconds: float
    """Estimated time to the last step."""
    save_wait_seconds: float = 0.0
    """Since the line before: how long training stood still for checkpoints, to copy the state and to wait until the one
    before was written."""
    padding: float = 0.0
    """Share of the micro-batches' tokens that are padding."""
    mfu: float | None = None
    """Model FLOP utilisation: see `utilisation.Work`; absent where the device or the student's FLOP are not known."""
    peak_device_bytes: int | None = None
    """What tensors had at most on a GPU since the start, on the rank that had most; absent without GPUs."""
    router_aux: float | None = None
    """Auxiliary loss of a mixture of experts, without its coefficient; absent for other students."""
    dumps: dict[str, DumpLosses] | None = None
    """The same losses by the dumps of `train.dumps`; absent for a run on one dump."""


PREFIX = "eval_"
"""Of the fields of an evaluation in events.jsonl, but for `step`, as in the log history of transformers' Trainer."""


class Closeness(FrozenModel):
    """How close a student is to the teacher: means over the supervised tokens that were evaluated."""

    ce: float
    """Cross-entropy of the tokens themselves at temperature 1, nats."""
    top1_agreement: float | None
    """Share of tokens whose most likely token is the same for both; null for dumps without an exact head."""
    acceptance_rate_min: float
    """sum min(p, q) at the temperature, what speculative sampling would keep of the student's drafts: the least it can
    be given what is stored, see `losses.overlap`."""
    acceptance_rate_max: float
    """And the most."""
    supervised_tokens: int
    """Tokens that were evaluated."""


class HeldoutResult(Closeness):
    """One evaluation on the held-out samples."""

    step: int
    """Optimizer steps that were done."""
    kl: float
    """Forward KL(teacher || student) at `temperature`, nats: on the stored entries and one tail bucket, so a lower
    bound of the KL over the full vocabulary; with drawn targets an unbiased estimate of that."""
    seconds: float
    """How long it took."""
    temperature: float
    """Of both distributions."""
    dump: str
    """Fingerprint of the held-out dump."""


class Part(NamedTuple):
    """What a step was for one dump, over all ranks."""

    supervised: int
    """Supervised tokens."""
    loss: float
    """Sum over these, as the next two; without what routers add."""
    ce: float
    divergence: float


class Step(NamedTuple):
    """What a step was, over all ranks."""

    loss: float
    """Sum over its supervised tokens."""
    parts: Sequence[Part]
    """Of each dump; none of a step without supervised tokens."""
    supervised: int
    """Supervised tokens."""
    tokens: int
    """All tokens that are not padding."""
    padded: int
    """And those that are."""
    memory: int
    """See `Event.peak_device_bytes`; 0 without a GPU."""
    wait: float
    """Seconds that the slowest rank waited for data."""
    learning_rate: float
    grad_norm: float
    router_aux: float = 0.0
    """Sum over its supervised tokens; 0 for a student without one."""


class Meter:
    """Adds up steps until the next event. Means are per supervised token, so that steps weigh what they hold."""

    def __init__(
        self,
        *,
        start: int,
        stop: int,
        steps_per_epoch: int,
        dumps: Sequence[str] = (),
        work: "Work | None" = None,
        ranks: int = 1,
    ) -> None:
        """Begin after `start` of `stop` steps. `dumps` are the names of the dumps, if there are several."""
        self._dumps, self._work, self._ranks = dumps, work, ranks
        self._first, self._stop, self._steps_per_epoch = start, stop, steps_per_epoch
        self._begin = self._since = time.monotonic()
        self.total_tokens, self.total_wait, self.total_save_wait = 0, 0.0, 0.0
        """Tokens, and seconds of waiting for data and for checkpoints, since the beginning."""
        self.paused = 0.0
        """Seconds since the beginning that were no training."""
        self._steps: list[Step] = []
        self._save_wait = 0.0

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

    def wait(self, seconds: float) -> None:
        """Training has stood still so long for a checkpoint."""
        self._save_wait += seconds
        self.total_save_wait += seconds

    def add(self, step: Step) -> None:
        """One step."""
        self._steps.append(step)
        self.total_tokens += step.tokens
        self.total_wait += step.wait

    def event(self, done: int) -> Event:
        """The event after `done` steps; starts the next one."""
        steps, self._steps = self._steps, []
        since, self._since = self._since, time.monotonic()
        save_wait, self._save_wait = self._save_wait, 0.0
        seconds = max(1e-9, self._since - since)
        supervised, tokens, padded = (
            sum(getattr(step, name) for step in steps) for name in ("supervised", "tokens", "padded")
        )
        return Event(
            step=done,
            epoch=done / self._steps_per_epoch,
            loss=sum(step.loss for step in steps) / max(1, supervised),
            ce=sum(part.ce for step in steps for part in step.parts) / max(1, supervised),
            kl=sum(part.divergence for step in steps for part in step.parts) / max(1, supervised),
            learning_rate=steps[-1].learning_rate,
            grad_norm=steps[-1].grad_norm,
            supervised_tokens=supervised,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            padding=padded / max(1, tokens + padded),
            mfu=self._work and self._work.utilisation(tokens, supervised, seconds=seconds, devices=self._ranks),
            peak_device_bytes=steps[-1].memory or None,
            data_wait_seconds=sum(step.wait for step in steps),
            save_wait_seconds=save_wait,
            eta_seconds=(self.seconds + self.paused) / max(1, done - self._first) * (self._stop - done),
            router_aux=sum(step.router_aux for step in steps) / max(1, supervised) or None,
            dumps={name: _mean([step.parts[i] for step in steps if step.parts]) for i, name in enumerate(self._dumps)}
            or None,
        )


def _mean(parts: Sequence[Part]) -> DumpLosses:
    tokens = sum(part.supervised for part in parts)
    loss, ce, kl = (sum(part[i] for part in parts) / max(1, tokens) for i in (1, 2, 3))
    return DumpLosses(loss=loss, ce=ce, kl=kl, supervised_tokens=tokens)


Told = Event | HeldoutResult
Write = Callable[[Told], None]
"""Takes what a run tells, one after the other: its steps, and its evaluations on held-out samples."""


def read_events(path: Path) -> list[Event]:
    """All events of a run, but for its evaluations. A line that is torn or damaged is left out with a warning."""
    return [line for line in _lines(path) if isinstance(line, Event)]


def _line(told: Told) -> str:
    fields = told.model_dump(exclude_none=isinstance(told, Event))
    if isinstance(told, HeldoutResult):
        fields = {name if name == "step" else f"{PREFIX}{name}": value for name, value in fields.items()}
    return json.dumps(fields) + "\n"


def _lines(path: Path) -> list[Told]:
    """What `_line` has written; what cannot be read is left out, since these lines decide nothing."""
    if not path.is_file():
        return []
    found: list[Told] = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            fields = json.loads(text)
            kind = HeldoutResult if f"{PREFIX}ce" in fields else Event
            found.append(kind.model_validate({name.removeprefix(PREFIX): value for name, value in fields.items()}))
        except (ValueError, RecursionError, AttributeError, TypeError):
            log.warning("line %d of %s is torn or damaged, and is left out", number, path)
    return found


@contextmanager
def event_log(path: Path, *, after: int, evaluated: Collection[int] = ()) -> Iterator[Write]:
    """events.jsonl, without what was logged beyond step `after` and evaluations of other steps than `evaluated`: those
    are made again.

    Raises:
        TemporaryError: the file cannot be written.
    """
    with _writing(path):
        kept = (told for told in _lines(path) if told.step in evaluated or isinstance(told, Event))
        lines = [_line(told) for told in kept if told.step <= after]
        publish(path, "".join(lines))
        file = path.open("a", encoding="utf-8")

    def write(told: Told) -> None:
        with _writing(path):
            file.write(_line(told))
            file.flush()  # So that others can follow.

    with file:
        yield write


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
def bar(console: Console, *, start: int, stop: int, divergence: str) -> Iterator[Write]:
    """A progress bar on a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(TextColumn("train"), *columns, console=console) as progress:
        task = progress.add_task("", total=stop, completed=start)

        def write(told: Told) -> None:
            if isinstance(told, HeldoutResult):
                progress.console.print(_evaluated(told), highlight=False)
                return
            speed = f"{told.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=told.step, description=f"{_losses(told, divergence)}  {speed}")

        yield write


def lines(console: Console, *, stop: int, divergence: str) -> Write:
    """One line every few seconds, and one for the first and the last step and for each evaluation."""
    due = 0.0

    def write(told: Told) -> None:
        nonlocal due
        if isinstance(told, HeldoutResult):
            console.print(_evaluated(told), highlight=False, soft_wrap=True)
            return
        if time.monotonic() < due and told.step < stop:
            return
        due = time.monotonic() + LINE_SECONDS
        console.print(
            f"train step {told.step}/{stop}  {_losses(told, divergence)}  lr {told.learning_rate:.2e}  "
            f"{told.tokens_per_second:,.0f} tokens/s  eta {timedelta(seconds=int(told.eta_seconds))}",
            highlight=False,
            soft_wrap=True,
        )

    return write


def _losses(event: Event, divergence: str) -> str:
    name = "kl" if divergence == "forward_kl" else divergence
    return f"loss {event.loss:.4f}  ce {event.ce:.4f}  {name} {event.kl:.4f}"


def _evaluated(result: HeldoutResult) -> str:
    top1 = "" if result.top1_agreement is None else f"  top-1 {result.top1_agreement:.1%}"
    least, most = result.acceptance_rate_min, result.acceptance_rate_max
    return (
        f"held-out samples after step {result.step}: kl {result.kl:.4f}  ce {result.ce:.4f}{top1}  "
        f"acceptance {least:.1%} to {most:.1%}  ({result.supervised_tokens:,} tokens in {result.seconds:.1f} s)"
    )


Values = dict[str, float]
Opened = tuple[Callable[[Values, int], object], Callable[[], object]]
"""Of a tracker: what takes the values of a step, and what ends it."""


def _tensorboard(output: Path, *, start: int) -> Opened:
    """Scalars in `tensorboard/` of the run directory."""
    from torch.utils.tensorboard import SummaryWriter

    # Steps after `start` that an earlier attempt has told are hidden.
    writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)

    def write(values: Values, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(output: Path, config: Mapping[str, Any], name: str, labels: Mapping[str, Any]) -> Opened:
    """A run of Weights & Biases that is continued when training is."""
    shown = {"name": output.name} | {key: value for key, value in labels.items() if value}
    run: Any = import_module("wandb").init(dir=str(output), id=name, resume="allow", config=dict(config), **shown)
    return lambda values, step: run.log(values, step=step), run.finish


def _monitor(opened: Callable[[], Any]) -> Opened:
    """One of DeepSpeed's own, with a run's events in place of the little that DeepSpeed tells it."""
    monitor = opened()
    return lambda values, step: monitor.write_events([(*pair, step) for pair in values.items()]), lambda: None


@contextmanager
def tracker(name: str, open_it: Callable[[], Opened]) -> Iterator[Write]:
    """What training does not depend on: once it fails, that is told once, and it is left alone."""
    opened: Opened | None = None

    def attempt(work: Callable[[], Any]) -> Any:
        nonlocal opened
        try:
            return work()
        except Exception as error:
            opened = None
            log.warning("%s logging failed and is off for this run; metrics continue in %s: %r", name, EVENTS, error)

    def write(told: Told) -> None:
        if opened is not None:
            group = "eval" if isinstance(told, HeldoutResult) else "train"
            take, values = opened[0], told.model_dump(exclude={"step", "dump", "temperature"}, exclude_none=True)
            for name, losses in values.pop("dumps", {}).items():
                values |= {f"{name}/{key}": value for key, value in losses.items()}
            attempt(lambda: take({f"{group}/{key}": value for key, value in values.items()}, told.step))

    opened = attempt(open_it)
    try:
        yield write
    finally:
        if opened is not None:
            attempt(opened[1])


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
    divergence: str = "forward_kl",
    evaluated: Collection[int] = (),
    labels: Mapping[str, Any] | None = None,
) -> Iterator[Write]:
    """All places that the rank that reports tells of its run, after `start` of `stop` steps; events.jsonl first.

    Args:
        config: shown by trackers that can.
        name: identity of the run, the same when it is resumed.
        monitors: DeepSpeed's own, by the name of their section: how each is opened.
        evaluated: steps whose evaluations are known.
        divergence: what the terminal calls the divergence.
        labels: name, project and tags in Weights & Biases, in its own words.
    """
    trackers: dict[str, Callable[[], Opened]] = {}
    if "tensorboard" in report_to:
        trackers["tensorboard"] = partial(_tensorboard, output, start=start)
    if "wandb" in report_to:
        trackers["wandb"] = partial(_wandb, output, config, name, labels or {})
    for section, opened in monitors.items():
        trackers[f"DeepSpeed's {section}"] = partial(_monitor, opened)
    console = Console()
    with ExitStack() as stack:
        writes = [stack.enter_context(event_log(output / EVENTS, after=start, evaluated=evaluated))]
        if console.is_terminal:
            writes.append(stack.enter_context(bar(console, start=start, stop=stop, divergence=divergence)))
        else:
            writes.append(lines(console, stop=stop, divergence=divergence))
        writes += [stack.enter_context(tracker(*one)) for one in trackers.items()]

        def write(told: Told) -> None:
            for one in writes:
                one(told)

        yield write


def refuse_missing_trackers(report_to: Sequence[str]) -> None:
    """Raise MismatchError if a tracker's package is not installed."""
    for tracker in report_to:  # Also the name of its extra.
        refuse_missing(
            f"train.report_to: {tracker}", tracker, extra=tracker, instead=f"take {tracker} out of train.report_to"
        )
