"""Where a model stops to write: tokenizer, config and generation config say the same, and it is what was learned."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from storage_schemas.rows import Row

GENERATION = "generation_config.json"
LEARNED_SHARE = 0.1
"""Of all supervised spans: how many a special token must end to count as an end of turn."""


def span_ends(rows: Sequence[Row]) -> Counter[int]:
    """Of each token, how many supervised spans it ends."""
    ends: Counter[int] = Counter()
    for row in rows:
        mask = row.loss_mask
        last = mask & ~np.append(mask[1:], False)
        ends.update(row.input_ids[last].tolist())
    return ends


def generation_of(model: Any, tokenizer: PreTrainedTokenizerBase | None, ends: Mapping[int, int]) -> GenerationConfig:
    """The model's generation config, which also stops at the tokenizer's end and at what was learned as ends of turns:
    `ends`, as `span_ends` counts them."""
    found: GenerationConfig = model.generation_config or GenerationConfig.from_model_config(model.config)
    if tokenizer is None:
        return found
    rows = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    enough = LEARNED_SHARE * sum(ends.values())
    learned = [token for token, count in Counter(ends).most_common() if token in special and count >= enough]
    own = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    stops = [i for i in dict.fromkeys([*learned, *own, tokenizer.eos_token_id]) if i is not None and i < rows]
    found.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        found.pad_token_id = tokenizer.pad_token_id
    return found
