"""Stores in the layouts of other projects, encoded here from what their code does, in another way than it is read."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard

README_CODEC = {
    "d": 320, "k": 40, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32", "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 7, "num_elements": 14},
        {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3},
    ],
    "delta_encoding": False, "error_diffusion": False, "normalize_t": True,
}  # fmt: skip
"""Polynomial and quantised residuals, as in DistillKit's README."""
EXACT_CODEC = {"d": 320, "k": 40, "exact_k": 40, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": True}


def top(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, k) ids and log-probs of (rows, V) logits, largest first."""
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    ids = np.argsort(-logp, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logp, ids, axis=1)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A Parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{k: _plain(v) for k, v in row.items()} for row in rows]), path)
    return path


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def distillkit_row(ids: np.ndarray, logprobs: np.ndarray, config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """`compressed_logprobs` and `bytepacked_indices` of a sample whose row j describes token j + 1."""
    bits = int(np.ceil(np.log2(np.float32(config["d"]))))
    return {
        "compressed_logprobs": [list(_compressed(row, config)) for row in torch.from_numpy(logprobs).float()],
        "bytepacked_indices": [list(_packed(row.tolist(), bits)) for row in ids],
    }


def write_distillkit(folder: Path, rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Path:
    """A capture in two files, of which the second has the larger number."""
    write_table(folder / "data_2.parquet", rows[: len(rows) // 2])
    write_table(folder / "data_10.parquet", rows[len(rows) // 2 :])
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _compressed(logprobs: torch.Tensor, config: dict[str, Any]) -> bytes:
    if config["delta_encoding"]:
        logprobs = torch.cat([logprobs[:1], logprobs[1:] - logprobs[:-1]])
    exact, rest = logprobs[: config["exact_k"]], logprobs[config["exact_k"] :]
    out = _bytes(exact, config["exact_dtype"])
    if terms := config.get("polynomial_terms"):
        points = torch.linspace(0, 1, len(rest)) if config["normalize_t"] else torch.arange(len(rest)).float()
        basis = torch.stack([points**t if isinstance(t, int) else getattr(torch, t)(points) for t in terms], dim=1)
        coefficients = torch.linalg.lstsq(basis.double(), rest.double()[:, None]).solution[:, 0].float()
        out += _bytes(coefficients, config["term_dtype"])
        rest = rest - (basis * coefficients).sum(1)
    for each in config["residual_bins"]:
        part, rest, n = rest[: each["num_elements"]], rest[each["num_elements"] :], each["element_bits"]
        scale = part.abs().max() / (1 if n == 1 else 2 ** (n - 1))
        scale = scale.to(getattr(torch, each["scale_dtype"]))
        low, high = (0, 1) if n == 1 else (-(2 ** (n - 1)), 2 ** (n - 1) - 1)
        levels = torch.round(part / scale.float()).clamp(low, high) - low
        out += _bytes(scale[None], each["scale_dtype"]) + _packed(levels.long().tolist(), n)
    return out


def _bytes(values: torch.Tensor, dtype: str) -> bytes:
    return bytes(values.to(getattr(torch, dtype)).contiguous().view(torch.uint8).tolist())


def _packed(values: Sequence[int], bits: int) -> bytes:
    """Integers one behind the other, highest bits first, filled up with zeros to whole bytes."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def write_megatron(
    folder: Path,
    ids: np.ndarray,
    logprobs: np.ndarray,
    *,
    ranks: int,
    micro_batch: int,
    version: int,
    dtype: torch.dtype,
) -> Path:
    """A store of (samples, positions, k) ids and log-probs, two micro-batches per rank and iteration."""
    folder.mkdir(parents=True)
    per_iteration = 2 * ranks * micro_batch
    for rank in range(ranks):
        name = f"cp0_dp{rank}__{len(ids) // per_iteration - 1}.tar" if version == 1 else f"dp{rank}__0-{len(ids)}.tar"
        saver = {"format_version": version, "mbs_save": micro_batch, "dp_size_save": ranks, "gbs_save": per_iteration}
        with tarfile.open(folder / name, "w") as tar:
            _member(tar, "_meta.json", json.dumps({"hash": "0", "saver": saver if version > 1 else {}}).encode())
            for iteration in range(len(ids) // per_iteration):
                parts = []
                for step in range(2):
                    first = iteration * per_iteration + (step * ranks + rank) * micro_batch
                    chosen = slice(first, first + micro_batch)
                    parts.append(
                        [torch.from_numpy(each[chosen]).transpose(0, 1).contiguous() for each in (logprobs, ids)]
                    )
                values, indices = ([part[i] for part in parts] for i in range(2))
                payload: dict[str, Any] = {
                    "values": [each.to(dtype) for each in values],
                    "indices_low": [(each & 0xFFFF).to(torch.uint16) for each in indices],
                    "bit_17": [(each >> 16).bool() for each in indices],
                }
                member = f"{iteration}.pt.zst"
                if version == 2:
                    payload = {name: torch.cat(each, dim=1) for name, each in payload.items()} | {"format_version": 2}
                    member = f"{iteration * per_iteration}-{(iteration + 1) * per_iteration}.pt.zst"
                buffer = io.BytesIO()
                torch.save(payload, buffer)
                _member(tar, member, zstandard.ZstdCompressor(level=3).compress(buffer.getvalue()))
    return folder


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
