"""What targets must never hold, and a unit of rows to damage."""

from collections.abc import Callable

import numpy as np
from support.dumps import unit_rows

from storage_schemas.provenance import Provenance
from storage_schemas.rows import Row, UnitRows, rows_to_unit


def poisoned(rows: list[Row], **changes: Callable[[np.ndarray], None]) -> list[Row]:
    """The first row with targets, with some arrays changed in place."""
    row = next(row for row in rows if row.targets is not None)
    for name, change in changes.items():
        change(getattr(row.targets if hasattr(row.targets, name) else row, name))
    return rows


def put(value: float, at: int = 0) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.reshape(-1)[at] = value

    return change


POISON = {
    "NaN log-prob": {"logprobs": put(np.nan)},
    "infinite log-prob": {"logprobs": put(np.inf)},
    "log-prob of 0": {"logprobs": put(-np.inf)},
    "log-prob above 0": {"logprobs": put(1.0)},
    "NaN tail": {"tail_logprob": put(np.nan)},
    "tail above 1": {"tail_logprob": put(0.5)},
    "tail a little above 1": {"tail_logprob": put(5e-4)},
    "a head that holds nothing": {"tail_logprob": put(0.0)},
    "infinite logsumexp": {"logsumexp": put(np.inf)},
    "NaN logsumexp": {"logsumexp": put(np.nan)},
    "negative id": {"ids": put(-1)},
    "id beyond the head": {"ids": put(100, 7)},
    "ids out of order": {"ids": put(99)},
    "token id beyond the head": {"input_ids": put(100)},
    "negative token id": {"input_ids": put(-1)},
    "head larger than the entries": {"head_size": put(9)},
    "negative head": {"head_size": put(-1)},
    "head smaller than the entries": {"head_size": put(7)},
}


def good_unit(provenance: Provenance, unit: int = 0) -> UnitRows:
    return rows_to_unit(unit_rows(provenance, unit), provenance.recipe)
