"""Units that processes share: rows to the bit as they were decoded, proven again, and a folder that keeps nothing."""

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from support.dumps import ESTIMATORS, make_dump, record_of, some_provenance

from storage_schemas.common.errors import DataError
from storage_schemas.config import Estimator
from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row
from storage_schemas.shared_unit import SharedUnit
from storage_schemas.stores.shared import KEPT, SharedFiles


def assert_same(found: Row, expected: Row) -> None:
    """To the bit."""
    for field in fields(Row):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        arrays = [(mine, theirs)]
        if field.name == "targets" and theirs is not None:
            arrays = [(getattr(mine, name), getattr(theirs, name)) for name in theirs.__slots__]
        for one, other in arrays:
            assert type(one) is type(other)
            if isinstance(other, np.ndarray):
                assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
                assert one.flags.aligned
            else:
                assert one == other


def shared(url: Path, folder: Path) -> Dump:
    dump = Dump.open(str(url))
    dump.share(folder)
    return dump


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rows"))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.kind)
def test_rows_are_those_of_the_unit(estimator: Estimator, tmp_path: Path) -> None:
    """In memory of their own, with and without targets; of who decoded the unit, and of who did not."""
    temperatures = (1.0, 2.0) if estimator.kind == "topk" else (1.0,)
    make_dump(tmp_path / "dump", some_provenance(samples=9, estimator=estimator, temperatures=temperatures))
    plain, statuses = Dump.open(str(tmp_path / "dump")), set()
    for dump in (shared(tmp_path / "dump", tmp_path / "rows"), shared(tmp_path / "dump", tmp_path / "rows")):
        for number in range(plain.provenance.units):
            unit, expected = dump.open_unit(number), plain.read_unit(number)
            assert isinstance(unit, SharedUnit)
            assert np.array_equal(unit.used_tokens, expected.used_tokens)
            for i in range(len(expected)):
                assert_same(unit.row(i), expected.row(i))
                statuses.add(expected.status[i] == OK)
    assert statuses == {True, False}


@pytest.fixture
def url(tmp_path: Path) -> Path:
    """A dump of three units."""
    make_dump(tmp_path / "dump")
    return tmp_path / "dump"


