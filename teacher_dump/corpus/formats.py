"""Shapes of a training record, and the few forms that they are all brought into."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from storage_schemas.common.errors import DataError

Message = dict[str, Any]
"""`role`, `content`, and whatever else the chat template reads."""

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
    "question_answer": ("question", "answer"),
    "question_response": ("question", "response"),
    "instruction_response": ("instruction", "response"),
}
"""Format -> the columns that it needs. `auto` takes the first that fits, in this order."""
_ONE_TURN = {
    "alpaca": ("system", "input"),
    "question_answer": ("system", "context"),
    "question_response": ("system_prompt", "context"),
    "instruction_response": ("system", "context"),
}
"""Formats of one question, their first column, and its answer, their second -> where the system message stands, and
what is written below the question."""

_MASKS = ("loss_mask", "labels", "completion_mask", "assistant_masks")
"""Columns of tokenised records that say what is supervised."""
_CONVERSATION = {"system", "tools", "chat_template_kwargs"}
_READ: dict[str, set[str]] = {
    "messages": _CONVERSATION,
    "conversations": _CONVERSATION,
    "prompt_completion": set(),
    "text": set(),
    "tokens": {*_MASKS, "attention_mask", "position_ids"},
    **{kind: {*columns, "tools", "chat_template_kwargs"} for kind, columns in _ONE_TURN.items()},
}
"""Columns that a format reads beside those that it needs."""
READ = {"id"}.union(*FORMATS.values(), *_READ.values())
"""Columns that some format reads."""
_DECIDES = {
    "system", "system_prompt", "tools", "functions", "chat_template_kwargs", "history", "documents", "chosen",
    "rejected", "seq_lengths", "image", "images", "video", "videos", "audio", "audios", "loss_mask", "completion_mask",
    "assistant_masks", "input_ids",
}  # fmt: skip
"""Columns that decide what a sample is; where they are not read, another sample than the intended one would result."""
_SUPERVISES = re.compile("mask|label|weight|prompt|completion")
"""In names of unknown columns beside token ids: they may say which tokens are supervised."""
_METADATA = {
    "id", "idx", "index", "uuid", "source", "source_id", "dataset", "subset", "split", "category", "task",
    "topic", "tags", "language", "lang", "score", "quality", "difficulty", "url", "timestamp", "date", "created",
    "model", "license", "title", "meta", "metadata", "prompt", "prompt_id", "conversation_id", "text", "label",
    "length", "num_turns", "num_tokens", "token_type_ids", "special_tokens_mask",
}  # fmt: skip
"""Columns that nobody expects to be read."""
_UNREADABLE = {
    "image", "images", "video", "videos", "audio", "audios", "documents", "train_detail", "refusal", "mask", "masked",
    "loss_mask", "loss_weight",
}  # fmt: skip
"""Keys of a message that decide what is said or supervised, and that are not read."""
_WEIGHTS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it is supervised (OpenAI, axolotl, ms-swift)."""
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template."""

    messages: list[Message]
    tools: list[Any] | None = None
    """Definitions of the tools that the assistant may call."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the chat template, such as `enable_thinking`."""
    silent: tuple[int, ...] = ()
    """Places of the assistant's messages that are not supervised."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A text without a template: a prompt and what shall follow it, or plain text, which follows nothing."""

    prompt: str | None
    completion: str


@dataclass(frozen=True, slots=True)
class Pretokenised:
    """Token ids, made elsewhere with the teacher's tokenizer."""

    input_ids: Sequence[int]
    loss_mask: Sequence[bool] | None
    """One per token; None: every token but the first is supervised."""


Record = Conversation | Completion | Pretokenised


def fitting_format(columns: Collection[str]) -> str | None:
    """The first format whose columns are all there, if there is one."""
    return next((name for name, needed in FORMATS.items() if all(column in columns for column in needed)), None)


def unread_columns(record: Mapping[str, Any], kind: str) -> tuple[set[str], set[str]]:
    """Columns with something in them that format `kind` does not read: (those that decide a sample, unknown ones)."""
    read = {*_READ[kind], *FORMATS[kind]}
    if kind == "prompt_completion" and _is_conversational(record):
        read |= {"tools", "chat_template_kwargs"}
    left = {name for name, value in record.items() if is_filled(value)} - read
    decisive = left & _DECIDES
    if kind == "tokens":
        decisive |= {name for name in left - _METADATA if _SUPERVISES.search(name)}
    if isinstance(record.get("label"), bool):  # Unpaired preferences: false marks an answer that nobody wants.
        decisive |= left & {"label"}
    return decisive, left - decisive - _METADATA


def is_filled(value: Any) -> bool:
    """Whether a column says anything; columnar files give every record the columns of all."""
    return value is not None and value not in ("", [], {})


