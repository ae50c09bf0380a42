"""Tiny teachers of many architectures, and a tokenizer, made in process: random weights, real code paths."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from storage_schemas.rows import OK, Row

VOCABULARY = 320

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' "
    "+ message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
"""In the manner of Llama 3: the template writes the beginning-of-text token, contents are stripped."""
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
"""In the manner of Mistral: no generation prompt, and roles that the template refuses."""
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""In the manner of reasoning models: earlier turns render differently from the last."""

_SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 5},
    "phi": {},  # Its LM head has a bias.
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "mamba": {"state_size": 8, "use_mambapy": False},  # No attention at all.
}


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of ARCHITECTURES with random weights."""
    options = _SIZES | ARCHITECTURES.get(name, {}) | changes
    config = AutoConfig.for_model(options.pop("model_type", name), **options)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Biases and norms start at constants that would hide their absence.
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    return model


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is the answer to the question, and how is the other one"] * 4, trainer)
    # So little text gives fewer merges: without these the head would have rows that the tokenizer has no ids for.
    tokenizer.add_tokens([f"<|unused-{i}|>" for i in range(VOCABULARY - tokenizer.get_vocab_size())])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=_SPECIAL[2:]
    )
    wrapped.chat_template = template
    return wrapped


def save_teacher(folder: Path, name: str = "llama", *, template: str | None = CHATML, **changes: Any) -> Path:
    """A teacher's directory: safetensors and tokenizer."""
    tiny_model(name, **changes).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def sample_of(length: int, *, index: int = 0, mask: list[int] | None = None) -> Row:
    """Random ids; the supervised tokens are those of `mask`, else every second one."""
    ids = np.random.default_rng(index).integers(0, VOCABULARY, length).astype(np.int32)
    loss_mask = np.zeros(length, bool)
    loss_mask[mask if mask is not None else slice(1, None, 2)] = True
    return Row(sample_index=index, sample_id=str(index), status=OK, input_ids=ids, loss_mask=loss_mask)
