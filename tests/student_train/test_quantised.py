"""QLoRA: an adapter on a base in 4 bits, under DeepSpeed, equals plain torch on the rounded weights.

What needs bitsandbytes is skipped where the extra `qlora` is not installed: `make test-qlora` does it.
"""

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Trace, assert_same_steps, train_plainly
from peft import PeftModel
from safetensors import safe_open
from support.distributed import Ranks, run_ranks
from support.engine_jobs import student_of, train_section
from support.rounding import FORWARD
from support.tiny_student import VOCAB, tiny_tokenizer, write_dump
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3MoeConfig

from storage_schemas.common import extras
from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from student_train.config import LoraSection, StudentSection
from student_train.model.adapter import attach
from student_train.model.load import load_model
from student_train.model.quantised import keep_numbers, quantisation
from student_train.results.merge import merge
from student_train.training_run import refuse_early

BATCH, STEPS, RATE, CLIP = 6, 3, 1e-2, 0.3
CASES: list[tuple[int, dict[str, Any]]] = [(0, {}), (1, {}), (2, {}), (2, {"modules_to_save": ["norm", "lm_head"]})]
"""(ZeRO stage, of the adapter)"""
IDS = torch.arange(20)[None]


def save_wide(folder: Path) -> Path:
    """A student whose layers are as wide as a block of weights with one scale."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.15, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def round_weights(student: Path, folder: Path) -> Path:
    """The same student with its linear layers rounded to 4 bits, in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    section = StudentSection(model=str(student), quantization="nf4")
    rounded = load_model(str(student), None, dtype=torch.float32, quantisation=quantisation(section, torch.float32))
    keep_numbers(rounded)
    found = dict(rounded.named_modules())
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = found[name].weight
            value = dequantize_4bit(weight.data, weight.quant_state)
            assert 0.05 < float((value - layer.weight).norm() / layer.weight.norm()) < 0.15, name
            layer.weight.copy_(value)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump; a student, and the same rounded."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantised")
    write_dump(folder / "dump")
    round_weights(save_wide(folder / "student"), folder / "rounded")
    return folder


@pytest.fixture(scope="module")
def steps(wide: Path) -> list[dict[str, Any]]:
    """Some steps of all cases on two ranks, of rank 0."""
    cases = [
        {
            "model": str(wide / "student"), "quantization": "nf4", "lora": lora, "steps": STEPS,
            "train": {
                "zero_stage": stage, "max_grad_norm": CLIP, "global_batch_size": BATCH, "learning_rate": RATE,
            },
        }
        for stage, lora in CASES
    ]  # fmt: skip
    return run_ranks("support.engine_jobs:run_cases", 2, dump=str(wide / "dump"), cases=cases)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{stage}-{'-'.join(lora)}" for stage, lora in CASES])
def test_equals_plain_torch_on_the_rounded_weights(case: int, wide: Path, steps: list[dict[str, Any]]) -> None:
    """Losses, gradients, their norm and, after some clipped steps, the weights."""
    options = {"steps": STEPS, "batch": BATCH, "rate": RATE, "clip": CLIP, **CASES[case][1]}
    expected: Trace = train_plainly(Dump.open(str(wide / "dump")), str(wide / "rounded"), arm="neo", **options)
    assert_same_steps(steps[case], expected, rate=RATE)


@pytest.fixture(scope="module")
def ranks(wide: Path) -> Iterator[Ranks]:
    """Two that stay."""
    found = Ranks("support.train_jobs:trainer", 2)
    yield found
    found.close()


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_resumed_saved_and_merged(precision: str, wide: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The same bits after a stop; checkpoints hold the adapter alone; peft loads it on the unquantised base."""

    def call(name: str, **more: Any) -> dict[str, Any]:
        job = {"model": str(wide / "student"), "dump": str(wide / "dump"), "output": str(tmp_path / name),
               "quantization": "nf4", "train": {"precision": precision}}  # fmt: skip
        return ranks.call(job=job | more)[0]  # type: ignore[no-any-return]

    whole = call("whole")
    assert whole["code"] == 0, whole["message"]
    assert call("half", stop_after=3)["code"] == 75
    other = call("half", quantization=None)
    assert other["code"] == 78
    assert "student.quantization" in other["message"]
    rest = call("half")
    assert rest["code"] == 0, rest["message"]
    assert all(torch.equal(rest["state"][key], value) for key, value in whole["state"].items())
    assert all("lora_" in key for key in whole["state"])
    final = tmp_path / "whole" / "final"
    assert "in nf4" in (final / "README.md").read_text()
    merge(final, tmp_path / "merged")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(wide / "student", dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, final).eval()(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert float((merged(input_ids=IDS).logits - expected).abs().max() / expected.abs().max()) < FORWARD
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as saved:
        assert saved.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.float32


def test_evaluating_changes_no_number(wide: Path) -> None:
    """bitsandbytes would repack the weights where the CPU has bf16 products."""
    if not importlib.import_module("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes repacks nothing")
    section = StudentSection(model=str(wide / "student"), quantization="nf4")
    model = load_model(section.model, None, dtype=torch.float32, quantisation=quantisation(section, torch.float32))
    keep_numbers(model)
    exact = AutoModelForCausalLM.from_pretrained(wide / "rounded", dtype=torch.float32)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=IDS).logits for m in (model, exact))
    assert float((found - expected).abs().max() / expected.abs().max()) < FORWARD


@pytest.mark.parametrize("mixture", [True, False])
def test_a_mixture_that_stays_as_it_is_is_refused(mixture: bool, wide: Path, tmp_path: Path) -> None:
    """Its experts are one parameter, which bitsandbytes passes over; the dense student of its kind is taken."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    experts = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **experts) if mixture else Qwen3Config(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    job = tmp_path / "model", Dump.open(str(wide / "dump")), train_section(tmp_path / "run")
    with pytest.raises(MismatchError, match=r"not model.*mlp\.experts") if mixture else nullcontext():
        student_of(*job, quantization="nf4", lora={"target_modules": ["q_proj"]})


def test_quantised_modules_are_not_trained_in_full(wide: Path) -> None:
    """Integers have no gradient."""
    section = StudentSection(model=str(wide / "student"), quantization="nf4")
    model = load_model(section.model, None, dtype=torch.float32, quantisation=quantisation(section, torch.float32))
    with pytest.raises(MismatchError, match="has quantised"):
        attach(model, LoraSection(r=2, modules_to_save=["o_proj"]), seed=0)


@pytest.mark.parametrize(
    ("train", "lora", "says"),
    [
        ({"zero_stage": 3}, {}, "ZeRO-3 spreads weights"),
        ({"arm": "kd"}, {}, "the arm lora or neo"),
        ({}, {"variant": "dora"}, "one of lora, rslora"),
        ({}, {}, r"llm-neo\[qlora\]"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    train: dict[str, Any], lora: dict[str, Any], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a dump is waited for; so is the missing package."""
    monkeypatch.setattr(extras, "installed", lambda _: False)
    student = StudentSection(model=str(folder / "student"), lora=LoraSection(r=2, **lora), quantization="nf4")
    with pytest.raises(MismatchError, match=says):
        refuse_early(student, train_section(folder / "run", **train))
