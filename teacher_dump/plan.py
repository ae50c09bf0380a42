"""What a dump will hold, weigh and cost: a pilot of the corpus through the real teacher and the real encoder."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from storage_schemas.common.errors import DataError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import Adaptive, DumpSection, Estimator, Sampled, TopK, described
from storage_schemas.provenance import Provenance
from storage_schemas.rows import OK, Row
from storage_schemas.targets import Targets, concatenate, decode
from storage_schemas.writer import DumpWriter
from teacher_dump.config import CorpusSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import provenance_of, refuse_too_long, refuse_wider_than_vocabulary, row_of
from teacher_dump.teachers.teacher import Teacher

WIDTHS = (8, 16, 32, 64, 128, 256)
"""The k that the kept mass is given for."""
WORKERS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of workers that hours are given for."""


class EstimatorPlan(FrozenModel):
    """One estimator's dump."""

    estimator: str
    """Kind and parameters."""
    configured: bool
    """Whether it is the one of the configuration; the others are there to compare."""
    bytes: int
    """Of all data files, every column and each file's own overhead included."""
    bytes_per_supervised_token: float
    """The same per supervised token, as the pilot has it in one file."""
    entries_per_supervised_token: float
    """Stored entries."""
    kept_mass: float
    """Mean probability inside the heads."""


class Duration(FrozenModel):
    """How long some devices take."""

    devices: int
    """Of all workers together."""
    hours: float
    """Of the teacher's forward passes; loading the model is not in it."""
    money: float | None
    """Price of that, in the unit of --price-per-hour; null without one."""


class Plan(FrozenModel):
    """What a dump of the corpus will hold, weigh and cost."""

    samples: int
    """Rows of the dump."""
    statuses: dict[str, int]
    """Rows per status, as far as it is known before the teacher runs."""
    units: int
    """Data files."""
    tokens: int
    """Of all rows."""
    teacher_tokens: int
    """Of the rows that go through the teacher."""
    supervised_tokens: int
    """Tokens with a target."""
    pilot_samples: int
    """Samples that the teacher has seen for this plan."""
    pilot_supervised_tokens: int
    """Their supervised tokens."""
    estimators: list[EstimatorPlan]
    """The configured one first."""
    mass_at_k: dict[int, float]
    """Mean probability of the k most likely tokens."""
    tokens_per_second: float
    """Of one worker."""
    devices_per_worker: int
    """More than 1 where devices hold one teacher together."""
    measured: bool
    """Whether that was measured here; else it was given."""
    durations: list[Duration]
    """By number of devices; more workers than units do not help."""


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
        teacher: runs on the pilot's samples, once per kind of estimator and once for the masses.
        corpus: tokenised as a whole, so that its numbers of tokens are exact.
        estimator: the configured one; the defaults of the other kinds are planned too.
        samples: of the pilot, drawn at random.
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
    chosen = np.random.default_rng(seed).choice(len(frozen), min(samples, len(frozen)), replace=False)
    picked = [frozen.sample(int(i)) for i in np.sort(chosen)]
    defaults: list[Estimator] = [TopK(), Adaptive(kind="adaptive"), Sampled(kind="sampled")]
    estimators = [estimator, *(each for each in defaults if each.kind != estimator.kind)]
    # The masses come first: the first pass on a device is slow, and this one is not timed.
    recipes = [_with(provenance, each) for each in (TopK(k=max(WIDTHS), mass=1.0), *estimators)]
    (wide, _), *passes = _passes(teacher, picked, recipes, progress)
    if not wide:
        raise DataError(
            "no sample of the pilot has targets",
            got=f"{len(picked)} samples",
            expected="at least one that is usable, with finite logits",
            fix="raise --pilot-samples, or look at the corpus",
        )
    units = [_encoded(picked, found, recipe) for (found, _), recipe in zip(passes, recipes[1:], strict=True)]
    supervised = int(frozen.loss_mask.sum())
    lengths, usable = np.diff(frozen.offsets), frozen.have(OK)
    teacher_tokens = int(lengths[usable].sum())
    speed = tokens_per_second or sum(len(s.input_ids) for s in picked if s.status == OK) / passes[0][1]
    return Plan(
        samples=len(frozen),
        statuses=frozen.status_counts(),
        units=provenance.units,
        tokens=int(frozen.offsets[-1]),
        teacher_tokens=teacher_tokens,
        supervised_tokens=supervised,
        pilot_samples=len(wide),
        pilot_supervised_tokens=units[0].supervised_tokens,
        estimators=[
            EstimatorPlan(
                estimator=described(each),
                configured=each == estimator,
                bytes=round(unit.bytes / unit.supervised_tokens * supervised),
                bytes_per_supervised_token=unit.bytes / unit.supervised_tokens,
                entries_per_supervised_token=unit.entries / unit.supervised_tokens,
                kept_mass=unit.mean_kept_mass,
            )
            for each, unit in zip(estimators, units, strict=True)
        ],
        mass_at_k=mass_at(concatenate(list(wide.values())), WIDTHS),
        tokens_per_second=speed,
        devices_per_worker=teacher.devices,
        measured=tokens_per_second is None,
        durations=durations(
            teacher_tokens=teacher_tokens,
            units=provenance.units,
            tokens_per_second=speed,
            price_per_hour=price_per_hour,
            devices_per_worker=teacher.devices,
        ),
    )


