"""The shift, stated once: which logits predict which token.

Token `t` is supervised when `loss_mask[t]` is true. Its target is the distribution of token `t` given the tokens
before it, and a causal model puts the logits of that distribution at position `t - 1`. Cross-entropy, divergence,
dump and evaluation all take their positions from here.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage_schemas.common.errors import DataError


class Positions(NamedTuple):
    """Parallel arrays, one entry per supervised token, in order."""

    tokens: npt.NDArray[np.int64]
    """Position of the supervised token: its id is the label."""
    logits: npt.NDArray[np.int64]
    """Position whose logits predict that token."""


def supervised_positions(loss_mask: npt.ArrayLike, *, starts: npt.NDArray[np.int64] | int = 0) -> Positions:
    """Positions of supervised tokens and of the logits that predict them.

    Args:
        loss_mask: booleans, shape (tokens,), of one sample, or of several in one array; false where a sample starts,
            since nothing precedes token 0.
        starts: index of each sample's token 0.

    Raises:
        DataError: token 0 is supervised.
    """
    mask = np.asarray(loss_mask, dtype=bool)
    if mask.size and mask[starts].any():
        raise DataError(
            "token 0 is supervised, but nothing precedes it that could predict it",
            got="loss_mask[0] = true",
            expected="false",
            fix="clear the first element of the loss mask of this sample",
        )
    tokens = np.flatnonzero(mask)
    return Positions(tokens=tokens, logits=tokens - 1)
