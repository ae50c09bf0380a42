"""What may have been meant by a command line that cannot be understood."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline import elsewhere
from pipeline.config import Config
from pipeline.credentials import instead
from pipeline.problems import keys
from storage_schemas.common.secrets import is_secret, masked

_UsageError: Any = typer.BadParameter.__mro__[1]
"""Of click, or of the copy of it that newer versions of Typer hold."""
_SETTING = re.compile(r"[a-z]\w*(\.\w+)+=.*", re.DOTALL)


class HintingGroup(TyperGroup):
    """The commands. What is wrong with a command line is said with what may have been meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words."""
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            told = str(getattr(error, "message", ""))
            if hint := meant(told, ctx.meta[__name__]):
                told = f"{told.partition(' Did you mean')[0].rstrip('.')}; {hint}"
            error.message = _without_values(told, ctx.meta[__name__])
            raise


def meant(told: str, words: Sequence[str]) -> str | None:
    """A hint about a command line.

    Args:
        told: what is wrong with it.
        words: after `llm-neo`.
    """
    follows = list(pairwise(["", *words]))
    # `No such option: --x` of one version of click, `No such option '--x'.` of another.
    if unknown := re.search(r"No such option:? '?-+([\w.-]*\w)", told):
        return _setting(unknown[1].replace("-", "_"))
    if unknown := re.search(r"No such command '(.+?)'", told):
        here = elsewhere.COMMANDS.get(unknown[1].lower())
        return f"that is {here}" if here else None
    if "unexpected extra argument" not in told:
        return None
    values = [word for before, word in follows if before == "--set"]
    for word in (word for before, word in follows if before != "--set" and _SETTING.fullmatch(word)):
        return _set(word.partition("=")[0])
    for value in (value for value in values if "=" not in value):
        return f"write --set {value}=VALUE"
    if any(value.count(a) != value.count(b) for value in values for a, b in ("[]", "{}")):
        return "quote a value with blanks in it: --set 'A.B={key: value}'"
    return None


def _setting(name: str) -> str | None:
    """How to give a setting that was given as an option."""
    *section, last = name.split(".")
    known = {".".join(path) for path in keys(Config)}
    places = [place for place in known if f".{place}".endswith(f".{name}")]
    if places := sorted(places, key=lambda place: (place.startswith("heldout."), place)):
        return _set(*places[:3])
    if hint := elsewhere.setting(last, section):
        return f"{hint.rstrip('.')}{'' if hint.endswith('?') else '.'} Settings are given as --set A.B=VALUE"
    return _set(name if section and is_secret(last) else "A.B") if section else None


def _set(*places: str) -> str:
    """How to give settings; a secret is none. The value is not repeated: it may be one."""
    for name in (place.rpartition(".")[2] for place in places):
        if is_secret(name):
            return instead(name)
    return "settings are given as " + " or ".join(f"--set {place}=VALUE" for place in places)


def _without_values(told: str, words: Sequence[str]) -> str:
    """A message that repeats no value of a setting, and nothing else that is known for a secret."""
    for word in sorted(words, key=len, reverse=True):
        if _SETTING.fullmatch(word):
            told = told.replace(word, f"{word.partition('=')[0]}=VALUE")
    return masked(told)
