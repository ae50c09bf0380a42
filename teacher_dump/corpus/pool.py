"""A function over many chunks in several processes, in order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from storage_schemas.common.errors import TemporaryError
from storage_schemas.common.signals import ignore

C = TypeVar("C")
R = TypeVar("R")

_work: Callable[[Any], Any]
"""What this process does with a chunk, if it is one of a pool."""


@contextmanager
def pooled(work: Callable[[C], R], *, processes: int) -> Iterator[Callable[[Iterable[C]], Iterator[R]]]:
    """A `map` of `work` over chunks, in order: here, or in processes that are started when the first chunk comes.

    What it returns is the same either way. Leaving the context ends the processes at once.
    """
    if processes == 1:
        yield partial(map, work)
        return
    # Not forked: this process may hold threads and a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(work,))
    try:
        yield partial(_mapped, pool, processes)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)


def _mapped(pool: ProcessPoolExecutor, processes: int, chunks: Iterable[C]) -> Iterator[R]:
    """One result per chunk; few chunks are read ahead.

    Raises:
        TemporaryError: a process was killed.
    """
    try:
        waiting: deque[Future[R]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_call, chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TemporaryError(
            "a process that tokenises the corpus was killed",
            got=str(error),
            expected=f"{processes} processes until the end",
            fix="run the same command again, with a smaller corpus.num_proc if memory was short",
        ) from error


def chunked(items: Iterable[C], size: int) -> Iterator[list[C]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    # A stop is the parent's to hear; when that ends, in whatever way, so does this process.
    ignore()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One thread each: the processes share the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work


def _call(chunk: Any) -> Any:
    return _work(chunk)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
