"""Shapes of a training record, and the few forms that they are all brought into."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage_schemas.errors import DataError

Message = dict[str, Any]
"""`role`, `content`, and whatever else the chat template reads."""

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
"""Format -> the columns that it needs. `auto` takes the first that fits, in this order."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what shall follow it, without a template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Pretokenised:
    """Token ids, made elsewhere with the teacher's tokenizer."""

    input_ids: Sequence[int]
    loss_mask: Sequence[bool] | None
    """One per token; None: every token but the first is supervised."""


Record = Conversation | Completion | Document | Pretokenised


def fitting_format(columns: Collection[str]) -> str | None:
    """The first format whose columns are all there, if there is one."""
    return next((name for name, needed in FORMATS.items() if all(column in columns for column in needed)), None)


def detect_format(columns: Collection[str], *, where: str) -> str:
    """The format whose columns are all there.

    Raises:
        DataError: none fits.
    """
    if name := fitting_format(columns):
        return name
    raise DataError(
        f"{where}: no known record format fits",
        got=f"columns {', '.join(sorted(columns)) or '(none)'}",
        expected="; ".join(f"{name}: {' + '.join(needed)}" for name, needed in FORMATS.items()),
        fix="rename the columns, or convert the file to `messages`",
    )


def normalise(record: Mapping[str, Any], kind: str) -> Record | None:
    """Bring a record of format `kind` into its common form; None if it holds nothing to learn from.

    Raises:
        DataError: a column is missing, or of another shape than the format's.
    """
    missing = [column for column in FORMATS[kind] if column not in record]
    if missing:
        raise DataError(
            f"the record is not of format `{kind}`",
            got=f"columns {', '.join(sorted(record)) or '(none)'}",
            expected=f"columns {', '.join(FORMATS[kind])}",
            fix="set the format of this source, or split the file by format",
        )
    match kind:
        case "messages" | "conversations":
            messages = _messages(record[kind])
            if record.get("system") and messages and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": _text(record["system"], "system")})
            return Conversation(messages) if messages else None
        case "alpaca":
            return _alpaca(record)
        case "prompt_completion":
            prompt = _text(record["prompt"], "prompt")
            completion = _text(record["completion"], "completion")
            return Completion(prompt, completion) if completion else None
        case "text":
            text = _text(record["text"], "text")
            return Document(text) if text else None
        case "tokens":
            return _tokens(record)
        case _:
            raise ValueError(f"unknown format {kind!r}")


def _messages(value: Any) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise _shape("the conversation", value, "a list of {role, content} or {from, value}")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> Message:
    # Columnar files give every message the keys of all messages; absent ones come as None.
    present = {key: value for key, value in message.items() if value is not None}
    speaker = present.pop("role", present.pop("from", None))
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise DataError(
            "a message has an unknown role",
            got=repr(speaker),
            expected=", ".join(sorted(_ROLES)),
            fix="rename the role, or drop the record",
        )
    content = present.pop("content", present.pop("value", None))
    # Templates tell a message that only calls tools by its lack of content.
    text = None if content is None and present.get("tool_calls") else _text(content, "content")
    return present | {"role": _ROLES[speaker.lower()], "content": text}


def _alpaca(record: Mapping[str, Any]) -> Conversation | None:
    instruction, context, output, system = (
        _text(record.get(name), name) for name in ("instruction", "input", "output", "system")
    )
    if not output:
        return None
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    question = f"{instruction}\n\n{context}" if context else instruction
    return Conversation([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}])


def _tokens(record: Mapping[str, Any]) -> Pretokenised | None:
    input_ids, loss_mask = record["input_ids"], record.get("loss_mask")
    if not input_ids:
        return None
    if not isinstance(input_ids, list) or not all(isinstance(token, int) for token in input_ids):
        raise _shape("input_ids", input_ids, "a list of integers")
    if loss_mask is not None and (not isinstance(loss_mask, list) or len(loss_mask) != len(input_ids)):
        raise _shape("loss_mask", loss_mask, f"a list of {len(input_ids)} booleans, one per token")
    return Pretokenised(input_ids, loss_mask)


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
