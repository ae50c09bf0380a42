"""Errors that speak to the user.

Every error says what is wrong, what was got, what was expected and what to do. The command line turns an error
into its exit code; anything that is not one of these is a bug in this project (70).
"""

import errno
import re

from storage_schemas.common.exits import Exit


class NeoError(Exception):
    """Base of all errors meant for the user; `exit_code` is the process's exit status."""

    exit_code = Exit.BUG

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        told = {"got:": got, "expected:": expected, "to do:": fix}
        lines = [f"  {name:<9} {value}" for name, value in told.items() if value is not None]
        super().__init__("\n".join([what, *lines]))


class UsageError(NeoError):
    """The command line is wrong."""

    exit_code = Exit.USAGE


class DataError(NeoError):
    """An input, a shard or a record is missing, torn, tampered with or out of range."""

    exit_code = Exit.BAD_DATA


class NothingToResumeError(NeoError):
    """A resume was asked for, or is needed, and no valid checkpoint exists."""

    exit_code = Exit.NOTHING_TO_RESUME


class TemporaryError(NeoError):
    """Nothing is wrong with the data: disk full, store away, stop requested. Run the same command again."""

    exit_code = Exit.TEMPORARY


class MismatchError(NeoError):
    """The configuration is invalid, or it disagrees with the dump or the checkpoint."""

    exit_code = Exit.MISMATCH


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Errors of a file system that somebody mends; then the same command goes on."""
NEVER = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""Errors of a path that cannot be used, however often."""
_HARDWARE = ("ecc error", "hardware error", "device not ready", "gpu is lost", "fallen off the bus")
_NO_MEMORY = ("out of memory", "defaultcpuallocator", "cannot allocate memory", "cublas_status_alloc_failed")


_NCCL = (
    "duplicate gpu", "shared memory segment", "/dev/shm", "ncclinvalidusage", "ncclinvalidargument",
    "driver version is insufficient",
)  # fmt: skip
"""What errors of NCCL say when ranks cannot talk to each other however often they start."""


def explained(error: BaseException, *, memory: str = "use a smaller model or batch") -> NeoError | None:
    """What the machine or its user has caused, as an error that says so; None for what may be a bug.

    Args:
        memory: what to change when memory runs out.
    """
    if isinstance(error, NeoError):
        return error
    text = " ".join(str(error).split())
    low, got = text.lower(), f"{type(error).__name__}: {text[:300]}"
    if isinstance(error, MemoryError) or any(sign in low for sign in _NO_MEMORY):
        return MismatchError("out of memory", got=got, fix=memory)
    if "does not have a deterministic implementation" in low:
        fix = "set train.deterministic to false, or choose a model and a loss without this operation"
        return MismatchError("train.deterministic does not go with an operation of this training", got=got, fix=fix)
    if any(sign in low for sign in _HARDWARE):
        fix = "take this machine or GPU out of the job, then run the same command again"
        return TemporaryError("a device has failed", got=got, fix=fix)
    if "nccl" in low and any(sign in low for sign in _NCCL):
        return MismatchError(
            "NCCL cannot connect the GPUs of these ranks",
            got=text[-1000:],
            expected="a GPU for each rank, shared memory for those of a node, and a driver that is new enough",
            fix="give the container more /dev/shm (docker run --shm-size=8g), start as many ranks as there are GPUs; "
            "NCCL_DEBUG=WARN says more",
        )
    number = error_number(error)
    name = str(getattr(error, "filename", None) or "a file")
    if number in _FULL:
        fix = "free space or repair the file system, then run the same command again"
        return TemporaryError(f"cannot write or read {name}", got=got, fix=fix)
    if number in NEVER:
        return MismatchError(f"{name} cannot be used", got=got, fix="correct the path, or its permissions")
    return None


def error_number(error: BaseException) -> int | None:
    """The system's number of an error; libraries in Rust, as safetensors, pass it on in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def cannot_write(what: str, error: Exception, *, setting: str) -> NeoError:
    """What to raise where a file system refuses to write: whether that can mend decides.

    Args:
        what: that cannot be written.
        error: the file system's, or a library's that repeats it.
        setting: where the user named the place.
    """
    number = error_number(error)
    got = f"{errno.errorcode.get(number or 0, type(error).__name__)}: {error}"
    if number in NEVER:
        expected = "a directory that can be written to, or the name of a new one"
        return MismatchError(f"cannot write {what}", got=got, expected=expected, fix=f"correct {setting}")
    fix = "free space or repair the file system, then run the same command again; what is there stays"
    return TemporaryError(f"cannot write {what}", got=got, fix=fix)


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message of ours: its first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def exit_code(error: BaseException | None) -> Exit:
    """The exit code that an error stands for."""
    if error is None:
        return Exit.DONE
    told = explained(error)
    return Exit.BUG if told is None else told.exit_code
