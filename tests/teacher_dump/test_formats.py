"""Every record format, its detection, and the records that do not fit."""

import json
from typing import Any

import pytest

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.formats import Completion, Conversation, Pretokenised, detect_format, normalise, unread_columns

QUESTION = {"role": "user", "content": "why"}
ANSWER = {"role": "assistant", "content": "because"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "messages", "text"], "messages"),
        (["conversations", "source"], "conversations"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "text"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["text", "input_ids"], "text"),
        (["input_ids", "loss_mask"], "tokens"),
    ],
)
def test_detection_follows_the_documented_order(columns: list[str], expected: str) -> None:
    assert detect_format(columns, where="a.jsonl") == expected


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl(.|\n)*question, reply(.|\n)*prompt \+ completion"):
        detect_format(["question", "reply"], where="a.jsonl")


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"messages": [QUESTION, ANSWER]}, "messages", Conversation([QUESTION, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]},
            "conversations",
            Conversation([QUESTION, ANSWER]),
        ),
        (
            {
                "system": "be brief",
                "conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}],
            },
            "conversations",
            Conversation([{"role": "system", "content": "be brief"}, QUESTION, {"role": "assistant", "content": "so"}]),
        ),
        (
            {"messages": [{"role": "developer", "content": "x"}, {"role": "function", "content": "y"}]},
            "messages",
            Conversation([{"role": "system", "content": "x"}, {"role": "tool", "content": "y"}]),
        ),
        # A columnar file gives every message every key, null or empty.
        (
            {
                "messages": [
                    QUESTION | {"from": "human", "value": ""},
                    {"from": "gpt", "content": "", "value": "because"},
                ]
            },
            "messages",
            Conversation([QUESTION, ANSWER]),
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, QUESTION, {"role": "tool"}, ANSWER], "system": "x"},
            "messages",
            Conversation([{"role": "system", "content": "x"}, QUESTION, {"role": "tool", "content": ""}, ANSWER]),
        ),
        (
            {"messages": [QUESTION | {"tool_calls": None, "name": "bob"}, ANSWER | {"name": None}]},
            "messages",
            Conversation([QUESTION | {"name": "bob"}, ANSWER]),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w"}, {"text": "hy"}]}, ANSWER]},
            "messages",
            Conversation([QUESTION, ANSWER]),
        ),
        ({"instruction": "why", "input": "", "output": "because"}, "alpaca", Conversation([QUESTION, ANSWER])),
        (
            {"instruction": "why", "input": "me", "output": "because", "system": "be brief"},
            "alpaca",
            Conversation([{"role": "system", "content": "be brief"}, {"role": "user", "content": "why\n\nme"}, ANSWER]),
        ),
        ({"prompt": "why", "completion": "so"}, "prompt_completion", Completion("why", "so")),
        ({"prompt": None, "completion": "so"}, "prompt_completion", Completion("", "so")),
        ({"text": "some"}, "text", Completion(None, "some")),
        ({"input_ids": [1, 2]}, "tokens", Pretokenised([1, 2], None)),
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "tokens", Pretokenised([1, 2], [0, 1])),
    ],
)
def test_records_become_their_common_form(record: dict[str, Any], kind: str, expected: Any) -> None:
    assert normalise(record, kind) == expected


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"instruction": "why", "input": None, "output": ""}, "alpaca"),
        ({"prompt": "why", "completion": None}, "prompt_completion"),
        ({"text": None}, "text"),
        ({"input_ids": []}, "tokens"),
    ],
)
def test_records_with_nothing_to_learn_are_empty(record: dict[str, Any], kind: str) -> None:
    assert normalise(record, kind) is None


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        ({"messages": "oops"}, "messages", "list of"),
        ({"messages": ["oops"]}, "messages", "list of"),
        ({"messages": [{"content": "no role"}]}, "messages", "unknown role"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages", "narrator"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "content"),
        ({"text": 7}, "text", "text"),
        ({"text": "x"}, "messages", "columns text"),
        ({"input_ids": ["a"]}, "tokens", "integers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "tokens", "2 booleans"),
        ({"input_ids": [1, 2], "labels": None}, "tokens", "one value per token"),
        # What columnar readers make of a record of another format.
        ({"messages": None, "question": "why", "reply": "so"}, "messages", "columns question, reply"),
        ({"instruction": "why", "output": None, "response": "so"}, "alpaca", "columns instruction, response"),
        ({"messages": [QUESTION, {"role": "assistant", "text": "so"}]}, "messages", "`content`, or tool calls"),
        ({"messages": [{"role": "user", "text": "why"}, ANSWER]}, "messages", "`content`, or tool calls"),
        ({"messages": [QUESTION, {"role": "assistant", "reasoning": "so"}]}, "messages", "`content`, or tool calls"),
        ({"messages": [QUESTION, ANSWER | {"value": "so"}]}, "messages", "`content` and `value`"),
        ({"messages": [QUESTION | {"from": "gpt"}, ANSWER]}, "messages", "`role` and `from`"),
        ({"messages": [{"role": "system", "content": "x"}, ANSWER], "system": "y"}, "messages", "column `system`"),
    ],
)
def test_records_of_another_shape_say_what_is_wrong(record: dict[str, Any], kind: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        normalise(record, kind)


SUPERVISED = [
    {"loss_mask": [0, 0, 1, 1]},
    {"labels": [-100, -100, 7, 8]},
    {"completion_mask": [0, 0, 1, 1]},
    {"assistant_masks": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1]},
    {"labels": [-100, -100, 7, 8], "completion_mask": [0, 0, 1, 1], "position_ids": [0, 1, 2, 3]},
]


