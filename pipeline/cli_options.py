"""Options that several commands share, and how what a command does and has found is printed."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from pipeline.credentials import has_secret, instead, is_secret_option
from storage_schemas.common.publish import publish

log = logging.getLogger(__name__)

_LINE_SECONDS = 5.0
Url = Annotated[
    str,
    typer.Argument(metavar="URL", help="The dump: a path, file://, s3://, gs://, az:// or hf://datasets/USER/NAME."),
]
StoreOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--store", metavar="KEY=VALUE", help="Setting of the object store, e.g. endpoint=http://HOST. Repeatable."
    ),
]


def pairs(texts: list[str] | None, *, option: str = "--store") -> dict[str, str]:
    """What an option that may be repeated sets."""
    for number, text in enumerate(texts or (), 1):
        key, equals, value = text.partition("=")
        # Nothing of it is shown: it may be a secret.
        if not equals or not re.fullmatch(r"\w+", key):
            raise typer.BadParameter(f"the one with number {number} is not of the form KEY=VALUE", param_hint=option)
        if is_secret_option(key) or has_secret(value):
            raise typer.BadParameter(f"{key} holds a secret; {instead(key)}", param_hint=option)
    return dict(text.split("=", 1) for text in texts or ())


@contextmanager
def shown_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, all): a bar on a terminal, else a log line every few seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), console=console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = shown = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _LINE_SECONDS or done == total:
            shown = now
            left = timedelta(seconds=round((now - started) / max(1, done) * (total - done)))
            log.info("%s: %d/%d, %s left", title, done, total, left)

    yield line


def print_result(
    found: dict[str, Any],
    as_json: bool,
    result: Path | None = None,
    *,
    show: Callable[[dict[str, Any], Console], None] | None = None,
) -> None:
    """Print a result, or leave it in a file.

    Args:
        found: the result.
        as_json: whether as one JSON object.
        result: leave it there, and print nothing.
        show: how it is printed for people; None: a line per value.
    """
    if result is not None:
        publish(result, json.dumps(found))
    elif as_json:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
    elif show is not None:
        show(found, Console())
    else:
        lines = list(_plain(found))
        width = max([28, *(len(name) for name, _ in lines)])
        for name, value in lines:
            typer.echo(f"{name:{width}} {value}")


def _plain(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of what is in there, for people; of a list one per element."""
    for name, value in found.items():
        match value:
            case dict():
                yield from _plain(value, f"{prefix}{name}.")
            case list():
                yield from ((prefix + name, each) for each in value or ["none"])
            case bool() | None:
                yield prefix + name, json.dumps(value)
            case int():
                yield prefix + name, f"{value:,}"
            case float():
                yield prefix + name, f"{value:.6g}"
            case _:
                yield prefix + name, value
