"""The sections of the configuration that only stage one reads."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

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


def _share(weight: float) -> float:
    if weight > 1:
        raise ValueError(
            "must be at most 1: a repeated record would make the teacher answer twice what it answered already; lower "
            "the other sources' weights instead, or raise train.epochs"
        )
    return weight


class SourceSection(Section):
    """One file, glob, directory, object-store prefix or hub dataset of the corpus."""

    path: str
    """File (JSONL, JSON, Parquet) or glob, `s3://`, `gs://`, `az://` or `file://` too; directory, prefix or hub id."""
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    """Shape of a record; `auto` looks at the columns of the first one."""
    split: str = "train"
    """Split, in the notation of `datasets` (`train[:1000]` works)."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    weight: Annotated[float, AfterValidator(_share)] = Field(1.0, gt=0.0)
    """Share of the records that is used: `weight` x records, rounded half up, at least one; drawn by `corpus.seed`."""
    storage_options: dict[str, str] = {}
    """Passed to this source's object store, as `dump.storage_options` is. Secrets belong into the environment."""


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
    seed: int = Field(0, ge=0, lt=2**64)
    """Which records a source of `weight` below 1 gives; a larger weight keeps those of a smaller one. Order is kept."""
    cache_dir: str | None = None
    """Where fetched files and the tokenised corpus are kept; default: `$LLM_NEO_CACHE`, else `~/.cache/llm-neo`."""
