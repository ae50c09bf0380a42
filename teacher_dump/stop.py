"""Stop requests: SIGTERM and SIGINT become one temporary error, quickly and whatever is running."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from storage_schemas.errors import TemporaryError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    """SIGTERM or SIGINT inside the context ends it with TemporaryError.

    A forward pass may take a minute, so that waiting for its end would be too slow; nothing that is interrupted here
    can harm a dump, which survives SIGKILL at any point. Outside the main thread signals are left as they are.
    """
    request = StopRequest()
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, request.handle) for number in _SIGNALS} if main else {}
    try:
        yield request
    except KeyboardInterrupt as error:
        name = signal.Signals(request.signal).name if request.signal else "an interrupt"
        raise TemporaryError(
            "stopped before the dump was complete",
            got=name,
            expected="all units committed",
            fix="run the same command again; committed units are kept",
        ) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
