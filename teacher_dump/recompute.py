"""Prove stored targets against the teacher: rows of a dump are computed again and compared with what is stored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage_schemas.codec import round_logprobs
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from storage_schemas.rows import NONFINITE, OK, Row
from storage_schemas.shift import supervised_positions
from storage_schemas.targets import F32, I32, Decoded, Targets, decode
from teacher_dump.corpus.freeze import Corpus, Sample
from teacher_dump.teachers.teacher import Teacher

F64 = npt.NDArray[np.float64]
Places = npt.NDArray[np.signedinteger[Any]]


class Noise(NamedTuple):
    """By how much the same teacher differs from itself in other batches, or on another device."""

    logprob: float
    """Nats that a log-prob, a log tail mass or a logsumexp may be off, rounding aside."""
    kl: float
    """Nats that the mean KL over all rows may be above the dump's fidelity gate."""
    token_kl: float
    """Nats that the KL of one token may reach."""
    draws: float
    """Share of the draws that may fall on another entry."""


NOISE = {
    "float32": Noise(logprob=2e-3, kl=1e-4, token_kl=5e-3, draws=0.05),
    "float16": Noise(logprob=0.25, kl=5e-4, token_kl=0.05, draws=0.25),
    "bfloat16": Noise(logprob=1.5, kl=5e-3, token_kl=0.2, draws=0.5),
}
"""By compute dtype. Measured with SmolLM2-135M on GSM8K, batches of one sample against batches of 4,096 tokens: in
float32 log-probs are off by at most 6e-5, and 0.1 % of the draws fall elsewhere; in bfloat16 by at most 0.6, the KL is
5e-4 on average and 0.03 at most, and 12 % of the draws of `adaptive`, 2 % of those of `sampled`, fall elsewhere."""


class RecomputeReport(FrozenModel):
    """What comparing some rows with the teacher has found."""

    rows: list[int]
    """Samples that were computed again."""
    supervised_tokens: int
    """Their supervised tokens."""
    kl: tuple[float, ...]
    """Mean KL(recomputed || stored) in nats, per temperature; with draws, at T = 1 alone."""
    kl_limit: float
    """What it may be: the dump's fidelity gate and the noise of the teacher's dtype."""
    heads_equal: float
    """Share of the tokens whose head has the very same ids; others differ by ties, or are errors."""
    draws_equal: float | None
    """Share of the draws that fell on the same entry; null for `topk`."""
    corpus_compared: bool
    """Whether ids, token ids and loss masks of the rows were compared with the corpus too."""
    errors: list[str]
    """One line per row that is wrong; each names the row and a position."""


class Compared(NamedTuple):
    """One row's stored targets beside recomputed ones."""

    kl: F64
    """(tokens, temperatures) KL(recomputed || stored) over common head entries and one bucket for all else, nats."""
    drift: F64
    """(tokens,) mean error of the log-probs of common draws, nats."""
    heads_equal: int
    """Tokens whose head has the same ids."""
    drawn: F64
    """(tokens,) draws."""
    redrawn: F64
    """(tokens,) draws that fell on the same entry."""
    problems: dict[int, str]
    """By token, the first thing that no tolerance explains."""


