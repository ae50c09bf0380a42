"""The shard cache: bounded, last used stays longest, and nobody is in anybody's way."""

import fcntl
import hashlib
import multiprocessing
import os
import threading
from pathlib import Path

from storage_schemas.stores.cache import ShardCache

SIZE = 1000


def content(name: int) -> bytes:
    return bytes([name]) * SIZE


def key(name: int) -> str:
    return hashlib.sha256(content(name)).hexdigest()


class Cache:
    """A cache that counts what it fetches."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._cache = ShardCache(folder, limit=limit)
        self.fetched: list[int] = []

    def get(self, name: int) -> None:
        def fetch() -> bytes:
            self.fetched.append(name)
            return content(name)

        assert self._cache.get(key(name), fetch=fetch) == content(name)


def kept(folder: Path) -> set[int]:
    return {name for name in range(20) if (folder / f"{key(name)}.parquet").is_file()}


def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, None)
    for name in [*range(6), *range(6)]:
        cache.get(name)
    assert cache.fetched == [0, 1, 2, 3, 4, 5]
    assert kept(tmp_path) == set(range(6))


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    for name in (0, 1, 2):
        cache.get(name)
    cache.get(0)
    cache.get(3)
    assert kept(tmp_path) == {0, 2, 3}, "1 was used before 0"
    cache.get(1)
    assert kept(tmp_path) == {0, 1, 3}
    assert cache.fetched == [0, 1, 2, 3, 1]


def test_exactly_the_limit_fits(tmp_path: Path) -> None:
    for limit, left in ((2 * SIZE, {0, 1}), (2 * SIZE - 1, {1})):
        cache = Cache(tmp_path / str(limit), limit)
        cache.get(0)
        cache.get(1)
        assert kept(tmp_path / str(limit)) == left


def test_what_was_just_fetched_stays_even_if_it_does_not_fit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10)
    for name in (0, 1):
        cache.get(name)
        assert kept(tmp_path) == {name}


def test_a_file_that_is_being_read_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SIZE)
    cache.get(0)
    with open(tmp_path / f".{key(0)}.lock", "ab") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        cache.get(1)
        assert kept(tmp_path) == {0, 1}
    cache.get(2)
    assert kept(tmp_path) == {2}


def test_readers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Ranks that prove a shard at once each take as long as one of them alone."""
    Cache(tmp_path, None).get(0)
    with open(tmp_path / f".{key(0)}.lock", "ab") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        thread = threading.Thread(target=Cache(tmp_path, None).get, args=(0,), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / f".{key(0)}.parquet.staged").write_bytes(b"half")
    Cache(tmp_path, SIZE).get(0)
    assert kept(tmp_path) == {0}
    assert not list(tmp_path.glob("*.staged"))


def read_much(folder: Path, seed: int) -> None:
    cache = Cache(folder, 2 * SIZE)
    for i in range(300):
        cache.get((i * seed) % 7)


def test_processes_that_fetch_and_delete_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_much, args=(tmp_path, seed)) for seed in (1, 2, 3, 5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    Cache(tmp_path, 2 * SIZE).get(8)
    assert 8 in kept(tmp_path)
    assert sum(os.path.getsize(file) for file in tmp_path.glob("*.parquet")) <= 2 * SIZE
