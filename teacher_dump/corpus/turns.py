"""Where the assistant's turns stand in a rendered conversation, for chat templates that do not say so.

The conversation is rendered again with one answer replaced by a mark. What stands before and after the mark does not
depend on the answer, so what lies between the two in the true rendering is the answer, as the template left it:
stripped, without its thoughts, or with thoughts that the template added. Everything is compared with the true
rendering; where that does not fit, there is an error and no guess.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.formats import Message

Span = tuple[int, int]
"""Characters first:last of a text."""
Render = Callable[[list[Message], bool], str | None]
"""(messages, add_generation_prompt) -> text; None where the template refuses them."""


@dataclass(frozen=True, slots=True)
class Special:
    """A tokenizer's special tokens, as text."""

    tokens: Collection[str]
    bos: str = ""
    eos: str = ""


def assistant_spans(
    render: Render, messages: list[Message], text: str, *, special: Special, silent: Collection[int] = ()
) -> list[Span]:
    """Spans of the assistant's turns in `text`, the rendering of `messages`.

    A turn begins where the generation prompt ends, which is where the model would begin to write, and includes its
    end-of-turn token with the white space before it: the first special token, or the tokenizer's end of text if that
    follows at once; where turns have no end of their own, the next one's first token, at which generation stops. Where
    history is rendered without the generation prompt's own opening (such as `<think>`), it begins with the answer.
    Tool calls belong to the turn. A turn that nothing precedes answers nothing and is not in the list.

    Args:
        messages: with `role` and `content`.
        text: their rendering.
        silent: places of messages that are not asked for.

    Raises:
        DataError: a turn cannot be located with certainty.
    """
    return [
        _turn(render, messages, i, text, special)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i > 0 and i not in silent
    ]


def _turn(render: Render, messages: list[Message], i: int, text: str, special: Special) -> Span:
    mark = _mark(messages, text)
    calls = messages[i].get("tool_calls")
    if calls and any(token in json.dumps(calls, ensure_ascii=False, default=str) for token in special.tokens):
        raise _lost(messages, i, "a special token inside its tool calls")
    marked = _with_mark(messages, i, mark)
    before, after = _cut(render(marked, False), mark, messages, i)
    start = _start(render, messages, i, text, before, mark)
    stop = len(text) - len(after)
    fixed = before if calls else before[:start]
    if not (text.startswith(fixed) and text.endswith(after) and start <= stop):
        raise _lost(messages, i, "the rest of the conversation renders differently with another answer")
    alone = after
    if i + 1 < len(messages):
        _, alone = _cut(render(marked[: i + 1], False), mark, messages, i)
    return start, stop + len(_end_of_turn(after, alone, special, take_all=bool(calls)))


def _start(render: Render, messages: list[Message], i: int, text: str, before: str, mark: str) -> int:
    """Where the model would begin to write turn i; `before` stands in front of the mark in its place."""
    prompt = render(messages[:i], True)
    if prompt is not None and text.startswith(prompt) and before.startswith(prompt):
        return len(prompt)
    # Earlier turns render differently without later ones. Compare only what follows the message before this turn.
    other = mark[::-1]
    earlier = _with_mark(messages, i - 1, other)
    _, prompt = _cut(render(earlier[:i], True), other, messages, i)
    whole, _ = _cut(render(_with_mark(earlier, i, mark), False), mark, messages, i)
    _, between = _cut(whole, other, messages, i)
    if not before.endswith(between):
        raise _lost(messages, i, "what stands before it depends on the message before")
    if between.startswith(prompt):
        return len(before) - len(between) + len(prompt)
    if messages[i].get("tool_calls"):
        raise _lost(messages, i, "tool calls that do not begin with the generation prompt")
    return len(before)


def next_turn(render: Render, messages: list[Message], text: str, special: Special) -> str:
    """The special token that another turn would begin with if the last one has no end of its own, else nothing."""
    if messages[-1]["role"] != "assistant" or any(token and text.rstrip().endswith(token) for token in special.tokens):
        return ""
    longer = render([*messages, {"role": "user", "content": _mark(messages, text)}], False)
    if longer is None or not longer.startswith(text):
        return ""
    return _beginning(longer[len(text) :], special)


def _beginning(after: str, special: Special) -> str:
    end = _special_end(after, 0, {token for token in special.tokens if token != special.bos}, anywhere=False)
    return after[:end] if end else ""


def _end_of_turn(after: str, alone: str, special: Special, *, take_all: bool) -> str:
    """What ends a turn: up to a special token that follows it here and where nothing comes after it.

    Args:
        after: what follows the turn in this conversation.
        alone: what follows it when it is the last one; without a special token there, all of it but white space.
        special: special tokens; those that follow at once are taken as far as the end of text, if that is among them.
        take_all: take all that follow at once: tool calls are closed by several.
    """
    end = _special_end(alone, 0, special.tokens, anywhere=True)
    if end is None:
        written = alone.rstrip()
        if not alone:
            return _beginning(after, special)
        return written if after.startswith(written) else ""
    stops = [end]
    while further := _special_end(alone, stops[-1], special.tokens, anywhere=False):
        stops.append(further)
    stops = [stop for stop in stops if after.startswith(alone[:stop])]
    if not stops:
        return ""
    ended = next((stop for stop in stops if special.eos and alone[:stop].endswith(special.eos)), stops[0])
    return alone[: stops[-1] if take_all else ended]


def _special_end(text: str, start: int, special: Collection[str], *, anywhere: bool) -> int | None:
    """Where the first special token ends that stands at `start`, or anywhere from there; None without one."""
    places = [(text.find(token, start), -len(token)) for token in special if token]
    found = min(((place, size) for place, size in places if place >= 0 and (anywhere or place == start)), default=None)
    return None if found is None else found[0] - found[1]


def _mark(messages: Sequence[Message], text: str) -> str:
    """Letters and digits that no template touches and no text contains."""
    seed = json.dumps(messages, default=str)
    while True:
        mark = "x" + hashlib.sha256(seed.encode(errors="surrogatepass")).hexdigest()[:20] + "y"
        if mark not in text and mark[::-1] not in text:
            return mark
        seed = mark


def _with_mark(messages: list[Message], i: int, mark: str) -> list[Message]:
    """The messages with the mark in place of the content of message i, or of the name of its last tool call."""
    changed: dict[str, Any] = {"content": mark}
    if calls := messages[i].get("tool_calls"):
        last = dict(calls[-1])
        if "function" in last:
            last["function"] = last["function"] | {"name": mark}
        else:
            last["name"] = mark
        changed = {"tool_calls": [*calls[:-1], last]}
    return [*messages[:i], messages[i] | changed, *messages[i + 1 :]]


def _cut(text: str | None, mark: str, messages: list[Message], i: int) -> tuple[str, str]:
    if text is None:
        raise _lost(messages, i, "the template refuses the first turns of it alone, or another answer in its place")
    if text.count(mark) != 1:
        raise _lost(messages, i, f"the template writes a message {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after


def _lost(messages: list[Message], i: int, why: str) -> DataError:
    shown = str(messages[0].get("content"))
    return DataError(
        "an assistant turn cannot be located with certainty in what the chat template renders",
        got=f"{why} (message {i + 1} of a conversation that begins with {shown[:60]!r})",
        expected="a template that writes each answer once, with a beginning and an end of its own",
        fix="set corpus.mask: all, or give the tokenizer a chat template with {% generation %}",
    )
