"""Locks between processes: of one machine, and of several where the file system keeps locks for all of them (NFS does).

The kernel frees a lock when its holder dies.
"""

import fcntl
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.05
"""Between two tries of processes that all want to make the same."""


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which is made if need be.

    Args:
        shared: with others who share it; else alone.
        wait: for those who hold it.

    Raises:
        BlockingIOError: somebody holds it, and nobody shall wait.
        OSError: the file cannot be written, or its file system has no locks.
    """
    with open(path, "a+b") as file:  # On NFS a lock that is shared needs a file to read, another one a file to write.
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


def read_or_make(
    lock: Path,
    read: Callable[[], T | None],
    make: Callable[[], T],
    *,
    state: Callable[[], object],
    waiting: str | None = None,
) -> T:
    """What `read` finds, else what `make` makes, which one process does while the others wait.

    Readers share the lock: none waits for another one, however long it reads.

    Args:
        read: None: it is missing or damaged.
        state: another value where it was made, or removed, since `read` looked.
        waiting: said once to who has to wait.

    Raises:
        OSError: as `locked`; and whatever `read` and `make` raise.
    """
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(lock, shared=True, wait=False))
            except BlockingIOError:
                if waiting is not None:
                    log.info(waiting)
                    waiting = None
                stack.enter_context(locked(lock, shared=True))
            before = state()
            if (found := read()) is not None:
                return found
        # Nobody waits for this one: who waited would keep all that read meanwhile from reading at the same time.
        with ExitStack() as stack, suppress(BlockingIOError):
            stack.enter_context(locked(lock, wait=False))
            if state() == before:
                return make()
        time.sleep(_PAUSE_SECONDS * random.random())
