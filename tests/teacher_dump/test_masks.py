"""Which tokens the assistant wrote, over templates with and without generation marks."""

from typing import Any

import numpy as np
import pytest
from support.corpora import supervised_text, tokenise_chats
from support.tiny_teachers import CHATML, CHATML_GENERATION, FORGETS_THOUGHTS, HEADERS, INSTRUCTIONS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from storage_schemas.common.errors import DataError
from teacher_dump.corpus import masks
from teacher_dump.corpus.formats import Completion, Conversation, Message
from teacher_dump.corpus.masks import Tokens, Unusable, covered, tokenise_completions


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Alternating turns."""
    roles = ["user", "assistant"] if first == "user" else [first, "user", "assistant"]
    names = roles[:1] + ["user", "assistant"] * len(contents) if first != "user" else roles * len(contents)
    return [{"role": role, "content": content} for role, content in zip(names, contents, strict=False)]


CONVERSATIONS = [
    turns("what is it", "the answer"),
    turns("what is it", "the answer", "and the other", "one, two\nthree "),
    turns("be brief", "what is it", "the answer\n\n", first="system"),
    turns("what is it", "  spaced answer with \u00e9, \u4e2d\u6587 and \U0001f600"),
    turns("what is it", "the answer is what is it", "what is it"),
    turns("the answer", "the answer"),
    turns("what is it", "\n"),
]


def text(tokenizer: Any, tokens: Tokens) -> str:
    return tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_generation_marks_and_prefix_rendering_agree(messages: list[Message]) -> None:
    marked, unmarked = tiny_tokenizer(CHATML_GENERATION), tiny_tokenizer(CHATML)
    (a,) = tokenise_chats(marked, [messages], mask="assistant")
    (b,) = tokenise_chats(unmarked, [messages], mask="assistant")
    np.testing.assert_array_equal(a.input_ids, b.input_ids)
    np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chatml_supervises_each_answer_and_its_end_of_turn(template: str, messages: list[Message]) -> None:
    tokenizer = tiny_tokenizer(template)
    (tokens,) = tokenise_chats(tokenizer, [messages], mask="assistant")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert supervised_text(tokenizer, tokens) == "".join(answer + "<|im_end|>" for answer in answers)
    assert text(tokenizer, tokens) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_header_template_supervises_each_answer_and_its_end_of_turn(messages: list[Message]) -> None:
    tokenizer = tiny_tokenizer(HEADERS)
    (tokens,) = tokenise_chats(tokenizer, [messages], mask="assistant")
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    assert supervised_text(tokenizer, tokens) == "".join(answer + "<|eot|>" for answer in answers)


def test_the_beginning_of_text_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(HEADERS)
    # As Llama's tokenizer does, add <s> to whatever is tokenised.
    tokenizer._tokenizer.post_processor = _adds_bos(tokenizer)
    (chat,) = tokenise_chats(tokenizer, [CONVERSATIONS[0]], mask="assistant")
    (plain, marked) = tokenise_completions(
        tokenizer, [Completion(None, "what is it"), Completion(None, "<s>what is it")], mask="assistant"
    )
    for tokens in (chat, plain, marked):
        assert (tokens.input_ids == tokenizer.bos_token_id).sum() == 1
        assert tokens.input_ids[0] == tokenizer.bos_token_id
    np.testing.assert_array_equal(plain.input_ids, marked.input_ids)


def test_instruction_template_without_generation_prompt() -> None:
    tokenizer = tiny_tokenizer(INSTRUCTIONS)
    ours, refused = tokenise_chats(
        tokenizer, [turns("what", "the answer", "how", "so"), CONVERSATIONS[2]], mask="assistant"
    )
    assert supervised_text(tokenizer, ours) == " the answer</s> so</s>"
    assert isinstance(refused, Unusable)
    assert "only user and assistant" in refused.reason


def test_a_template_that_rewrites_history_is_followed() -> None:
    tokenizer = tiny_tokenizer(FORGETS_THOUGHTS)
    (single,) = tokenise_chats(tokenizer, [turns("what", "the answer")], mask="assistant")
    assert supervised_text(tokenizer, single) == "<think></think>the answer<|im_end|>"
    several = [turns("what", "the answer", "how", "so")]
    (both,) = tokenise_chats(tokenizer, several, mask="assistant")
    assert supervised_text(tokenizer, both) == "the answer<|im_end|><think></think>so<|im_end|>"
    (everything,) = tokenise_chats(tokenizer, several, mask="all")
    assert everything.loss_mask[1:].all()


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template: str) -> None:
    dated = "\n\n{% set today = strftime_now('%d %b %Y') %}{{ 'Today Date: ' + today + '\n' }}" + template
    tokenizer = tiny_tokenizer(dated)
    (tokens,) = tokenise_chats(tokenizer, [CONVERSATIONS[0]], mask="assistant")
    assert text(tokenizer, tokens).startswith("\n\nToday Date: 26 Jul 2024\n<|im_start|>user")
    assert supervised_text(tokenizer, tokens) == "the answer<|im_end|>"


def test_an_answer_that_nothing_precedes_is_context() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    messages = [{"role": "assistant", "content": "hello"}, *turns("what", "the answer")]
    (tokens,) = tokenise_chats(tokenizer, [messages], mask="assistant")
    assert supervised_text(tokenizer, tokens) == "the answer<|im_end|>"


def test_mask_all_supervises_everything_but_the_first_token() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    (tokens,) = tokenise_chats(tokenizer, [CONVERSATIONS[1]], mask="all")
    assert not tokens.loss_mask[0]
    assert tokens.loss_mask[1:].all()


def test_no_chat_template_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="chat template"):
        tokenise_chats(tiny_tokenizer(None), [CONVERSATIONS[0]], mask="assistant")


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_invalid_unicode_is_unusable_and_leaves_its_neighbours_alone(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    bad = turns("what", "\ud800 half a pair")
    good, unusable, also_good = tokenise_chats(tokenizer, [CONVERSATIONS[0], bad, CONVERSATIONS[1]], mask="assistant")
    assert isinstance(unusable, Unusable)
    assert supervised_text(tokenizer, good) == "the answer<|im_end|>"
    assert supervised_text(tokenizer, also_good).startswith("the answer<|im_end|>one")
    assert isinstance(tokenise_completions(tokenizer, [Completion(None, "\udfff")], mask="all")[0], Unusable)
    assert isinstance(tokenise_completions(tokenizer, [Completion("\udfff", "a")], mask="assistant")[0], Unusable)
    assert isinstance(tokenise_chats(tokenizer, [bad], mask="assistant")[0], Unusable)


def test_completions_supervise_the_completion_and_end_the_text() -> None:
    tokenizer = tiny_tokenizer(None)
    records = [Completion("what is", " the answer"), Completion("", "the answer"), Completion("what ", "so</s>")]
    with_prompt, without, ended = tokenise_completions(tokenizer, records, mask="assistant")
    assert text(tokenizer, with_prompt) == "what is the answer</s>"
    assert supervised_text(tokenizer, with_prompt) == " the answer</s>"
    assert not without.loss_mask[0]
    assert without.loss_mask[1:].all()
    assert text(tokenizer, ended) == "what so</s>"
    (straddling,) = tokenise_completions(tokenizer, [Completion("what is ", "the answer")], mask="assistant")
    np.testing.assert_array_equal(straddling.loss_mask, with_prompt.loss_mask)
    (everything,) = tokenise_completions(tokenizer, records[:1], mask="all")
    assert everything.loss_mask[1:].all()


def test_documents_supervise_everything_but_the_first_token_and_end() -> None:
    tokenizer = tiny_tokenizer(None)
    tokens, ended, empty = tokenise_completions(
        tokenizer,
        [Completion(None, text) for text in ("what is the answer", "what is the answer</s>", "")],
        mask="assistant",
    )
    assert text(tokenizer, tokens) == text(tokenizer, ended) == "what is the answer</s>"
    assert not tokens.loss_mask[0]
    assert tokens.loss_mask[1:].all()
    assert len(empty.input_ids) == 0


def test_white_space_tokens_belong_to_the_span_they_end_in() -> None:
    # As byte-level tokenizers with trimmed offsets report: token 1 is white space before the span, token 3 inside it.
    offsets = [(0, 4), (5, 5), (5, 9), (10, 10), (10, 14), (0, 0)]
    np.testing.assert_array_equal(covered(offsets, [(5, 14)]), [False, False, True, True, True, True])
    np.testing.assert_array_equal(covered(offsets, [(5, 10)]), [False, False, True, True, False, False])
    np.testing.assert_array_equal(covered(offsets, [(5, 5)]), np.zeros(6, bool))
    assert covered([], [(0, 3)]).shape == (0,)


def _adds_bos(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )


TOOLS = "{% for tool in tools or [] %}{{ tool.name }}|{% endfor %}{% if quiet %}{{ 'quiet ' }}{% endif %}"
QUIET = [Conversation(turns("what is it", "the answer", "how", "so"), [{"name": "it"}], {"quiet": True}, silent=(1,))]


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_tools_options_and_weights_reach_the_template_and_the_mask(template: str) -> None:
    tokenizer = tiny_tokenizer(TOOLS + template)
    (found,) = masks.tokenise_conversations(tokenizer, QUIET, mask="assistant")
    assert text(tokenizer, found).startswith("it|quiet <|im_start|>user\nwhat is it")
    assert supervised_text(tokenizer, found) == "so<|im_end|>"


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    """Of a tokenizer that has several by name; in the order of the records."""
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools[0].name }}|" + CHATML_GENERATION}
    with_tools = Conversation(turns("what is it", "the answer"), [{"name": "it"}])
    without = Conversation(turns("how", "so"))
    found = masks.tokenise_conversations(tokenizer, [with_tools, without, with_tools], mask="assistant")
    assert [text(tokenizer, one).startswith("it|") for one in found] == [True, False, True]
    assert [supervised_text(tokenizer, one) for one in found] == [
        "the answer<|im_end|>", "so<|im_end|>", "the answer<|im_end|>"
    ]  # fmt: skip


def test_a_weight_of_0_is_given_up_where_stretches_are_not_turns() -> None:
    """A turn with two of them and one without any: as many as turns, and none where it seems to be."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning %}{% generation %}{{ m.reasoning }}"
        "{% endgeneration %}|{% endif %}{% if m.role == 'assistant' and m.content %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer, messages = tiny_tokenizer(template), turns("what", "the answer", "how", "")
    messages[1]["reasoning"] = "so"
    (found,) = masks.tokenise_conversations(tokenizer, [Conversation(messages, silent=(1,))], mask="assistant")
    assert isinstance(found, masks.Unusable)
    assert "not one stretch each" in found.reason


