"""What the processes of a pool do in tests; imports nothing, so that they start quickly."""

import os
import signal
import time


def killed(number: int) -> int:
    """The number, but number 5 kills its process."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(number: int) -> int:
    """The number, and a minute later for number 3."""
    if number == 3:
        time.sleep(60)
    return number