def spoil(file: Path, at: int) -> None:
    """Another bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_damaged_row_is_decoded_again(url: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One flipped bit anywhere in the rows, or a file that was cut: what is read is what was stored."""
    expected = Dump.open(str(url)).read_unit(0)
    first = shared(url, tmp_path / "rows")
    first.open_unit(0)
    (file,) = files(tmp_path / "rows")
    whole, name = file.read_bytes(), record_of(url, 0).file
    begin = 8 + len(expected) * 32
    for at in (begin, len(whole) // 2, len(whole) - 1, None):
        file.write_bytes(whole)
        unit = shared(url, tmp_path / "rows").open_unit(0)
        caplog.clear()
        spoil(file, at) if at is not None else os.truncate(file, begin)
        for i in range(len(expected)):
            assert_same(unit.row(i), expected.row(i))
        assert caplog.messages == [f"a row of {name} was damaged after it was decoded; it is decoded again"]


def test_a_damaged_index_ends_sharing(url: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any byte of it, the checksum's too, a file of another unit and an empty one; each with one warning."""
    expected = Dump.open(str(url)).read_unit(0)
    first = shared(url, tmp_path / "rows")
    first.open_unit(0)
    (file,) = files(tmp_path / "rows")
    whole = file.read_bytes()
    first.open_unit(1)
    (other,) = set(files(tmp_path / "rows")) - {file}
    for content in [*range(0, 8 + len(expected) * 32, 5), other.read_bytes(), b""]:
        file.write_bytes(whole if isinstance(content, int) else content)
        if isinstance(content, int):
            spoil(file, content)
        dump = shared(url, tmp_path / "rows")
        caplog.clear()
        for _ in range(2):
            assert_same(dump.open_unit(0).row(1), expected.row(1))
        assert not dump.is_shared
        assert len(caplog.messages) == 1
        assert "a decoded unit is damaged" in caplog.text


def test_a_damaged_dump_is_told_as_ever(url: Path, tmp_path: Path) -> None:
    """By who decodes, and nothing is left of it."""
    dump = shared(url, tmp_path / "rows")
    spoil(url / record_of(url, 0).file, 1000)
    for _ in range(2):
        with pytest.raises(DataError, match="unit-00000000"):
            dump.open_unit(0)
    assert dump.is_shared
    assert [file.name for file in (tmp_path / "rows").iterdir() if "rows" in file.name] == []


@pytest.mark.parametrize("how", ["others may write", "a file", "no room"])
def test_where_units_cannot_be_shared_each_decodes(
    how: str, url: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning that says why."""
    folder = tmp_path / "rows"
    if how == "others may write":
        folder.mkdir()
        folder.chmod(0o777)
    elif how == "a file":
        folder.touch()
    dump = shared(url, folder)
    expected = Dump.open(str(url)).read_unit(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "no room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for _ in range(2):
            assert_same(dump.open_unit(1).row(0), expected.row(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not dump.is_shared
    assert len(caplog.messages) == 1
    assert "units are decoded by each process for itself" in caplog.text
    assert not files(folder)


def name(i: int) -> str:
    """Of a file."""
    return hashlib.sha256(str(i).encode()).hexdigest()


def content(text: bytes) -> Callable[[BinaryIO], None]:
    """Fills a file."""

    def fill(file: BinaryIO) -> None:
        file.write(text)

    return fill


def put(shared: SharedFiles, i: int) -> None:
    """Have a file made."""
    os.close(shared.get(name(i), content(b"x")))


def test_the_first_and_the_last_empty_the_folder(tmp_path: Path) -> None:
    """What a killed process left is never read; what is somebody else's stays."""
    folder = tmp_path / "rows"
    folder.mkdir(mode=0o700)
    (folder / f"{name(0)}.rows").write_bytes(b"old")
    (folder / f".{name(1)}.rows.staged").write_bytes(b"half")
    (folder / "notes.rows").write_bytes(b"a user's")
    first, second = SharedFiles(folder), SharedFiles(folder)
    descriptor = first.get(name(0), content(b"new"))
    assert os.pread(descriptor, 10, 0) == b"new"
    put(second, 1)
    del first
    assert len(files(folder)) == 3, "the second is still there"
    del second
    assert [file.name for file in folder.iterdir() if file.name != ".lock"] == ["notes.rows"]
    assert os.pread(descriptor, 10, 0) == b"new"
    os.close(descriptor)


def test_a_few_files_are_kept(tmp_path: Path) -> None:
    """The newest; who has one open keeps reading it."""
    folder = tmp_path / "rows"
    shared = SharedFiles(folder)
    descriptor = shared.get(name(0), content(b"first"))
    for i in range(1, KEPT + 5):
        put(shared, i)
    assert {file.stem for file in files(folder)} == {name(i) for i in range(5, KEPT + 5)}
    assert os.pread(descriptor, 10, 0) == b"first"
    os.close(descriptor)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *files(folder)))


def ask(folder: Path, log: Path, barrier: Any) -> None:
    """For eight files, at the same time as others."""
    shared = SharedFiles(folder)

    def fill(file: BinaryIO) -> None:
        with log.open("a") as told:
            told.write("filled\n")
        time.sleep(0.02)
        file.write(b"y" * 1000)

    barrier.wait()
    for i in range(8):
        descriptor = shared.get(name(i), fill)
        assert os.pread(descriptor, 2000, 0) == b"y" * 1000
        os.close(descriptor)
    barrier.wait()


def test_each_file_is_made_once_for_all_processes(tmp_path: Path) -> None:
    """Who comes while it is made waits for it."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=ask, args=(tmp_path / "rows", tmp_path / "log", barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text().count("filled") == 8


def test_a_killed_maker_is_replaced(tmp_path: Path) -> None:
    """Its lock dies with it, and the next one makes the file."""
    context = multiprocessing.get_context("fork")

    def die(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        os._exit(9)

    shared = SharedFiles(tmp_path / "rows")
    put(shared, 1)
    process = context.Process(target=lambda: shared.get(name(0), die))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    descriptor = shared.get(name(0), content(b"whole"))
    assert os.pread(descriptor, 10, 0) == b"whole"
    os.close(descriptor)
