"""A sample as another project stored it, and how it becomes a row: by what is claimed of its numbers, and proven of it.

Files of top-k values say neither which token a row of them describes nor what was done to them before. Each such claim
is known from the layout or asked for; the shift and the tail are held against the data.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from storage_schemas.common.errors import DataError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.rows import EMPTY, NONFINITE, OK, Row
from storage_schemas.targets import F64, I64, Bool, Targets

OVER_ONE = 0.01
"""By how much 16-bit values may bring the probability of a token's entries above 1; more is no distribution."""
_WHOLE = 1e-4
"""How near to 1 the entries of a token come once they were renormalised."""
_ROUNDING = 0.25
"""What masses hold above 1, by what others lack. Rounding alone brings about as much of both, a tail the second."""
_FEW = 32
"""Tokens from which on all of them being whole is no accident."""
_SURE = 3.0
"""Standard errors by which one reading of the shift must lie above the other."""


class Claims(FrozenModel):
    """What the numbers of a store mean. Nothing in them says it."""

    shift: Literal["next", "same"]
    """Which token row j describes: token j + 1, or token j."""
    values: Literal["logprobs", "probs", "logits"]
    """What a value is."""
    tail: Literal["implied", "lost"]
    """`implied`: values are normalised over the vocabulary, so that what they lack of 1 is the tail. `lost`: over the
    stored entries, or not at all; then nothing says how much the rest had, and the head takes all."""
    temperature: float
    """At which the values were computed: a dump holds those of 1."""
    mask: str
    """`all`, or the column that says which tokens are supervised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSample:
    """One sample. Rows of entries have the width of the longest; an empty slot has the value -inf."""

    place: str
    """File and row, for messages."""
    input_ids: I64
    """(tokens,)"""
    supervised: Bool | None
    """(tokens,) what the store says of its tokens; None: nothing."""
    ids: I64
    """(rows, k) token ids."""
    values: F64
    """(rows, k) values as stored."""


class Made(NamedTuple):
    """A row, and what was seen while it was made."""

    row: Row
    left_out: int
    """Tokens that the store supervises without a target for them."""
    mass: F64
    """(targets,) probability of the stored entries, before anything was rescaled."""
    own: F64
    """(pairs,) probability of the token that a row is claimed to describe."""
    other: F64
    """(pairs,) of the token that it would describe under the other shift."""


def make_row(sample: ForeignSample, claims: Claims, index: int, *, lm_head_rows: int) -> Made:
    """The row of a sample.

    Raises:
        DataError: its entries are no distribution over the teacher's vocabulary.
    """
    tokens = np.arange(len(sample.input_ids))
    rows = tokens - 1 if claims.shift == "next" else tokens
    _refuse(sample, sample.input_ids, "token ids", lm_head_rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(sample.values) if claims.values == "probs" else sample.values
    filled = values > -np.inf  # NaN is not, and is looked for below.
    wanted = np.ones(len(tokens), bool) if sample.supervised is None else sample.supervised.copy()
    wanted[:1] = False
    there = (rows >= 0) & (rows < len(values))
    there[there] = np.any(filled | np.isnan(values), axis=1)[rows[there]]
    loss_mask = wanted & there
    picked = rows[loss_mask]
    values, filled, ids = values[picked], filled[picked], sample.ids[picked]
    finite = bool(np.isfinite(values[filled]).all() and not np.isnan(values).any())
    row = Row(
        sample_index=index,
        sample_id=hashlib.sha256(sample.input_ids.astype("<i8").tobytes()).hexdigest()[:16],
        status=EMPTY,
        input_ids=sample.input_ids.astype(np.int32),
        loss_mask=loss_mask,
    )
    nothing = np.empty(0)
    left_out = int((wanted & ~there).sum())
    if not len(picked) or not finite:
        return Made(replace(row, status=NONFINITE) if len(picked) else row, left_out, nothing, nothing, nothing)
    _refuse(sample, ids[filled], "target ids", lm_head_rows)

    # Empty slots go to the end, behind ids in ascending order.
    order = np.argsort(np.where(filled, ids, np.iinfo(np.int64).max), axis=1, kind="stable")
    ids, values, filled = (np.take_along_axis(each, order, axis=1) for each in (ids, values, filled))
    if np.any((ids[:, 1:] == ids[:, :-1]) & filled[:, 1:]):
        raise _bad(sample, "a token has the same id twice among its entries", "ids that differ")
    top = values.max(1, keepdims=True)
    total = (top + np.log(np.exp(values - top).sum(1, keepdims=True)))[:, 0]
    mass = np.exp(np.minimum(total, 700.0))
    if claims.tail == "implied" and mass.max() > 1 + OVER_ONE:
        raise _bad(
            sample,
            f"the entries of a token hold a probability of {mass.max():.6g}",
            f"at most 1, up to {OVER_ONE} of rounding",
        )
    short = (mass < 1) & (claims.tail == "implied")
    p = np.exp(values - total[:, None])
    offset = np.where(short, 0.0, total)
    lengths = filled.sum(1)
    tail = np.full((len(mass), 1), -np.inf, np.float32)
    tail[short, 0] = np.log1p(-mass[short])
    targets = Targets(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        ids=ids[filled].astype(np.int32),
        logprobs=np.minimum((values - offset[:, None])[filled], 0.0).astype(np.float32),
        head_size=lengths.astype(np.int32),
        tail_logprob=tail,
    )
    own, other = picked + 1, picked
    if claims.shift == "same":
        own, other = other, own
    paired = (own < len(tokens)) & (other < len(tokens))
    seen = (
        np.where(ids[paired] == sample.input_ids[place[paired]][:, None], p[paired], 0.0).sum(1)
        for place in (own, other)
    )
    return Made(replace(row, status=OK, targets=targets), left_out, mass, *seen)


@dataclass(slots=True)
class Survey:
    """What all samples together say of the claims."""

    left_out: int = 0
    targets: int = 0
    whole: int = 0
    """Targets whose entries hold a probability of 1."""
    mass: float = 0.0
    above: float = 0.0
    """By how much the targets whose entries hold more than 1 do so, in all."""
    pairs: int = 0
    sums: F64 = field(default_factory=lambda: np.zeros(4))
    """Of the token's own probability, of that under the other shift, of their difference and of its square."""

    def add(self, made: Made) -> None:
        """Count one more sample."""
        difference = made.own - made.other
        self.left_out += made.left_out
        self.targets += len(made.mass)
        self.whole += int((np.abs(made.mass - 1) < _WHOLE).sum())
        self.mass += float(made.mass.sum())
        self.above += float(np.maximum(made.mass - 1, 0.0).sum())
        self.pairs += len(difference)
        self.sums += [made.own.sum(), made.other.sum(), difference.sum(), (difference**2).sum()]

    @property
    def own(self) -> float:
        """Mean probability that the targets give to the tokens that they are claimed to describe."""
        return float(self.sums[0]) / max(1, self.pairs)

    @property
    def other(self) -> float:
        """And to those that they would describe under the other shift."""
        return float(self.sums[1]) / max(1, self.pairs)

    @property
    def standard_errors(self) -> float:
        """By how many of them the first lies above the second."""
        n = max(1, self.pairs)
        mean = self.sums[2] / n
        spread = np.sqrt(max(0.0, self.sums[3] / n - mean**2) / n)
        return float(mean / spread) if spread > 0 else float(np.sign(mean) * np.inf if mean else 0.0)

    def refuse_contradicted(self, claims: Claims, *, heads_are_whole: bool, must_be_sure: bool) -> None:
        """Raise DataError where the data contradict what is claimed.

        Args:
            heads_are_whole: the stored entries are the whole vocabulary, so that there is no tail.
            must_be_sure: tokens and targets come from different files, so the data must show that they belong together.
        """
        told = (
            f"the token that a row is said to describe has a mean probability of {self.own:.4f}, the one under the "
            f"other shift {self.other:.4f} ({self.pairs} tokens, {self.standard_errors:+.1f} standard errors)"
        )
        if self.standard_errors < -_SURE:
            other = "same" if claims.shift == "next" else "next"
            raise DataError(
                f"the targets do not describe the tokens that --shift {claims.shift} says",
                got=told,
                expected="the first to be the larger one",
                fix=f"if the store is what you think it is, --shift {other} is right; nothing was written",
            )
        if must_be_sure and not self.standard_errors > _SURE:
            raise DataError(
                "the targets do not fit the tokens",
                got=told,
                expected=f"the first to be the larger one by {_SURE:g} standard errors",
                fix="give the tokens that the teacher saw, one sequence a row, in the order of the store",
            )
        if heads_are_whole or claims.values == "logits" or self.targets < _FEW:
            return
        mean = self.mass / self.targets
        below = self.above + self.targets - self.mass
        if claims.tail == "implied" and (self.whole == self.targets or self.above > _ROUNDING * below):
            raise DataError(
                "the values were renormalised over the stored entries, so the tail is lost",
                got=f"all {self.targets} targets hold a probability of 1"
                if self.whole == self.targets
                else f"a probability of 1 but for rounding: over {self.targets} targets {below:.3g} is missing and "
                f"{self.above:.3g} too much",
                expected="less for some of them, with --tail implied",
                fix="say --tail lost; `llm-neo docs interoperability` says what that means for training",
            )
        if claims.tail == "lost" and abs(mean - 1) > OVER_ONE:
            raise DataError(
                "the values were not renormalised over the stored entries",
                got=f"a mean probability of {mean:.4f} over {self.targets} targets",
                expected="1 with --tail lost",
                fix="say --tail implied if they are normalised over the vocabulary, or correct --values",
            )


def _refuse(sample: ForeignSample, ids: I64, what: str, lm_head_rows: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= lm_head_rows):
        raise _bad(sample, f"{what} from {ids.min()} to {ids.max()}", f"0 to {lm_head_rows - 1}, the teacher's head")


def _bad(sample: ForeignSample, got: str, expected: str) -> DataError:
    return DataError(
        f"{sample.place} cannot be imported",
        got=got,
        expected=expected,
        fix="check --teacher, --values and the layout; nothing is guessed and no row is left out",
    )
