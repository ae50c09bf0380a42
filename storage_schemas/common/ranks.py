"""How processes that need each other leave together: each leaves its exit code in a folder, where the others look.

They are the ranks of one training, or the processes that hold one teacher. A process that fails between two agreements
(out of memory, killed) cannot tell the others, who may wait for it in a collective. They see its file, or their
connection to it breaks; then they leave with its code, within half a minute.
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from storage_schemas.common.errors import TemporaryError, explained, first_line
from storage_schemas.common.exits import Exit
from storage_schemas.common.publish import publish
from storage_schemas.common.secrets import shown

EXIT_FOLDER, STOP = "exit", "stop"
GRACE_SECONDS = 15.0
"""How long a rank may go on once another one has left with an error."""
LOST_SECONDS = 5.0
"""How long a rank whose collective broke looks for the reason that another one gives."""
LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "remote process")
"""What the errors of a collective say when another rank is gone."""


class ExitCodes:
    """The exit codes of all ranks, as files in `exit/` of a folder that all of them see."""

    def __init__(self, output: Path, rank: int, world_size: int) -> None:
        self._folder, self._rank, self._world_size = output / EXIT_FOLDER, rank, world_size

    def watch(self) -> None:
        """From now on, end this process once another rank has failed and this one does not get to know."""
        threading.Thread(target=_leave_with_others, args=(self,), daemon=True, name="watchdog").start()

    def clear(self) -> None:
        """Forget what the last start left here, if who started this one has not done so."""
        (self._folder / f"rank-{self._rank}").unlink(missing_ok=True)

    def write(self, code: int) -> None:
        """Leave this rank's code; a disk that is full cannot be helped here."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            publish(self._folder / f"rank-{self._rank}", f"{code}\n")
        except OSError as error:
            print(f"cannot write {self._folder}: {error}", file=sys.stderr)

    def of_others(self) -> int:
        """The code of the lowest other rank that has failed; 0 if none has."""
        others = set(range(self._world_size)) - {self._rank}
        codes = read_codes(self._folder.parent)
        return next((code for rank, code in sorted(codes.items()) if code and rank in others), 0)

    def stop_requested(self) -> bool:
        """Whether somebody asks for a checkpoint and an end."""
        return (self._folder / STOP).exists()


def read_codes(output: Path) -> dict[int, int]:
    """Rank -> exit code, of the ranks that have left."""
    folder = output / EXIT_FOLDER
    found = {}
    for file in folder.glob("rank-*") if folder.is_dir() else ():
        rank = file.name.removeprefix("rank-")
        if rank.isdecimal():
            found[int(rank)] = int(file.read_text(encoding="ascii"))
    return found


def failed(error: BaseException, codes: ExitCodes, rank: int, *, memory: str) -> int:
    """Say what ended this rank; the code is another rank's if this error is but its echo, 70 if it is nobody's.

    Args:
        memory: what to change when memory runs out.
    """
    told = explained(error, memory=memory)
    if told is not None:
        print(f"llm-neo: {shown(str(told))}", file=sys.stderr)
        return int(told.exit_code)
    lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
    deadline = time.monotonic() + LOST_SECONDS
    while lost and time.monotonic() < deadline:
        if code := codes.of_others():
            return code
        time.sleep(0.1)
    if lost:
        gone = TemporaryError(
            f"rank {rank} has lost another rank",
            got=first_line(error),
            expected="all ranks to be there",
            fix="look for what ended it (out of memory? a lost node?), then run the same command again",
        )
        print(shown(str(gone)), file=sys.stderr)
        return int(gone.exit_code)
    sys.stderr.write(shown("".join(traceback.format_exception(error))))
    return int(Exit.BUG)


def _leave_with_others(codes: ExitCodes) -> None:
    seen: float | None = None
    while True:
        time.sleep(1.0)
        code = codes.of_others()
        seen = (seen or time.monotonic()) if code else None
        if seen is not None and time.monotonic() - seen > GRACE_SECONDS:
            codes.write(code)
            end(code)


def end(code: int) -> NoReturn:
    """Leave at once, whatever other threads and collectives are in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
