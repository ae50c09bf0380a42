"""ZeRO-3: a student that is read from the mapped file and spread weight by weight is that of the other stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.tiny_student import VOCAB, save_student, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from student_train import engine

FUNCTION = "support.partition_jobs:weights"
CASES: list[dict[str, Any]] = [
    {"model": "student", "train": {"precision": "fp32"}},
    {"model": "student", "train": {"precision": "bf16"}},
    {"model": "bf16", "train": {"precision": "fp32"}},
    {"model": "bf16", "train": {"precision": "bf16"}},
    {"model": "tied", "train": {"precision": "bf16"}, "lora": {"modules_to_save": ["norm", "lm_head"]}},
    {"model": "bf16", "train": {"precision": "fp32"}, "lora": {"modules_to_save": ["embed_tokens"]}},
    {"model": "bf16", "train": {"precision": "fp32"}, "lora": {"variant": "pissa"}},
    {"model": "bf16", "train": {"precision": "fp32", "arm": "kd"}},
    {"model": "student", "train": {"precision": "bf16"}, "lora": {"variant": "pissa"}},
    {"model": "student", "train": {"precision": "bf16", "arm": "kd"}},
    {"model": "fp16", "train": {"precision": "bf16"}},
]
NAMES = ["-".join(map(str, (case["model"], *case["train"].values(), *case.get("lora", {})))) for case in CASES]


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """Of each stage, by rank and case."""
    save_student(folder / "bf16", dtype=torch.bfloat16)
    save_student(folder / "fp16", dtype=torch.float16)
    return {
        stage: run_ranks(
            FUNCTION, 2, dump=str(folder / "dump"),
            cases=[
                case | {"model": str(folder / case["model"]), "train": case["train"] | {"zero_stage": stage}}
                for case in CASES
            ],
        )
        for stage in (2, 3)
    }  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_weights_are_those_of_stage_2(case: int, found: dict[int, list[list[dict[str, Any]]]]) -> None:
    """To the bit, frozen and trained ones, working copies and masters, on both ranks; and each rank holds its half."""
    expected = found[2][0][case]
    for rank in (0, 1):
        spread = found[3][rank][case]
        for kind in ("whole", "masters"):
            assert spread[kind].keys() == expected[kind].keys()
            for name, weight in expected[kind].items():
                assert spread[kind][name].dtype == weight.dtype, name
                assert torch.equal(spread[kind][name], weight), name
        for name, weight in expected["whole"].items():
            assert spread["held"][name] == (weight.numel() + 1) // 2, name


def test_buffers_are_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is not the CPU: DeepSpeed moves none of a module whose weights are spread already."""
    monkeypatch.setattr(engine.deepspeed.zero, "Init", lambda **_: None)  # It would look for ranks.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    engine._partition(model, {}, torch.device("meta"), torch.float32)
    found = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in found
    assert {str(buffer.device) for buffer in found.values()} == {"meta"}


@pytest.mark.slow
def test_a_rank_holds_no_copy_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.4 billion weights stored in fp32 and trained in bf16: at stage 2 each rank casts all of them, at stage 3 it
    never holds more than its half and what is on its way."""
    # What is freed goes back at once: holes in the heap are the allocator's.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=24, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    in_bf16 = 2 * model.num_parameters()
    peaks = {}
    for stage in (2, 3):
        case = {"model": str(tmp_path / "model"), "train": {"precision": "bf16", "zero_stage": stage}, "look": False}
        results = run_ranks(FUNCTION, 2, dump=str(folder / "dump"), cases=[case], anew=True)
        peaks[stage] = max(result["peak"] for (result,) in results) / in_bf16
    assert peaks[2] > 0.95
    assert peaks[3] < 0.8, peaks
