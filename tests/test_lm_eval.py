"""lm-evaluation-harness takes what a run leaves behind, by the commands of docs/evaluation.md. `make test-lm-eval`."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_student import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from student_train.results.merge import merge

ROOT = Path(__file__).parent.parent
pytest.importorskip("lm_eval", reason="lm-eval is not installed here: make test-lm-eval")


def documented(model_args: str, out: Path) -> list[str]:
    """The command of the page with another model, on a CPU."""
    page = (ROOT / "docs/evaluation.md").read_text()
    (command,) = [block for block in page.split("```") if "--tasks local_choice" in block]
    words = shlex.split(command.replace("\\\n", ""))
    words[words.index("--model_args") + 1] = model_args
    return [sys.executable, "-m", "lm_eval", *words[1:], "--device", "cpu", "--output_path", str(out)]


def test_local_task_of_an_adapter_and_of_its_merged_model(tmp_path: Path) -> None:
    """Both are taken, and score alike."""
    letters = {chr(i): i - 32 for i in range(32, 96)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="@", eos_token="^", pad_token="^", unk_token="?"
    )
    base = tiny_llama(0)
    base.save_pretrained(tmp_path / "base")
    fast.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    fast.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", None)
    scores = []
    for name, model in (
        ("adapter", f"pretrained={tmp_path}/base,peft={tmp_path}/adapter,dtype=float32"),
        ("merged", f"pretrained={tmp_path}/merged,dtype=float32"),
    ):
        subprocess.run(documented(model, tmp_path / "out" / name), cwd=ROOT, check=True)
        (file,) = (tmp_path / "out" / name).rglob("results_*.json")
        scores.append(json.loads(file.read_text())["results"]["local_choice"])
    assert scores[0]["sample_len"] == 8
    for measure in ("acc,none", "acc_norm,none"):
        assert scores[0][measure] == scores[1][measure]
