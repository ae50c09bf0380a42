"""Chat templates in the manner of well-known models: their markers, their stripping, their treatment of history.

Each comes with what an assistant's turn is supervised on, written by hand from the model's published format.
"""

# ruff: noqa: E501

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
_SYSTEM_APART = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)
_HEADERS = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA_31 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' + system + '<|eot_id|>' }}"
    "{% for message in messages %}{% if not (message.role in ('ipython', 'tool') or 'tool_calls' in message) %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in message %}{% set call = message.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}{{ '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA_2 = (
    _SYSTEM_APART + "{% for message in rest %}" + _ALTERNATE + "{% set content = message['content'] %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_3 = (
    _SYSTEM_APART + "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{% if loop.last or rest[loop.index0:] | selectattr('role', 'equalto', 'user') | list | length == 1 %}"
    "{{ '[INST] ' + (system + '\n\n' if system else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% elif message.tool_calls is defined and message.tool_calls is not none %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}"
    "{% endfor %}{{ ']' + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS] ' + message['content'] + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
"""The system message is written into the last user turn, so that it moves as a conversation grows."""
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CALLS = (
    "{% for call in message.tool_calls %}{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
_TOOL_TURN = (
    "{% elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
_QWEN_2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + _CHATML
)
_QWEN_25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role in ('user', 'system') or (message.role == 'assistant' and not "
    "message.tool_calls) %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>' + message.role }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}" + _CALLS + "{{ '<|im_end|>\n' }}" + _TOOL_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
_QWEN_3 = (
    "{% set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}"
    "{% for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
    "{% if ns.multi_step_tool and message.role == 'user' and not (message.content.startswith('<tool_response>') and "
    "message.content.endswith('</tool_response>')) %}"
    "{% set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'user' or message.role == 'system' %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% elif message.role == 'assistant' %}{% set content = message.content or '' %}{% set reasoning = '' %}"
    "{% if message.reasoning_content is defined and message.reasoning_content is not none %}"
    "{% set reasoning = message.reasoning_content %}{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
    "{{ '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + content }}{% endif %}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{% if (loop.first and content) or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{ call.function.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}" + _TOOL_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
"""Thoughts are kept, or made up empty, after the last question, and cut out of all answers before it."""
_GEMMA = (
    _SYSTEM_APART + "{{ bos_token }}{% for message in rest %}" + _ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (system + '\n\n' if loop.first and system else '') + message['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
_PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif message['role'] == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% set ns = namespace(is_tool=false) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.is_tool = false %}{{ '<\uff5cUser\uff5c>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' and message['tool_calls'] is defined %}"
    "{{ '<\uff5cAssistant\uff5c><\uff5ctool\u2581calls\u2581begin\uff5c>' }}{% for call in message['tool_calls'] %}"
    "{{ '<\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>' + call['function']['name'] + "
    "'\n```json\n' + (call['function']['arguments'] | tojson) + '\n```<\uff5ctool\u2581call\u2581end\uff5c>' }}{% endfor %}"
    "{{ '<\uff5ctool\u2581calls\u2581end\uff5c>' + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{% if ns.is_tool %}{% set ns.is_tool = false %}"
    "{{ '<\uff5ctool\u2581outputs\u2581end\uff5c>' + message['content'] + eos_token }}{% else %}"
    "{% set content = message['content'] %}%STRIP%"
    "{{ '<\uff5cAssistant\uff5c>' + content + eos_token }}{% endif %}{% elif message['role'] == 'tool' %}"
    "{% set ns.is_tool = true %}{{ '<\uff5ctool\u2581outputs\u2581begin\uff5c>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if ns.is_tool %}{{ '<\uff5ctool\u2581outputs\u2581end\uff5c>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{ '<\uff5cAssistant\uff5c>%PROMPT%' }}{% endif %}"
)
_VICUNA = (
    _SYSTEM_APART + "{{ bos_token + system }}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ ' USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_COHERE_2 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{% if message.role == 'assistant' %}"
    "{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}{% else %}"
    "{{ '<|' + message.role | upper + '_TOKEN|>' + message.content }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
GLM_45 = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}{{ '\n' + message.content | trim }}{% else %}{{ '\n' + message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""No turn has an end of its own: generation stops at the token that the next one begins with."""
_NO_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def _qwen_3(content: str, last: bool) -> str:
    thoughts = ""
    if "</think>" in content:
        thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    if not last:
        return content + "<|im_end|>"
    return "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + "<|im_end|>"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One model's way to write conversations."""

    template: str
    special: str
    """Its special tokens, with a blank between; the first begins a text, the second ends one."""
    turn: Callable[[str, bool], str]
    """(content of an answer, whether no user comes after it) -> what of it is supervised."""
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte by byte, so that no token lies across the edge of an answer."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        bos, eos, *others = self.special.split()
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, additional_special_tokens=others
        )
        wrapped.chat_template = self.template
        return wrapped


_DS = "<\uff5cbegin\u2581of\u2581sentence\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c> <\uff5cUser\uff5c> <\uff5cAssistant\uff5c>"
_DS += "".join(
    f" <\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep", "outputs\u2581begin",
                 "outputs\u2581end")
)  # fmt: skip
_DS_EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_IM = "<|endoftext|> <|im_end|> <|im_start|>"
_L3 = "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>"

CHATS = {
    "llama-2": Chat(template=_LLAMA_2, special="<s> </s>", turn=lambda c, _: f" {c.strip()} </s>"),
    "llama-3": Chat(template=_HEADERS, special=_L3, turn=lambda c, _: f"{c.strip()}<|eot_id|>"),
    "llama-3.1": Chat(template=_LLAMA_31, special=_L3, turn=lambda c, _: f"{c.strip()}<|eot_id|>"),
    "mistral-1": Chat(template=_MISTRAL_1, special="<s> </s>", turn=lambda c, _: f"{c}</s>", system=False),
    "mistral-3": Chat(
        template=_MISTRAL_3,
        special="<s> </s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        turn=lambda c, _: f" {c}</s>",
    ),
    "chatml": Chat(template=_CHATML, special=_IM, turn=lambda c, _: f"{c}<|im_end|>"),
    "chatml-plain": Chat(template=_CHATML, special="<s> </s>", turn=lambda c, _: f"{c}<|im_end|>"),
    "qwen-2": Chat(template=_QWEN_2, special=_IM, turn=lambda c, _: f"{c}<|im_end|>"),
    "qwen-2.5": Chat(template=_QWEN_25, special=_IM, turn=lambda c, _: f"{c}<|im_end|>"),
    "qwen-3": Chat(template=_QWEN_3, special=_IM, turn=_qwen_3),
    "gemma": Chat(
        template=_GEMMA,
        special="<bos> <eos> <start_of_turn> <end_of_turn>",
        turn=lambda c, _: f"{c.strip()}<end_of_turn>",
    ),
    "phi-3": Chat(
        template=_PHI_3,
        special="<s> <|endoftext|> <|end|> <|user|> <|assistant|> <|system|>",
        turn=lambda c, _: f"{c}<|end|>",
    ),
    "phi-4": Chat(template=_PHI_4, special=_IM + " <|im_sep|>", turn=lambda c, _: f"{c}<|im_end|>"),
    # Its generation prompt has no line end, so the model begins with it.
    "zephyr": Chat(template=_ZEPHYR, special="<s> </s>", turn=lambda c, _: f"\n{c}</s>"),
    "deepseek-v3": Chat(
        template=_DEEPSEEK.replace("%STRIP%", "").replace("%PROMPT%", ""), special=_DS, turn=lambda c, _: c + _DS_EOS
    ),
    "deepseek-r1": Chat(
        template=_DEEPSEEK.replace(
            "%STRIP%", "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        ).replace("%PROMPT%", "<think>\n"),
        special=_DS,
        turn=lambda c, _: c.split("</think>")[-1] + _DS_EOS,
    ),
    "vicuna": Chat(template=_VICUNA, special="<s> </s>", turn=lambda c, _: f" {c}</s>"),
    "cohere-2": Chat(
        template=_COHERE_2,
        special="<BOS_TOKEN> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>",
        turn=lambda c, _: f"<|START_RESPONSE|>{c}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    "no-end": Chat(template=_NO_END, special="<s> </s>", turn=lambda c, _: c),
}