def detect_format(columns: Collection[str], *, where: str) -> str:
    """The format whose columns are all there.

    Raises:
        DataError: none fits.
    """
    if name := fitting_format(columns):
        return name
    fix = "say what they are called, as in corpus.sources[].columns: {question: query}; or convert it to `messages`"
    if len(columns) == 1 and re.search(r"[;,\t|]", next(iter(columns))):
        fix = "separate the values by commas in a .csv, by tabs in a .tsv"
    raise DataError(
        f"{where}: no known record format fits",
        got=f"columns {', '.join(sorted(columns)) or '(none)'}",
        expected="; ".join(f"{name}: {' + '.join(needed)}" for name, needed in FORMATS.items()),
        fix=fix,
    )


def normalise(record: Mapping[str, Any], kind: str) -> Record | None:
    """Bring a record of format `kind` into its common form; None if it holds nothing to learn from.

    Raises:
        DataError: a column is missing, or of another shape than the format's.
    """
    # Not there, or null as columnar files have it: a record with something else in it is of another format, one without
    # is empty.
    missing = [column for column in FORMATS[kind] if record.get(column) is None]
    filled = [column for column, value in record.items() if is_filled(value)] if missing else []
    elsewhere = fitting_format(filled) is not None and any(column not in record for column in missing)
    if missing and (elsewhere or any(unread_columns(record, kind))):
        raise DataError(
            f"the record is not of format `{kind}`",
            got=f"columns {', '.join(sorted(name for name in record if record[name] is not None)) or '(none)'}",
            expected=f"columns {', '.join(FORMATS[kind])}",
            fix="set the format of this source, or split the file by format",
        )
    match kind:
        case "messages" | "conversations":
            messages = _messages(record.get(kind), kind)
            system = _text(record.get("system"), "system")
            if system and messages and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            elif system and messages and messages[0]["content"] != system:
                raise _shape("the column `system`", system, "what the conversation's own first message says")
            return _conversation(messages, record)
        case kind if kind in _ONE_TURN:
            return _one_turn(record, kind)
        case "prompt_completion" if _is_conversational(record):
            before, after = (_messages(record.get(name), name) for name in FORMATS[kind])
            context = tuple(i for i, message in enumerate(before) if message["role"] == "assistant")
            found = _conversation(before + after, record) if after else None
            return found and replace(found, silent=tuple(sorted({*found.silent, *context})))
        case "prompt_completion":
            prompt, completion = (_text(record.get(name), name) for name in FORMATS[kind])
            return Completion(prompt, completion) if completion else None
        case "text":
            text = _text(record.get("text"), "text")
            return Completion(None, text) if text else None
        case "tokens":
            return _tokens(record)
        case _:
            raise ValueError(f"unknown format {kind!r}")


def _conversation(messages: list[Message], record: Mapping[str, Any]) -> Conversation | None:
    tools = _parsed(record.get("tools"), "tools", list)
    options = _parsed(record.get("chat_template_kwargs"), "chat_template_kwargs", dict)
    silent = tuple(i for i, message in enumerate(messages) if not message.pop(_SUPERVISED, True))
    return Conversation(messages, tools or None, options or {}, silent) if messages else None


