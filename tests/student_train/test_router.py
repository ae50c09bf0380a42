"""A mixture of experts: its routers are left out of `all-linear`, and their auxiliary loss is that of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import rows_of
from support.distributed import run_ranks
from support.engine_jobs import batches_of_step, gradients, leave_start, student_of, train_section
from support.rounding import FORWARD, GRADIENT
from support.tiny_student import VOCAB, tiny_tokenizer, write_dump
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DogeConfig, MixtralConfig, PhimoeConfig, Qwen3MoeConfig

from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from student_train.config import LoraSection
from student_train.data.batch import collate
from student_train.model.adapter import attach, left_out
from student_train.model.probes import refuse_mixed_samples, refuse_unknown_head
from student_train.model.router import RouterLoss

COEFFICIENT = 0.3
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "num_experts_per_tok": 2,
    "output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=24, head_dim=8),
    "phimoe": PhimoeConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0),
}
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES: list[dict[str, Any]] = [
    {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3, "deepspeed": SPREAD},
    {"zero_stage": 3, "deepspeed": SPREAD, "gradient_checkpointing": True},
    {"zero_stage": 3, "deepspeed": SPREAD, "arm": "kd"}, {"zero_stage": 2, "arm": "kd"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, and a student of each architecture."""
    folder = tmp_path_factory.mktemp("router")
    write_dump(folder / "dump", samples=10, exact=True)
    for name, config in MODELS.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def built(config: Any, **lora: Any) -> set[str]:
    """Adapted modules, by their name in a layer."""
    model = attach(AutoModelForCausalLM.from_config(config), LoraSection(r=2, **lora), seed=0)
    names = {n.split(".lora_A")[0] for n, _ in model.get_base_model().named_parameters() if ".lora_A" in n}
    return {name.split(".", 3)[3] for name in names}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
EXPERTS = {"mlp.experts", "mlp.experts.base_layer"}


@pytest.mark.parametrize(
    ("name", "lora", "adapted"),
    [
        ("mixtral", {}, ATTENTION | EXPERTS),
        ("qwen3_moe", {}, ATTENTION | EXPERTS),
        ("phimoe", {}, ATTENTION),
        ("mixtral", {"target_modules": ["q_proj", "gate"]}, {"self_attn.q_proj", "mlp.gate"}),
        ("mixtral", {"target_modules": r".*\.(q_proj|gate)"}, {"self_attn.q_proj", "mlp.gate"}),
        ("mixtral", {"extra": {"target_parameters": ["gate.weight"]}}, ATTENTION | EXPERTS | {"mlp.gate"}),
        ("phimoe", {"target_modules": ["router"]}, {"mlp.router"}),
    ],
)
def test_routers_are_adapted_where_they_are_named(name: str, lora: dict[str, Any], adapted: set[str]) -> None:
    """And `all-linear` is no name."""
    assert built(MODELS[name], **lora) == adapted


def test_what_is_left_out_is_known_by_name() -> None:
    model = AutoModelForCausalLM.from_config(MODELS["mixtral"])
    assert left_out(model, LoraSection()) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert left_out(model, LoraSection(target_modules=["gate"])) == []


def test_pissa_decomposes_no_experts() -> None:
    with pytest.raises(MismatchError, match=r"variant: pissa decomposes linear layers"):
        built(MODELS["mixtral"], variant="pissa")


