"""What may have been meant by a command line that cannot be understood."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline import elsewhere
from pipeline.config import Config
from pipeline.problems import keys

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
                error.message = f"{told.rstrip('.')}; {hint}"
            raise


def meant(told: str, words: Sequence[str]) -> str | None:
    """A hint about a command line.

    Args:
        told: what is wrong with it.
        words: after `llm-neo`.
    """
    follows = list(pairwise(["", *words]))
    if unknown := re.search(r"No such option: -+(\S+)", told):
        option = re.compile(rf"-+{re.escape(unknown[1])}(=|$)")
        values = [word.partition("=")[2] or after for word, after in pairwise([*words, ""]) if option.match(word)]
        return _setting(unknown[1].replace("-", "_"), next(filter(None, values), "VALUE"))
    if "No such command" in told:
        here = elsewhere.COMMANDS.get(words[0].lower())
        return f"that is `llm-neo {here}`" if here else None
    if "unexpected extra argument" not in told:
        return None
    values = [word for before, word in follows if before == "--set"]
    for word in (word for before, word in follows if before != "--set" and _SETTING.fullmatch(word)):
        return f"settings are given as --set {word}"
    for value in (value for value in values if "=" not in value):
        return f"write --set {value}=VALUE"
    if any(value.count(a) != value.count(b) for value in values for a, b in ("[]", "{}")):
        return "quote a value with blanks in it: --set 'A.B={key: value}'"
    return None


def _setting(name: str, value: str) -> str | None:
    """How to give a setting that was given as an option."""
    known = {".".join(path) for kind in ("topk", "adaptive", "sampled") for path in keys(Config, kind)}
    if places := sorted(place for place in known if f".{place}".endswith(f".{name}")):
        return "settings are given as " + " or ".join(f"--set {place}={value}" for place in places[:3])
    if hint := elsewhere.setting(name):
        return f"{hint} Settings are given as --set A.B=VALUE"
    return "settings are given as --set A.B=VALUE" if "." in name else None
