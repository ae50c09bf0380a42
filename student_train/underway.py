"""Numbers on their way from the device: they are asked for early, and read once they are there, so that the host does
not wait for what it has launched since."""

from typing import Any

import torch
from torch import Tensor


class Underway:
    """The values of a tensor, asked for when this is made."""

    def __init__(self, values: Tensor | float) -> None:
        """Start copying. What changes the tensor from here on makes no difference on a GPU."""
        tensor = torch.as_tensor(values).flatten()
        self._values = tensor.to("cpu", non_blocking=True)
        self._there: Any = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._there is not None:
            self._there.record()

    def read(self) -> list[float]:
        """The values; waits for what was launched before they were asked for."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()
