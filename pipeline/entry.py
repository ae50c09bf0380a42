"""The first lines of `llm-neo`: an interruption is heard before the command line is imported."""

import os
import signal
from typing import NoReturn


def leave(*_: object) -> NoReturn:
    """End at once: there is nothing yet to clean up."""
    os.write(2, b"llm-neo: stopped\n")
    os._exit(75)


def main() -> NoReturn:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    from pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
