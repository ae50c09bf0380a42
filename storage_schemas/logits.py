"""What a causal language model does between its LM head and its logits; teacher and student read it from one place."""

from collections.abc import Callable
from typing import Any, Self

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.frozen import FrozenModel

_MULTIPLIED_BY = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), "logit_scale"),
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
_DIVIDED = {
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "minicpm3",
}  # fmt: skip
"""Kinds of models whose logits are divided by `logits_scaling`."""
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
TOLERANCE = 0.02
"""Of the largest value: what bfloat16 may differ by between two ways to the same number."""


class LogitTransform(FrozenModel):
    """logits = softcap * tanh(scale * x / softcap), where x is what the LM head returns."""

    scale: float
    """Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    softcap: float | None
    """Gemma 2's `final_logit_softcapping`."""

    @classmethod
    def of(cls, config: Any, *, role: str) -> Self:
        """From a transformers model config.

        Args:
            config: of the model.
            role: `teacher` or `student`, for the message.

        Raises:
            MismatchError: the model scales its logits in a way that is not known here. The same attribute multiplies
                in one architecture and divides in another, so that guessing could give wrong logits.
        """
        config = config.get_text_config()
        softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
        scale, kind = 1.0, config.model_type
        if kind in _MULTIPLIED_BY:
            scale = float(getattr(config, _MULTIPLIED_BY[kind]))
        elif kind in _DIVIDED:
            scale = 1.0 / float(config.logits_scaling)
        elif found := [name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)]:
            raise MismatchError(
                f"models of type `{kind}` scale their logits in a way that is not known here",
                got=", ".join(f"{name} = {getattr(config, name)}" for name in found),
                expected=f"one of {sorted(_DIVIDED.union(_MULTIPLIED_BY))}, or a model that does not scale its logits",
                fix=f"choose another {role}",
            )
        return cls(scale=scale, softcap=softcap)


def finish_logits(x: Any, *, scale: float, softcap: float | None, slope: bool = False) -> Any:
    """What the LM head returns becomes logits, in place; `x` is a tensor of any library with torch's methods.

    Returns:
        With `slope` the softcap's derivative, if there is a softcap; else None.
    """
    if scale != 1.0:
        x.mul_(scale)
    if softcap is None:
        return None
    x.div_(softcap).tanh_()
    found = x.square().neg_().add_(1.0) if slope else None
    x.mul_(softcap)
    return found


def head_rows(causal: Any) -> int:
    """Rows of the whole LM head, padding included; ZeRO-3 leaves nothing of it in place."""
    weight = causal.get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def relative_difference(found: Any, expected: Any) -> float:
    """The largest difference of two tensors over the largest expected value."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def refuse_other_logits(causal: Any, off: float, *, role: str) -> None:
    """Raise MismatchError if what is known here of a model's head does not give its own logits.

    Args:
        causal: the model.
        off: `relative_difference` of the two.
        role: `teacher` or `student`, for the message.
    """
    if not off < TOLERANCE:
        raise MismatchError(
            f"the head of {type(causal).__name__} is not understood",
            got=f"logits off by {off:.2g} of the largest",
            expected="weight, bias, logit scale and softcap, as in Llama, Qwen, Gemma, Cohere and Granite models",
            fix=f"choose another {role}",
        )


def input_device(causal: Any) -> Any:
    """Where a model takes its token ids: bitsandbytes puts one on the GPU as it is loaded."""
    return causal.get_input_embeddings().weight.device


def body_of(model: Any, *, role: str) -> Any:
    """The part of a causal language model of transformers that gives the hidden states its head is applied to.

    Args:
        model: without peft's wrapper.
        role: `teacher` or `student`, for the message.

    Raises:
        MismatchError: there is no such part.
    """
    known = (model, model.get_output_embeddings())
    # transformers' best guess is the model itself for Llama 4, and for ModernBERT's decoder its head.
    for body in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if body is not None and all(body is not other for other in known):
            return body
    raise MismatchError(
        f"the body of {type(model).__name__} is not found",
        got="get_decoder() gives the whole model or its head",
        expected="a body that gives hidden states, and a head",
        fix=f"choose another {role}",
    )


def compile_layers(model: Any, compiled: Callable[[Any], Any], *, role: str) -> None:
    """Compile the forward pass of each decoder layer, once it is called, by `compiled`.

    Not that of the whole body: it would be handed a mask, with which attention is not the fast causal kernel.

    Args:
        model: without peft's wrapper; its layers are known by the names of classes that transformers keeps with it.
        compiled: makes a faster function of one, such as `torch.compile`.
        role: section of the configuration, for the message.

    Raises:
        MismatchError: there are no such names.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise MismatchError(
            f"{type(model).__name__} cannot be compiled layer by layer",
            got="no names of decoder layers",
            expected="a model that transformers can split over devices",
            fix=f"set {role}.compile: false",
        )
    for layer in layers:
        layer.forward = compiled(layer.forward)
