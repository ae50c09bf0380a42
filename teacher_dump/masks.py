"""From text to (input_ids, loss_mask): chat templates, and which tokens the assistant wrote.

A template with `{% generation %}` marks the assistant's text itself. For any other template the spans come from
rendering prefixes: turn i is what rendering messages[:i + 1] adds to rendering messages[:i] with the generation
prompt. The full text is tokenised once, and a span covers every token that overlaps it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from storage_schemas.errors import DataError
from teacher_dump.formats import Completion, Document, Message

Span = tuple[int, int]
"""Characters first:last of a text."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised sample."""

    input_ids: npt.NDArray[np.int32]
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,) never true for the first."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """Text that cannot become a sample."""

    reason: str


def tokenise_conversations(
    tokenizer: Any, conversations: Sequence[list[Message]], *, mask: str
) -> list[Tokens | Unusable]:
    """Render and tokenise conversations.

    Args:
        tokenizer: fast tokenizer with a chat template.
        conversations: messages with `role` and `content`.
        mask: `assistant`: the assistant's turns with their end-of-turn token are supervised; `all`: every token.

    Returns:
        One per conversation; `Unusable` where the template refuses it or the text is not valid Unicode.

    Raises:
        DataError: no chat template, or one whose assistant turns cannot be located.
    """
    template = _chat_template(tokenizer)
    rendered = [_render(tokenizer, messages) for messages in conversations]
    if mask == "assistant" and _GENERATION.search(template):
        return _by_generation_marks(tokenizer, conversations, rendered)
    spans: list[list[Span]] = []
    for messages, text in zip(conversations, rendered, strict=True):
        if mask == "all" or isinstance(text, Unusable):
            spans.append([] if isinstance(text, Unusable) else [(0, len(text))])
        else:
            spans.append(assistant_spans(tokenizer, messages, text))
    # The template writes the special tokens itself, so the tokenizer must not add them a second time.
    return _tokenise(tokenizer, rendered, spans, add_special_tokens=False)


def tokenise_completions(tokenizer: Any, records: Sequence[Completion], *, mask: str) -> list[Tokens | Unusable]:
    """Prompts with their completions, tokenised as one text; the completion and an end-of-text token are supervised."""
    eos = tokenizer.eos_token or ""
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        eos = ""  # The tokenizer appends it by itself.
    texts: list[str | Unusable] = []
    for record in records:
        text = record.prompt + record.completion
        texts.append(valid_text(text if text.endswith(eos) else text + eos))
    spans = [
        [(0 if mask == "all" else len(record.prompt), len(text) if isinstance(text, str) else 0)]
        for record, text in zip(records, texts, strict=True)
    ]
    return _tokenise(tokenizer, texts, spans, add_special_tokens=True)


def tokenise_documents(tokenizer: Any, records: Sequence[Document]) -> list[Tokens | Unusable]:
    """Plain texts; every token but the first is supervised."""
    texts = [valid_text(record.text) for record in records]
    spans = [[(0, len(text) if isinstance(text, str) else 0)] for text in texts]
    return _tokenise(tokenizer, texts, spans, add_special_tokens=True)


def assistant_spans(tokenizer: Any, messages: list[Message], text: str) -> list[Span]:
    """Character spans of the assistant's turns in `text`, the rendering of `messages`, by rendering prefixes.

    A turn ends with its end-of-turn token; white space that the template writes after it is not part of the turn.
    A turn that nothing precedes answers nothing and is not supervised.

    Raises:
        DataError: a prefix does not render as a prefix of the whole, so that turns cannot be located.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        start = _prefix_length(tokenizer, messages[:i], text, add_generation_prompt=True)
        last = i + 1 == len(messages)
        stop = len(text) if last else _prefix_length(tokenizer, messages[: i + 1], text, add_generation_prompt=False)
        spans.append((start, start + len(text[start:stop].rstrip())))
    return spans


def _prefix_length(tokenizer: Any, messages: list[Message], text: str, *, add_generation_prompt: bool) -> int:
    prefix = _render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    if isinstance(prefix, Unusable) or not text.startswith(prefix):
        raise DataError(
            "the chat template rewrites earlier turns, so that assistant turns cannot be located",
            got=f"the first {len(messages)} turns render differently alone and in the whole conversation",
            expected="a template under which the rendering of the first turns is a prefix of the whole",
            fix="set corpus.mask: all, or give the tokenizer a chat template with {% generation %}",
        )
    return len(prefix)


def valid_text(text: str) -> str | Unusable:
    """The text itself, unless it is not valid Unicode (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Unusable(f"not valid Unicode: {error}")
    return text


def _chat_template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "conversations need a chat template, and the teacher's tokenizer has none",
            got="a base model's tokenizer",
            expected="a tokenizer with chat_template.jinja",
            fix="use an instruct model's tokenizer, or convert the corpus to `prompt` + `completion` or `text`",
        ) from error


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str | Unusable:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        return Unusable(f"the chat template refuses it: {error}")
    return valid_text(str(text))


def _by_generation_marks(
    tokenizer: Any, conversations: Sequence[list[Message]], rendered: Sequence[str | Unusable]
) -> list[Tokens | Unusable]:
    usable = [messages for messages, text in zip(conversations, rendered, strict=True) if isinstance(text, str)]
    if not usable:
        return [text for text in rendered if isinstance(text, Unusable)]
    encoded = tokenizer.apply_chat_template(
        usable,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    tokens = iter(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    return [text if isinstance(text, Unusable) else _tokens(*next(tokens)) for text in rendered]


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
    results: list[Tokens | Unusable] = [text if isinstance(text, Unusable) else _tokens([], []) for text in texts]
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
            results[i] = _tokens(ids, covered(offsets, spans[i]))
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


def _tokens(input_ids: Any, mask: Any) -> Tokens:
    loss_mask = np.array(mask, bool)
    loss_mask[:1] = False
    return Tokens(np.array(input_ids, np.int32), loss_mask)
