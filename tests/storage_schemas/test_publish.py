"""A final name means a finished file, on the disk for good; there is one way to give it."""

import ast
import os
import re
import resource
import stat
from pathlib import Path

import pytest

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.publish import publish, publishing

ROOT = Path(__file__).parents[2]
PACKAGES = ("storage_schemas", "teacher_dump", "student_train", "pipeline")
GIVERS = {("os", "link"), ("os", "rename"), ("os", "renames"), ("os", "replace"), ("shutil", "move")}
"""Functions that give a file its name."""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every fsync: the file's name, and whether `x` was visible by then."""
    found: list[tuple[str, bool]] = []

    def record(descriptor: int) -> None:
        found.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, (tmp_path / "x").exists()))

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_file_is_on_the_disk_before_its_name(tmp_path: Path, log: list[tuple[str, bool]]) -> None:
    publish(tmp_path / "x", "text")
    assert log == [(".x.staged", False), (tmp_path.name, True)]
    (tmp_path / ".x.staged").write_text("what a killed writer left")
    publish(tmp_path / "x", b"other", private=True)
    assert (tmp_path / "x").read_bytes() == b"other"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_finds_no_room_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    publish(tmp_path / "x", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "x"))):
            publish(tmp_path / "x", b"1" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "x").read_text() == "old"


def test_a_directory_is_on_the_disk_before_its_name(tmp_path: Path, log: list[tuple[str, bool]]) -> None:
    with publishing(tmp_path / "x", setting="OUT") as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "file").write_text("1")
    assert sorted(log) == sorted([("file", False), ("deep", False), (".x.staged", False), (tmp_path.name, True)])
    assert log[-1] == (tmp_path.name, True)


def test_a_directory_with_content_is_replaced_on_request_only(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(MismatchError, match="correct OUT"), publishing(tmp_path / "x", setting="OUT") as staged:
        (staged / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "mine"]
    with publishing(tmp_path / "x", setting="OUT", replace=True) as staged:
        (staged / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_nothing_else_gives_a_file_its_name() -> None:
    """No other module renames or links: put-if-absent is the store's, everything else `publish`'s."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in GIVERS:
                    found.add(str(path.relative_to(ROOT)))
                # Of a path: a string's `replace` takes two arguments, a dataclass's names them.
                case ast.Attribute(attr="rename" | "replace" | "hardlink_to") if len(call.args) == 1:
                    if not call.keywords:
                        found.add(str(path.relative_to(ROOT)))
                case _:
                    pass
    assert found == {"storage_schemas/common/publish.py", "storage_schemas/stores/store.py"}
