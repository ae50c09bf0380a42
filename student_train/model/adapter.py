"""The low-rank adapter: its peft configuration, how it is put on the student, and the plain LoRA that is saved."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.suggest import did_you_mean
from student_train.checkpoint import exactly
from student_train.config import LoraSection

ADAPTER = "default"
"""peft's name of the one adapter."""

FLAGS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
"""Variants that are peft's own. PiSSA is a start of our own: peft's is not exact on a base in bf16. MoSLoRA is not in
peft at all."""
MIXER = ".mixer.weight"
"""How the names of MoSLoRA's mixers end; the rest is the name of their A, without `.weight`."""

OWNED = {
    "r": "student.lora.r",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "target_modules": "student.lora.target_modules",
    "modules_to_save": "student.lora.modules_to_save",
    "use_rslora": "student.lora.variant: rslora",
    "use_dora": "student.lora.variant: dora",
    "base_model_name_or_path": "student.model",
    "revision": "student.revision",
}
"""Arguments of LoraConfig that have a place of their own in the configuration."""

EXTRA = {
    "exclude_modules", "fan_in_fan_out", "bias", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters",
}  # fmt: skip
"""Arguments of LoraConfig that `student.lora.extra` may hold: they leave base weights, head and embeddings as they are,
need no pass over the data and no state beside the weights, and are saved as a plain adapter."""

ROUTERS = {"gate", "router", "router_gate"}
"""What transformers calls the modules that choose experts for a token; no dense model has a module of these names."""

