"""The sections of the configuration that only stage one reads."""

from typing import Literal

from pydantic import Field

from storage_schemas.section import Section


class TeacherSection(Section):
    """The model whose distribution is stored."""

    model: str
    """Directory or hub id of the teacher."""
    revision: str | None = None
    """Branch, tag or commit on the hub; it is resolved to a commit and recorded."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Compute dtype of the forward pass. Statistics are always taken in float32 or better."""
    backend: Literal["transformers"] = "transformers"
    """Which engine runs the teacher."""
    batch_tokens: int = Field(16384, ge=1)
    """Token budget of a forward pass, padding included. Only speed and memory depend on it."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` …"""


class SourceSection(Section):
    """One file, directory or hub dataset of the corpus."""

    path: str
    """File (JSONL, JSON, Parquet), directory or hub dataset id."""
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    """Shape of a record; `auto` looks at the columns of the first one."""
    split: str = "train"
    """Split, in the notation of `datasets` (`train[:1000]` works)."""
    name: str | None = None
    """Configuration name of a hub dataset."""


class CorpusSection(Section):
    """What is distilled on, and which tokens are supervised."""

    sources: list[SourceSection] = Field(min_length=1)
    """Read in order and concatenated; the order is part of the corpus's fingerprint."""
    max_length: int = Field(2048, ge=2)
    """Tokens per sample, at most."""
    mask: Literal["assistant", "all"] = "assistant"
    """`assistant`: only what the assistant says (or the completion) is supervised. `all`: every token but the first."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """Longer samples are cut, kept as a row without targets, or refused."""
