"""The commands that serve an adapter: the right flags, and none where they would give a wrong or no model."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from student_train.results.serving import VLLM_RANKS, AdapterFacts, serving_commands

PLAIN = AdapterFacts(folder=Path("runs/a/final"), base="org/model", rank=64)


def command(text: str, program: str) -> list[str]:
    """The words of the only line that runs a program."""
    (line,) = [line for line in text.splitlines() if program in shlex.split(line)]
    return shlex.split(line)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (64, 64), (129, 256), (257, 320), (321, 512)])
def test_vllm_gets_the_smallest_rank_that_it_takes(rank: int, served: int) -> None:
    """`--max-lora-rank` is one of a few values."""
    text = serving_commands(replace(PLAIN, rank=rank), Path("merged"), "bfloat16")
    assert f"vllm serve org/model --enable-lora --max-lora-rank {served} --lora-modules a=runs/a/final" in text
    assert "  vllm serve merged\n" in text
    assert served in VLLM_RANKS


def test_llama_cpp_gets_the_dtype_and_finds_the_base(tmp_path: Path) -> None:
    """A hub id and a directory are told apart."""
    words = command(serving_commands(PLAIN, Path("out/merged"), "bfloat16"), "convert_hf_to_gguf.py")
    assert words == [
        "python", "convert_hf_to_gguf.py", "out/merged", "--outfile", "merged.gguf", "--outtype", "bf16"
    ]  # fmt: skip
    for dtype, outtype in (("float16", "f16"), ("float32", "f32")):
        words = command(serving_commands(PLAIN, Path("merged"), dtype), "convert_hf_to_gguf.py")
        assert words[-2:] == ["--outtype", outtype]
    words = command(serving_commands(PLAIN, Path("merged"), "float32"), "convert_lora_to_gguf.py")
    assert words[2:] == [
        "--base-model-id", "org/model", "runs/a/final", "--outfile", "a-lora.gguf", "--outtype", "f32"
    ]  # fmt: skip
    local = replace(PLAIN, base=str(tmp_path))
    words = command(serving_commands(local, Path("merged"), "float32"), "convert_lora_to_gguf.py")
    assert words[2:4] == ["--base", str(tmp_path)]


@pytest.mark.parametrize(
    ("facts", "vllm", "llama_cpp"),
    [
        ({}, None, None),
        ({"dora": True}, "DoRA", "DoRA"),
        ({"biases": True}, "biases", "biases"),
        ({"rslora": True}, None, "sqrt"),
        ({"ranks_differ": True}, "same in all layers", None),
        ({"alphas_differ": True}, "same in all layers", "one alpha"),
        ({"rank": 513}, "up to 512", None),
    ],
)
def test_what_cannot_be_served_unmerged(facts: dict[str, Any], vllm: str | None, llama_cpp: str | None) -> None:
    """A reason in the place of a command; the merged model is always served."""
    text = serving_commands(replace(PLAIN, **facts), Path("merged"), "bfloat16")
    for mark, reason in (("--enable-lora", vllm), ("convert_lora_to_gguf.py", llama_cpp)):
        assert (mark in text) == (reason is None)
        assert reason is None or reason in text
    assert text.count("not possible") == (vllm is not None) + (llama_cpp is not None)
    assert "vllm serve merged" in text
    assert "convert_hf_to_gguf.py merged" in text


def test_names_are_quoted_and_the_revision_is_kept() -> None:
    """Words of a shell stay words."""
    facts = AdapterFacts(folder=Path("my runs/a b/final"), base="org/model", revision="v1", rank=4)
    text = serving_commands(facts, Path("my runs/merged"), "float16")
    (line,) = [line for line in text.splitlines() if "--enable-lora" in line]
    words = shlex.split(line)
    assert words[:5] == ["vllm", "serve", "org/model", "--revision", "v1"]
    assert words[-1] == "a b=my runs/a b/final"
    assert command(text, "convert_hf_to_gguf.py")[2] == "my runs/merged"


def test_facts_of_a_saved_adapter(tmp_path: Path) -> None:
    """As peft writes it; the largest rank counts."""
    config = {
        "base_model_name_or_path": "org/model", "revision": None, "r": 8, "lora_alpha": 16, "use_dora": False,
        "use_rslora": True, "bias": "none", "lora_bias": True, "rank_pattern": {"q_proj": 24}, "alpha_pattern": {},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert AdapterFacts.of(tmp_path) == AdapterFacts(
        folder=tmp_path, base="org/model", rank=24, rslora=True, biases=True, ranks_differ=True
    )
