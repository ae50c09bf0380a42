"""What a student is asked before it is trained: whether it is understood here."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from storage_schemas.common.errors import MismatchError
from storage_schemas.logits import TOLERANCE, head_rows, input_device, refuse_other_logits, relative_difference
from student_train.model.attention import NoPositions, needing_positions, runnable_attention

if TYPE_CHECKING:
    from student_train.model.student import Distilled


@torch.no_grad()
def refuse_unknown_head(module: "Distilled") -> None:
    """Raise MismatchError if this architecture does more between body and logits than is known here."""
    causal = module.causal
    ids = torch.arange(4, device=input_device(causal))[None] % head_rows(causal)
    try:
        with _evaluating(module):
            off = relative_difference(module.logits(ids), causal(input_ids=ids, use_cache=False).logits)
    except (AttributeError, TypeError) as error:
        raise MismatchError(
            f"{type(causal).__name__} cannot be run as a student",
            got=f"{type(error).__name__}: {error}",
            expected="a model whose adapted layers take and return one tensor",
            fix="name other student.lora.target_modules, such as [q_proj, k_proj, v_proj, o_proj], or another student",
        ) from error
    refuse_other_logits(causal, off, role="student")


@torch.no_grad()
def refuse_mixed_samples(module: "Distilled") -> None:
    """Raise MismatchError if this model lets packed samples see each other."""
    causal = module.causal
    numbers = partial(torch.arange, device=input_device(causal))
    first, second = (ids[None] % head_rows(causal) for ids in (numbers(5), numbers(11, 18)))
    position_ids = torch.cat([numbers(5), numbers(7)])[None]
    try:
        with needing_positions(causal), _evaluating(module):
            packed = module.logits(torch.cat([first, second], 1), position_ids)
            off = relative_difference(packed, torch.cat([module.logits(first), module.logits(second)], 1))
        got = f"logits off by {off:.2g} of the largest"
    except NoPositions:
        off, got = math.inf, f"{causal.config._attn_implementation}, whose layers are told no position ids"
    if not off < TOLERANCE:
        raise MismatchError(
            f"{type(causal).__name__} does not keep packed samples apart",
            got=got,
            expected="attention that starts anew where position_ids do",
            fix="set train.packing to false, or choose another attention implementation",
        )


@contextmanager
def _evaluating(module: "Distilled") -> Iterator[None]:
    """Without dropout for a while, wherever the model lies."""
    training = module.training
    module.eval()
    with runnable_attention(module.causal):
        yield
    module.train(training)
