"""Record what vLLM says about a few prompts: `.venv-vllm/bin/python tests/support/record_vllm.py`.

The model is tiny and random, and the rows of its head come in equal pairs, so that every probability is tied. The
prompts are made so that their own token is the largest entry, is tied with the last of the k largest without being one
of them, and is none of either.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_teachers import tiny_model

TARGET = Path(__file__).parent / "vllm_prompt_logprobs.json"
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM's CPU build needs on a small machine."""
K, VOCABULARY, LENGTH = 5, 48, 6
FLAT = ("start_indices", "end_indices", "token_ids", "logprobs", "ranks")


def paired_model() -> Any:
    """A Llama whose head gives equal logits to the tokens 2j and 2j + 1; vLLM's CPU attention takes heads of 32."""
    model = tiny_model("llama", head_dim=32, vocab_size=VOCABULARY)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[1::2] = weight[::2]
    return model


def logprobs_of(model: Any, prompt: list[int]) -> torch.Tensor:
    """(tokens, V) float64: row i predicts token i + 1."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0].double(), 1)


def prompts_of(model: Any) -> list[list[int]]:
    """One prompt for each relation of its tokens to the k largest entries."""
    found = []
    for kind in ("largest", "tied with the last", "elsewhere"):
        prompt = [3]
        while len(prompt) < LENGTH:
            order = logprobs_of(model, prompt)[-1].argsort(descending=True).tolist()
            # Both of the pair that the k-th place cuts through: vLLM keeps one of them.
            split = sorted(order[K - 1 : K + 1])[len(prompt) % 2]
            prompt.append({"largest": order[0], "tied with the last": split, "elsewhere": order[20]}[kind])
        found.append(prompt)
    return found


def record() -> None:
    """Ask vLLM for both forms and write them with the log-probs of transformers, of the even tokens."""
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    model = paired_model()
    prompts = prompts_of(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            model=folder,
            dtype="float32",
            skip_tokenizer_init=True,
            logprobs_mode="raw_logprobs",
            max_logprobs=K,
            enable_prefix_caching=False,
            max_model_len=96,
        )
    cases = []
    options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": K, "detokenize": False}
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    forms = [engine.generate(asked, SamplingParams(flat_logprobs=flat, **options)) for flat in (True, False)]
    for prompt, flat, listed in zip(prompts, *forms, strict=True):
        flat, listed = flat.prompt_logprobs, listed.prompt_logprobs
        cases.append(
            {
                "prompt": prompt,
                "flat": {name: getattr(flat, name) for name in FLAT},
                "list": [p and [[id_, entry.logprob, entry.rank] for id_, entry in p.items()] for p in listed],
                "transformers": [[round(x, 7) for x in row] for row in logprobs_of(model, prompt)[:-1, ::2].tolist()],
            }
        )
    content = {"vllm": version, "k": K, "vocabulary": VOCABULARY, "cases": cases}
    TARGET.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    os.environ |= CPU
    record()
