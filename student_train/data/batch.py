"""Micro-batches: what the model is fed, which positions are supervised, and their sparse targets as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from storage_schemas.common.errors import DataError
from storage_schemas.rows import Row
from storage_schemas.shift import supervised_positions
from storage_schemas.targets import I32, I64, Targets, concatenate, decode

_T = TypeVar("_T", bound="_Tensors")


class _Tensors:
    """A dataclass of tensors, of other such dataclasses, of tuples of these, and of plain values."""

    __slots__ = ()

    def to(self: _T, device: torch.device | str, *, non_blocking: bool = False) -> _T:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        """The same in page-locked memory, for a copy to the device that does not block."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: _T, apply: Callable[[Tensor], Tensor]) -> _T:
        changed: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = apply(value)
            elif isinstance(value, _Tensors):
                changed[field.name] = value._each(apply)
            elif isinstance(value, tuple):
                changed[field.name] = tuple(part._each(apply) for part in value)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets(_Tensors):
    """Decoded targets of n supervised tokens at one temperature, padded to K entries. K is 0 where only CE is used."""

    labels: Int64[Tensor, " n"]
    """Id of the supervised token itself."""
    ids: Int32[Tensor, "n K"]
    """Token ids of the entries, each at most once; 0 in padding."""
    logprobs: Float[Tensor, "n K"]
    """Teacher's log p at the temperature; 0 in padding."""
    weights: Float[Tensor, "n K"]
    """p in the head, (M / m) * count for draws, 0 in padding."""
    in_head: Bool[Tensor, "n K"]
    """True for exact entries."""
    tail_logprob: Float[Tensor, " n"]
    """Teacher's log mass outside the head; -inf where there is none."""
    has_draws: bool
    """Whether entries outside the head are draws, which replace the tail bucket."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, tokens: slice) -> "SparseTargets":
        """Some of the tokens, sharing memory."""
        return self._each(lambda tensor: tensor[tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch(_Tensors):
    """One micro-batch: the samples that have supervised tokens, right-padded, or packed one after the other in one row.

    Right padding needs no attention mask: under causal attention no token sees what follows it. Packed samples are kept
    apart by their position ids, which start at 0 with each.
    """

    input_ids: Int64[Tensor, "batch seq"]
    """Token ids."""
    position_ids: Int64[Tensor, "batch seq"]
    """Place of each token in its sample."""
    positions: Int64[Tensor, " n"]
    """Flat index, row * seq + column, of the hidden states whose logits predict the supervised tokens."""
    parts: tuple[SparseTargets, ...]
    """Of the supervised tokens, dump by dump, and in each sample by sample."""
    tokens: int
    """Tokens in `input_ids` that are not padding."""
    lengths: Int64[Tensor, " batch"]
    """Tokens of each row that are not padding; 1 for a filler."""

    @property
    def padding(self) -> int:
        """Tokens in `input_ids` that are padding; none of a filler counts."""
        return self.input_ids.numel() - self.tokens if self.tokens else 0

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return len(self.positions)

    @property
    def targets(self) -> SparseTargets:
        """Of a batch of one dump."""
        (only,) = self.parts
        return only

    def select(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "n hidden"]:
        """Hidden states of the supervised tokens, in the targets' order."""
        return hidden.flatten(0, 1).index_select(0, self.positions)

    @property
    def mask(self) -> Bool[Tensor, "batch seq"]:
        """False for padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]


def collate(rows: Sequence[Row], *, temperature_index: int, temperature: float, **more: Any) -> TrainBatch:
    """Rows of one dump as one micro-batch, see `collate_mixed`."""
    return collate_mixed([rows], temperature_indices=[temperature_index], temperature=temperature, **more)


def collate_mixed(
    dumps: Sequence[Sequence[Row]],
    *,
    temperature_indices: Sequence[int],
    temperature: float,
    entries: bool = True,
    vocab_size: int | None = None,
    packed: bool = False,
) -> TrainBatch:
    """Rows of several dumps as one micro-batch.

    Args:
        dumps: samples of each; none, or none with targets, makes a filler: one token 0 without targets, so that every
            rank does the same number of forward passes.
        temperature_indices: of each dump, the column of the stored tail masses that belongs to `temperature`.
        temperature: T that targets are decoded at.
        entries: False leaves the entries undecoded (K = 0), for training on CE alone.
        vocab_size: every id must lie below it, if given: the columns of the student's head that are in use.
        packed: put the samples one after the other in one row, without padding.

    Raises:
        DataError: an id is out of range.
    """
    by_dump = [[row for row in rows if row.targets is not None] for rows in dumps]
    used = [row for rows in by_dump for row in rows]
    lengths = np.array([len(row.input_ids) for row in used], np.int64)
    tokens = int(lengths.sum())
    # Flat index of each sample's first token.
    if packed:
        batch, seq, starts = 1, max(1, tokens), np.cumsum(lengths) - lengths
        position_ids = np.arange(seq)
        position_ids[:tokens] -= np.repeat(starts, lengths)
    else:
        batch, seq = max(1, len(used)), int(lengths.max(initial=1))
        starts = np.arange(len(used)) * seq
        position_ids = np.tile(np.arange(seq), batch)
    input_ids, loss_mask = np.zeros(batch * seq, np.int64), np.zeros(batch * seq, bool)
    for row, start in zip(used, starts.tolist(), strict=True):
        place = slice(start, start + len(row.input_ids))
        input_ids[place], loss_mask[place] = row.input_ids, row.loss_mask
    if vocab_size is not None:
        _refuse_out_of_range(input_ids, vocab_size)
    at = supervised_positions(loss_mask, starts=starts)
    labels, parts, first = input_ids[at.tokens], [], 0
    for rows, index in zip(by_dump, temperature_indices, strict=True):
        targets = [row.targets for row in rows if row.targets is not None]
        mine = labels[first : first + sum(map(len, targets))]
        first += len(mine)
        if not entries:
            targets = []
        parts.append(
            _sparse_targets(targets, mine, temperature_index=index, temperature=temperature, vocab_size=vocab_size)
        )
    return TrainBatch(
        input_ids=torch.from_numpy(input_ids).view(batch, seq),
        position_ids=torch.from_numpy(position_ids).view(batch, seq),
        positions=torch.from_numpy(at.logits),
        parts=tuple(parts),
        tokens=tokens,
        lengths=torch.from_numpy(np.full(1, seq) if packed or not used else lengths),
    )


def _sparse_targets(
    parts: Sequence[Targets],
    labels: I64,
    *,
    temperature_index: int,
    temperature: float,
    vocab_size: int | None,
) -> SparseTargets:
    """Decode the concatenated targets; K = 0 without any."""
    if not parts:
        n = len(labels)
        return SparseTargets(
            labels=torch.from_numpy(labels),
            ids=torch.zeros(n, 0, dtype=torch.int32),
            logprobs=torch.zeros(n, 0),
            weights=torch.zeros(n, 0),
            in_head=torch.zeros(n, 0, dtype=torch.bool),
            tail_logprob=torch.zeros(n),
            has_draws=False,
        )
    stored = concatenate(parts)
    if vocab_size is not None:
        _refuse_out_of_range(stored.ids, vocab_size)
    decoded = decode(stored, temperature_index=temperature_index, temperature=temperature)
    return SparseTargets(
        labels=torch.from_numpy(labels),
        ids=torch.from_numpy(decoded.ids),
        logprobs=torch.from_numpy(decoded.logprobs),
        weights=torch.from_numpy(decoded.weights),
        in_head=torch.from_numpy(decoded.in_head),
        tail_logprob=torch.from_numpy(np.ascontiguousarray(decoded.tail_logprob)),
        has_draws=stored.counts is not None,
    )


def _refuse_out_of_range(ids: I32 | I64, size: int) -> None:
    """An id outside the head would be read past its end, on a GPU without a message."""
    highest = int(ids.max(initial=0))
    if highest >= size:
        raise DataError(
            "a token id lies outside the student's vocabulary",
            got=highest,
            expected=f"less than {size}",
            fix="use a student with the teacher's tokenizer and at least as many head rows, or dump again",
        )
