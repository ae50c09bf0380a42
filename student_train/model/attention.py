"""What of transformers' attention is another one for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_flash_attention_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from storage_schemas.logits import input_device

_STAND_IN = "told_positions"


@contextmanager
def looking_for_packed_samples(wanted: bool) -> Iterator[None]:
    """Spare a forward pass the look, if it is not wanted: position ids of whole rows tell nothing.

    transformers takes it in each pass without a mask, with a read of a value, for which the host waits until the device
    has done all that was launched before.
    """
    if wanted:
        yield
        return
    masks: Any = masking_utils
    flash: Any = modeling_flash_attention_utils
    looks = masks.find_packed_sequence_indices, flash._is_packed_sequence
    masks.find_packed_sequence_indices = lambda position_ids: None
    flash._is_packed_sequence = lambda position_ids, batch_size: False  # In each layer.
    try:
        yield
    finally:
        masks.find_packed_sequence_indices, flash._is_packed_sequence = looks


class NoPositions(Exception):
    """Attention was not told the position ids."""


@contextmanager
def needing_positions(causal: Any) -> Iterator[None]:
    """As `runnable_attention`, by one that must be told position ids in each layer, or raises NoPositions.

    By these alone flash attention knows which samples are apart; other attention has a mask.
    """

    def told(module: Any, *states: Any, **options: Any) -> Any:
        if options.get("position_ids") is None:
            raise NoPositions
        return sdpa_attention_forward(module, *states, **options)

    AttentionInterface.register(_STAND_IN, told)
    AttentionMaskInterface.register(_STAND_IN, masking_utils.sdpa_mask)
    try:
        with runnable_attention(causal, _STAND_IN):
            yield
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_STAND_IN)


@contextmanager
def runnable_attention(causal: Any, instead: str = "eager") -> Iterator[None]:
    """Attention that runs where a model lies: flash attention does not on a CPU, from which ZeRO is to move it."""
    chosen = causal.config._attn_implementation
    if "flash" not in (chosen or "") or input_device(causal).type != "cpu":
        yield
        return
    causal.set_attn_implementation(instead)
    try:
        yield
    finally:
        causal.set_attn_implementation(chosen)
