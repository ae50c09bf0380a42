"""The pilot of a plan: some samples of the real corpus through the real teacher and the real encoder."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from storage_schemas.codec import mean_kept_mass, open_parquet
from storage_schemas.common.errors import DataError
from storage_schemas.config import Adaptive, DumpSection, Estimator, Sampled, TopK, described
from storage_schemas.provenance import Provenance
from storage_schemas.rows import OK, SCHEMA, Row
from storage_schemas.targets import Targets, concatenate
from storage_schemas.writer import DumpWriter
from teacher_dump.config import CorpusSection
from teacher_dump.corpus.freeze import Sample, freeze_corpus
from teacher_dump.dump import provenance_of, refuse_too_long, refuse_wider_than_vocabulary, row_of
from teacher_dump.plan import Bytes, Pilot, Plan, UnitSize, choose_pilot, make_plan
from teacher_dump.teachers.teacher import Teacher

WIDTHS = (8, 16, 32, 64, 128, 256)
"""The k that the kept mass is given for."""
_PER_ROW = ("sample_index", "sample_id", "status")
_PER_TOKEN = ("input_ids", "loss_mask")


def plan_dump(
    *,
    dump: DumpSection,
    teacher: Teacher,
    corpus: CorpusSection,
    estimator: Estimator,
    temperatures: Sequence[float],
    samples: int,
    seed: int = 0,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """What the dump of a configuration will hold, weigh and cost. Nothing is written to its URL.

    Args:
        dump: how it is cut and encoded.
        teacher: runs on the pilot's samples, once per kind of estimator.
        corpus: tokenised as a whole, so that its numbers of tokens are exact.
        estimator: the configured one; the defaults of the other kinds are planned too.
        temperatures: of the stored tail masses.
        samples: of the pilot.
        seed: of their choice.
        tokens_per_second: of another worker; by default it is measured here.
        price_per_hour: of one device.
        progress: called with (batches done, batches in all).

    Raises:
        MismatchError: the teacher cannot be loaded, or a sample is too long for it.
        DataError: the corpus cannot be used.
    """
    refuse_wider_than_vocabulary(estimator, teacher)
    teacher.refuse_unloadable()
    frozen = freeze_corpus(corpus, teacher.tokenizer, lm_head_rows=teacher.lm_head_rows)
    refuse_too_long(frozen, teacher)
    provenance = provenance_of(dump, teacher, corpus, frozen, estimator=estimator, temperatures=temperatures)
    lengths = np.diff(frozen.offsets)
    picked = [frozen.sample(int(i)) for i in choose_pilot(lengths, samples, seed=seed)]
    estimators = _estimators(estimator)
    found, wide, speed = _ask(teacher, picked, estimators, provenance, progress)
    usable = frozen.statuses.are(OK)
    return make_plan(
        [measure(picked, targets, provenance, each, chosen=each == estimator) for each, targets in found],
        statuses=frozen.statuses.counts(),
        samples_per_unit=provenance.samples_per_unit,
        tokens=int(frozen.offsets[-1]),
        teacher_tokens=int(lengths[usable].sum()),
        supervised_tokens=int(frozen.loss_mask.sum()),
        mass_at_k=mass_at(wide, WIDTHS),
        tokens_per_second=tokens_per_second or speed,
        measured=tokens_per_second is None,
        devices=teacher.devices,
        price_per_hour=price_per_hour,
    )


def _estimators(configured: Estimator) -> list[Estimator]:
    """The configured one, then the defaults of the other kinds."""
    defaults: list[Estimator] = [TopK(), Adaptive(kind="adaptive"), Sampled(kind="sampled")]
    return [configured, *(each for each in defaults if each.kind != configured.kind)]


def _ask(
    teacher: Teacher,
    picked: Sequence[Sample],
    estimators: Sequence[Estimator],
    provenance: Provenance,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[tuple[Estimator, dict[int, Targets]]], Targets, float]:
    """Each estimator's targets by sample, the widest heads of all tokens, and tokens per second.

    The targets of `topk` are cut from the widest heads, which the masses need anyway.
    """
    usable = [sample for sample in picked if sample.status == OK]
    batches = teacher.batches(usable)
    _ = teacher.model
    widest = TopK(k=max(*WIDTHS, *(each.k for each in estimators if isinstance(each, TopK))), mass=1.0)
    # The first pass on a device is slow; the smallest batch takes that upon itself.
    if batches:
        teacher.targets(batches[-1][-1:], replace(provenance.recipe, estimator=widest, logsumexp=True))
    found: list[tuple[Estimator, dict[int, Targets]]] = []
    wide: dict[int, Targets] = {}
    seconds = 0.0
    for place, each in enumerate(estimators):
        draws = each.kind != "topk"
        temperatures = provenance.temperatures[:1] if draws else provenance.temperatures
        recipe = replace(
            provenance.recipe, estimator=each if draws else widest, temperatures=temperatures, logsumexp=True
        )
        results: dict[int, Targets] = {}
        started = time.monotonic()
        for i, batch in enumerate(batches):
            answers = teacher.targets(batch, recipe)
            results |= {s.sample_index: t for s, t in zip(batch, answers, strict=True) if t is not None}
            if progress is not None:
                progress(place * len(batches) + i + 1, len(estimators) * len(batches))
        seconds = seconds or time.monotonic() - started
        if isinstance(each, TopK):
            wide = results
            results = {i: end_heads(t, each, temperatures=temperatures) for i, t in wide.items()}
        found.append((each, results))
    if not wide:
        raise DataError(
            "no sample of the pilot has targets",
            got=f"{len(usable)} usable samples of {len(picked)}",
            expected="at least one with finite logits",
            fix="raise --pilot-samples, or look at the corpus",
        )
    tokens = sum(len(sample.input_ids) for sample in usable)
    return found, concatenate(list(wide.values())), tokens / seconds


def end_heads(wide: Targets, estimator: TopK, *, temperatures: Sequence[float]) -> Targets:
    """What `topk` would have given, from the heads of a larger k that did not end early, with their logsumexp."""
    lengths = wide.lengths
    filled = np.arange(int(lengths.max(initial=1))) < lengths[:, None]
    # (n, K), -inf in padding
    logprobs = np.full(filled.shape, -np.inf)
    logprobs[filled] = wide.logprobs
    order = np.argsort(-logprobs, axis=1, kind="stable")
    by_rank = np.take_along_axis(logprobs, order, 1)
    before = np.cumsum(np.exp(by_rank), 1) - np.exp(by_rank)
    ends = (before < estimator.mass) if estimator.mass < 1.0 else np.ones_like(filled)
    ends[:, estimator.k :] = False
    inside = np.zeros_like(filled)
    np.put_along_axis(inside, order, ends, 1)
    inside &= filled
    assert wide.logsumexp is not None
    lse, tails = wide.logsumexp.astype(np.float64), []
    for i, temperature in enumerate(temperatures):
        tempered = (logprobs + lse[:, :1]) / temperature - lse[:, i : i + 1]
        outside = np.where(inside, -np.inf, tempered)
        tails.append(np.logaddexp.reduce(np.concatenate([outside, wide.tail_logprob[:, i : i + 1]], 1), axis=1))
    return replace(
        wide,
        offsets=np.concatenate([[0], np.cumsum(inside.sum(1))]),
        ids=wide.ids[inside[filled]],
        logprobs=wide.logprobs[inside[filled]],
        head_size=inside.sum(1).astype(np.int32),
        tail_logprob=np.minimum(np.stack(tails, 1), 0.0).astype(np.float32),
    )


def mass_at(wide: Targets, widths: Sequence[int]) -> dict[int, float]:
    """Mean probability of the k most likely tokens, for each k up to the vocabulary; `wide` holds the largest k."""
    masses = dict.fromkeys(widths, 0.0)
    for start, stop in zip(wide.offsets[:-1], wide.offsets[1:], strict=True):
        kept = np.cumsum(-np.sort(-np.exp(wide.logprobs[start:stop].astype(np.float64))))
        for k in widths:
            masses[k] += float(kept[min(k, len(kept)) - 1])
    return {k: min(1.0, total / len(wide)) for k, total in masses.items()}


def measure(
    picked: Sequence[Sample],
    targets: Mapping[int, Targets],
    provenance: Provenance,
    estimator: Estimator,
    *,
    chosen: bool,
) -> Pilot:
    """Encode the pilot's rows as the dump will, in units of at most the configured size and of half of that."""
    if not provenance.logsumexp:
        targets = {index: replace(found, logsumexp=None) for index, found in targets.items()}
    rows = [row_of(sample, targets.get(sample.sample_index)) for sample in picked]
    units = -(-len(rows) // provenance.samples_per_unit)
    temperatures = provenance.temperatures if estimator.kind == "topk" else provenance.temperatures[:1]
    provenance = provenance.model_copy(update={"estimator": estimator, "temperatures": temperatures})
    return Pilot(
        name=described(estimator),
        configured=chosen,
        whole=[encode_unit(part, provenance) for part in _parts(rows, units)],
        halves=[encode_unit(part, provenance) for part in _parts(rows, 2 * units)] if 2 * units <= len(rows) else [],
        entries=[len(found.ids) for found in targets.values()],
        supervised=[len(found) for found in targets.values()],
        kept_mass=mean_kept_mass(concatenate(list(targets.values()))),
    )


def _parts(rows: Sequence[Row], count: int) -> list[Sequence[Row]]:
    """`count` stretches of nearly equal length."""
    cuts = [i * len(rows) // count for i in range(count + 1)]
    return [rows[start:stop] for start, stop in pairwise(cuts)]


def encode_unit(rows: Sequence[Row], provenance: Provenance) -> UnitSize:
    """Rows as one unit, written by the dump's own writer to a scratch directory.

    Raises:
        DataError: the fidelity gate is missed, as it would be in the dump.
    """
    corpus = provenance.corpus.model_copy(update={"samples": len(rows)})
    provenance = provenance.model_copy(update={"corpus": corpus, "samples_per_unit": len(rows)})
    with tempfile.TemporaryDirectory() as folder:
        writer = DumpWriter.open(folder, provenance)
        record = writer.commit_unit(0, [replace(row, sample_index=i) for i, row in enumerate(rows)])
        assert record is not None
        sizes = file_bytes((Path(folder) / record.file).read_bytes())
    return UnitSize(len(rows), record.tokens, record.supervised_tokens, sizes)


def file_bytes(data: bytes) -> Bytes:
    """Size of a data file by what it grows with, from its footer."""
    metadata = open_parquet(data).metadata
    columns: Counter[str] = Counter()
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            columns[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    per_row, per_token = (sum(columns[name] for name in names) for names in (_PER_ROW, _PER_TOKEN))
    per_target = sum(columns[name] for name in SCHEMA.names if name not in _PER_ROW + _PER_TOKEN)
    return Bytes(file=len(data) - per_row - per_token - per_target, rows=per_row, tokens=per_token, targets=per_target)
