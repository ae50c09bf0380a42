"""Prove stored targets against the teacher: rows of a dump are computed again and compared with what is stored."""

from collections.abc import Callable, Mapping

import numpy as np

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.provenance import Provenance, refuse_differences
from storage_schemas.reader import Dump
from storage_schemas.rows import NONFINITE, OK, Row
from teacher_dump.compare import TOLERANCES, Compared, compare, problems
from teacher_dump.corpus.freeze import Corpus
from teacher_dump.teachers.teacher import Teacher

_STRAY = 1e-4
"""Nats that the mean KL of few rows may be above that of their units, which is what the fidelity gate bounds."""


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


def recompute_rows(
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
        corpus: what the dump was made from, to compare token ids and loss masks with.
        progress: called with (rows done, rows in all).

    Raises:
        MismatchError: it is another teacher, or another corpus.
    """
    provenance = dump.provenance
    refuse_other_teacher(provenance, teacher)
    picked, errors = pick_rows(dump, rows, seed=seed)
    if corpus is not None:
        refuse_other_corpus(provenance, corpus)
        for row in picked.values():
            errors += _corpus_problems(row, corpus.sample(row.sample_index))

    results: dict[int, tuple[Compared, dict[int, str]]] = {}
    done = 0
    for batch in teacher.batches(list(picked.values())):
        for sample, exact in zip(batch, teacher.targets(batch, provenance.recipe), strict=True):
            index, stored = sample.sample_index, sample.targets
            if exact is None or stored is None:
                if (exact is None) != (stored is None):
                    finite = "not finite" if exact is None else "finite"
                    errors.append(f"row {index}: stored as {sample.status}, but its logits are {finite}")
                continue
            record = dump.read_record(index // provenance.samples_per_unit)
            assert record is not None
            figures = compare(exact, stored, temperatures=provenance.temperatures)
            results[index] = figures, problems(exact, stored, figures, provenance, step=record.logprob_step)
        done += len(batch)
        if progress is not None:
            progress(done, len(picked))

    return _report(picked, results, errors, provenance, corpus_compared=corpus is not None)


def _report(
    picked: Mapping[int, Row],
    results: Mapping[int, tuple[Compared, dict[int, str]]],
    errors: list[str],
    provenance: Provenance,
    *,
    corpus_compared: bool,
) -> RecomputeReport:
    """Errors of rows, and of all of them together, where no row alone has one."""
    tolerance = TOLERANCES[provenance.teacher.dtype]
    found = [figures for figures, _ in results.values()]
    tokens = max(1, sum(len(each.kl) for each in found))
    kl = sum((each.kl.sum(0) for each in found), np.zeros(len(provenance.temperatures))) / tokens
    kl[0] += abs(sum(float(each.drift.sum()) for each in found)) / tokens
    drawn, redrawn = (sum(float(getattr(each, name).sum()) for each in found) for name in ("drawn", "redrawn"))
    limit = provenance.max_kl + _STRAY + tolerance.kl
    for index, (each, problem) in sorted(results.items()):
        row = f"row {index}, position"
        positions = picked[index].positions.tokens
        if problem:
            first = min(problem)
            more = f"; {len(problem)} of its {len(positions)} supervised tokens are off"
            errors.append(f"{row} {positions[first]}: {problem[first]}{more}")
            continue
        mean = float(each.kl.mean(0).max())
        if not max(kl) <= limit and not mean <= limit:
            worst = positions[np.argmax(each.kl.max(1))]
            errors.append(f"{row} {worst}: KL(recomputed || stored) is {mean:.3g} nats")
        share = each.redrawn.sum() / max(1.0, each.drawn.sum())
        if max(share, redrawn / max(1.0, drawn)) < 1 - tolerance.draws and drawn:
            worst = positions[np.argmax(each.drawn - each.redrawn)]
            errors.append(f"{row} {worst}: {share:.0%} of the row's draws are reproduced")
    if not max(kl) <= limit:
        errors.append(f"the mean KL(recomputed || stored) is {max(kl):.3g} nats, expected at most {limit:.3g}")
    return RecomputeReport(
        rows=sorted(picked),
        supervised_tokens=sum(len(each.kl) for each in found),
        kl=tuple(kl.tolist()),
        kl_limit=limit,
        heads_equal=sum(int(np.isneginf(each.gap).sum()) for each in found) / tokens,
        draws_equal=redrawn / drawn if drawn else None,
        corpus_compared=corpus_compared,
        errors=errors,
    )


def refuse_other_teacher(provenance: Provenance, teacher: Teacher) -> None:
    """Raise MismatchError unless the teacher is the one of run.json, wherever it lies: weights, config and dtype."""
    here = provenance.model_copy(update={"teacher": teacher.identify(), "made_by": teacher.note_origin()})
    refuse_differences(
        f"{teacher.section.model} is not the teacher that made the dump",
        provenance.differences_to(here),
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
    units = np.array(sorted(dump.read_records()), np.int64)
    starts = np.cumsum([0, *(len(dump.provenance.unit_range(int(unit))) for unit in units)])
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


def _corpus_problems(row: Row, sample: Row) -> list[str]:
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
