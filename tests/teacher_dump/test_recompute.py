"""Stored targets against the teacher: a good dump passes in any batch, and forged ones are caught by row and position.

A forged dump is written by the real writer with the run.json of the good one: every record, hash and seal is right.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dump_checks import SAMPLES, rows_of, sections, write_corpus
from support.dumps import dense_targets, some_provenance
from support.tiny_teachers import save_teacher, tiny_tokenizer

from storage_schemas import codec
from storage_schemas.common.errors import MismatchError
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import NONFINITE, Row
from storage_schemas.targets import Targets, concatenate
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter
from teacher_dump.compare import compare, problems
from teacher_dump.config import TeacherSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import run_dump
from teacher_dump.recompute import pick_rows, recompute_rows
from teacher_dump.teachers.teacher import Teacher

ESTIMATORS = {
    "topk": TopK(k=24),
    "adaptive": Adaptive(kind="adaptive", mass=0.8, k_max=8),
    "sampled": Sampled(kind="sampled", draws=20),
}
EMPTY_AND_TOO_LONG = {5, 7}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, another one of the same shape, a corpus, and for each estimator a dump and one that is not rounded."""
    folder = tmp_path_factory.mktemp("recompute")
    save_teacher(folder / "teacher")
    save_teacher(folder / "other", seed=1)
    write_corpus(folder / "corpus.jsonl")
    for name, estimator in ESTIMATORS.items():
        for url, rounding in ((folder / name, {}), (folder / f"{name}-exact", {"logprob_step": 0.0})):
            job = sections(url, folder / "corpus.jsonl", folder / "teacher", **rounding) | {"estimator": estimator}
            run_dump(**job, temperatures=(1.0, 2.0) if name == "topk" else (1.0,))
    return folder


def teacher_of(place: Path, name: str = "teacher", *, batch_tokens: int = 1, dtype: str = "float32") -> Teacher:
    """One sample per batch; the dumps were made with batches of 200 tokens."""
    return Teacher(TeacherSection(model=str(place / name), dtype=dtype, device="cpu", batch_tokens=batch_tokens))


def forge(place: Path, folder: Path, change: Any, *, of: str = "topk", provenance: Any = None) -> Dump:
    """The dump `of` with each row that has targets changed, as if it had been made so."""
    provenance = provenance or Dump.open(str(place / of)).provenance
    writer = DumpWriter.open(str(folder), provenance)
    rows = [row if row.targets is None else change(row) for row in rows_of(place / f"{of}-exact")]
    for unit in range(provenance.units):
        writer.commit_unit(unit, [rows[i] for i in provenance.unit_range(unit)])
    assert writer.seal()
    # A forged mass may be seen without the teacher, too.
    assert all("beyond rounding" in error for error in verify(str(folder)).errors)
    return Dump.open(str(folder))


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("batch_tokens", [1, 2000])
def test_a_good_dump_passes_in_other_batches(place: Path, kind: str, batch_tokens: int) -> None:
    dump = Dump.open(str(place / kind))
    seen = []
    report = recompute_rows(
        dump, teacher_of(place, batch_tokens=batch_tokens), rows=SAMPLES, progress=lambda *counts: seen.append(counts)
    )
    assert report.errors == []
    assert report.rows == sorted(set(range(SAMPLES)) - EMPTY_AND_TOO_LONG)
    assert report.supervised_tokens == sum(record.supervised_tokens for record in dump.read_records().values())
    # What is left is the rounding of the store, as the records say.
    tokens = np.array([record.supervised_tokens for record in dump.read_records().values()])
    stored = np.array([record.fidelity for record in dump.read_records().values()])
    if kind == "topk":
        np.testing.assert_allclose(report.kl, tokens @ stored / tokens.sum(), rtol=0.02)
    else:  # The errors of draws differ in sign from unit to unit.
        assert 0 < report.kl[0] < (tokens @ stored / tokens.sum())[0] * 1.02
    assert report.heads_equal == 1.0
    assert report.draws_equal == (None if kind == "topk" else pytest.approx(1.0, abs=0.02))
    assert seen[-1] == (len(report.rows), len(report.rows))


