"""The adapter: what may be configured, how it starts, and every variant trained, saved and loaded again."""

import json
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from support.distributed import run_ranks
from support.rounding import FORWARD
from support.tiny_student import save_student, tiny_llama, write_dump
from torch import Tensor
from transformers import AutoModelForCausalLM

from storage_schemas.common.errors import MismatchError
from student_train.config import LoraSection
from student_train.model.adapter import OWNED, Part, attach, initial_factors, lora_config, plain_adapter, spread

VARIANTS = ("lora", "rslora", "dora", "pissa", "moslora")
IDS = torch.arange(20)[None]
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Else ZeRO-3 keeps the small weights of these models whole on every rank."""
ORDINARY: list[tuple[str, int, dict[str, Any]]] = [
    ("rslora", 2, {}),
    ("dora", 3, {}),
    ("dora", 2, {}),
    ("pissa", 3, {}),
    ("moslora", 3, {"deepspeed": SPREAD}),
    ("lora", 3, {"checkpointing": True}),
]
GRID: list[tuple[str, int, dict[str, Any]]] = [
    ("dora", 3, {"precision": "bf16", "checkpointing": True}),
    ("lora", 3, {"extra": {"bias": "all"}}),
    ("lora", 2, {"extra": {"lora_bias": True}}),
    ("moslora", 3, {"precision": "bf16", "checkpointing": True, "deepspeed": SPREAD}),
    ("moslora", 2, {"extra": {"lora_bias": True, "rank_pattern": {"q_proj": 2}}}),
]
"""(variant, ZeRO stage, anything else)"""


def named(case: tuple[str, int, dict[str, Any]]) -> str:
    """A name for a case."""
    return "-".join([case[0], str(case[1]), *(str(value) for value in case[2])])


def train_cases(folder: Path, cases: list[tuple[str, int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each case on two ranks."""
    write_dump(folder / "dump")
    save_student(folder / "student")
    jobs = [
        {
            "output": str(folder / named(case)), "dump": str(folder / "dump"), "model": str(folder / "student"),
            "train": {
                "zero_stage": case[1], "max_steps": 3, "warmup_ratio": 0.0,
                "precision": case[2].get("precision", "fp32"),
                "gradient_checkpointing": case[2].get("checkpointing", False),
                "deepspeed": case[2].get("deepspeed", {}),
            },
            "lora": {"variant": case[0], "extra": case[2].get("extra", {})},
        }
        for case in cases
    ]  # fmt: skip
    results = run_ranks("support.train_jobs:run_trainings", 2, jobs=jobs)[0]
    return {named(case): result for case, result in zip(cases, results, strict=True)}


