"""What a machine or its user causes is told as that; only the rest is a bug."""

import errno

import pytest

from storage_schemas.common.errors import MismatchError, explained, first_line
from storage_schemas.common.exits import Exit


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Exit.MISMATCH),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), Exit.MISMATCH),
        (MemoryError(), Exit.MISMATCH),
        (RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you"), Exit.MISMATCH),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Exit.TEMPORARY),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), Exit.TEMPORARY),
        (RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'), Exit.TEMPORARY),
        (RuntimeError('Error while serializing: I/O error: Permission denied (os error 13)'), Exit.MISMATCH),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), Exit.MISMATCH),
        (FileExistsError(errno.EEXIST, "File exists", "/data/x"), Exit.MISMATCH),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/x"), Exit.MISMATCH),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), Exit.MISMATCH),
    ],
)  # fmt: skip
def test_told_with_a_code_that_says_whether_to_run_again(error: Exception, code: Exit) -> None:
    told = explained(error, memory="lower the batch")
    assert told is not None
    assert told.exit_code == code
    assert told.fix
    if told.what == "out of memory":
        assert told.fix == "lower the batch"


def test_ours_stay_as_they_are_and_bugs_are_bugs() -> None:
    ours = MismatchError("x")
    assert explained(ours) is ours
    assert explained(KeyError("memory")) is None
    assert explained(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


def test_the_first_line_of_an_error_that_says_nothing_is_its_kind() -> None:
    assert first_line(ValueError("\nwrong head\nTraceback ...")) == "wrong head"
    assert first_line(AssertionError()) == "AssertionError"