def recompute(
    dump: Dump,
    teacher: Teacher,
    *,
    rows: int,
    seed: int = 0,
    corpus: Corpus | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RecomputeReport:
    """Compute some rows of a dump again and compare.

    Args:
        dump: sealed, or as far as it is committed.
        teacher: the one that made it; another batch size or device may be chosen.
        rows: how many; they are spread evenly over the committed units.
        seed: of their choice.
        corpus: what the dump was made from, to compare token ids and loss masks with.
        progress: called with (rows done, rows in all).

    Raises:
        MismatchError: it is another teacher, or another corpus.
    """
    provenance = dump.provenance
    refuse_other_teacher(provenance, teacher)
    noise = NOISE[provenance.teacher.dtype]
    picked, errors = pick_rows(dump, rows, seed=seed)
    if corpus is not None:
        refuse_other_corpus(provenance, corpus)
        for row in picked.values():
            errors += _corpus_problems(row, corpus.sample(row.sample_index))

    results: dict[int, Compared] = {}
    done = 0
    for batch in teacher.batches([_sample(row) for row in picked.values()]):
        found = teacher.targets(batch, provenance.recipe)
        for sample, exact in zip(batch, found, strict=True):
            stored = picked[sample.sample_index].targets
            if exact is None or stored is None:
                if (exact is None) != (stored is None):
                    status = picked[sample.sample_index].status
                    finite = "not finite" if exact is None else "finite"
                    errors.append(f"row {sample.sample_index}: stored as {status}, but its logits are {finite}")
                continue
            record = dump.record(sample.sample_index // provenance.samples_per_unit)
            assert record is not None
            results[sample.sample_index] = compare(
                exact, stored, provenance=provenance, step=record.logprob_step, noise=noise
            )
        done += len(batch)
        if progress is not None:
            progress(done, len(picked))
    return _report(picked, results, errors, provenance, noise, corpus_compared=corpus is not None)


def refuse_other_teacher(provenance: Provenance, teacher: Teacher) -> None:
    """Raise MismatchError unless the teacher is the one of run.json, wherever it lies: weights, config and dtype."""
    here = provenance.model_copy(update={"teacher": teacher.identity(), "made_by": teacher.made_by()})
    if found := provenance.differences_to(here):
        raise MismatchError(
            f"{teacher.section.model} is not the teacher that made the dump: {', '.join(found.keys)}",
            got=found.there,
            expected=found.here,
            fix=f"recompute with {provenance.origin.model} itself, in {provenance.teacher.dtype}",
        )


def refuse_other_corpus(provenance: Provenance, corpus: Corpus) -> None:
    """Raise MismatchError unless the dump was made from this corpus."""
    if corpus.fingerprint != provenance.corpus.fingerprint:
        raise MismatchError(
            "the corpus is not the one that the dump was made from",
            got=corpus.fingerprint,
            expected=f"corpus.fingerprint = {provenance.corpus.fingerprint}",
            fix="pass the configuration that the dump was made with, or none",
        )


def pick_rows(dump: Dump, count: int, *, seed: int) -> tuple[dict[int, Row], list[str]]:
    """Rows by sample index, spread evenly over the committed units, and an error for each that cannot be read.

    The rows are cut into `count` stretches of equal length and one is drawn from each; where that one has nothing to
    recompute, the next one of its unit that has.
    """
    units = np.array(sorted(dump.records()), np.int64)
    starts = np.concatenate([[0], np.cumsum([len(dump.provenance.unit_range(int(unit))) for unit in units])]).astype(
        np.int64
    )
    total = int(starts[-1])
    bounds = np.arange(min(count, total) + 1) * total // max(1, min(count, total))
    places = np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])
    picked: dict[int, Row] = {}
    errors: list[str] = []
    of_unit = np.searchsorted(starts, places, side="right") - 1
    for which in np.unique(of_unit):
        unit = int(units[which])
        try:
            rows = dump.read_unit(unit)
        except DataError as error:
            errors.append(f"unit {unit}: {error.what}, so none of its rows can be recomputed")
            continue
        for first in places[of_unit == which] - starts[which]:
            for i in [*range(first, len(rows)), *range(first)]:
                row = rows.row(i)
                if row.status in (OK, NONFINITE) and row.sample_index not in picked:
                    picked[row.sample_index] = row
                    break
    return picked, errors


def compare(exact: Targets, stored: Targets, *, provenance: Provenance, step: float, noise: Noise) -> Compared:
    """Targets of the same tokens, recomputed and stored."""
    draws = stored.counts is not None
    temperatures = provenance.temperatures[:1] if draws else provenance.temperatures
    e = [decode(exact, temperature_index=i, temperature=T) for i, T in enumerate(temperatures)]
    s = [decode(stored, temperature_index=i, temperature=T) for i, T in enumerate(temperatures)]
    n = len(exact)
    kl, drift = np.zeros((n, len(temperatures))), np.zeros(n)
    drawn, redrawn, heads_equal = np.zeros(n), np.zeros(n), 0
    problems: dict[int, str] = {}
    for t in range(n):
        here, there = _Token.of(exact, t), _Token.of(stored, t)
        common, in_e, in_s = np.intersect1d(here.head, there.head, assume_unique=True, return_indices=True)
        same = len(common) == len(here.head) == len(there.head)
        heads_equal += same
        kl[t] = [
            _bucketed_kl(p, q, t, in_e, in_s, (len(here.head), len(there.head))) for p, q in zip(e, s, strict=True)
        ]
        problem = None if same else _head_problem(here, there, provenance=provenance, step=step, noise=noise)
        problem = problem or _value_problem(here.head_logprobs[in_e], there.head_logprobs[in_s], common, step, noise)
        if same:
            problem = problem or _tail_problem(here.tail, there.tail, noise)
        if here.logsumexp is not None and there.logsumexp is not None:
            problem = problem or _logsumexp_problem(here.logsumexp, there.logsumexp, step, noise)
        if draws:
            ids, in_e, in_s = np.intersect1d(here.draws, there.draws, assume_unique=True, return_indices=True)
            drawn[t] = max(here.counts.sum(), there.counts.sum())
            redrawn[t] = np.minimum(here.counts[in_e], there.counts[in_s]).sum()
            gap = here.draw_logprobs[in_e].astype(np.float64) - there.draw_logprobs[in_s]
            drift[t] = float((gap * there.counts[in_s]).sum()) / max(1.0, drawn[t]) * np.exp(float(there.tail[0]))
            problem = problem or _value_problem(here.draw_logprobs[in_e], there.draw_logprobs[in_s], ids, step, noise)
        if not np.all(kl[t] <= provenance.max_kl + noise.token_kl):
            problem = problem or f"KL(recomputed || stored) is {np.max(kl[t]):.3g} nats"
        if problem:
            problems[t] = problem
    return Compared(kl, drift, heads_equal, drawn, redrawn, problems)