@torch.no_grad()
def check_trained(folder: Path, name: str, result: dict[str, Any]) -> None:
    """It learned, and `final/` on the unchanged base is a plain peft adapter that does something."""
    assert result["code"] == 0, result["message"]  # The run itself has compared the logits of `final/` with its own.
    losses = [event.loss for event in result["events"]]
    assert len(set(losses)) == len(losses)
    base = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    before = base(input_ids=IDS).logits
    adapted = PeftModel.from_pretrained(base, folder / name / "final").eval()
    assert float((adapted(input_ids=IDS).logits - before).abs().max()) > 0.05
    config = json.loads((folder / name / "final" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] in (True, "gaussian")
    assert config["inference_mode"] is True
    assert "on `all-linear`" in (folder / name / "final" / "README.md").read_text()
    with safe_open(folder / name / "final" / "adapter_model.safetensors", "pt") as saved:
        assert not [key for key in saved.keys() if "mixer" in key]  # noqa: SIM118


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The cases of everyday."""
    folder = tmp_path_factory.mktemp("variants")
    return folder, train_cases(folder, ORDINARY)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Unusual ones."""
    folder = tmp_path_factory.mktemp("grid")
    return folder, train_cases(folder, GRID)


@pytest.mark.parametrize("name", [named(case) for case in ORDINARY])
def test_variants_train(name: str, ordinary: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """On two ranks, saved, loaded in a fresh model and compared."""
    folder, results = ordinary
    check_trained(folder, name, results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [named(case) for case in GRID])
def test_unusual_adapters_train(name: str, grid: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """The same for what `test_grid` does not have."""
    folder, results = grid
    check_trained(folder, name, results[name])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_start_changes_nothing(variant: str) -> None:
    """An adapter begins where the student is; the same seed begins with the same weights, another with others."""
    expected = tiny_llama(1)(input_ids=IDS).logits
    models = [attach(tiny_llama(1), LoraSection(r=4, variant=variant), seed=seed).eval() for seed in (5, 5, 6)]
    found = models[0](input_ids=IDS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD
    first, second, third = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = all(torch.equal(first[name], third[name]) for name in first)
    assert same == (variant == "pissa"), "a decomposition draws nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_are_fp32_on_a_bf16_base(variant: str) -> None:
    """Only the base is in bf16, and only the adapter is trained."""
    model = attach(tiny_llama(1).bfloat16(), LoraSection(r=4, variant=variant), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_is_restored_without_a_decomposition(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first factors, bit for bit, so that a resumed run does not depend on the machine's SVD."""
    lora = LoraSection(r=4, variant="pissa")
    first = attach(tiny_llama(1).to(dtype), lora, seed=0)
    initial = initial_factors(first, lora)

    def no_svd(*_: object, **__: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    again = attach(tiny_llama(1).to(dtype), lora, seed=0, initial=initial)
    expected = dict(first.named_parameters())
    assert len(initial) == 28
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_pissa_is_decomposed_by_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes as many weights; what all have in the end is what one rank alone would have, bit for bit."""
    lora, sizes, svd = LoraSection(r=4, variant="pissa"), list[int](), torch.linalg.svd
    whole = attach(tiny_llama(1), lora, seed=0)

    def counted(weight: Tensor, **options: Any) -> Any:
        sizes.append(weight.numel())
        return svd(weight, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    models = [attach(tiny_llama(1), lora, seed=0, part=Part(rank, 3)) for rank in range(3)]
    assert len(sizes) == 14
    shares = [sum(sizes[start:stop]) for start, stop in ((0, 5), (5, 10), (10, 14))]
    assert max(shares) < 1.3 * min(shares)
    told: list[list[Tensor]] = [[] for _ in models]
    for rank, model in enumerate(models):
        spread(deepcopy(model), 3, lambda tensor, owner, mine=told[rank]: mine.append(tensor.clone()))
    for model in models:
        order = count()
        spread(model, 3, lambda tensor, owner, order=order: tensor.copy_(told[owner][next(order)]))
        for (name, found), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(found, expected), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_holds_the_principal_components(dtype: torch.dtype) -> None:
    """Adapter and base together are the student, to the rounding of its dtype; what is left has smaller components."""
    before = tiny_llama(1).to(dtype).model.layers[0].mlp.up_proj.weight.float()
    model = attach(tiny_llama(1).to(dtype), LoraSection(r=4, variant="pissa"), seed=0)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    after = layer.get_base_layer().weight.float()
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rounding = torch.finfo(dtype).eps
    assert float((after + update - before).abs().max()) <= rounding * float(before.abs().max())
    values, rest = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
    assert float(rest[0]) == pytest.approx(float(values[4]), rel=0.02)


def moved(model: torch.nn.Module) -> dict[str, Tensor]:
    """What is trained, after it was moved as by training; by name."""
    torch.manual_seed(2)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter + 0.1 * torch.randn_like(parameter)
            parameter.copy_(weights[name])
    return weights


@torch.no_grad()
def test_pissa_as_a_plain_adapter(tmp_path: Path) -> None:
    """W - s B0 A0 + s B A, put as twice the rank on W; also where ranks differ between layers."""
    extra = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    lora = LoraSection(r=4, variant="pissa", extra=extra)
    model = attach(tiny_llama(1), lora, seed=0).eval()
    initial = initial_factors(model, lora)
    weights = moved(model)
    config, state = plain_adapter(model, weights, initial)
    assert config.r == 8
    assert config.rank_pattern == {"q_proj": 4}
    doubled = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 6}}
    fresh = attach(tiny_llama(1), LoraSection(r=8, alpha=16, extra=doubled), seed=0)
    parameters = {name.replace(".default", ""): p for name, p in fresh.named_parameters() if p.requires_grad}
    assert set(parameters) == set(state)
    for name, value in state.items():
        parameters[name].copy_(value)
    expected, found = (m.eval()(input_ids=IDS).logits for m in (model, fresh))
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD
    assert model.peft_config["default"].r == 4, "the trained model is left as it was"


@torch.no_grad()
def test_moslora_is_b_m_a() -> None:
    """y = W x + (alpha / r) B M A x; with M = I it is plain LoRA with the very A of that seed."""
    plain, mixed = (attach(tiny_llama(1), LoraSection(r=4, alpha=6, variant=v), seed=3) for v in ("lora", "moslora"))
    for model in (plain, mixed):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter))
    layer = mixed.get_base_model().model.layers[1].mlp.down_proj
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    m, x = layer.lora_A["default"].mixer.weight.double(), torch.randn(5, 56)
    expected = x.double() @ (layer.get_base_layer().weight.double() + 6 / 4 * b @ m @ a).T
    assert float((layer(x) - expected).abs().max() / expected.abs().max()) < FORWARD
    mixers = {name: p for name, p in mixed.named_parameters() if name.endswith("mixer.weight")}
    assert len(mixers) == 14
    assert all(p.shape == (4, 4) and p.abs().max() <= 4**-0.5 and p.std() > 0.1 for p in mixers.values())
    assert float((mixed(input_ids=IDS).logits - plain(input_ids=IDS).logits).abs().max()) > 0.05
    for p in mixers.values():
        p.copy_(torch.eye(4))
    assert torch.equal(mixed(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@torch.no_grad()
def test_moslora_as_a_plain_adapter() -> None:
    """M A in the place of A; also where ranks differ between layers, and with a bias in B."""
    extra = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "lora_bias": True}
    model = attach(tiny_llama(1), LoraSection(r=4, variant="moslora", extra=extra), seed=0).eval()
    weights = moved(model)
    config, state = plain_adapter(model, weights, {})
    assert (config.r, config.rank_pattern) == (4, {"q_proj": 2})
    fresh = attach(tiny_llama(1), LoraSection(r=4, extra=extra), seed=1)
    parameters = {name.replace(".default", ""): p for name, p in fresh.named_parameters() if p.requires_grad}
    assert set(parameters) == set(state)
    for name, value in state.items():
        parameters[name].copy_(value)
    expected, found = (m.eval()(input_ids=IDS).logits for m in (model, fresh))
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD
    assert sum(name.endswith("mixer.weight") for name in weights) == 14, "the weights that were given stay as they are"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"init_lora_weights": False}, "does not begin at zero"),
        ({"init_lora_weights": "orthogonal"}, "does not begin at zero"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "ParamWrapper"),
    ],
)
def test_moslora_refuses_what_misses_the_mixer(extra: dict[str, Any], says: str) -> None:
    """What peft would compute from A and B without it."""
    lora = LoraSection(r=4, variant="moslora", target_modules=["q_proj"], extra=extra)
    with pytest.raises(MismatchError, match=r"does not go with student\.lora\.variant: moslora") as error:
        attach(tiny_llama(1), lora, seed=0)
    assert says in str(error.value)
    assert next(iter(extra)) in str(error.value)


def test_defaults_are_those_of_the_paper() -> None:
    """alpha = 2 r, every linear layer but the head, no dropout."""
    config = lora_config(LoraSection())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 128, 0.0)
    model = attach(tiny_llama(1), LoraSection(r=2), seed=0)
    adapted = {name.split(".")[-1] for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert lora_config(LoraSection(r=8, alpha=3)).lora_alpha == 3
    assert lora_config(LoraSection(r=8, alpha=2.5)).lora_alpha == 2.5


def test_other_arguments_pass_through() -> None:
    """What peft's LoraConfig takes, `extra` may hold."""
    config = lora_config(LoraSection(r=8, extra={"rank_pattern": {"q_proj": 2}, "exclude_modules": ["up_proj"]}))
    assert config.rank_pattern == {"q_proj": 2}
    assert config.exclude_modules == {"up_proj"}


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"rank_patern": {}}, "did you mean rank_pattern?"),
        ({"zzzz": 1}, "one of alpha_pattern, "),
        ({"modules_to_save": ["lm_head"]}, "student.lora.modules_to_save instead"),
        ({"loftq_config": {}}, "one of alpha_pattern, "),
        ({"kasa_config": {}}, "one of alpha_pattern, "),
        ({"velora_config": {}}, "one of alpha_pattern, "),
        ({"init_lora_weights": "pissa_niter_4"}, "leave the base model as it is"),
        ({"init_lora_weights": "pissa"}, "student.lora.variant: pissa"),
        ({"init_lora_weights": "olora"}, "leave the base model as it is"),
        ({"init_lora_weights": "eva"}, "a pass over the data"),
        ({"bias": "wrong"}, "NotImplementedError"),
        ({"rank_pattern": 5}, "PEFT rejected"),
    ],
)
def test_extra_is_checked(extra: dict[str, Any], says: str) -> None:
    """Exit 78 with a reason or a suggestion."""
    with pytest.raises(MismatchError) as error:
        attach(tiny_llama(1), LoraSection(r=2, extra=extra), seed=0)
    assert says in str(error.value)


def test_arguments_with_a_place_of_their_own_are_told_it() -> None:
    """Each of them."""
    for key, where in OWNED.items():
        with pytest.raises(MismatchError) as error:
            lora_config(LoraSection(extra={key: 1}))
        assert where in str(error.value)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"], ["no_such_layer"], r".*\.nothing"])
def test_head_and_unknown_modules_are_refused(targets: str | list[str]) -> None:
    """The head stays frozen, and a pattern must fit something."""
    with pytest.raises(MismatchError, match=r"student\.lora\.target_modules"):
        attach(tiny_llama(1), LoraSection(r=2, target_modules=targets), seed=0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "got:      v_prj"),
        ({"target_modules": ["q_proj", "layers.9.self_attn.v_proj"]}, "got:      layers.9.self_attn.v_proj"),
        ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]}, "got:      v_proj"),
        ({"target_modules": [f"q_proj{i or ''}" for i in range(30)]}, "got:      q_proj1, q_proj2"),
        ({"target_modules": ["q_proj"], "extra": {"layers_to_transform": [0, 99]}}, "got:      99"),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj"], "extra": {"layers_to_transform": 99}},
            "got:      99",
        ),
        (
            {"target_modules": ["layers.1.self_attn.q_proj", "v_proj"], "extra": {"layers_to_transform": 0}},
            "got:      layers.1.self_attn.q_proj",
        ),
    ],
)
def test_what_peft_passes_over_is_refused(given: dict[str, Any], says: str) -> None:
    """A name or a layer that nothing has, among others that there are."""
    with pytest.raises(MismatchError, match="not adapted") as error:
        attach(tiny_llama(1), LoraSection(r=2, **given), seed=0)
    assert says in str(error.value)