def test_rows_are_spread_over_the_units_and_chosen_by_the_seed(place: Path) -> None:
    dump = Dump.open(str(place / "topk"))
    for seed in range(5):
        picked, errors = pick_rows(dump, 4, seed=seed)
        assert errors == []
        assert len(picked) == 4
        assert max(np.bincount([index // dump.provenance.samples_per_unit for index in picked])) <= 2
        assert list(pick_rows(dump, 4, seed=seed)[0]) == list(picked)
    chosen = {tuple(pick_rows(dump, 3, seed=seed)[0]) for seed in range(20)}
    assert len(chosen) > 5
    assert {index for indices in chosen for index in indices} == set(range(SAMPLES)) - EMPTY_AND_TOO_LONG
    assert len(pick_rows(dump, 100, seed=0)[0]) == SAMPLES - len(EMPTY_AND_TOO_LONG)


def rolled(targets: Targets) -> Targets:
    """Each token has the target of the one before it."""
    n = len(targets)
    return concatenate([targets.slice(i, i + 1) for i in [0, *range(n - 1)]])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_targets_that_are_off_by_one_are_caught(place: Path, tmp_path: Path, kind: str) -> None:
    dump = forge(place, tmp_path / "dump", lambda row: replace(row, targets=rolled(row.targets)), of=kind)
    report = recompute_rows(dump, teacher_of(place), rows=SAMPLES)
    # Rows of one supervised token cannot be shifted.
    long = {row.sample_index: row for row in rows_of(place / kind) if row.targets is not None and len(row.targets) > 2}
    named = {int(re.match(r"row (\d+), position \d+: ", line)[1]) for line in report.errors if line.startswith("row")}
    assert set(long) <= named


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_another_teachers_targets_are_caught(place: Path, tmp_path: Path, kind: str) -> None:
    """Its run.json says that they are the right teacher's."""
    provenance = Dump.open(str(place / kind)).provenance
    estimator = ESTIMATORS[kind]
    run_dump(
        **sections(tmp_path / "other", place / "corpus.jsonl", place / "other") | {"estimator": estimator},
        temperatures=provenance.temperatures,
    )
    others = {row.sample_index: row.targets for row in rows_of(tmp_path / "other")}
    dump = forge(place, tmp_path / "dump", lambda row: replace(row, targets=others[row.sample_index]), of=kind)
    report = recompute_rows(dump, teacher_of(place), rows=4)
    assert {int(re.match(r"row (\d+)", line)[1]) for line in report.errors if line.startswith("row")} == set(
        report.rows
    )


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("nats", [-0.5, 0.3])
def test_one_perturbed_logprob_is_caught_by_row_and_position(
    place: Path, tmp_path: Path, kind: str, nats: float
) -> None:
    where = {}

    def perturb(row: Row) -> Row:
        if row.sample_index != 9:
            return row
        # An entry that matters, in the second target.
        start, stop = row.targets.offsets[1:3]
        entry = start + int(np.argsort(row.targets.logprobs[start:stop])[(stop - start) // 2])
        logprobs = row.targets.logprobs.copy()
        logprobs[entry] = min(0.0, logprobs[entry] + nats)
        where.update(position=np.flatnonzero(row.loss_mask)[1], id=row.targets.ids[entry])
        return replace(row, targets=replace(row.targets, logprobs=logprobs))

    dump = forge(place, tmp_path / "dump", perturb, of=kind)
    report = recompute_rows(dump, teacher_of(place), rows=SAMPLES)
    assert len([line for line in report.errors if line.startswith("row")]) == 1
    assert report.errors[0].startswith(f"row 9, position {where['position']}: the log-prob of id {where['id']} is")


def cut(row: Row, keep: Any) -> Row:
    """Heads of `keep` entries, the rest honestly in the tail."""
    parts = []
    for i in range(len(row.targets)):
        one = row.targets.slice(i, i + 1)
        inside = np.sort(np.argsort(-one.logprobs, kind="stable")[:keep])
        left = np.delete(np.arange(len(one.ids)), inside)
        tails = [one.tail_logprob[0, 0]] + [one.tail_logprob[0, 1]] * (one.tail_logprob.shape[1] - 1)
        tail = np.logaddexp.reduce([*one.logprobs[left], tails[0]])
        parts.append(
            replace(
                one,
                offsets=np.array([0, len(inside)]),
                ids=one.ids[inside],
                logprobs=one.logprobs[inside],
                head_size=np.array([len(inside)], np.int32),
                tail_logprob=np.array([[tail, *tails[1:]]], np.float32),
            )
        )
    return replace(row, targets=concatenate(parts))


def test_heads_that_end_too_early_are_caught(place: Path, tmp_path: Path) -> None:
    """All that is left is true, and the divergence is 0: only the estimator's rule says that entries are missing."""
    report = recompute_rows(forge(place, tmp_path / "dump", lambda row: cut(row, 20)), teacher_of(place), rows=3)
    assert len(report.errors) >= 3
    assert "the head has 20 entries, the teacher gives 24" in report.errors[0]


def test_a_tail_or_a_logsumexp_that_is_wrong_is_caught(place: Path, tmp_path: Path) -> None:
    for field, nats, words in (("tail_logprob", -0.2, "log tail mass"), ("logsumexp", 0.1, "logsumexp")):
        for column in (0, 1):

            def change(row: Row, field: str = field, nats: float = nats, column: int = column) -> Row:
                values = getattr(row.targets, field).copy()
                values[:, column] += nats
                return replace(row, targets=replace(row.targets, **{field: values}))

            dump = forge(place, tmp_path / f"{field}{column}", change)
            report = recompute_rows(dump, teacher_of(place), rows=4)
            assert len([line for line in report.errors if words in line]) == 4


def test_draws_of_another_seed_are_caught(place: Path, tmp_path: Path) -> None:
    for kind in ("adaptive", "sampled"):
        provenance = Dump.open(str(place / kind)).provenance
        claimed = provenance.model_copy(update={"estimator": provenance.estimator.model_copy(update={"seed": 1})})
        dump = forge(place, tmp_path / kind, lambda row: row, of=kind, provenance=claimed)
        report = recompute_rows(dump, teacher_of(place), rows=SAMPLES)
        assert report.draws_equal < 0.7
        assert len([line for line in report.errors if "draws are reproduced" in line]) > 5
        assert all(re.match(r"row \d+, position \d+: ", line) for line in report.errors)


def test_a_row_that_hides_as_nonfinite_is_caught(place: Path, tmp_path: Path) -> None:
    def hide(row: Row) -> Row:
        return replace(row, status=NONFINITE, targets=None) if row.sample_index == 3 else row

    report = recompute_rows(forge(place, tmp_path / "dump", hide), teacher_of(place), rows=SAMPLES)
    assert report.errors == ["row 3: stored as nonfinite, but its logits are finite"]


def test_labels_and_loss_masks_are_compared_with_the_corpus(place: Path, tmp_path: Path) -> None:
    """The targets fit the row as it stands, so that the teacher alone sees nothing."""
    section = sections(tmp_path, place / "corpus.jsonl", place / "teacher")["corpus"]
    corpus = freeze_corpus(section, tiny_tokenizer(), lm_head_rows=320)
    good = Dump.open(str(place / "topk"))
    assert recompute_rows(good, teacher_of(place), rows=SAMPLES, corpus=corpus).errors == []

    def unmask(row: Row) -> Row:
        mask, first = row.loss_mask.copy(), np.flatnonzero(row.loss_mask)[0]
        mask[first] = False
        if row.sample_index != 4:
            return row
        return replace(row, loss_mask=mask, targets=row.targets.slice(1, len(row.targets)))

    dump = forge(place, tmp_path / "dump", unmask)
    assert recompute_rows(dump, teacher_of(place), rows=SAMPLES).errors == []
    report = recompute_rows(dump, teacher_of(place), rows=SAMPLES, corpus=corpus)
    row = rows_of(place / "topk")[4]
    position = np.flatnonzero(row.loss_mask)[0]
    assert report.errors == [f"row 4, position {position}: loss_mask differ from the corpus"]
    assert report.corpus_compared

    lines = (place / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1]))
    section = sections(tmp_path, tmp_path / "other.jsonl", place / "teacher")["corpus"]
    other = freeze_corpus(section, tiny_tokenizer(), lm_head_rows=320)
    with pytest.raises(MismatchError, match="the corpus is not the one"):
        recompute_rows(good, teacher_of(place), rows=1, corpus=other)


def test_another_teacher_is_refused_before_its_weights_are_loaded(place: Path) -> None:
    dump = Dump.open(str(place / "topk"))
    other = teacher_of(place, "other")
    with pytest.raises(MismatchError, match=r"weights_sha256\.model\.safetensors"):
        recompute_rows(dump, other, rows=1)
    half = teacher_of(place, dtype="bfloat16")
    with pytest.raises(MismatchError, match="dtype = bfloat16"):
        recompute_rows(dump, half, rows=1)
    assert "model" not in vars(other)
    assert "model" not in vars(half)


def test_a_damaged_unit_is_named_and_the_others_are_recomputed(place: Path, tmp_path: Path) -> None:
    dump = forge(place, tmp_path / "dump", lambda row: row)
    (tmp_path / "dump" / dump.read_record(1).file).write_bytes(b"torn")
    report = recompute_rows(dump, teacher_of(place), rows=SAMPLES)
    assert [line.split(":")[0] for line in report.errors] == ["unit 1"]
    assert report.rows == [0, 1, 2, 6, 8, 9, 10]


# The comparison alone


def problems_of(exact: Targets, stored: Targets, estimator: Estimator, *, step: float = 0.0) -> dict[int, str]:
    return problems(exact, stored, compare(exact, stored), some_provenance(estimator=estimator), step=step)


def test_ties_may_be_broken_otherwise_and_nothing_else() -> None:
    tied = dense_targets(np.log([[0.5, 0.2, 0.1, 0.1, 0.1]]), k=3)
    other = replace(tied, ids=np.array([0, 1, 4], np.int32))
    assert problems_of(tied, tied, TopK(k=3)) == {}
    assert problems_of(tied, other, TopK(k=3)) == {}
    wrong = replace(tied, ids=np.array([0, 2, 3], np.int32), logprobs=np.log(np.float32([0.5, 0.1, 0.1])))
    assert "not among its largest" in problems_of(tied, wrong, TopK(k=3))[0]


def test_a_head_may_end_one_entry_earlier_only_where_its_mass_is_the_limit() -> None:
    p = [0.6, 0.3, 0.06, 0.04]
    two, three = dense_targets(np.log([p]), k=2), dense_targets(np.log([p]), k=3)
    for exact, stored in ((two, three), (three, two)):
        assert problems_of(exact, stored, TopK(k=3, mass=0.9)) == {}
        assert "entries, the teacher gives" in problems_of(exact, stored, TopK(k=3, mass=0.95))[0]
        assert "entries, the teacher gives" in problems_of(exact, stored, TopK(k=3, mass=1.0))[0]


def test_rounding_is_allowed_to_half_a_cell_and_the_noise_only() -> None:
    exact = dense_targets(np.random.default_rng(0).normal(0, 3, (200, 50)), k=20)
    for step in (0.25, 0.0625, 0.0):
        rounded = exact if not step else replace(exact, logprobs=codec.round_logprobs(exact.logprobs, step))
        assert problems_of(exact, rounded, TopK(k=20, mass=1.0), step=step) == {}
        cell = step or 0.01
        off = replace(exact, logprobs=np.minimum(rounded.logprobs - np.float32(cell), 0))
        found = problems_of(exact, off, TopK(k=20, mass=1.0), step=step)
        # From -8 on a cell is four steps wide, so that one step may hide in it; every token has entries above.
        assert len(found) == 200