class _Token(NamedTuple):
    """The target of one token."""

    head: I32
    head_logprobs: F32
    draws: I32
    draw_logprobs: F32
    counts: I32
    tail: F32
    logsumexp: F32 | None

    @classmethod
    def of(cls, targets: Targets, t: int) -> "_Token":
        start, stop = int(targets.offsets[t]), int(targets.offsets[t + 1])
        middle = start + int(targets.head_size[t])
        return cls(
            head=targets.ids[start:middle],
            head_logprobs=targets.logprobs[start:middle],
            draws=targets.ids[middle:stop],
            draw_logprobs=targets.logprobs[middle:stop],
            counts=np.zeros(0, np.int32) if targets.counts is None else targets.counts[middle:stop],
            tail=targets.tail_logprob[t],
            logsumexp=None if targets.logsumexp is None else targets.logsumexp[t],
        )


def _bucketed_kl(p: Decoded, q: Decoded, t: int, in_p: Places, in_q: Places, sizes: tuple[int, int]) -> float:
    """KL over the common head entries and one bucket that holds all else, the heads' other entries too."""
    log_p, log_q = p.logprobs[t, : sizes[0]].astype(np.float64), q.logprobs[t, : sizes[1]].astype(np.float64)
    other_p = np.exp(float(p.tail_logprob[t])) + np.delete(np.exp(log_p), in_p).sum()
    other_q = np.exp(float(q.tail_logprob[t])) + np.delete(np.exp(log_q), in_q).sum()
    # Below 1e-30 it is nothing, whatever the other side says.
    rest = other_p * np.log(other_p / max(other_q, 1e-30)) if other_p > 1e-30 else 0.0
    return float((np.exp(log_p[in_p]) * (log_p[in_p] - log_q[in_q])).sum() + rest)


def _head_problem(here: _Token, there: _Token, *, provenance: Provenance, step: float, noise: Noise) -> str | None:
    """What is wrong with heads of different ids, unless a tie or the mass at which a head ends explains it."""
    only_here, only_there = np.setdiff1d(here.head, there.head), np.setdiff1d(there.head, here.head)
    what = (
        f"the head has {len(only_there)} ids that the teacher has not among its largest, and lacks {len(only_here)}"
        f" (stored alone: {only_there[:3].tolist()}, recomputed alone: {only_here[:3].tolist()})"
    )
    for one, other, alone in ((here, there, only_here), (there, here, only_there)):
        if len(alone) and (not len(other.head) or not len(one.head)):
            return what
        if len(alone):
            least = float(other.head_logprobs.min())
            # Rounding moves a log-prob by no more than a quarter of the step per nat, see `codec.round_targets`.
            tie = least + noise.logprob + step / 4 * max(1.0, -least)
            if np.any(one.head_logprobs[np.isin(one.head, alone)] > tie):
                return what
    if len(here.head) == len(there.head):
        return None
    mass = getattr(provenance.estimator, "mass", 1.0)
    shorter = here if len(here.head) < len(there.head) else there
    ends = float(np.log1p(-mass)) if mass < 1.0 else -np.inf
    if abs(float(shorter.tail[0]) - ends) <= noise.logprob + _tail_rounding(ends):
        return None
    return f"the head has {len(there.head)} entries, the teacher gives {len(here.head)}"


def _value_problem(exact: F32, stored: F32, ids: I32, step: float, noise: Noise) -> str | None:
    """A stored log-prob that does not lie where rounding puts it; rounding is monotone, so the bounds are rounded."""
    low, high = exact - np.float32(noise.logprob), exact + np.float32(noise.logprob)
    if step:
        low, high = round_logprobs(low, step), round_logprobs(high, step)
    off = np.flatnonzero((stored < low) | (stored > high))
    if not len(off):
        return None
    worst = off[np.argmax(np.abs(exact[off] - stored[off]))]
    return f"the log-prob of id {ids[worst]} is stored as {stored[worst]:.4f}, recomputed {exact[worst]:.4f}"