def test_layers_are_not_chosen_of_parameters() -> None:
    extra = {"target_parameters": ["mlp.up_proj.weight"], "layers_to_transform": [0]}
    with pytest.raises(MismatchError, match="does not reach parameters"):
        attach(tiny_llama(1), LoraSection(r=2, target_modules=["q_proj"], extra=extra), seed=0)


@pytest.mark.parametrize("layers", [0, [0], [1, 0], []])
def test_layers_and_whole_names_are_taken(layers: int | list[int]) -> None:
    """By one number or several; none are all."""
    targets, extra = ["model.layers.0.self_attn.q_proj", "v_proj"], {"layers_to_transform": layers}
    model = attach(tiny_llama(1), LoraSection(r=2, target_modules=targets, extra=extra), seed=0)
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    both = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}
    assert adapted - both == ({"model.layers.1.self_attn.v_proj"} if layers in ([1, 0], []) else set())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"extra": {"lora_bias": True}}, "student.lora.extra.lora_bias"),
        ({"r": 33}, "rank 33 for base_model.model.model.layers.0.self_attn.q_proj, whose smaller dimension is 32"),
        ({"extra": {"rank_pattern": {"v_proj": 17}}}, "v_proj, whose smaller dimension is 16"),
    ],
)
def test_pissa_refuses_what_it_cannot_decompose_or_save(given: dict[str, Any], says: str) -> None:
    """A bias beside the factors, and more components than there are."""
    with pytest.raises(MismatchError, match=r"student\.lora\.variant: pissa") as error:
        attach(tiny_llama(1), LoraSection(**{"r": 2, "variant": "pissa"} | given), seed=0)
    assert says in str(error.value)
