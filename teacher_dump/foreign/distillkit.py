"""DistillKit's compressed captures: `compressed_logprobs` and `bytepacked_indices`, with compression_config.yaml.

The layout of `distillkit/compression` at a61c2e7 (March 2026). Bits run from the highest to the lowest; numbers are
little-endian. Row j describes token j + 1: vLLM gives no log-probs for the first token, and none are stored for it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.targets import F64, I64
from teacher_dump.foreign.lists import sample_of
from teacher_dump.foreign.sample import ForeignSample
from teacher_dump.foreign.tables import integers, records

CONFIG = "compression_config.yaml"
_LEGACY = "packed_indices"
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Bin(FrozenModel):
    """Consecutive residuals of one scale."""

    scale_dtype: Dtype
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1)


class Compression(FrozenModel):
    """compression_config.yaml; a key that is not here would change what the bytes mean."""

    d: int = Field(ge=2)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id, as DistillKit computes them, in float32."""
        return int(np.ceil(np.log2(np.float32(self.d))))


def read(source: Path, files: Sequence[Path], *, mask: str) -> Iterator[ForeignSample]:
    """The samples of a capture, in the order of its files.

    Raises:
        MismatchError: its compression is not known here.
        DataError: its bytes are not those of its compression.
    """
    config = _config(config_file(source))
    for record in records(files):
        if _LEGACY in record.columns:
            raise MismatchError(
                f"{record.place} is of DistillKit's first codec",
                got="logits less their mean, and no normaliser: nothing says what the rest had",
                expected="compressed_logprobs and bytepacked_indices",
                fix="decode it with DistillKit into `token_ids` and `top_values`, and import these: lists --tail lost",
            )
        packed, bits = (record.entries(name) for name in ("compressed_logprobs", "bytepacked_indices"))
        if len(packed) != len(bits):
            raise record.unusable(f"{len(packed)} rows of log-probs for {len(bits)} of ids", "as many")
        if not len(packed):  # Of a sample of one token.
            yield sample_of(record, np.empty((0, config.k), np.int64), np.empty((0, config.k)), mask=mask)
            continue
        try:
            values = logprobs(packed.astype(np.uint8), config)
            ids = _unpacked(bits.astype(np.uint8), config.id_bits, config.k)
        except ValueError as error:
            raise record.unusable(str(error), f"rows as {CONFIG} says") from error
        yield sample_of(record, integers(ids), values, mask=mask)


def logprobs(packed: Any, config: Compression) -> F64:
    """(rows, k) log-probs from (rows, bytes) of `compressed_logprobs`; -inf where vLLM gave fewer than k.

    Raises:
        ValueError: there are more or fewer bytes.
    """
    at = 0

    def take(count: int) -> Any:
        nonlocal at
        at += count
        if at > packed.shape[1]:
            raise ValueError(f"rows of {packed.shape[1]} bytes")
        return np.ascontiguousarray(packed[:, at - count : at])

    exact = _numbers(take(config.exact_k * _BYTES[config.exact_dtype]), config.exact_dtype)
    rest = np.zeros((len(packed), config.k - config.exact_k), np.float32)
    if config.polynomial_terms:
        work = np.float64 if config.term_dtype == "float64" else np.float32
        coefficients = _numbers(take(len(config.polynomial_terms) * _BYTES[config.term_dtype]), config.term_dtype)
        points = np.arange(rest.shape[1], dtype=work)
        if config.normalize_t:
            points = np.linspace(0, 1, rest.shape[1], dtype=work)
        terms = [
            points**term if isinstance(term, int) else getattr(np, term)(points) for term in config.polynomial_terms
        ]
        rest = rest + (np.stack(terms, axis=-1) * coefficients.astype(work)[:, None]).sum(-1)
    start = 0
    for each in config.residual_bins:
        scale = _numbers(take(_BYTES[each.scale_dtype]), each.scale_dtype)
        levels = _unpacked(take(-(-each.num_elements * each.element_bits // 8)), each.element_bits, each.num_elements)
        signed = levels * 2.0 - 1.0 if each.element_bits == 1 else levels - 2.0 ** (each.element_bits - 1)
        rest[:, start : start + each.num_elements] += signed * scale
        start += each.num_elements
    if at != packed.shape[1]:
        raise ValueError(f"rows of {packed.shape[1]} bytes, not {at}")
    found = np.concatenate([exact, rest], axis=1).astype(np.float64)
    if config.delta_encoding:
        with np.errstate(invalid="ignore"):
            found = np.cumsum(found, axis=1)
        found[np.maximum.accumulate(np.isneginf(found), axis=1)] = -np.inf
    return found


def _numbers(raw: Any, dtype: Dtype) -> Any:
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype).newbyteorder("<"))


def _unpacked(raw: Any, bits: int, count: int) -> I64:
    """(rows, count) integers of so many bits each."""
    if raw.shape[1] != -(-count * bits // 8):
        raise ValueError(f"{raw.shape[1]} bytes for {count} integers of {bits} bits")
    each = np.unpackbits(raw, axis=1)[:, : count * bits].reshape(len(raw), count, bits).astype(np.int64)
    return np.asarray((each << np.arange(bits - 1, -1, -1)).sum(-1))


def config_file(source: Path) -> Path:
    """Where a capture says how it is compressed."""
    return (source if source.is_dir() else source.parent) / CONFIG


def _config(path: Path) -> Compression:
    try:
        config = Compression.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise MismatchError(
            f"{path} does not say how the capture is compressed",
            got=" ".join(str(error).split())[:300],
            expected=f"DistillKit's {CONFIG}, which its capture writes beside data_*.parquet",
            fix="copy it there, or give the directory that holds it",
        ) from error
    if config.polynomial_terms and config.term_dtype in ("float16", "bfloat16"):
        raise MismatchError(
            f"{path} stores polynomials in 16 bits",
            got=f"term_dtype: {config.term_dtype}, in which DistillKit also adds them up",
            expected="float32 or float64",
            fix="decode it with DistillKit into `token_ids` and `top_values`, and import these as lists",
        )
    if sum(each.num_elements for each in config.residual_bins) > config.k - config.exact_k or config.exact_k > config.k:
        raise DataError(
            f"{path} contradicts itself", got="more values than k", expected=f"{config.k}", fix="copy it again"
        )
    return config
