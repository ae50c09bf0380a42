"""A conversation on the terminal, or one reply per line where standard input is no terminal."""

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from student_train.results.chat import Chat

NEW, LEAVE = "/new", "/exit"
"""What the user types to forget the conversation, and to leave."""


def converse(models: "Sequence[tuple[str, Chat]]", *, system: str | None, once: str | None, **settings: Any) -> None:
    """Answer what the user types until the input ends. Each model has its own conversation.

    Args:
        models: name and model; with more than one, each reply is headed by the name.
        system: first message of every conversation.
        once: answer this alone, even if it is `NEW` or `LEAVE`.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # A byte that is no text, or a character that the terminal lacks.
    told = Console(stderr=True)
    first = [{"role": "system", "content": system}] if system else []
    begun = [first if model.has_template else [] for _, model in models]
    conversations = [list(messages) for messages in begun]
    for name, model in models:
        if not model.has_template:
            told.print(f"{name} has no chat template: text is continued as it is", highlight=False, soft_wrap=True)
    if once is not None:
        _answer(once, models, conversations, **settings)
        return
    typed = sys.stdin.isatty()
    if typed:
        told.print(f"{NEW} begins anew, {LEAVE} or Ctrl-D leaves", highlight=False)
    while (text := _line(typed)) is not None and text != LEAVE:
        if text == NEW:
            conversations = [list(messages) for messages in begun]
        elif text.strip():
            _answer(text, models, conversations, **settings)


def _answer(
    text: str,
    models: "Sequence[tuple[str, Chat]]",
    conversations: Sequence[list[dict[str, str]]],
    **settings: Any,
) -> None:
    for (name, model), messages in zip(models, conversations, strict=True):
        if len(models) > 1:
            sys.stdout.write(f"--- {name}\n")
        messages.append({"role": "user", "content": text})
        reply = model.reply(messages, heard=_said, **settings)
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": reply})


def _line(typed: bool) -> str | None:
    try:
        return input("> " if typed else "")
    except EOFError:
        return None


def _said(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
