"""put-if-absent on local files: who wins, what is visible, what is durable, and names that must not be followed."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from support.races import race

from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.common.exits import Exit
from storage_schemas.stores import store
from storage_schemas.stores.store import Store


def test_the_first_put_wins(tmp_path: Path) -> None:
    files = Store(str(tmp_path / "a" / "b"))
    assert files.get_if_present("x/y") is None
    assert files.list("x") == []
    assert files.put_new("x/y", b"first")
    assert not files.put_new("x/y", b"second")
    assert files.put_new("x/y", b"first"), "our own bytes count as ours: the answer may have been lost"
    assert files.get("x/y") == b"first"
    assert files.size("x/y") == 5
    assert files.size("x/z") is None
    assert files.list("x") == ["x/y"]
    files.delete("x/y")
    files.delete("x/y")
    assert files.get_if_present("x/y") is None
    with pytest.raises(DataError, match="x/y"):
        files.get("x/y")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    files = Store(f"file://{tmp_path}")
    assert files.put_new("empty", b"")
    assert files.get_if_present("empty") == b""
    assert not files.put_new("empty", b"x")


HOSTILE_NAMES = [
    "", ".", "..", "../x", "a/../x", "a/..", "/etc/passwd", "a//b", "a/", "./a", "a/./b", ".hidden", "a/.hidden",
    "a\\b", "..\\x", "C:\\x", "a\0b", "a\nb", "a b", "~/x", "$HOME/x", "file:///x", "s3://b/x", "http://x/y",
    "%2e%2e/x", "a/%2e%2e/x", "\u2025/x", "a\u2215b", "x;rm", "x|y", "x?y", "x*", "-rf", "a/-b", "[a]", "{a}", "a:b",
    "a,b", "\ud800",
    "data/unit-00000000-" + "0" * 32 + ".parquet\n",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("verb", ["get", "put_new", "size", "delete", "list"])
def test_names_never_leave_the_dump(name: str, verb: str, tmp_path: Path) -> None:
    files = Store(str(tmp_path / "dump"))
    files.put_new("a/b", b"1")
    before = sorted(tmp_path.rglob("*"))
    calls = {
        "put_new": lambda: files.put_new(name, b"x"),
        "list": lambda: files.list(name),
        "get": lambda: files.get(name),
        "size": lambda: files.size(name),
        "delete": lambda: files.delete(name),
    }
    with pytest.raises(DataError, match="plain relative path"):
        calls[verb]()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("link", ["data", "data/more"])
def test_what_a_link_leads_to_is_neither_written_nor_deleted(link: str, tmp_path: Path) -> None:
    """A dump may come as an archive with links in it; that its own place is one is the user's doing."""
    (tmp_path / "mine" / "more").mkdir(parents=True)
    (tmp_path / "mine" / "x").write_bytes(b"1")
    (tmp_path / "mine" / "more" / "x").write_bytes(b"1")
    dump = tmp_path / "dump"
    (dump / link).parent.mkdir(parents=True)
    (dump / link).symlink_to(tmp_path / "mine", target_is_directory=True)
    files, key = Store(str(dump)), f"{link}/x"
    writes = (lambda: files.put_new(f"{link}/y", b"2"), lambda: files.put_new(f"{link}/new/y", b"2"))
    for change in (*writes, lambda: files.delete(key)):
        with pytest.raises(DataError, match="leads out of"):
            change()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["more", "x"]
    (tmp_path / "link").symlink_to(tmp_path / "mine", target_is_directory=True)
    files = Store(str(tmp_path / "link"))
    assert files.put_new("more/y", b"2")
    files.delete("more/y")


def test_eight_processes_race_for_every_key(tmp_path: Path) -> None:
    race(str(tmp_path), 8, [f"commits/unit-{i}" for i in range(25)], start="fork")
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 25


