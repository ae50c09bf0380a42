"""Exit codes: what each says to a scheduler, and the one that a group of processes returns."""

import signal
import sys
from collections.abc import Sequence
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


SEVEREST_FIRST = (Exit.BUG, Exit.USAGE, Exit.MISMATCH, Exit.BAD_DATA, Exit.NOTHING_TO_RESUME, Exit.TEMPORARY)
"""Which code a group of processes returns: a stop that others made is no news beside the reason for it."""
STOPPED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a process to end."""
KILLED = {
    signal.SIGKILL: "the machine or the job has probably run out of memory: see `dmesg` or the scheduler's log",
    signal.SIGABRT: "a library gave up, as NCCL does when a collective hangs: look for the first message above",
    signal.SIGBUS: "a disk or /dev/shm is probably full",
    signal.SIGSEGV: "native code has crashed, as drivers and NCCL do now and then; if it does again, please report it",
}
"""Signals that end a process without a word, for what may be wrong with its machine alone, and what that is."""


def known(code: int) -> Exit:
    """A code as one of ours; what is not is a bug."""
    return Exit(code) if code in tuple(Exit) else Exit.BUG


def combined(codes: Sequence[int]) -> int:
    """One exit code for a group of processes. Negative codes, or those above 128, are signals."""
    mends = {sign for number in (*STOPPED, *KILLED) for sign in (-number, 128 + number)}
    told = [Exit.TEMPORARY if code in mends else known(code) for code in codes]
    return next((int(code) for code in SEVEREST_FIRST if code in told), int(Exit.DONE))


def tell_deaths(codes: Sequence[int], names: Sequence[str]) -> None:
    """Say on standard error which processes a signal has ended: they could not say it themselves."""
    for name, code in zip(names, codes, strict=True):
        if code < 0 and -code not in STOPPED:
            number = signal.Signals(-code)
            why = KILLED.get(number, "please report it with the lines above")
            sys.stderr.write(f"llm-neo: {name} was ended by {number.name}\n  why:      {why}\n")
    if all(-code in STOPPED for code in codes):  # While they started: later each answers the signal itself.
        sys.stderr.write("llm-neo: stopped before it had begun; run the same command again\n")
