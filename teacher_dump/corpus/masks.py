"""From text to (input_ids, loss_mask): chat templates, and which tokens the assistant wrote.

A template with `{% generation %}` marks the assistant's text itself; for any other, `turns.py` finds the spans. The
full text is tokenised once, and a span covers every token that overlaps it.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from storage_schemas.common.errors import DataError, NeoError
from teacher_dump.corpus.formats import Completion, Conversation, Message
from teacher_dump.corpus.turns import Span, Special, assistant_spans, next_turn

log = logging.getLogger(__name__)

_ALWAYS = {"role", "content", "name", "tool_calls", "tool_call_id", "id"}
"""Keys of a message that a template may leave out for good reasons."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thinking_content")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') "
    "| replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%A', 'Friday') "
    "| replace('%a', 'Fri') | replace('%H', '00') | replace('%M', '00') | replace('%S', '00') | replace('%-d', '26') "
    "| replace('%e', '26') | replace('%j', '208') | replace('%I', '12') | replace('%p', 'AM') }}{%- endmacro %}{{ '' }}"
)
"""Put before a template that writes today's date: another date makes another corpus, which no dump could continue."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised sample."""

    input_ids: npt.NDArray[np.int32]
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,) never true for the first."""

    @classmethod
    def of(cls, input_ids: Any, mask: Any) -> "Tokens":
        """The same of a mask that may be true for the first."""
        loss_mask = np.array(mask, bool)
        loss_mask[:1] = False
        return cls(np.array(input_ids, np.int32), loss_mask)


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record that cannot become a sample."""

    reason: str

    @classmethod
    def of(cls, error: NeoError) -> "Unusable":
        """What an error says of one record, in one line."""
        return cls(f"{error.what}: {error.got} ({error.fix})")


def tokenise_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], *, mask: str
) -> list[Tokens | Unusable]:
    """Render and tokenise conversations.

    Args:
        tokenizer: fast tokenizer with a chat template.
        conversations: messages with `role` and `content`, and what else the template is given.
        mask: `assistant`: the assistant's turns with their end-of-turn token are supervised; `all`: every token.

    Returns:
        One per conversation; `Unusable` where the template refuses it, where the text is not valid Unicode, or where a
        turn of the assistant cannot be located with certainty.

    Raises:
        DataError: no chat template, or a tokenizer that reports no offsets.
    """
    found: dict[int, Tokens | Unusable] = {}
    for tools in (False, True):  # A tokenizer may have a template of its own for conversations with tools.
        chosen = [i for i, conversation in enumerate(conversations) if bool(conversation.tools) is tools]
        if chosen:
            given = [conversations[i] for i in chosen]
            template = _chat_template(tokenizer, given[0].tools)
            found |= zip(chosen, _conversations(tokenizer, template, given, mask), strict=True)
    return [found[i] for i in range(len(conversations))]


def _conversations(
    tokenizer: Any, template: str, conversations: Sequence[Conversation], mask: str
) -> list[Tokens | Unusable]:
    conversations = [_acceptable(tokenizer, template, conversation) for conversation in conversations]
    rendered = [_render(tokenizer, template, conversation, conversation.messages) for conversation in conversations]
    for conversation in conversations:
        _warn_of_unread(template, conversation)
    special = special_tokens(tokenizer)
    if mask == "assistant" and marks_generation(template):
        return [
            text if isinstance(text, Unusable) else _by_generation_marks(tokenizer, template, conversation, special)
            for conversation, text in zip(conversations, rendered, strict=True)
        ]
    spans: list[list[Span]] = [[] for _ in conversations]
    for i, (conversation, text) in enumerate(zip(conversations, rendered, strict=True)):
        if isinstance(text, Unusable):
            continue
        if mask == "all":
            spans[i] = [(0, len(text))]
            continue
        try:
            rendered[i], spans[i] = _located(tokenizer, template, conversation, text, special)
        except DataError as error:
            rendered[i] = Unusable.of(error)
    # The template writes the special tokens itself, so the tokenizer must not add them a second time.
    return _tokenise(tokenizer, rendered, spans, add_special_tokens=False)


