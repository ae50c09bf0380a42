"""Command lines as `llm-neo` reads them, without running anything."""

from collections.abc import Callable, Sequence
from typing import Any

import typer

from pipeline.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
"""Name -> command."""

Call = Callable[..., tuple[int, str, str]]
"""`llm-neo` with these arguments: exit code, standard output, standard error."""


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """What a command would be called with.

    Args:
        words: after `llm-neo`; the first is the command's name.

    Raises:
        KeyError: there is no such command.
        Exception: it would refuse its arguments, with what the user would read.
    """
    name, *arguments = words
    return dict(COMMANDS[name].make_context(name, arguments).params)
