"""Calls that cannot be interrupted, made so that a signal is heard."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def interruptible(call: Callable[[], T]) -> T:
    """The result of `call`, for which the main thread waits in a way that lets signal handlers run.

    A request to an object store repeats itself for minutes inside native code, where Python runs no handler. Here it
    does so in a daemon thread; a handler that raises leaves it behind. In other threads, which get no signals, `call`
    is called as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    return in_background(call).result()


def in_background(call: Callable[[], T], *, name: str = "request") -> Future[T]:
    """What `call` will return, from a daemon thread: nobody has to wait for it, not even the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
