"""What SIGTERM, SIGINT and SIGUSR1 do: every handler of the project, one for each kind of process.

| process | a signal |
|---|---|
| `llm-neo` in its first second (`pipeline/entry.py`) | ends it at once |
| any command | is a KeyboardInterrupt: `interrupt` |
| stage one, in its own process | ends the dump with TemporaryError, whatever it is doing: `stoppable` |
| a rank of stage two | asks for a checkpoint at the next step boundary: `stop_event` |
| one that started others | is passed on to them: `forwarded` |
| one that ends with its leader | is ignored: `ignore` |
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from storage_schemas.common.errors import TemporaryError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a process to end: schedulers, which warn with SIGUSR1 where they were told to, and people."""


class _Interrupted(KeyboardInterrupt):
    """Not an Exception, so that no library takes it for one of its own."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def check(self) -> None:
        """Raise if a stop was requested: an interruption may have been lost in a finaliser."""
        if self.signal is not None:
            raise _Interrupted

    def handle(self, number: int, _: FrameType | None) -> None:
        """Signal handler: interrupts at the first signal, and leaves the clean-up in peace after that."""
        if self.signal is None:
            self.signal = number
            raise _Interrupted


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """A signal inside the context ends it with TemporaryError.

    A forward pass may take a minute, so that waiting for its end would be too slow; nothing that is interrupted here
    can harm a dump, which survives SIGKILL at any point. Outside the main thread signals are left as they are.
    """
    request = StopRequest()
    try:
        with _handled(STOPS if threading.current_thread() is threading.main_thread() else (), request.handle):
            yield request
    except KeyboardInterrupt as error:
        name = signal.Signals(request.signal).name if request.signal else "an interrupt"
        raise TemporaryError(
            "stopped before the dump was complete",
            got=name,
            expected="all units committed",
            fix="run the same command again; committed units are kept",
        ) from error


@contextmanager
def forwarded(send: Callable[[], object]) -> Iterator[None]:
    """A signal inside the context calls `send`, and ends nothing."""
    with _handled(STOPS, lambda *_: send()):
        yield


def stop_event() -> threading.Event:
    """An event that a signal sets, from now on."""
    event = threading.Event()
    for number in STOPS:
        signal.signal(number, lambda *_: event.set())
    return event


def interrupt() -> None:
    """From now on a scheduler's SIGTERM is an interruption like a person's, until something above knows better."""
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)


def ignore() -> None:
    """From now on signals do nothing: who leads this process ends it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[..., Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