def _messages(value: Any, name: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise _shape(name, value, "a list of {role, content} or {from, value}")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> Message:
    # Columnar files give every message the keys of all messages; absent ones come as None.
    present: Message = _without_nulls(message)
    if unreadable := [key for key in sorted(_UNREADABLE & present.keys()) if is_filled(present[key])]:
        raise DataError(
            "a message holds what is not read and decides what it is",
            got=", ".join(unreadable),
            expected="text, tool calls and their results; `weight: 0` for a turn that is not supervised",
            fix="drop the record, or the key if it does not matter",
        )
    for key in {"role", "from"} & present.keys():
        present[key] = _ROLES.get(str(present[key]).lower(), present[key])
    role = _one_of(present, "role", "from")
    if role not in _ROLES.values():
        raise DataError(
            "a message has an unknown role",
            got=repr(role),
            expected=", ".join(sorted(_ROLES)),
            fix="say which of these it is in corpus.sources[].roles, as in {customer: user}; or drop the record",
        )
    for name in _WEIGHTS:
        weight = present.pop(name, None)
        if weight not in (None, 0, 1) or (weight and name != "weight" and role != "assistant"):
            raise _shape(f"`{name}` of a message", weight, "0 or 1, and 1 for the assistant's messages only")
        if weight == 0 and role == "assistant":
            present[_SUPERVISED] = False
    if call := present.pop("function_call", None):
        present["tool_calls"] = [*present.get("tool_calls", []), {"type": "function", "function": call}]
    present["tool_calls"] = [_call(each) for each in _parsed(present.get("tool_calls"), "tool_calls", list) or []]
    if not present["tool_calls"]:
        del present["tool_calls"]
    content = _one_of(present, "content", "value")
    if content is None and not present.get("tool_calls") and role != "tool":
        # Rendered with nothing, it would teach to end the turn at once.
        raise _shape("a message", dict(message), "`content`, or tool calls")
    # Templates tell a message that only calls tools by its lack of content.
    text = None if content is None and present.get("tool_calls") else _text(content, "content")
    return present | {"role": role, "content": text}


def _one_of(message: Message, name: str, other: str) -> Any:
    """What a message holds under either name; it is removed from it."""
    given = [message.pop(key, None) for key in (name, other)]
    said = [value for value in given if is_filled(value)] or [value for value in given if value is not None]
    if len(said) == 2 and said[0] != said[1]:
        raise _shape(f"`{name}` and `{other}` of a message", said, "one of them, or the same in both")
    return said[0] if said else None


_SUPERVISED = "\0supervised"


def _call(call: Any) -> Any:
    """A tool call with its arguments as a mapping: templates encode them themselves."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    elsewhere = isinstance(inner, dict) and {"parameters", "input", "args"} & inner.keys() and "arguments" not in inner
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or elsewhere:
        raise _shape("a tool call", call, "{type: function, function: {name, arguments}}")
    arguments = _parsed(inner.get("arguments"), "arguments of a tool call", dict)
    changed = inner | {"arguments": arguments or {}}
    return call | {"function": changed} if "function" in call else changed


def _parsed(value: Any, name: str, kind: type) -> Any:
    """A list or a mapping, or the same as JSON text, without keys that only other records have; None without it."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise _shape(name, value, f"valid JSON, or a {kind.__name__}") from None
    else:
        value = _without_nulls(value or None)
    if value is not None and not isinstance(value, kind):
        raise _shape(name, value, f"a {kind.__name__}, or one as JSON text")
    return value


def _without_nulls(value: Any) -> Any:
    """Columnar files give every struct the keys of all structs; absent ones come as None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _one_turn(record: Mapping[str, Any], kind: str) -> Conversation | None:
    asked, answer, system, context = (_text(record.get(name), name) for name in (*FORMATS[kind], *_ONE_TURN[kind]))
    if not answer:
        return None
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    question = f"{asked}\n\n{context}" if context else asked
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(messages, record)


def _is_conversational(record: Mapping[str, Any]) -> bool:
    """Whether prompt or completion is a list of messages, as TRL has them, and not of parts of a text."""
    lists = [value for name in FORMATS["prompt_completion"] if isinstance(value := record.get(name), list)]
    return any(isinstance(each, Mapping) and {"role", "from"} & each.keys() for value in lists for each in value)


def _tokens(record: Mapping[str, Any]) -> Pretokenised | None:
    ids = record.get("input_ids")
    if not ids:
        return None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise _shape("input_ids", ids, "a list of integers")
    given = {name: record[name] for name in ("attention_mask", "position_ids", *_MASKS) if record.get(name) is not None}
    for name, values in given.items():
        allowed = None if name in ("labels", "position_ids") else (0, 1)
        if (
            not isinstance(values, list)
            or len(values) != len(ids)
            or not all(isinstance(value, int) and (allowed is None or value in allowed) for value in values)
        ):
            kind = "integers" if allowed is None else "booleans"
            raise _shape(name, values, f"a list of {len(ids)} {kind}, one per token")
    if (blank := [name for name in _MASKS if name in record]) and not given.keys() & set(_MASKS):
        raise _shape(blank[0], None, "one value per token, as other records have, or no such column")
    attended = given.pop("attention_mask", [1] * len(ids))
    if not any(attended):
        return None
    first, last = attended.index(1), len(ids) - attended[::-1].index(1)
    if not all(attended[first:last]):
        raise _disagree("attention_mask has holes", "0 for padding at the beginning or the end only")
    places = given.pop("position_ids", None)
    if places is not None and places[first:last] != [*range(places[first], places[first] + last - first)]:
        raise _disagree("position_ids start again", "one sample per record, not packed ones")
    masks = [(name, _mask(name, values, ids)) for name, values in given.items()]
    for name, mask in masks:
        if any(mask[:first]) or any(mask[last:]):
            raise _disagree(
                f"{name} supervises what attention_mask calls padding", "supervised tokens that are attended to"
            )
        # Nothing precedes token 0, so it is never supervised and tools differ on it.
        usual, other = masks[0]
        if [*map(bool, mask[first + 1 : last])] != [*map(bool, other[first + 1 : last])]:
            raise _disagree(f"{usual} and {name} differ", "masks that say the same, or only one of them")
    return Pretokenised(ids[first:last], masks[0][1][first:last] if masks else None)


def _mask(name: str, values: list[int], ids: list[int]) -> list[Any]:
    if name != "labels":
        return values
    for label, token in zip(values, ids, strict=True):
        if label not in (-100, token):
            raise _disagree(
                f"label {label} stands at token {token}", "labels that repeat input_ids or are -100, not shifted"
            )
    return [label != -100 for label in values]


def _disagree(got: str, expected: str) -> DataError:
    fix = "correct the record, or give input_ids and loss_mask only"
    return DataError("what a tokenised record says of its tokens disagrees", got=got, expected=expected, fix=fix)


def _text(value: Any, name: str) -> str:
    """A string; None is empty, and a list of text parts is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise _shape(name, value, "text")


def _shape(what: str, value: Any, expected: str) -> DataError:
    shown = repr(value)
    return DataError(
        f"{what} has another shape than its format",
        got=shown if len(shown) <= 200 else shown[:200] + " ...",
        expected=expected,
        fix="correct or drop the record, or set the format of this source",
    )
