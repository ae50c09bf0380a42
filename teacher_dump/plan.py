"""What a dump will hold, weigh and cost, from the numbers of a pilot. Pure functions: numbers in, numbers out."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from storage_schemas.common.frozen import FrozenModel
from storage_schemas.targets import I64

WORKERS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of workers that hours are given for."""


class Bytes(NamedTuple):
    """Size of a data file, by what it grows with."""

    file: float
    """Footer, page headers, indices, provenance: once per file."""
    rows: float
    """Columns with one value per row."""
    tokens: float
    """Columns with one value per token."""
    targets: float
    """Columns of the supervised tokens."""


class UnitSize(NamedTuple):
    """One encoded unit."""

    rows: int
    tokens: int
    supervised: int
    bytes: Bytes


class Pilot(NamedTuple):
    """What a pilot has measured for one estimator."""

    name: str
    """The estimator and its parameters."""
    configured: bool
    """Whether it is the one of the configuration; the others are there to compare."""
    whole: Sequence[UnitSize]
    """The pilot's rows in as few units as the configured size allows."""
    halves: Sequence[UnitSize]
    """The same rows in twice as many units; empty if a unit is one row."""
    entries: Sequence[int]
    """Stored entries, per sample with targets."""
    supervised: Sequence[int]
    """Supervised tokens of these samples."""
    kept_mass: float
    """Mean probability inside the heads."""


class EstimatorPlan(FrozenModel):
    """One estimator's dump."""

    estimator: str
    """Kind and parameters."""
    configured: bool
    """Whether it is the one of the configuration."""
    bytes: int
    """Of all data files, every column and each file's own overhead included."""
    bytes_per_supervised_token: float
    """The same per supervised token."""
    relative_standard_error: float | None
    """Of the bytes, by the scatter of the pilot's samples; null for a pilot of one sample."""
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


def choose_pilot(lengths: I64, count: int, *, seed: int) -> I64:
    """Which samples the pilot runs on: each with the same probability, spread over the corpus and over the lengths.

    Systematic sampling (one random start, equal steps) through an order that winds: the corpus is cut into stretches,
    and within them samples go from short to long and from long to short in turns.

    Args:
        lengths: (samples,) tokens of each sample.
        count: samples to choose; all if there are fewer.
        seed: of the random start.

    Returns:
        (min(count, samples),) ascending indices.
    """
    total = len(lengths)
    count = min(count, total)
    stretches = max(1, math.isqrt(count))
    stretch = np.arange(total) * stretches // max(1, total)
    order = np.lexsort((np.where(stretch % 2, -lengths, lengths), stretch))
    step = total / max(1, count)
    places = np.floor((np.arange(count) + np.random.default_rng(seed).random()) * step).astype(np.int64)
    return np.sort(order[np.minimum(places, total - 1)])


def forecast_bytes(pilot: Pilot, *, units: int, rows: int, tokens: int, supervised: int) -> float:
    """Bytes of all data files of a dump.

    Each part of a file is taken to be a + b x, x being the rows, tokens or supervised tokens in it. Larger units
    compress better, so that b is what one more costs at the size of the pilot's units, not the mean. Both follow from
    the same rows in units of one size and of half of it; the whole corpus is then `units` times a and b times all x.
    """
    totals = {"rows": rows, "tokens": tokens, "targets": supervised}
    found = units * float(np.mean([unit.bytes.file for unit in pilot.whole]))
    for part, total in totals.items():
        x, size = _means(pilot.whole, part)
        if not pilot.halves:
            found += total * size / max(x, 1.0)
            continue
        x_half, size_half = _means(pilot.halves, part)
        slope = (size - size_half) / (x - x_half) if x > x_half else 0.0
        found += units * (size - slope * x) + slope * total
    return found


def _means(units: Sequence[UnitSize], part: str) -> tuple[float, float]:
    """Mean over units of what a part counts, and of its bytes."""
    count = {"rows": "rows", "tokens": "tokens", "targets": "supervised"}[part]
    x = float(np.mean([getattr(unit, count) for unit in units]))
    return x, float(np.mean([getattr(unit.bytes, part) for unit in units]))


def relative_standard_error(entries: Sequence[int], supervised: Sequence[int]) -> float | None:
    """Of the ratio of two sums over a random sample, relative to it; None for a sample of one."""
    x, y = np.asarray(supervised, float), np.asarray(entries, float)
    if len(x) < 2 or not y.sum():
        return None
    residual = y - y.sum() / x.sum() * x
    return float(np.sqrt(len(x) * (residual**2).sum() / (len(x) - 1)) / y.sum())


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
    found = []
    for workers in WORKERS:
        devices = workers * devices_per_worker
        hours = alone * math.ceil(units / workers) / units
        money = None if price_per_hour is None else hours * devices * price_per_hour
        found.append(Duration(devices=devices, hours=hours, money=money))
    return found


def make_plan(
    pilots: Sequence[Pilot],
    *,
    statuses: Mapping[str, int],
    samples_per_unit: int,
    tokens: int,
    teacher_tokens: int,
    supervised_tokens: int,
    mass_at_k: Mapping[int, float],
    tokens_per_second: float,
    measured: bool,
    devices: int,
    price_per_hour: float | None,
) -> Plan:
    """The plan, from a pilot and from what is known about the whole corpus."""
    samples = sum(statuses.values())
    units = -(-samples // samples_per_unit)
    plans = []
    for pilot in pilots:
        size = forecast_bytes(pilot, units=units, rows=samples, tokens=tokens, supervised=supervised_tokens)
        plans.append(
            EstimatorPlan(
                estimator=pilot.name,
                configured=pilot.configured,
                bytes=round(size),
                bytes_per_supervised_token=size / supervised_tokens,
                relative_standard_error=relative_standard_error(pilot.entries, pilot.supervised),
                entries_per_supervised_token=sum(pilot.entries) / sum(pilot.supervised),
                kept_mass=pilot.kept_mass,
            )
        )
    return Plan(
        samples=samples,
        statuses=dict(statuses),
        units=units,
        tokens=tokens,
        teacher_tokens=teacher_tokens,
        supervised_tokens=supervised_tokens,
        pilot_samples=len(pilots[0].supervised),
        pilot_supervised_tokens=sum(pilots[0].supervised),
        estimators=plans,
        mass_at_k=dict(mass_at_k),
        tokens_per_second=tokens_per_second,
        devices_per_worker=devices,
        measured=measured,
        durations=durations(
            teacher_tokens=teacher_tokens,
            units=units,
            tokens_per_second=tokens_per_second,
            price_per_hour=price_per_hour,
            devices_per_worker=devices,
        ),
    )
