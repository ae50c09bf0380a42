"""How to serve an adapter, merged or beside its base: the commands of vLLM and llama.cpp. Needs no torch."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be, from vllm/config/lora.py; 1 is left out, which older versions do not know."""
OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Dtype of a model -> `--outtype` of llama.cpp's converter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What decides how an adapter can be served."""

    folder: Path
    """Of adapter_config.json."""
    base: str
    """Directory or hub id of the base model."""
    revision: str | None = None
    """Of the base model on the hub."""
    rank: int
    """The largest of all layers."""
    dora: bool = False
    """Whether magnitudes were learned."""
    rslora: bool = False
    """Whether the scaling is alpha / sqrt(r)."""
    biases: bool = False
    """Whether biases were trained."""
    ranks_differ: bool = False
    """Whether there is a rank_pattern."""
    alphas_differ: bool = False
    """Whether there is an alpha_pattern."""

    @classmethod
    def of(cls, folder: Path) -> "AdapterFacts":
        """From the directory of a peft adapter."""
        found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        ranks, alphas = found.get("rank_pattern") or {}, found.get("alpha_pattern") or {}
        return cls(
            folder=folder,
            base=found["base_model_name_or_path"],
            revision=found.get("revision"),
            rank=max([found["r"], *ranks.values()]),
            dora=bool(found.get("use_dora")),
            rslora=bool(found.get("use_rslora")),
            biases=found.get("bias", "none") != "none" or bool(found.get("lora_bias")),
            ranks_differ=bool(ranks),
            alphas_differ=bool(alphas),
        )

    @property
    def name(self) -> str:
        """A name to serve it under: its directory's, or for a run's `final` the run's."""
        whole = self.folder.resolve()
        return whole.parent.name if whole.name == "final" else whole.name

    def not_in_vllm(self) -> str | None:
        """Why vLLM cannot serve it beside its base (vllm/lora/peft_helper.py); None if it can."""
        if self.dora:
            return "vLLM does not serve DoRA adapters"
        if self.biases:
            return "vLLM does not serve adapters with biases"
        if self.ranks_differ or self.alphas_differ:
            return "vLLM takes alpha / r to be the same in all layers"
        if self.rank > VLLM_RANKS[-1]:
            return f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one is {self.rank}"
        return None

    def not_in_llama_cpp(self) -> str | None:
        """Why llama.cpp cannot load it so (convert_lora_to_gguf.py, src/llama-adapter.h); None if it can."""
        if self.dora:
            return "llama.cpp does not convert DoRA adapters"
        if self.biases:
            return "llama.cpp does not convert adapters with biases"
        if self.rslora:
            return "llama.cpp scales by alpha / r, not by alpha / sqrt(r)"
        if self.alphas_differ:
            return "llama.cpp takes one alpha for all layers"
        return None


def serving_commands(adapter: AdapterFacts, merged: Path, dtype: str) -> str:
    """The commands, as text for a terminal.

    Args:
        adapter: what was merged.
        merged: directory of the merged model.
        dtype: of its weights: `bfloat16`, `float16` or `float32`.
    """
    model, folder, base = (shlex.quote(str(path)) for path in (merged, adapter.folder, adapter.base))
    name = shlex.quote(adapter.name)
    whole = shlex.quote(f"{merged.resolve().name}.gguf")
    lines = [
        "vLLM, merged:",
        f"  vllm serve {model}",
        "vLLM, the adapter beside its base:",
    ]
    if reason := adapter.not_in_vllm():
        lines.append(f"  not possible, serve the merged model: {reason}")
    else:
        rank = next(rank for rank in VLLM_RANKS if rank >= adapter.rank)
        revision = f" --revision {shlex.quote(adapter.revision)}" if adapter.revision else ""
        lines.append(
            f"  vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}"
        )
    lines += [
        "llama.cpp, merged:",
        f"  python convert_hf_to_gguf.py {model} --outfile {whole} --outtype {OUTTYPES.get(dtype, 'auto')}",
        "llama.cpp, the adapter beside its base:",
    ]
    if reason := adapter.not_in_llama_cpp():
        lines.append(f"  not possible, convert the merged model: {reason}")
    else:
        where = "--base" if Path(adapter.base).is_dir() else "--base-model-id"
        outfile = shlex.quote(f"{adapter.name}-lora.gguf")
        lines.append(f"  python convert_lora_to_gguf.py {where} {base} {folder} --outfile {outfile} --outtype f32")
    return "\n".join(lines)
