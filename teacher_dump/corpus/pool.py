"""A function over many chunks in several processes, in order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Generic, TypeVar

from storage_schemas.common.errors import TemporaryError
from storage_schemas.common.signals import ignore

C = TypeVar("C")
R = TypeVar("R")

_work: Callable[[Any], Any]
"""What this process does with a chunk, if it is one of a pool."""


class Pool(Generic[C, R]):
    """`work` over chunks: here, or in processes that are started when the first chunk comes.

    What it returns is the same either way. Leaving the context ends the processes at once.
    """

    def __init__(self, work: Callable[[C], R], *, processes: int) -> None:
        self._processes = processes
        self._work = work
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool[C, R]":
        if self._processes > 1:
            # Not forked: this process may hold threads and a GPU.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, initializer=_start, initargs=(self._work,))
        return self

    def map(self, chunks: Iterable[C]) -> Iterator[R]:
        """One result per chunk, in order; few chunks are read ahead.

        Raises:
            TemporaryError: a process was killed.
        """
        if self._pool is None:
            yield from map(self._work, chunks)
            return
        chunks = iter(chunks)
        try:
            waiting: deque[Future[R]] = deque()
            for chunk in chunks:
                waiting.append(self._pool.submit(_call, chunk))
                if len(waiting) > 2 * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise TemporaryError(
                "a process that tokenises the corpus was killed",
                got=str(error),
                expected=f"{self._processes} processes until the end",
                fix="run the same command again, with a smaller corpus.num_proc if memory was short",
            ) from error

    def __exit__(self, *_: object) -> None:
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)


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
