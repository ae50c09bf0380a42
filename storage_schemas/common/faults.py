"""Named points in the code where a test can make a process die, stop or fail.

Every write step passes one, so that tests enumerate the steps from the code instead of guessing sleeps. Without
the environment variable a point costs one dictionary look-up.

`LLM_NEO_FAULT=<name>:<occurrence>:<action>` acts at the n-th passing (1-based) of the point; actions are `kill`
(SIGKILL), `stop` (SIGSTOP), `raise` (OSError EIO), `full` (OSError ENOSPC) and `thread` (RuntimeError).
`LLM_NEO_FAULT_LOG=<file>` appends the name of every point passed.
"""

import errno
import os
import signal

_passed: dict[str, int] = {}


def point(name: str) -> None:
    """Pass the point `name`."""
    if log := os.environ.get("LLM_NEO_FAULT_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(name + "\n")
    plan = os.environ.get("LLM_NEO_FAULT")
    if not plan:
        return
    wanted, occurrence, action = plan.rsplit(":", 2)
    _passed[name] = _passed.get(name, 0) + 1
    if name != wanted or _passed[name] != int(occurrence):
        return
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise OSError(errno.EIO, "injected I/O error", name)
        case "full":
            raise OSError(errno.ENOSPC, "injected: no space left on device", name)
        case "thread":
            raise RuntimeError(f"injected failure at {name}")
        case _:
            raise ValueError(f"unknown fault action {action!r}")
