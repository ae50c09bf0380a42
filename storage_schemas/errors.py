"""Errors that speak to the user, and the exit codes that speak to schedulers.

Every error says what is wrong, what was got, what was expected and what to do. The command line turns an error
into its exit code; anything that is not one of these is a bug in this project (70).
"""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command (the numbers of BSD's sysexits.h)."""

    DONE = 0
    USAGE = 64
    BAD_DATA = 65
    NOTHING_TO_RESUME = 66
    BUG = 70
    TEMPORARY = 75
    MISMATCH = 78


class NeoError(Exception):
    """Base of all errors meant for the user; `exit_code` is the process's exit status."""

    exit_code = Exit.BUG

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        lines = [what]
        if got is not None:
            lines.append(f"  got:      {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to do:    {fix}")
        super().__init__("\n".join(lines))


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