@pytest.mark.parametrize("given", SUPERVISED)
def test_every_usual_mask_of_tokenised_records_is_honoured(given: Any) -> None:
    found = normalise({"input_ids": [5, 6, 7, 8], **given}, "tokens")
    assert found == Pretokenised([5, 6, 7, 8], [0, 0, 1, 1])
    left, right = {}, {}
    for name, values in ({"attention_mask": [1] * 4} | given).items():
        padding = -100 if name == "labels" else 0
        left[name], right[name] = [padding] * 2 + values, values + [padding] * 2
    assert normalise({"input_ids": [0, 0, 5, 6, 7, 8], **left}, "tokens") == found
    assert normalise({"input_ids": [5, 6, 7, 8, 0, 0], **right}, "tokens") == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"labels": [-100, 7, 8, -100]}, "label 7 stands at token 6"),
        ({"labels": [5, 6, 7]}, "4 integers"),
        ({"labels": [-100, -100, 7, 8], "loss_mask": [0, 1, 1, 1]}, "labels and loss_mask differ|loss_mask and labels"),
        ({"attention_mask": [1, 0, 1, 1]}, "holes"),
        ({"attention_mask": [1, 1, 1, 0], "loss_mask": [0, 0, 1, 1]}, "loss_mask supervises"),
        ({"attention_mask": [1, 2, 1, 1]}, "4 booleans"),
        ({"position_ids": [0, 1, 0, 1]}, "start again"),
    ],
)
def test_masks_that_contradict_are_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        normalise({"input_ids": [5, 6, 7, 8], **given}, "tokens")


def test_a_record_of_padding_only_is_empty() -> None:
    assert normalise({"input_ids": [0, 0], "attention_mask": [0, 0]}, "tokens") is None


def called(arguments: Any, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}, **keys}


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [called({"city": "Paris"})]},
        {"tool_calls": [called('{"city": "Paris"}')]},
        {"tool_calls": [called({"city": "Paris", "a": None, "b": None}, id=None)], "content": None},
        {"function_call": {"name": "look", "arguments": '{"city": "Paris"}'}, "content": None},
    ],
)
def test_every_usual_form_of_a_tool_call_is_the_same_one(message: dict[str, Any]) -> None:
    found = normalise({"messages": [QUESTION, {"role": "assistant", **message}]}, "messages")
    expected = {"role": "assistant", "content": None, "tool_calls": [called({"city": "Paris"})]}
    assert found == Conversation([QUESTION, expected])


def test_tools_and_options_are_read_as_lists_mappings_and_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"city": {"type": "string"}}}}]
    padded = [{"type": "function", "function": tools[0]["function"] | {"description": None}, "other": None}]
    expected = Conversation([QUESTION, ANSWER], tools, {"enable_thinking": False})
    for given in (tools, padded, json.dumps(tools)):
        for options in ({"enable_thinking": False, "other": None}, '{"enable_thinking": false}'):
            record = {"messages": [QUESTION, ANSWER], "tools": given, "chat_template_kwargs": options}
            assert normalise(record, "messages") == expected
    assert normalise({"messages": [QUESTION, ANSWER], "tools": [], "chat_template_kwargs": None}, "messages") == (
        Conversation([QUESTION, ANSWER])
    )


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
def test_a_turn_of_weight_0_is_not_supervised(name: str) -> None:
    record = {"messages": [QUESTION, ANSWER | {name: 0}, QUESTION, ANSWER | {name: 1}]}
    assert normalise(record, "messages") == Conversation([QUESTION, ANSWER, QUESTION, ANSWER], silent=(1,))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"weight": 0.5}, "weight"),
        ({"role": "user", "train": True}, "assistant's messages only"),
        ({"tool_calls": [called("{oops")]}, "arguments of a tool call"),
        ({"tool_calls": ["look"]}, "a tool call"),
        ({"tool_calls": [{"function": {"name": "look", "parameters": {"city": "Paris"}}}]}, "a tool call"),
        ({"function_call": "look()"}, "a tool call"),
        ({"images": ["a.png"]}, "images"),
        ({"refusal": "no"}, "refusal"),
        ({"mask": 0}, "mask"),
        ({"loss_weight": 0.0}, "loss_weight"),
    ],
)
def test_keys_of_a_message_that_are_not_understood_are_refused(message: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        normalise({"messages": [QUESTION, ANSWER | message]}, "messages")


def test_columns_that_are_not_read() -> None:
    record = {"messages": [QUESTION], "prompt": "x", "images": [], "tools": ["a"], "functions": "[]", "mood": "good"}
    assert unread_columns(record, "messages") == ({"functions"}, {"mood"})
    assert unread_columns({"text": "x", "tools": "[1]", "input_ids": [1]}, "text") == ({"tools", "input_ids"}, set())
    assert unread_columns({"instruction": "x", "output": "y", "input": "z", "history": [["a", "b"]]}, "alpaca") == (
        {"history"},
        set(),
    )
    assert unread_columns({"messages": [QUESTION], "system_prompt": "x"}, "messages") == ({"system_prompt"}, set())
    assert unread_columns({"input_ids": [1], "target_mask": [1], "prompt_length": 1, "mood": 1}, "tokens") == (
        {"target_mask", "prompt_length"},
        {"mood"},
    )
    assert unread_columns({"input_ids": [1], "special_tokens_mask": [1], "prompt": "x"}, "tokens") == (set(), set())
    pair = {"prompt": "x", "completion": "y"}
    assert unread_columns(pair | {"label": False}, "prompt_completion") == ({"label"}, set())
    assert unread_columns(pair | {"label": "physics"}, "prompt_completion") == (set(), set())
