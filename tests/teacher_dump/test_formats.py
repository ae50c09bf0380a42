"""Every record format, its detection, and the records that do not fit."""

import pytest

from storage_schemas.errors import DataError
from teacher_dump.formats import Completion, Conversation, Document, Pretokenised, detect_format, normalise

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
def test_detection_follows_the_documented_order(columns, expected):
    assert detect_format(columns, where="a.jsonl") == expected


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match=r"a\.jsonl(.|\n)*answer, question(.|\n)*prompt \+ completion"):
        detect_format(["question", "answer"], where="a.jsonl")


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
        # A columnar file gives every message every key.
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
        ({"text": "some"}, "text", Document("some")),
        ({"input_ids": [1, 2]}, "tokens", Pretokenised([1, 2], None)),
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "tokens", Pretokenised([1, 2], [0, 1])),
    ],
)
def test_records_become_their_common_form(record, kind, expected):
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
def test_records_with_nothing_to_learn_are_empty(record, kind):
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
    ],
)
def test_records_of_another_shape_say_what_is_wrong(record, kind, says):
    with pytest.raises(DataError, match=says):
        normalise(record, kind)
