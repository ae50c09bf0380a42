"""The auxiliary loss of a mixture of experts, which keeps its routers from sending all tokens to a few experts."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from storage_schemas.common.errors import MismatchError
from storage_schemas.logits import body_of, input_device
from student_train.model.attention import runnable_attention

_TOLERANCE = 0.02
"""What the loss of a probe may differ by in bf16, relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoss:
    """transformers' `load_balancing_loss_func` of one model (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    For each expert it is the product of two means over the tokens of a micro-batch, padding left out: the share that
    the expert gets, which has no gradient, and its probability. It enters once per supervised token of the micro-batch,
    times the coefficient, and the sum is divided like every other by the supervised tokens of the global batch. So one
    micro-batch gives transformers' own loss, and several give the mean of theirs, weighted by supervised tokens. This
    is the one loss that a split changes, as it does in transformers: by how much shares and probabilities differ
    between the parts, and by how much more of their tokens are supervised in one than in another.

    A router that is frozen, as under LoRA, still gets its input from adapters: these learn to keep it balanced.
    """

    coefficient: float
    """`router_aux_loss_coef` of the model's config."""
    function: Callable[..., Tensor]
    experts: int
    """Experts per layer, of which `top_k` take each token."""
    top_k: int

    @classmethod
    def of(cls, causal: Any) -> "RouterLoss | None":
        """What a model's config asks for with `output_router_logits` and a coefficient; None if it does not.

        Raises:
            MismatchError: it asks for one that cannot be computed as transformers does.
        """
        config = causal.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)
        if not getattr(config, "output_router_logits", False) or not coefficient:
            return None
        try:
            function = sys.modules[type(causal).__module__].load_balancing_loss_func
            found = cls(
                coefficient=coefficient,
                function=function,
                experts=causal.num_experts,
                top_k=causal.num_experts_per_tok,
            )
            with runnable_attention(causal):
                found._refuse_other_value(causal)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise _not_understood(causal, f"{type(error).__name__}: {error}") from error
        return found

    def __call__(
        self, logits: tuple[Float[Tensor, "tokens experts"], ...], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, ""]:
        """The loss, without its coefficient, of each layer's router logits; the mask is false for padding."""
        return self.function(logits, self.experts, self.top_k, mask)

    @torch.no_grad()
    def _refuse_other_value(self, causal: Any) -> None:
        device = input_device(causal)
        ids, mask = torch.arange(8, device=device).view(2, 4), torch.ones(2, 4, dtype=torch.bool, device=device)
        mask[1, 2:] = False
        expected = causal(input_ids=ids, attention_mask=mask.long(), use_cache=False).aux_loss
        body = body_of(causal, role="student")
        found = self(body(input_ids=ids, attention_mask=mask.long(), use_cache=False).router_logits, mask)
        if not abs(float(found) - float(expected)) < _TOLERANCE * abs(float(expected)):
            raise _not_understood(causal, f"{float(found):.4g} where transformers has {float(expected):.4g}")


def _not_understood(causal: Any, got: str) -> MismatchError:
    return MismatchError(
        f"the auxiliary loss of {type(causal).__name__}'s routers is not understood",
        got=got,
        expected="what transformers adds to the loss for output_router_logits: true",
        fix="set output_router_logits: false in the student's config.json, which leaves this loss out",
    )