def _with(provenance: Provenance, estimator: Estimator) -> Provenance:
    """The run.json of the same dump by another estimator; draws know no temperature but 1."""
    temperatures = provenance.temperatures[:1] if estimator.draws else provenance.temperatures
    return provenance.model_copy(update={"estimator": estimator, "temperatures": temperatures})


def _passes(
    teacher: Teacher, picked: Sequence[Row], recipes: Sequence[Provenance], progress: Callable[[int, int], None] | None
) -> list[tuple[dict[int, Targets], float]]:
    """Targets by sample, and seconds, of one pass over the samples per recipe."""
    batches = teacher.batches([sample for sample in picked if sample.status == OK])
    _ = teacher.model
    found = []
    for place, recipe in enumerate(recipes):
        targets: dict[int, Targets] = {}
        started = time.monotonic()
        for i, batch in enumerate(batches):
            answers = teacher.targets(batch, recipe.recipe)
            targets |= {s.sample_index: t for s, t in zip(batch, answers, strict=True) if t is not None}
            if progress is not None:
                progress(place * len(batches) + i + 1, len(recipes) * len(batches))
        found.append((targets, time.monotonic() - started))
    return found


class _Pilot(NamedTuple):
    """What the pilot's files come to."""

    bytes: int
    supervised_tokens: int
    entries: int
    mean_kept_mass: float


def _encoded(picked: Sequence[Row], targets: dict[int, Targets], provenance: Provenance) -> _Pilot:
    """The pilot in units of the dump's size, or one if it fills no two; by the dump's writer in a scratch directory.

    Raises:
        DataError: the fidelity gate is missed, as it would be in the dump.
    """
    rows = [replace(row_of(s, targets.get(s.sample_index)), sample_index=i) for i, s in enumerate(picked)]
    size = provenance.samples_per_unit if len(rows) >= 2 * provenance.samples_per_unit else len(rows)
    corpus = provenance.corpus.model_copy(update={"samples": len(rows)})
    provenance = provenance.model_copy(update={"corpus": corpus, "samples_per_unit": size})
    with tempfile.TemporaryDirectory() as folder:
        writer = DumpWriter.open(folder, provenance)
        units = [writer.commit_unit(unit, rows[unit * size : (unit + 1) * size]) for unit in range(provenance.units)]
    records = [record for record in units if record is not None]
    tokens = [record.supervised_tokens for record in records]
    return _Pilot(
        bytes=sum(record.bytes for record in records),
        supervised_tokens=sum(tokens),
        entries=sum(record.entries for record in records),
        mean_kept_mass=float(np.average([record.mean_kept_mass for record in records], weights=tokens)),
    )


def mass_at(wide: Targets, widths: Sequence[int]) -> dict[int, float]:
    """Mean probability of the k most likely tokens, for each k up to the vocabulary; `wide` holds the largest k."""
    kept = np.cumsum(-np.sort(-decode(wide).weights.astype(np.float64)), axis=1)
    return {k: min(1.0, float(kept[:, min(k, kept.shape[1]) - 1].mean())) for k in widths}


def durations(
    *,
    teacher_tokens: int,
    units: int,
    tokens_per_second: float,
    price_per_hour: float | None,
    devices_per_worker: int = 1,
) -> list[Duration]:
    """Hours and money by number of devices: the last worker ends when it has done its share of the units."""
    alone = teacher_tokens / tokens_per_second / 3600
    hours = {workers * devices_per_worker: alone * math.ceil(units / workers) / units for workers in WORKERS}
    return [
        Duration(devices=devices, hours=each, money=None if price_per_hour is None else each * devices * price_per_hour)
        for devices, each in hours.items()
    ]
