"""Megatron-LM's cached logits: tar files of `{iteration}.pt.zst`, by data-parallel rank; its tokens lie elsewhere.

The layouts of `megatron/training/distillation` of pull request 5019 (one list of micro-batches) and of its format
version 2 (one tensor per iteration), 2026. Logits of position t predict token t + 1; log-probs are of T = 1 and
normalised over the vocabulary.
"""

import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import zstandard

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.targets import F64, I64
from teacher_dump.foreign.sample import ForeignSample
from teacher_dump.foreign.tables import integers, records

_TAR = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?:\d+-)?(?P<last>\d+)\.tar")
_MEMBER = re.compile(r"(?P<first>\d+)(?:-\d+)?\.pt\.zst")
_META = "_meta.json"
_EMPTY = -999.0
"""Entries outside of the nucleus have a value of -1e3 or -1e4, and an id of -1 that has lost its higher bits."""
_UNREADABLE = (
    OSError, tarfile.TarError, zstandard.ZstdError, UnpicklingError, ValueError, RuntimeError, LookupError, TypeError,
    AttributeError,
)  # fmt: skip
"""What reading a damaged or other file may raise."""
_UNKNOWN = "a layout of Megatron-LM's cached logits that is not known here"


def read(files: Sequence[Path], tokens: Sequence[Path], *, mask: str) -> Iterator[ForeignSample]:
    """The sequences of a store in the order in which the teacher has seen them.

    Args:
        files: the tar files.
        tokens: what the teacher saw: a row with `input_ids` per sequence, in the same order; one more token than
            there are targets, or as many.
        mask: `all`, or a column of `tokens`.

    Raises:
        MismatchError: another version, or a store of several context-parallel ranks.
        DataError: ranks, iterations or tokens are missing.
    """
    texts = records(tokens)
    for ids, values in sequences(files):
        record = next(texts, None)
        if record is None:
            raise _disagree("fewer sequences of tokens than of targets")
        sequence = integers(record.tokens("input_ids"))
        if len(sequence) - len(values) not in (0, 1):
            raise record.unusable(f"{len(sequence)} tokens for {len(values)} targets", "as many, or one more")
        yield ForeignSample(
            place=record.place, input_ids=sequence, supervised=record.supervised(mask), ids=ids, values=values
        )
    if next(texts, None) is not None:
        raise _disagree("more sequences of tokens than of targets")


def sequences(files: Sequence[Path]) -> Iterator[tuple[I64, F64]]:
    """((positions, k) ids, (positions, k) log-probs) of each sequence."""
    ranks = defaultdict[int, list[tuple[int, Path]]](list)
    for path in files:
        match = _TAR.fullmatch(path.name)
        if match is None or int(match["cp"] or 0):
            raise MismatchError(
                f"{path} is {_UNKNOWN}",
                got="a part of each sequence, of a context-parallel rank" if match else "another name",
                expected="dp0__100.tar or cp0_dp0__100.tar",
                fix="write the store with --context-parallel-size 1",
            )
        ranks[int(match["dp"])].append((int(match["last"]), path))
    if sorted(ranks) != list(range(len(ranks))):
        raise _incomplete(f"data-parallel ranks {sorted(ranks)}", "all from 0 on")
    streams = [_members([path for _, path in sorted(ranks[rank])]) for rank in range(len(ranks))]
    while parts := [part for stream in streams if (part := next(stream, None)) is not None]:
        if len(parts) < len(streams) or len({(first, len(each)) for first, each in parts}) > 1:
            raise _incomplete("ranks that hold other iterations", "the same for all of them")
        # Megatron deals one micro-batch to each rank in turn.
        for step in range(len(parts[0][1])):
            for _, micro_batches in parts:
                ids, values = micro_batches[step]
                yield from zip(ids.transpose(1, 0, 2), values.transpose(1, 0, 2), strict=True)


def _members(paths: Sequence[Path]) -> Iterator[tuple[int, list[tuple[I64, F64]]]]:
    """(number, micro-batches of (positions, samples, k) ids and log-probs) of each iteration of a rank."""
    before: int | None = None
    step = 0
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                saver: dict[str, Any] = {}
                for member in tar:
                    data = tar.extractfile(member)
                    match = _MEMBER.fullmatch(member.name)
                    if data is not None and member.name == _META:
                        saver = json.loads(data.read()).get("saver", {})
                    elif data is not None and match:
                        number = int(match["first"])
                        if before is not None and (number <= before or (step and number - before != step)):
                            raise _incomplete(f"iteration {number} after {before} in {path}", "no gap")
                        before, step = number, 0 if before is None else number - before
                        yield number, _micro_batches(data.read(), saver, path)
        except _UNREADABLE as error:
            raise DataError(
                f"{path} cannot be read",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                expected=f"a tar file with {_META} and members like 12.pt.zst",
                fix="copy the file again",
            ) from error


def _micro_batches(data: bytes, saver: dict[str, Any], path: Path) -> list[tuple[I64, F64]]:
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    extra = found.keys() - {"values", "indices_low", "bit_17", "format_version"}
    version = found.get("format_version", saver.get("format_version", 1))
    if extra or version not in (1, 2):
        raise MismatchError(
            f"{path} is {_UNKNOWN}",
            got=", ".join(sorted(extra)) or f"format version {version}",
            expected="format version 1 or 2, without packed sequences",
            fix="write the store with a Megatron-LM of mid-2026, or decode it into lists",
        )
    parts = [found[name] for name in ("values", "indices_low", "bit_17")]
    if isinstance(parts[0], torch.Tensor):
        size = int(saver["mbs_save"])
        parts = [part.split(size, dim=1) for part in parts]
    batches = []
    for values, low, high in zip(*parts, strict=True):
        ids = (high.long() << 16) | low.long()
        numbers = values.double().numpy()
        batches.append((ids.numpy(), np.where(numbers <= _EMPTY, -np.inf, numbers)))
    return batches


def _disagree(got: str) -> DataError:
    return DataError(
        "tokens and targets do not belong together",
        got=got,
        expected="one row of tokens per sequence of the store",
        fix="correct --tokens",
    )


def _incomplete(got: str, expected: str) -> DataError:
    return DataError("the store is not complete", got=got, expected=expected, fix="copy all of its tar files")
