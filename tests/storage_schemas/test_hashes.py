"""A file's hash is taken once, by one process, and again when anything may have written to the file."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage_schemas.common import hashes
from storage_schemas.common.hashes import file_sha256


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every file that is read."""
    found: list[int] = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: (found.append(1), original(*a))[1])
    return found


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, file: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    first = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [file_sha256(file, folder=folder) for _ in range(3)] == [first] * 3
    assert len(reads) == 1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with file.open("r+b") as out:
        out.write(b"W")
    os.utime(file, ns=times)  # Size, inode and time as before: the time of the inode tells.
    second = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_sha256(file, folder=folder) == second != first
    assert len(reads) == 2
    monkeypatch.setattr(hashes, "this_boot", lambda: "another")
    assert file_sha256(file, folder=folder) == second
    assert len(reads) == 3


def test_what_was_just_written_is_not_kept(
    tmp_path: Path, file: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 60.0)
    for _ in range(2):
        file_sha256(file, folder=tmp_path / "cache")
    assert len(reads) == 2


def test_every_mutation_of_what_is_kept_is_noticed(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "cache"
    right = file_sha256(file, folder=folder)
    (entry,) = folder.glob("*.json")
    whole = entry.read_bytes()
    for at in range(len(whole)):
        entry.write_bytes(bytes([*whole[:at], whole[at] ^ 1 << at % 8, *whole[at + 1 :]]))
        assert file_sha256(file, folder=folder) == right
        entry.write_bytes(whole[:at])
        assert file_sha256(file, folder=folder) == right


def test_of_several_one_reads_and_a_folder_that_cannot_be_used_is_no_error(
    tmp_path: Path, file: Path, reads: list[int]
) -> None:
    start = threading.Barrier(4)

    def work(_: int) -> str:
        start.wait()
        return file_sha256(file, folder=tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(work, range(4)))
    assert len(reads) == 1
    assert found == {file_sha256(file, folder=file)}


def test_machines_read_a_file_at_the_same_time_and_each_once(
    tmp_path: Path, file: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, counted = threading.Barrier(2, timeout=20), hashlib.file_digest
    monkeypatch.setattr(hashes, "this_boot", lambda: threading.current_thread().name.split("_")[0])
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: (together.wait(), counted(*a))[1])
    with ThreadPoolExecutor(2, "a") as one, ThreadPoolExecutor(2, "b") as other:
        found = [
            pool.submit(file_sha256, file, folder=tmp_path / "cache") for pool in (one, other, one, other, one, other)
        ]
        assert len({each.result() for each in found}) == 1
    assert len(reads) == 2