_NOT_TAKEN = (ValueError, TypeError, AttributeError, KeyError, NotImplementedError)
"""What peft raises for arguments that it cannot use."""
INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is."""


class MixedLinear(nn.Linear):
    """MoSLoRA's x -> M A x, in the place of A: dW = s B M A (Wu et al., arXiv 2406.11909).

    M begins Kaiming-uniform, as in the authors' code: each row of A reaches each column of B from the first step on,
    where M = I would begin as plain LoRA, and with M = 0 beside B = 0 nothing would ever learn. A linear layer whose
    weight is A is all that peft asks of `lora_A`, and ZeRO-3 gathers A and M in the hooks of their own modules.
    """

    def __init__(self, a: nn.Linear) -> None:
        """Around the A that peft has made; the mixer's weights are the next that torch draws."""
        super().__init__(a.in_features, a.out_features, bias=False, device="meta")
        self.weight = a.weight
        # PyTorch's own start of a linear layer is the Kaiming-uniform one, with a = sqrt(5).
        self.mixer = nn.Linear(a.out_features, a.out_features, bias=False, device=a.weight.device, dtype=a.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r)."""
        return self.mixer(super().forward(x))  # type: ignore[no-any-return]


def lora_config(lora: LoraSection) -> LoraConfig:
    """peft's configuration of the adapter.

    Raises:
        MismatchError: `extra` holds something that peft does not know, or that cannot be supported.
    """
    _check_extra(lora.extra)
    alpha = lora.scaled_by
    arguments = {
        "r": lora.r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "modules_to_save": list(lora.modules_to_save) or None,
        "task_type": TaskType.CAUSAL_LM,
    }
    try:
        return LoraConfig(**arguments, **(lora.extra | FLAGS.get(lora.variant, {})))
    except _NOT_TAKEN as error:
        raise _not_taken(error) from error


class Part(NamedTuple):
    """Who decomposes which weights."""

    rank: int = 0
    ranks: int = 1
    device: torch.device | None = None
    """Where, if not where the weights are: an SVD takes a CPU far longer than a GPU."""


ALONE = Part()
"""All of them, by one process."""


def attach(
    base: nn.Module, lora: LoraSection, *, seed: int, initial: Mapping[str, Tensor] | None = None,
    part: Part = ALONE,
) -> PeftModel:  # fmt: skip
    """Put the adapter on the student; everything else is frozen but for `lora.modules_to_save`. fp32 adapters, whatever
    the base's dtype.

    Args:
        base: the student; its weights are changed by `pissa`, and by nothing else.
        seed: of the initial weights; equal on every rank.
        initial: of a resumed run, what `initial_factors` gave at its start. The base then becomes what it was, however
            a decomposition would come out on this machine.
        part: of several ranks that decompose together, if there is no `initial`. It is done by halves then: the
            adapter has the factors of the rank's own weights, and `spread` does the rest.

    Raises:
        MismatchError: no such modules or layers, the head is among those to adapt, or rank or `extra` do not go with
            the variant.
        DataError: `initial` is not that of this adapter.
    """
    config = lora_config(lora)
    torch.manual_seed(seed)
    try:
        _leave_out_routers(base, lora, config)
        # Else peft would give a head that shares the embeddings' weight one of its own.
        config.ensure_weight_tying = _is_shared(base, _saved(base, lora.modules_to_save))
        model = get_peft_model(base, config)
    except _NOT_TAKEN as error:
        raise _not_taken(error) from error
    _refuse_head(model)
    _refuse_adapted_twice(model)
    _refuse_passed_over(model, lora)
    if lora.variant == "pissa":
        _refuse_experts(model)
        _refuse_undecomposable(model, lora.extra)
        if initial is None:
            _decompose(model, part)
        else:
            shapes = {name: p.shape for name, p in _factors(model)}
            _put(model, dict(exactly(initial.items(), shapes)))
        if initial is not None or part.ranks == 1:
            _subtract(model)
    if lora.variant == "moslora":
        _mix(model, lora.extra)
    return model


def left_out(base: nn.Module, lora: LoraSection) -> list[str]:
    """Names of the modules that `all-linear` does not adapt: what chooses the experts of a mixture."""
    if str(lora.target_modules).lower() != "all-linear":
        return []
    return [n for n, m in base.named_modules() if n.rpartition(".")[2] in ROUTERS and not isinstance(m, LoraLayer)]


def _leave_out_routers(base: nn.Module, lora: LoraSection, config: LoraConfig) -> None:
    """Take them out of what peft makes of `all-linear`. Names of `extra.target_parameters` stay."""
    if not left_out(base, lora):
        return
    # Experts and routers that are parameters, not linear layers, are known to peft by name.
    convert_peft_config_for_transformers(config, base, get_model_conversion_mapping(base))
    named = set(lora.extra.get("target_parameters") or ())
    parameters = set(config.target_parameters or ())
    config.target_parameters = {name for name in parameters if name in named or not _routes(name)} or None
    if isinstance(config.target_modules, str):
        head = base.get_output_embeddings()  # type: ignore[operator]
        linear = ((name, m) for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
        config.target_modules = {name for name, _ in linear if not _routes(name)}


def _routes(name: str) -> bool:
    """Whether a module or parameter is a router, or a part of one."""
    return not ROUTERS.isdisjoint(name.split("."))


def initial_factors(model: PeftModel, lora: LoraSection) -> dict[str, Tensor]:
    """What `pissa` has taken out of the base weights, by parameter name; empty for the other variants."""
    return {name: p.detach().clone() for name, p in _factors(model)} if lora.variant == "pissa" else {}


def _factors(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name)


def plain_adapter(
    model: PeftModel, weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of the adapter as peft stores them, for the unchanged base model.

    PiSSA trains B A on W - s B0 A0. On W this is the update s (B A - B0 A0), a plain LoRA of twice the rank. MoSLoRA
    trains B M A, a plain LoRA with M A in the place of A.

    Args:
        model: the trained model; only its structure is used.
        weights: fp32 weights by parameter name.
        initial: what `initial_factors` gave.
    """
    config = dataclasses.replace(model.peft_config[ADAPTER], inference_mode=True)
    weights = dict(weights)
    for mixer in [name for name in weights if name.endswith(MIXER)]:
        a = f"{mixer.removesuffix(MIXER)}.weight"
        weights[a] = weights.pop(mixer) @ weights[a]
    if initial:
        for name, start in initial.items():
            rows = ".lora_A." in name
            weights[name] = torch.cat([weights[name], start if rows else -start], dim=0 if rows else 1)
        config.init_lora_weights = True
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    # A weight that two modules share has one name in training, and both of them in the files.
    first = {p: name for name, p in model.named_parameters()}
    both = {
        name: weights[first[p]] for name, p in model.named_parameters(remove_duplicate=False) if first[p] in weights
    }
    state = get_peft_model_state_dict(model, state_dict=both, adapter_name=ADAPTER, save_embedding_layers=False)
    return config, {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


@torch.no_grad()
def _decompose(model: PeftModel, part: Part) -> None:
    """B A = the r largest principal components of each base weight over the scaling (PiSSA, arXiv 2404.02948, eq. 2-3).

    Of the weights that are this rank's. They are rounded to the base's dtype, which is what training begins with.
    """
    for layer, owner in _owners(model, part.ranks):
        if owner != part.rank:
            continue
        weight = layer.get_base_layer().weight
        wide = weight.to(part.device or weight.device, torch.float32)
        u, s, vh = torch.linalg.svd(wide.T if layer.fan_in_fan_out else wide, full_matrices=False)
        r = layer.r[ADAPTER]
        root = (s[:r] / layer.scaling[ADAPTER]).sqrt()
        layer.lora_A[ADAPTER].weight.copy_((root[:, None] * vh[:r]).to(weight.dtype))
        layer.lora_B[ADAPTER].weight.copy_((u[:, :r] * root).to(weight.dtype))


def _owners(model: PeftModel, ranks: int) -> list[tuple[Any, int]]:
    """Each layer and the rank that decomposes it: the largest are dealt first, so that all have as much to do."""
    layers = [layer for _, layer in _lora_layers(model)]
    layers.sort(key=lambda layer: layer.get_base_layer().weight.numel(), reverse=True)
    return [(layer, place % ranks) for place, layer in enumerate(layers)]


@torch.no_grad()
def spread(model: PeftModel, ranks: int, broadcast: Callable[[Tensor, int], object]) -> None:
    """Give all ranks the factors that each has decomposed, and take them out of the base weights. Collective.

    Args:
        broadcast: gives all ranks, in place, what the named one has of a tensor.
    """
    for layer, owner in _owners(model, ranks):
        for factor in (layer.lora_A, layer.lora_B):
            broadcast(factor[ADAPTER].weight.data, owner)
    _subtract(model)


@torch.no_grad()
def _put(model: PeftModel, factors: Mapping[str, Tensor]) -> None:
    for name, parameter in _factors(model):
        parameter.copy_(factors[name])


@torch.no_grad()
def _subtract(model: PeftModel) -> None:
    """Take what the adapter begins with out of the base weights."""
    for _, layer in _lora_layers(model):
        weight = layer.get_base_layer().weight
        update = layer.scaling[ADAPTER] * (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight)
        weight.copy_((weight.float() - (update.T if layer.fan_in_fan_out else update)).to(weight.dtype))


def _mix(model: PeftModel, extra: Mapping[str, Any]) -> None:
    """Put a mixer behind each A. Raises MismatchError, which names `extra`, where what peft does would miss it."""
    for name, layer in _lora_layers(model):
        wrong = None
        if not isinstance(layer, Linear):
            wrong = f"{name} is {type(layer).__name__}", "plain linear layers: what others do with A misses the mixer"
        elif layer.lora_B[ADAPTER].weight.any():
            wrong = f"B of {name} does not begin at zero", "B at zero, so that a random mixer changes nothing"
        if wrong is not None:
            raise MismatchError(
                "student.lora.extra does not go with student.lora.variant: moslora",
                got=f"{wrong[0]}, with student.lora.extra = {extra!r}",
                expected=wrong[1],
                fix="remove what makes it so from student.lora.extra, or choose another variant",
            )
        layer.lora_A[ADAPTER] = MixedLinear(layer.lora_A[ADAPTER])


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _not_taken(error: Exception) -> MismatchError:
    return MismatchError(
        "PEFT rejected the LoRA settings for this model",
        got=f"{type(error).__name__}: {str(error)[:500]}",
        expected="target_modules: names of linear layers, a pattern, or `all-linear`; extra: as peft.LoraConfig says",
        fix="correct student.lora.target_modules or student.lora.extra",
    )


def _refuse_head(model: PeftModel) -> None:
    base = model.get_base_model()
    for module in (base.get_output_embeddings(), base.get_input_embeddings()):
        saved = isinstance(module, ModulesToSaveWrapper)
        if isinstance(module, LoraLayer) or (not saved and any(p.requires_grad for p in module.parameters())):
            raise MismatchError(
                "the adapter would train the head or the embeddings",
                got=type(module).__name__,
                expected="adapters on the layers in between",
                fix="take them out of student.lora.target_modules: fused head and plain adapter rest on frozen ones; "
                "student.lora.modules_to_save trains them in full",
            )


def _saved(base: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules that peft takes for `modules_to_save`. Raises MismatchError where it would pass over a name, or would
    train what is not used."""
    found: list[nn.Module] = []
    for wanted in names:
        of_name = [m for name, m in base.named_modules() if name.endswith(wanted) and any(True for _ in m.parameters())]
        if not of_name:
            raise MismatchError(
                "student.lora.modules_to_save names no module of the student that has weights",
                got=wanted,
                expected="the end of a module's name, such as norm, embed_tokens or lm_head",
                fix="correct or remove it",
            )
        if any(not p.is_floating_point() for module in of_name for p in module.parameters()):
            raise MismatchError(
                "student.lora.modules_to_save names a module that student.quantization has quantised",
                got=wanted,
                expected="norms, embeddings or head",
                fix="take it out, or remove student.quantization",
            )
        found += of_name
    held = {m for module in found for m in module.modules() if m is not module}
    if inner := next((name for name, module in base.named_modules() if module in held and module in found), None):
        raise MismatchError(
            "student.lora.modules_to_save names a module inside another",
            got=inner,
            expected="modules of which none holds another: the copy of the inner one would not be used",
            fix="name the outer one alone, or the inner ones alone",
        )
    return found


def _is_shared(base: Any, modules: Sequence[nn.Module]) -> bool:
    """Whether the head or the embeddings are among them, and have one weight. Raises MismatchError if peft would then
    lose the head's bias."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    shared = head.weight is embeddings.weight and any(module in (head, embeddings) for module in modules)
    if shared and getattr(head, "bias", None) is not None:
        raise MismatchError(
            f"student.lora.modules_to_save cannot train the head of {type(base).__name__}",
            got="a bias, and the weight of the embeddings",
            expected="a head without a bias, or with a weight of its own",
            fix="remove head and embeddings from it",
        )
    return shared


def _refuse_adapted_twice(model: PeftModel) -> None:
    """Raise MismatchError where a module that is trained in full holds an adapter too."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(isinstance(m, LoraLayer) for m in module.modules()):
            raise MismatchError(
                "student.lora.modules_to_save and target_modules meet in one module",
                got=name,
                expected="modules that are adapted, and others that are trained in full",
                fix="name whole modules, such as o_proj, in one of the two",
            )


def _refuse_passed_over(model: PeftModel, lora: LoraSection) -> None:
    """Raise MismatchError for a module or layer that is named, and that peft has passed over in silence."""
    base = model.get_base_model()
    adapted = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    named = lora.target_modules if isinstance(lora.target_modules, list) else []
    if unused := [end for end in named if not any(f".{name}".endswith(f".{end}") for name in adapted)]:
        # Experts that are parameters, not linear layers, are known to peft by other names.
        left = lora_config(lora)
        convert_peft_config_for_transformers(left, base, get_model_conversion_mapping(base))
        unused = [name for name in unused if name in left.target_modules]
    if unused:
        raise MismatchError(
            "student.lora.target_modules names what is not adapted",
            got=", ".join(unused),
            expected="the ends of names of linear layers, which nothing else in student.lora leaves out",
            fix="correct or remove it",
        )
    layers = lora.extra.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else list(layers or ())
    if chosen and any(isinstance(module, ParamWrapper) for module in base.modules()):
        raise MismatchError(
            "student.lora.extra.layers_to_transform does not reach parameters: PEFT adapts the experts of all layers",
            got=layers,
            expected="linear layers alone",
            fix="remove it, or leave the parameters out of student.lora.target_modules and extra.target_parameters",
        )
    for layer in chosen:
        if not any(f".{layer}." in name for name in adapted):
            raise MismatchError(
                "student.lora.extra.layers_to_transform names a layer that is not adapted",
                got=layer,
                expected="numbers of layers that have one of student.lora.target_modules; the first is 0",
                fix="correct or remove it",
            )


def _refuse_experts(model: PeftModel) -> None:
    """Raise MismatchError where `pissa` would have to decompose what is not one matrix."""
    if name := next((name for name, layer in _lora_layers(model) if isinstance(layer, ParamWrapper)), None):
        raise MismatchError(
            "student.lora.variant: pissa decomposes linear layers, and the adapter is on other parameters too",
            got=name,
            expected="linear layers",
            fix="name student.lora.target_modules, such as [q_proj, k_proj, v_proj, o_proj], or choose another variant",
        )


def _refuse_undecomposable(model: PeftModel, extra: Mapping[str, Any]) -> None:
    """Raise MismatchError where `pissa` has fewer components than the rank, or would leave more than two factors."""
    if extra.get("lora_bias"):
        raise MismatchError(
            "student.lora.extra.lora_bias does not go with student.lora.variant: pissa",
            got="student.lora.extra.lora_bias = true",
            expected="an adapter of A and B alone: what they begin with is taken out of the base weights",
            fix="remove student.lora.extra.lora_bias, or choose another variant",
        )
    for name, layer in _lora_layers(model):
        least, rank = min(layer.get_base_layer().weight.shape), layer.r[ADAPTER]
        if rank > least:
            raise MismatchError(
                "student.lora.variant: pissa cannot have a rank above the smaller dimension of a layer",
                got=f"rank {rank} for {name}, whose smaller dimension is {least}",
                expected=f"at most {least}",
                fix="lower student.lora.r, give this layer a rank of its own in student.lora.extra.rank_pattern, or "
                "choose another variant",
            )


def _check_extra(extra: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in extra.items():
        if key not in EXTRA:
            hint = f"{OWNED[key]} instead" if key in OWNED else None if key in known else did_you_mean(key, EXTRA)
            raise MismatchError(
                f"student.lora.extra.{key} cannot be set",
                got=f"student.lora.extra.{key} = {value!r}",
                expected=hint or f"one of {', '.join(sorted(EXTRA))}",
                fix="correct or remove it",
            )
    init = extra.get("init_lora_weights", True)
    if init not in INITS:
        raise MismatchError(
            "student.lora.extra.init_lora_weights must leave the base model as it is, without a pass over the data",
            got=init,
            expected=f"one of {list(INITS)}, or student.lora.variant: pissa",
            fix="correct or remove it",
        )