@pytest.mark.parametrize("arm", ["lora", "sft"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_own_loss(folder: Path, name: str, arm: str) -> None:
    """Loss and gradient of one padded micro-batch, with the attention mask and the labels that transformers takes."""
    dump = Dump.open(str(folder / "dump"))
    module = student_of(folder / name, dump, train_section(folder, arm=arm)).train()
    leave_start(module)
    rows = [row for row in rows_of(dump, range(6)) if row.targets is not None]
    batch = collate(rows, temperature_index=0, temperature=1.0, entries=False)
    loss, parts = module(batch)
    tokens, trained = len(batch.targets), [p for _, p in module.trained()]
    found = torch.autograd.grad(loss / tokens, trained, allow_unused=True, materialize_grads=True)
    labels, mask = torch.full_like(batch.input_ids, -100), torch.zeros_like(batch.input_ids)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        mask[i, :length] = 1
        labels[i, :length] = torch.from_numpy(row.input_ids).long().where(torch.from_numpy(row.loss_mask), -100)
    assert not mask.all(), "there must be padding"
    own = module.student(input_ids=batch.input_ids, attention_mask=mask, labels=labels, use_cache=False)
    expected = torch.autograd.grad(own.loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
    assert float(loss) / tokens == pytest.approx(float(own.loss), rel=FORWARD)
    assert float(parts[-1]) / tokens == pytest.approx(float(own.aux_loss), rel=FORWARD)
    assert off(found, expected) < GRADIENT
    without = torch.autograd.grad(
        own.loss - COEFFICIENT * own.aux_loss, trained, allow_unused=True, materialize_grads=True
    )
    assert off(without, expected) > 0.005, "the auxiliary loss does nothing here"


def off(found: Any, expected: Any) -> float:
    """Norm of the difference, relative."""
    flat, other = (torch.cat([x.flatten() for x in tensors]) for tensors in (found, expected))
    return float((flat - other).norm() / other.norm())


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    cases = [{"model": str(folder / "mixtral"), "train": {"max_grad_norm": 0.0, **case}} for case in CASES]
    return run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_two_ranks_equal_one_process(folder: Path, on_two_ranks: list[dict[str, Any]], case: int) -> None:
    """Loss and gradient are those of the same micro-batches in plain torch; a rank may have a filler."""
    dump, train = Dump.open(str(folder / "dump")), train_section(folder, arm=CASES[case].get("arm", "neo"))
    module = student_of(folder / "mixtral", dump, train).train()
    total, loss = 0, torch.zeros(())
    for rank in range(2):
        batches, total = batches_of_step(dump, train, 0, rank=rank, world_size=2)
        loss = loss + sum((module(batch)[0] for batch in batches), torch.zeros(()))
    trained = module.trained()
    expected = torch.autograd.grad(loss / total, [p for _, p in trained], allow_unused=True, materialize_grads=True)
    found = on_two_ranks[case]
    assert found["steps"][0][0] == pytest.approx(float(loss) / total, rel=FORWARD)
    here = gradients(found["first"])
    assert off([here[name] for name, _ in trained], expected) < GRADIENT


def test_a_split_changes_little(folder: Path) -> None:
    """Of ten samples of 3 to 27 tokens in parts of 5, 2 and 1: found were 0.8, 6 and 9 % in the auxiliary loss."""
    dump = Dump.open(str(folder / "dump"))
    module = student_of(folder / "mixtral", dump, train_section(folder, arm="sft")).train()
    trained = [p for _, p in module.trained()]

    def found(micro: int) -> tuple[float, Tensor]:
        train = train_section(folder, arm="sft", micro_batch_size=micro, global_batch_size=10)
        batches, tokens = batches_of_step(dump, train, 0, rank=0, world_size=1)
        pairs = [module(batch) for batch in batches]
        gradient = torch.autograd.grad(sum(loss for loss, _ in pairs) / tokens, trained)
        return sum(float(parts[-1]) for _, parts in pairs) / tokens, torch.cat([x.flatten() for x in gradient])

    (whole, gradient), *others = (found(micro) for micro in (10, 5, 2, 1))
    for (value, other), most in zip(others, (0.02, 0.1, 0.15), strict=True):
        assert value == pytest.approx(whole, rel=most)
        assert off([other], [gradient]) < most


def test_without_the_flag_there_is_none(folder: Path, tmp_path: Path) -> None:
    """As in transformers: the coefficient alone adds nothing, and neither does the flag."""
    for changes in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        config = AutoConfig.from_pretrained(folder / "mixtral")
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        module = student_of(tmp_path, Dump.open(str(folder / "dump")), train_section(tmp_path)).train()
        assert module.router_loss is None


def test_a_loss_that_is_computed_in_another_way_is_refused(folder: Path, tmp_path: Path) -> None:
    """Doge's function takes other arguments; what to do is said. Older transformers cannot run it with an adapter."""
    config = DogeConfig(**SMALL, is_moe=True, num_experts=16, keep_window_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    dump, targets = Dump.open(str(folder / "dump")), {"target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(MismatchError, match=r"is not understood(.|\n)*output_router_logits: false|cannot be run as"):
        student_of(tmp_path, dump, train_section(tmp_path), lora=targets)


def test_a_run_logs_it_apart(folder: Path, tmp_path: Path) -> None:
    """It is in the loss; a filler in the second step holds nobody up; `final/` is proven with experts adapted."""
    job = {
        "output": str(tmp_path / "run"), "dump": str(folder / "dump"), "model": str(folder / "mixtral"),
        "train": {"zero_stage": 3, "max_steps": 2, "warmup_ratio": 0.0, "precision": "fp32"},
        "lora": {"variant": "lora"},
    }  # fmt: skip
    (result,) = run_ranks("support.train_jobs:run_trainings", 2, timeout=100, jobs=[job])[0]
    assert result["code"] == 0, result["message"]
    for event in result["events"]:
        assert event.router_aux > 1
        assert event.loss == pytest.approx(0.5 * event.ce + 0.5 * event.kl + COEFFICIENT * event.router_aux, rel=1e-6)
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]


def test_probes_go_to_where_the_student_is(folder: Path) -> None:
    """Those of head, packing and routers: a student in 4 bits is on the GPU when it is loaded. Here all tensors that do
    not say where they belong land on another device than the student."""
    dump = Dump.open(str(folder / "dump"))
    module = student_of(folder / "mixtral", dump, train_section(folder / "run", packing=True))
    with torch.device("meta"):
        refuse_unknown_head(module)
        refuse_mixed_samples(module)
        assert RouterLoss.of(module.causal) is not None
