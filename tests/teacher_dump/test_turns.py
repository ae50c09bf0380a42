"""The assistant's turns under the templates of well-known models: what they say is supervised, and nothing else is."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import CHATS, GLM_45, Chat
from support.corpora import supervised_text, tokenise_chats

from teacher_dump.corpus.masks import Tokens, Unusable

TOKENIZERS = {name: chat.tokenizer() for name, chat in CHATS.items()}
PIECES = [
    "the answer", "so", " ", "\n", "\n\n", "\u00e9\u4e2d\U0001f600", "<think>", "</think>",
    "<think>\nfirst\n</think>\n\n",
    "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n", "[/INST]", " [INST] ", "</s>", "<s>",
    "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<end_of_turn>\n<start_of_turn>model\n",
    "<|end|>\n<|assistant|>\n", "<|assistant|>", "ASSISTANT:", " USER: ", "### assistant:\n", "{{ bos_token }}",
    "{% generation %}", "<tool_response>", "</tool_response>", "<\uff5cAssistant\uff5c>", "<|endoftext|>",
]  # fmt: skip
CONTENT = st.one_of(st.just(""), st.lists(st.sampled_from(PIECES), max_size=5).map("".join))


@st.composite
def conversations(draw: st.DrawFn, *, system: bool) -> list[dict[str, str]]:
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENT)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(CONTENT)})
        messages.append({"role": "assistant", "content": draw(CONTENT)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(CONTENT)})
    return messages


def supervised(name: str, messages: list[dict]) -> str:
    tokenizer = TOKENIZERS[name]
    (tokens,) = tokenise_chats(tokenizer, [messages], mask="assistant")
    assert isinstance(tokens, Tokens)
    assert tokenizer.decode(tokens.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    return supervised_text(tokenizer, tokens)


def last_question(messages: list[dict]) -> int:
    """Where Qwen 3 sees the last question: a user that is no tool."""
    found = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "user"
        and not (message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>"))
    ]
    return found[-1] if found else len(messages) - 1


def expected(chat: Chat, messages: list[dict]) -> str:
    last = last_question(messages)
    return "".join(
        chat.turn(message["content"], i > last and i + 1 == len(messages))
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    )


def check(name: str, messages: list[dict]) -> None:
    assert supervised(name, messages) == expected(CHATS[name], messages)


PLAIN = [
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "the answer"},
    {"role": "assistant", "content": "so "},
]


@pytest.mark.parametrize("name", CHATS)
def test_every_answer_and_its_end_of_turn_are_supervised(name: str) -> None:
    for messages in (PLAIN[:2], PLAIN, PLAIN[:3]):
        check(name, messages)
        if CHATS[name].system:
            check(name, [{"role": "system", "content": "be brief"}, *messages])


@pytest.mark.parametrize("name", CHATS)
@given(st.data())
@settings(max_examples=12, deadline=None)
def test_whatever_is_said(name: str, data: bytes) -> None:
    if name == "qwen-3":
        # A turn after the last question that is not the conversation's last keeps its thoughts; that is tested below.
        messages = data.draw(conversations(system=True).filter(lambda m: last_question(m) >= len(m) - 2))
    else:
        messages = data.draw(conversations(system=CHATS[name].system))
    check(name, messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHATS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_said_many_times(name: str, data: bytes) -> None:
    test_whatever_is_said.hypothesis.inner_test(name, data)


def test_qwen_3_forgets_the_thoughts_of_earlier_answers_and_keeps_the_last() -> None:
    thought = [m | {"content": f"<think>\nhm {i}\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
               for i, m in enumerate(PLAIN)]  # fmt: skip
    assert supervised("qwen-3", thought) == ("the answer<|im_end|><|im_end|><think>\nhm 5\n</think>\n\nso <|im_end|>")
    apart = [m | {"reasoning_content": "hm"} if m["role"] == "assistant" else m for m in PLAIN]
    assert supervised("qwen-3", apart) == "the answer<|im_end|><|im_end|><think>\nhm\n</think>\n\nso <|im_end|>"


def call(name: str, **arguments: str) -> dict:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": None, "tool_calls": [call("look", at="it")]},
    {"role": "tool", "content": "nothing </s> here"},
    {"role": "assistant", "content": "nothing"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": None, "tool_calls": [call("look", at="now")]},
    {"role": "tool", "content": "all"},
    {"role": "assistant", "content": "all"},
]
QWEN_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "%s"}}\n</tool_call><|im_end|>'
DS = "<\uff5ctool\u2581{}\uff5c>".format
DS_CALL = DS("calls\u2581begin") + DS("call\u2581begin") + "function" + DS("sep") + 'look\n```json\n{"at": "%s"}\n```'
DS_CALL += DS("call\u2581end") + DS("calls\u2581end") + "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize(
    ("name", "first", "answer"),
    [
        ("llama-3.1", '{"name": "look", "parameters": {"at": "%s"}}<|eot_id|>', "%s<|eot_id|>"),
        ("mistral-3", '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "%s"}}]</s>', " %s</s>"),
        ("qwen-3", QWEN_CALL, "%s<|im_end|>"),
        ("deepseek-v3", DS_CALL, "%s<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ],
)
def test_tool_calls_are_what_the_assistant_says_and_tool_results_are_not(name: str, first: Any, answer: str) -> None:
    ends = "<think>\n\n</think>\n\n%s<|im_end|>" if name == "qwen-3" else answer
    assert supervised(name, TOOLS) == first % "it" + answer % "nothing" + first % "now" + ends % "all"


def test_several_calls_with_words_before_them() -> None:
    messages = [TOOLS[0], TOOLS[1] | {"content": "let me see", "tool_calls": [call("look"), call("hear")]}, TOOLS[2]]
    said = 'let me see\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>\n<tool_call>\n'
    said += '{"name": "hear", "arguments": {}}\n</tool_call><|im_end|>'
    assert supervised("qwen-2.5", messages) == said


def test_thoughts_between_tool_calls_after_the_last_question_are_kept() -> None:
    messages = [TOOLS[0], TOOLS[1] | {"content": "<think>\nhm\n</think>\n\n"}, *TOOLS[2:4]]
    assert supervised("qwen-3", messages) == (
        f"<think>\nhm\n</think>\n\n{QWEN_CALL % 'it'}<think>\n\n</think>\n\nnothing<|im_end|>"
    )


def refused(template: str, messages: list[dict], says: str, name: str = "chatml") -> None:
    tokenizer = CHATS[name].tokenizer()
    tokenizer.chat_template = template
    good = [{"role": "user", "content": "what"}]
    unusable, neighbour = tokenise_chats(tokenizer, [messages, good], mask="assistant")
    assert isinstance(unusable, Unusable)
    assert re.search(rf"located.*{says}.*mask: all.*generation", unusable.reason)
    assert isinstance(neighbour, Tokens) or "odd" in neighbour.reason
    (everything,) = tokenise_chats(tokenizer, [messages], mask="all")
    assert everything.loss_mask[1:].all()


CHATML = CHATS["chatml"].template


def test_what_cannot_be_located_is_refused_and_not_guessed() -> None:
    twice = CHATML.replace("message['content'] +", "message['content'] + message['content'] +")
    refused(twice, PLAIN[:2], "2 times")
    refused(CHATML.replace("message['content'] +", ""), PLAIN[:2], "0 times")
    counted = CHATML.replace("'\n' + message", "(message['content'] | length) ~ '\n' + message")
    refused(counted, PLAIN[:2], "renders differently with another answer")
    dated = CHATML + "{{ messages[-1]['content'] | length }}"
    refused(dated, PLAIN[:2], "renders differently with another answer")
    even = (
        "{% if messages | length % 2 and not add_generation_prompt %}{{ raise_exception('odd') }}{% endif %}" + CHATML
    )
    refused(even, [PLAIN[0], PLAIN[1], PLAIN[1], PLAIN[0]], "refuses the first turns")
    tricky = [TOOLS[0], TOOLS[1] | {"tool_calls": [call("look", at="<|im_end|>")]}]
    refused(CHATS["qwen-2.5"].template, tricky, "special token inside its tool calls")


def test_an_end_of_turn_that_only_the_last_turn_has_is_not_looked_for_elsewhere() -> None:
    tokenizer = CHATS["chatml"].tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    (tokens,) = tokenise_chats(tokenizer, [PLAIN[:4] + PLAIN[:2]], mask="assistant")
    assert tokenizer.decode(tokens.input_ids[tokens.loss_mask]) == " the answer  the answer\n<|im_end|>"


def test_guards_of_the_place_of_a_turn() -> None:
    eager = CHATML.replace("+ '<|im_end|>'", "+ ('\n' if message['content'] else '') + '<|im_end|>'")
    refused(eager, [PLAIN[0], PLAIN[3]], "renders differently with another answer")
    counted = CHATS["mistral-3"].template.replace("+ '[/INST]'", "+ (message['content'] | length) ~ '[/INST]'")
    system = {"role": "system", "content": "be brief"}
    refused(counted, [system, *PLAIN], "depends on the message before", name="mistral-3")
    refused(CHATS["deepseek-r1"].template, TOOLS, "do not begin with the generation prompt", name="deepseek-r1")


def with_template(name: str, template: str, messages: list[dict]) -> str:
    tokenizer = CHATS[name].tokenizer()
    tokenizer.chat_template = template
    (tokens,) = tokenise_chats(tokenizer, [messages], mask="assistant")
    return tokenizer.decode(tokens.input_ids[tokens.loss_mask])


def test_an_answer_that_repeats_the_opening_of_the_generation_prompt_is_whole() -> None:
    opens = CHATS["deepseek-v3"].template.replace("}}{% endif %}", "+ '<think>\n' }}{% endif %}")
    assert opens.endswith("<think>\n' }}{% endif %}")
    said = "<think>\nhm</think>so"
    found = with_template("deepseek-v3", opens, [PLAIN[0], {"role": "assistant", "content": said}])
    assert found == CHATS["deepseek-v3"].turn(said, True)


def test_the_end_of_a_text_after_the_end_of_a_turn_is_not_the_assistants() -> None:
    ended = CHATS["llama-3"].template + "{% if not add_generation_prompt %}{{ '<|eom_id|>' }}{% endif %}"
    assert with_template("llama-3", ended, PLAIN[:2]) == "the answer<|eot_id|>"


def test_turns_without_an_end_of_their_own_end_where_the_next_one_begins() -> None:
    """As GLM-4.5, whose generation stops at the next role."""
    special = "[gMASK] <|endoftext|> <sop> <|user|> <|assistant|> <|system|>"
    tokenizer = Chat(template=GLM_45, special=special, turn=lambda c, _: c).tokenizer()
    good, asks = tokenise_chats(tokenizer, [PLAIN[:2] + PLAIN[4:], PLAIN[:3]], mask="assistant")
    assert tokenizer.decode(good.input_ids[good.loss_mask]) == "\nthe answer<|user|>\nso<|user|>"
    assert tokenizer.decode(good.input_ids).endswith("so<|user|>")
    assert tokenizer.decode(asks.input_ids[asks.loss_mask]) == "\nthe answer<|user|>"
    assert tokenizer.decode(asks.input_ids).endswith("how")
