"""Whether transformers looks for packed samples in what a model is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


@contextmanager
def looking_for_packed_samples(wanted: bool) -> Iterator[None]:
    """Spare a forward pass the look, if it is not wanted: position ids of whole rows tell nothing.

    transformers takes it in each pass without a mask, with a read of a value, for which the host waits until the device
    has done all that was launched before.
    """
    if wanted:
        yield
        return
    look: Any = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
