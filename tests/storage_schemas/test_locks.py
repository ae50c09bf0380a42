"""What one process makes and the others read."""

from pathlib import Path

import pytest

from storage_schemas.common.locks import locked, read_or_make


def test_what_another_one_has_made_meanwhile_is_read_and_not_made_again(tmp_path: Path) -> None:
    """Between the look and the lock, there is a moment in which another process may make it."""
    found, states = iter([None, "theirs"]), iter([0, 1, 1])
    assert read_or_make(tmp_path / "lock", lambda: next(found), lambda: "ours", state=lambda: next(states)) == "theirs"


def test_nobody_else_is_there_while_it_is_made(tmp_path: Path) -> None:
    def make() -> str:
        for shared in (True, False):
            with pytest.raises(BlockingIOError), locked(tmp_path / "lock", shared=shared, wait=False):
                pass
        return "made"

    assert read_or_make(tmp_path / "lock", lambda: None, make, state=lambda: 0) == "made"
    with locked(tmp_path / "lock", wait=False):
        pass