@pytest.mark.parametrize("appends", [False, True])
def test_one_end_of_text_token_ends_a_completion(appends: bool) -> None:
    """Whether the text has it, the tokenizer appends it, or neither; also where the text has the first one, too."""
    tokenizer = tiny_tokenizer(CHATML)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if appends:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
        )
    for given in ("so", f"so{eos}", f"{bos}so", f"{bos}so{eos}"):
        (found,) = masks.tokenise_completions(tokenizer, [Completion(None, given)], mask="assistant")
        assert text(tokenizer, found).removeprefix(bos) == f"so{eos}", given
        assert supervised_text(tokenizer, found).endswith(eos)


def test_what_the_template_does_not_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    masks._warn_once.cache_clear()
    masks.tokenise_conversations(tiny_tokenizer(CHATML), QUIET * 3, mask="assistant")
    assert sorted(record.args or record.message for record in caplog.records) == [
        "the chat template does not read `quiet`; records that have it are rendered without",
        "the chat template does not read `tools`; records that have it are rendered without",
    ]


def test_a_template_that_takes_arguments_as_text_only_gets_text() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + call.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    call = {"type": "function", "function": {"name": "it", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (tokens,) = masks.tokenise_conversations(tokenizer, [Conversation(messages)], mask="assistant")
    assert supervised_text(tokenizer, tokens) == 'it{"a": 1}<|im_end|>'


def test_marks_that_leave_out_the_end_of_a_turn_are_told(caplog: pytest.LogCaptureFixture) -> None:
    masks._warn_once.cache_clear()
    end = "{% endgeneration %}"
    template = CHATML_GENERATION.replace("+ '<|im_end|>' }}" + end, "}}" + end + "{{ '<|im_end|>' }}")
    tokenizer = tiny_tokenizer(template)
    (tokens,) = tokenise_chats(tokenizer, [CONVERSATIONS[0]], mask="assistant")
    assert supervised_text(tokenizer, tokens) == "the answer"
    assert "leaves out <|im_end|>" in caplog.text
