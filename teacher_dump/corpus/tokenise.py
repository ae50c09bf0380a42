"""From records to token ids and loss masks: one function of a batch of records, so that it can run anywhere."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.formats import Completion, Conversation, Pretokenised, Record, normalise
from teacher_dump.corpus.lines import RawRecord
from teacher_dump.corpus.masks import Tokens, Unusable, tokenise_completions, tokenise_conversations

NOTHING = Tokens(np.empty(0, np.int32), np.empty(0, bool))


def tokenise(
    records: Sequence[tuple[str, str, RawRecord]], tokenizer: Any, *, mask: str
) -> Iterator[tuple[str, Tokens | Unusable]]:
    """(id, tokens) per (where, format, record), in order; a record that is of no use is `Unusable` and says why.

    The id is the record's own, or a hash of its content. Nobody has judged the length yet.

    Raises:
        DataError: the tokenizer cannot do what these records need, whatever they hold.
    """
    forms = [form_of(record, kind) for _, kind, record in records]
    for (_, _, raw), form, tokens in zip(records, forms, _tokenise(forms, tokenizer, mask), strict=True):
        given = None if isinstance(raw, Unusable) else raw.get("id")
        yield _content_hash(form) if given is None else str(given), tokens


def form_of(record: RawRecord, kind: str) -> Record | Unusable | None:
    """The common form of a record of format `kind`; None if it holds nothing to learn from."""
    try:
        return record if isinstance(record, Unusable) else normalise(record, kind)
    except DataError as error:
        return Unusable.of(error)


def _tokenise(forms: list[Record | Unusable | None], tokenizer: Any, mask: str) -> Iterator[Tokens | Unusable]:
    """One result per form, in order; forms of one kind are tokenised together, which is several times faster."""
    results: dict[type, Iterator[Tokens | Unusable]] = {}
    if conversations := [form for form in forms if isinstance(form, Conversation)]:
        results[Conversation] = iter(tokenise_conversations(tokenizer, conversations, mask=mask))
    if completions := [form for form in forms if isinstance(form, Completion)]:
        results[Completion] = iter(tokenise_completions(tokenizer, completions, mask=mask))
    for form in forms:
        if form is None:
            yield NOTHING
        elif isinstance(form, Unusable):
            yield form
        elif isinstance(form, Pretokenised):
            yield _pretokenised(form, mask)
        else:
            yield next(results[type(form)])


def _pretokenised(form: Pretokenised, mask: str) -> Tokens:
    # Larger than int32 is out of range for any vocabulary; keep it so, instead of wrapping around.
    try:
        ids = np.array(form.input_ids, np.int64)
    except OverflowError:
        ids = np.array(form.input_ids, object)
    ids = np.clip(ids, -1, 2**31 - 1).astype(np.int32)
    given = form.loss_mask if form.loss_mask is not None and mask == "assistant" else np.ones(len(ids), bool)
    return Tokens.of(ids, given)


def _content_hash(form: Record | Unusable | None) -> str:
    """An id for a record without one: the same content has the same id."""
    match form:
        case None:
            content: Any = None
        case Unusable(reason):
            content = reason
        case Conversation(messages, tools, options, silent):
            content = [messages, tools, options, silent] if tools or options or silent else messages
        case Completion(prompt, completion):
            content = completion if prompt is None else [prompt, completion]
        case Pretokenised(input_ids, loss_mask):
            content = [list(input_ids), None if loss_mask is None else list(loss_mask)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