def test_a_visible_name_is_complete_and_was_synced_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync is recorded with what was visible at that moment: content before its name, name before success."""
    log: list[tuple[str, bool]] = []
    target = tmp_path / "dump" / "data" / "x"

    def record(descriptor: int) -> None:
        log.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))

    monkeypatch.setattr(os, "fsync", record)
    Store(str(tmp_path / "dump")).put_new("data/x", b"1")
    folders = [str(tmp_path), str(tmp_path / "dump"), str(tmp_path / "dump" / "data")]
    assert [(os.path.basename(path).startswith(".staged-"), seen) for path, seen in log if "staged" in path] == [
        (True, False)
    ]
    assert log[-1] == (folders[2], True)
    assert {(folder, False) for folder in folders[:2]} <= set(log)


def test_directories_that_another_worker_made_are_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    Store(str(tmp_path)).put_new("data/x", b"1")
    assert str(tmp_path) in synced


def test_a_failed_fsync_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    files = Store(str(tmp_path))
    files.put_new("data/first", b"1")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TemporaryError, match="EIO") as caught:
        files.put_new("data/second", b"1")
    assert caught.value.exit_code == Exit.TEMPORARY
    with pytest.raises(TemporaryError):
        files.settle("data")
    assert not list(tmp_path.rglob(".staged*"))


@pytest.mark.parametrize("action", ["raise", "full"])
@pytest.mark.parametrize("name", ["local:write", "local:fsync", "local:close", "local:link"])
def test_a_failed_write_leaves_nothing(name: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_NEO_FAULT", f"{name}:1:{action}")
    monkeypatch.setattr(faults, "_passed", {})
    with pytest.raises(TemporaryError, match="ENOSPC" if action == "full" else "EIO"):
        Store(str(tmp_path)).put_new("data/x", b"1")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert Store(str(tmp_path)).put_new("data/x", b"1")


def broken_link(error: OSError, *, made: bool) -> Callable[..., None]:
    real = os.link

    def link(source: Path, target: Path) -> None:
        if made:
            real(source, target)
        raise error

    return link


def test_a_link_whose_answer_was_lost_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", broken_link(OSError(5, "lost"), made=True))
    assert Store(str(tmp_path)).put_new("x", b"1")
    monkeypatch.setattr(os, "link", broken_link(FileExistsError(17, "retransmitted"), made=True))
    assert Store(str(tmp_path)).put_new("y", b"1")
    monkeypatch.setattr(os, "link", broken_link(OSError(5, "failed"), made=False))
    with pytest.raises(TemporaryError):
        Store(str(tmp_path)).put_new("z", b"1")
    monkeypatch.setattr(os, "link", broken_link(PermissionError(1, "not permitted"), made=False))
    with pytest.raises(MismatchError, match="hard links"):
        Store(str(tmp_path)).put_new("z", b"1")


@pytest.mark.parametrize("error", [PermissionDeniedError("x"), UnauthenticatedError("x"), PermissionError(13, "x")])
def test_refused_access_is_a_configuration_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(obstore, "get", refuse)
    (tmp_path / "x").touch()
    with pytest.raises(MismatchError, match="no access"):
        Store(str(tmp_path)).get("x")


def test_only_regular_files_are_read_and_none_above_its_limit(tmp_path: Path) -> None:
    files = Store(str(tmp_path))
    files.put_new("x", b"12345")
    os.truncate(tmp_path / "x", 2**40)
    with pytest.raises(DataError, match=f"{2**40} bytes"):
        files.get("x", limit=5)
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for key in ("fifo", "device"):
        with pytest.raises(DataError, match="no regular file"):
            files.get(key, limit=5)


def test_a_directory_that_may_not_be_written_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", broken_link(PermissionError(13, "denied"), made=False))
    with pytest.raises(MismatchError, match=r"cannot write(.|\n)*EACCES"):
        Store(str(tmp_path)).put_new("x", b"1")


def test_a_cleaned_up_writer_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", broken_link(FileNotFoundError(2, "swept away"), made=False))
    assert not Store(str(tmp_path)).put_new("data/x", b"1")


def test_staged_files_go_only_when_decided(tmp_path: Path) -> None:
    files = Store(str(tmp_path))
    files.put_new("data/x", b"1")
    hexadecimal = "0" * 32
    for name in ("x", "y"):
        (tmp_path / "data" / f".staged-{name}-{hexadecimal}").write_bytes(b"half")
    (tmp_path / "data" / ".staged-strange").write_bytes(b"not ours")
    assert files.remove_staged(lambda key: key == "data/x") == 1
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"x", f".staged-y-{hexadecimal}", ".staged-strange"}
    assert files.list("data") == ["data/x"], "what is staged is never listed"


def test_the_probe_refuses_a_store_that_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(str(tmp_path)).probe()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]

    def overwrite(self: Store, key: str, data: bytes) -> bool:
        (tmp_path / key).write_bytes(data)
        return True

    monkeypatch.setattr(Store, "_put_new_local", overwrite)
    with pytest.raises(MismatchError, match="put-if-absent"):
        Store(str(tmp_path)).probe()


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "weird://bucket/x", "s3:///x"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(MismatchError) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_endpoints_carry_no_credentials() -> None:
    with pytest.raises(MismatchError, match="credentials") as caught:
        Store("s3://bucket/x", options={"endpoint": "http://key:secret@127.0.0.1:1"})
    assert "secret" not in str(caught.value)


def test_a_file_in_the_way_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("a file")
    with pytest.raises(MismatchError, match=r"cannot write(.|\n)*correct dump\.url"):
        Store(str(tmp_path / "dump")).put_new("run.json", b"{}")


def test_many_keys_come_back_in_order(tmp_path: Path) -> None:
    files = Store(str(tmp_path))
    keys = [f"many/{i}" for i in range(40)]
    (tmp_path / "many").mkdir()
    for key in keys:
        (tmp_path / key).write_text(key)
    found = list(files.parsed_many(keys, lambda data, name: (data, name)))
    assert found == [(key.encode(), f"{tmp_path}/{key}") for key in keys]
    with pytest.raises(DataError, match="many/99"):
        list(files.parsed_many([*keys, "many/99"], lambda data, name: data))
    assert threading.active_count() < 40


def test_unknown_faults_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_NEO_FAULT", "here:1:explode")
    monkeypatch.setattr(faults, "_passed", {})
    with pytest.raises(ValueError, match="explode"):
        faults.point("here")
    assert store.PARALLEL_REQUESTS > 0