def _tail_problem(exact: F32, stored: F32, noise: Noise) -> str | None:
    for e, s in zip(exact.tolist(), stored.tolist(), strict=True):
        if e != s and not abs(e - s) <= noise.logprob + _tail_rounding(e):
            return f"the log tail mass is stored as {s:.4f}, recomputed {e:.4f}"
    return None


def _logsumexp_problem(exact: F32, stored: F32, step: float, noise: Noise) -> str | None:
    for e, s in zip(exact.tolist(), stored.tolist(), strict=True):
        # Half a cell of the grid of step / 4.
        if not abs(e - s) <= noise.logprob + step / 8:
            return f"the logsumexp is stored as {s:.4f}, recomputed {e:.4f}"
    return None


def _tail_rounding(tail: float) -> float:
    """By how much storing moves a log tail mass at most: 9 significant bits are kept."""
    return abs(tail) * 2.0**-9 if np.isfinite(tail) else 0.0


def _corpus_problems(row: Row, sample: Sample) -> list[str]:
    pairs = {
        "sample_id": row.sample_id == sample.sample_id,
        "status": sample.status == OK,
        "input_ids": np.array_equal(row.input_ids, sample.input_ids),
        "loss_mask": np.array_equal(row.loss_mask, sample.loss_mask),
    }
    different = [name for name, equal in pairs.items() if not equal]
    if not different:
        return []
    place = ""
    if len(row.loss_mask) == len(sample.loss_mask):
        off = (row.input_ids != sample.input_ids) | (row.loss_mask != sample.loss_mask)
        place = f", position {int(np.argmax(off))}" if off.any() else ""
    return [f"row {row.sample_index}{place}: {', '.join(different)} differ from the corpus"]


def _sample(row: Row) -> Sample:
    return Sample(
        sample_index=row.sample_index,
        sample_id=row.sample_id,
        status=OK,
        input_ids=row.input_ids,
        loss_mask=row.loss_mask,
    )


def _report(
    picked: Mapping[int, Row],
    results: Mapping[int, Compared],
    errors: Sequence[str],
    provenance: Provenance,
    noise: Noise,
    *,
    corpus_compared: bool,
) -> RecomputeReport:
    width = 1 if provenance.estimator.kind != "topk" else len(provenance.temperatures)
    tokens = sum(len(found.kl) for found in results.values())
    limit = provenance.max_kl + noise.kl
    kl = sum((found.kl.sum(0) for found in results.values()), np.zeros(width)) / max(1, tokens)
    kl[0] += abs(sum(found.drift.sum() for found in results.values())) / max(1, tokens)
    drawn = sum(float(found.drawn.sum()) for found in results.values())
    redrawn = sum(float(found.redrawn.sum()) for found in results.values())

    lines = list(errors)
    for index, found in sorted(results.items()):
        positions = supervised_positions(picked[index].loss_mask).tokens
        if found.problems:
            first = min(found.problems)
            more = f"; {len(found.problems)} of its {len(found.kl)} supervised tokens are off"
            lines.append(f"row {index}, position {positions[first]}: {found.problems[first]}{more}")
            continue
        worst = int(np.argmax(found.kl.max(1)))
        mean = float(found.kl.mean(0).max())
        if not max(kl) <= limit and not mean <= limit:
            lines.append(f"row {index}, position {positions[worst]}: KL(recomputed || stored) is {mean:.3g} nats")
        share = found.redrawn.sum() / max(1.0, found.drawn.sum())
        if redrawn < (1 - noise.draws) * drawn and share < 1 - noise.draws:
            worst = int(np.argmax(found.drawn - found.redrawn))
            lines.append(f"row {index}, position {positions[worst]}: {share:.0%} of the row's draws are reproduced")
    if not max(kl) <= limit:
        lines.append(f"the mean KL(recomputed || stored) is {max(kl):.3g} nats, expected at most {limit:.3g}")
    return RecomputeReport(
        rows=sorted(picked),
        supervised_tokens=tokens,
        kl=tuple(float(value) for value in kl),
        kl_limit=limit,
        heads_equal=sum(found.heads_equal for found in results.values()) / max(1, tokens),
        draws_equal=redrawn / drawn if drawn else None,
        corpus_compared=corpus_compared,
        errors=lines,
    )
