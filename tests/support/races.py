"""Processes that put the same keys at the same time."""

import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from storage_schemas.stores.store import Store


def race(url: str, writers: int, keys: Sequence[str], *, start: str, options: Mapping[str, str] | None = None) -> None:
    """Of `writers` processes, each with all keys, one wins each key, and what it wrote stands there.

    Args:
        url: of the store.
        writers: how many.
        keys: that every writer puts, at the same time as the others.
        start: how processes are started, `fork` or `spawn`.
        options: of the store.
    """
    context = multiprocessing.get_context(start)
    barrier, results = context.Barrier(writers), context.Queue()
    workers = [
        context.Process(target=_put_all, args=(url, options, keys, me, barrier, results))  # type: ignore[attr-defined]
        for me in range(writers)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=200) for _ in range(writers * len(keys))]
    for worker in workers:
        worker.join(60)
    for key in keys:
        winners = [me for name, me, won in found if name == key and won]
        assert len(winners) == 1, (key, winners)
        assert Store(url, options=options).get(key) == f"writer {winners[0]}".encode()


def _put_all(
    url: str,
    options: Mapping[str, str] | None,
    keys: Sequence[str],
    me: int,
    barrier: Barrier,
    results: "Queue[tuple[str, int, bool]]",
) -> None:
    files = Store(url, options=options)
    for key in keys:
        barrier.wait()
        results.put((key, me, files.put_new(key, f"writer {me}".encode())))