def _located(
    tokenizer: Any, template: str, conversation: Conversation, text: str, tokens: set[str]
) -> tuple[str, list[Span]]:
    """A rendered conversation with the spans of the assistant's turns; as `assistant_spans`."""

    def render(messages: list[Message], prompt: bool) -> str | None:
        found = _render(tokenizer, template, conversation, messages, prompt=prompt)
        return found if isinstance(found, str) else None

    messages, silent = conversation.messages, conversation.silent
    special = Special(tokens, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
    spans = assistant_spans(render, messages, text, special=special, silent=silent)
    if spans and spans[-1][1] == len(text):
        # GLM-4.5's turns end where the next one begins; the last one would teach no end.
        text += next_turn(render, messages, text, special)
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def tokenise_completions(tokenizer: Any, records: Sequence[Completion], *, mask: str) -> list[Tokens | Unusable]:
    """Prompts with their completions, tokenised as one text; the completion and an end-of-text token are supervised.

    Of plain text, which has no prompt, every token but the first is. There is one end-of-text token, whether the text
    has it, the tokenizer appends it, or neither.
    """
    eos, bos = tokenizer.eos_token or "", tokenizer.bos_token or ""
    appended = bool(eos) and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    texts: list[str | Unusable] = []
    spans: list[list[Span]] = []
    for record in records:
        prompt = record.prompt or ""
        text = (prompt + record.completion).removesuffix(eos) if record.completion else prompt
        # The tokenizer adds nothing to a text that begins with its first token, see `_tokenise`.
        if text and not (appended and not (bos and text.startswith(bos))):
            text += eos
        texts.append(valid_text(text))
        spans.append([(0 if mask == "all" else len(prompt), len(text))])
    return _tokenise(tokenizer, texts, spans, add_special_tokens=True)


def marks_generation(template: str) -> bool:
    """Whether a chat template marks the assistant's text with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts that become one token wherever they stand, and mean no text."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)


def valid_text(text: str) -> str | Unusable:
    """The text itself, unless it is not valid Unicode (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Unusable(f"not valid Unicode: {error}")
    return text


def _chat_template(tokenizer: Any, tools: Any) -> str:
    try:
        template = str(tokenizer.get_chat_template(tools=tools or None))
    except ValueError as error:
        raise DataError(
            "conversations need a chat template, and the teacher's tokenizer has none",
            got="a base model's tokenizer",
            expected="a tokenizer with chat_template.jinja",
            fix="use an instruct model's tokenizer, or convert the corpus to `prompt` + `completion` or `text`",
        ) from error
    return _CLOCK + template if "strftime_now" in template else template


def _apply(tokenizer: Any, template: str, conversation: Conversation, messages: list[Message], **how: Any) -> Any:
    """The template over messages, with what else the conversation gives it."""
    given: dict[str, Any] = {"tools": conversation.tools, "chat_template": template}
    return tokenizer.apply_chat_template(messages, **given, **how, **conversation.options)


def _render(
    tokenizer: Any, template: str, conversation: Conversation, messages: list[Message], *, prompt: bool = False
) -> str | Unusable:
    try:
        text = _apply(tokenizer, template, conversation, messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError) as error:
        return Unusable(f"the chat template refuses it: {error}")
    return valid_text(str(text))


def _acceptable(tokenizer: Any, template: str, conversation: Conversation) -> Conversation:
    """The conversation, its calls' arguments as JSON text if the template takes nothing else (DeepSeek)."""
    if not any(message.get("tool_calls") for message in conversation.messages):
        return conversation
    if isinstance(_render(tokenizer, template, conversation, conversation.messages), str):
        return conversation
    messages = [
        message | {"tool_calls": [_written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in conversation.messages
    ]
    other = replace(conversation, messages=messages)
    return other if isinstance(_render(tokenizer, template, other, messages), str) else conversation


def _written(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _written(call["function"])}
    return call | {"arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}


def _warn_of_unread(template: str, conversation: Conversation) -> None:
    """Say once what a record holds and the template has no place for."""
    given = {"tools"} if conversation.tools else set()
    given |= conversation.options.keys()
    for message in conversation.messages:
        given |= message.keys() - _ALWAYS
    for name in given:
        # transformers gives a template that reads one of these the others, too.
        if not any(each in template for each in (_THOUGHTS if name in _THOUGHTS else (name,))):
            _warn_once(f"the chat template does not read `{name}`; records that have it are rendered without")


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _by_generation_marks(
    tokenizer: Any, template: str, conversation: Conversation, special: set[str]
) -> Tokens | Unusable:
    ids, mask, stretches = _marked(tokenizer, template, conversation, conversation.messages)
    if stretches and (stop := stretches[-1][1]) < len(ids):
        last, after = tokenizer.convert_ids_to_tokens(ids[stop - 1 : stop + 1].tolist())
        if after in special and last not in special:
            _warn_once(f"the chat template's {{% generation %}} leaves out {after}: a student does not learn to stop")
    if conversation.silent:
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        try:  # Thoughts may have a stretch of their own, and a turn without words none.
            found = [len(_marked(tokenizer, template, conversation, conversation.messages[: i + 1])[2]) for i in turns]
        except (TemplateError, TypeError, ValueError) as error:
            return Unusable(f"some turns have weight 0, and the template refuses those before the last: {error}")
        if [*found, len(stretches)] != [*range(1, len(turns) + 1), len(turns)]:
            return Unusable(f"{len(turns)} turns have not one stretch each of {len(stretches)}, and some have weight 0")
        for i, (start, stop) in zip(turns, stretches, strict=True):
            if i in conversation.silent:
                mask[start:stop] = False
    return Tokens.of(ids, mask)


def _marked(
    tokenizer: Any, template: str, conversation: Conversation, messages: list[Message]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], list[Span]]:
    """Token ids of messages, which of them the template marks as the assistant's, and the stretches of these."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _apply(tokenizer, template, conversation, messages, **how, tokenizer_kwargs={"verbose": False})
    mask = np.array(encoded["assistant_masks"], bool)
    starts = np.flatnonzero(mask & ~np.insert(mask[:-1], 0, False))
    stops = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    return np.array(encoded["input_ids"], np.int64), mask, list(zip(starts.tolist(), stops.tolist(), strict=True))


def _tokenise(
    tokenizer: Any, texts: Sequence[str | Unusable], spans: Sequence[list[Span]], *, add_special_tokens: bool
) -> list[Tokens | Unusable]:
    """Tokenise every usable text once; tokens that overlap one of its spans are supervised."""
    if not tokenizer.is_fast:
        raise DataError(
            "masks need a tokenizer that reports character offsets",
            got=type(tokenizer).__name__,
            expected="a fast tokenizer (tokenizer.json)",
            fix="convert the tokenizer, or tokenise the corpus elsewhere and give `input_ids` + `loss_mask`",
        )
    results: list[Tokens | Unusable] = [text if isinstance(text, Unusable) else Tokens.of([], []) for text in texts]
    bos = tokenizer.bos_token
    doubled = [isinstance(text, str) and bool(bos) and text.startswith(bos) for text in texts]
    for special in (True, False):
        chosen = [
            i
            for i, text in enumerate(texts)
            if isinstance(text, str) and (add_special_tokens and not doubled[i]) == special
        ]
        if not chosen:
            continue
        encoded = tokenizer(
            [texts[i] for i in chosen], add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        for i, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            results[i] = Tokens.of(ids, covered(offsets, spans[i]))
    return results


def covered(offsets: Sequence[Span], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """(tokens,) which tokens overlap one of the spans.

    Tokenizers report white space and appended special tokens with empty offsets at the place where they end; such a
    token belongs to the span that it ends in.
    """
    mask = np.zeros(len(offsets), bool)
    if not len(offsets):
        return mask
    # Special tokens at the end report (0, 0); the running maximum puts them where they stand.
    starts, ends = np.maximum.accumulate(np.asarray(offsets, np.int64), axis=0).T
    for start, stop in spans:
        first = np.searchsorted(ends, start, side="right")
        last = max(np.searchsorted(starts, stop, side="left"), np.searchsorted(ends, stop, side="right"))
        if stop > start:
            mask[first:last] = True
    return mask
