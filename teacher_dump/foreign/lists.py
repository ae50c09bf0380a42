"""Top-k values as lists of numbers, one row per token: axolotl's KD columns, and sets like Arcee's of Llama 405B."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from teacher_dump.foreign.sample import ForeignSample
from teacher_dump.foreign.tables import Record, integers, records

AXOLOTL = {"ids": "target_token_ids", "values": "target_logprobs", "slots": "target_mask"}
"""What axolotl's collators read (`src/axolotl/integrations/kd`)."""
LISTS = {"ids": "token_ids", "values": "top_values"}
"""What DistillKit takes uncompressed, and `arcee-ai/LLama-405B-Logits` has, beside `normalized_logits`."""


def read(files: Sequence[Path], columns: dict[str, str], *, mask: str) -> Iterator[ForeignSample]:
    """The samples of a store of lists.

    Args:
        files: Parquet, Arrow or JSONL.
        columns: names of the columns with `ids`, `values` and, where there is one, `slots`: which entries count.
        mask: `all`, or the column that says which tokens are supervised.

    Raises:
        DataError: columns are missing, or disagree in length.
    """
    for record in records(files):
        ids = integers(record.entries(columns["ids"], empty=0))
        values = record.entries(columns["values"], empty=-np.inf, like=columns["ids"]).astype(np.float64)
        if "slots" in columns:
            slots = record.entries(columns["slots"], empty=0, like=columns["ids"])
            values = np.where(slots != 0, values, -np.inf)
        yield sample_of(record, ids, values, mask=mask)


def sample_of(record: Record, ids: np.ndarray, values: np.ndarray, *, mask: str) -> ForeignSample:
    """A sample from the tokens of a record and its entries; padding, which `attention_mask` marks, is cut off."""
    tokens = integers(record.tokens("input_ids"))
    supervised = record.supervised(mask)
    if len(values) not in (len(tokens), len(tokens) - 1):
        raise record.unusable(f"{len(values)} rows of entries for {len(tokens)} tokens", "one row per token")
    if "attention_mask" in record.columns:
        attended = record.tokens("attention_mask")
        if len(attended) != len(tokens):
            raise record.unusable(f"{len(attended)} values of attention_mask for {len(tokens)} tokens", "one per token")
        kept = np.flatnonzero(attended)
        first, stop = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
        if stop - first != len(kept) or attended.max(initial=0) > 1:
            raise record.unusable("an attention_mask with holes, or of packed samples", "one sample a row")
        tokens, ids, values = tokens[first:stop], ids[first:stop], values[first:stop]
        supervised = None if supervised is None else supervised[first:stop]
    return ForeignSample(place=record.place, input_ids=tokens, supervised=supervised, ids=ids, values=values)
