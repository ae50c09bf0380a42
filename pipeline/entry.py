"""The first lines of `llm-neo`, and its last ones.

An interruption is heard before the command line is imported. At the end the interpreter is not taken down: threads of
libraries abort the process there now and then (code 134), when all is done.
"""

import atexit
import os
import signal
import sys
from typing import NoReturn


def leave(*_: object) -> NoReturn:
    """End at once: there is nothing yet to clean up."""
    os.write(2, b"llm-neo: stopped\n")
    os._exit(75)


def end(code: int) -> NoReturn:
    """Do what is registered for the end, and leave."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Nobody reads it, or the disk is full.
            code = code or 75
    os._exit(code)


def main() -> NoReturn:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)
    from pipeline.cli import main as command

    try:
        command()
    except SystemExit as left:
        end(int(left.code or 0))


if __name__ == "__main__":
    main()
