"""`make frontier`: what each stored byte of a target buys, as docs/design/evidence.md lays down.

Neo is trained from dumps of the same samples that store less or more of the teacher's distribution. About five hours on
two cores; what is done stays done. Ends with `frontier.md`, a picture and a page of the runs in its directory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from evidence import EVALUATION, Lab, LazyDump, Result, first, interval, parser, prepared, spread

from pipeline.views.run_page import INK, STYLE, svg
from storage_schemas.codec import encode
from storage_schemas.common.publish import publish
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import concatenate_units
from storage_schemas.targets import Targets
from storage_schemas.writer import DumpWriter
from student_train.results.measures import by_seed

FULL = "all of the vocabulary"
PLAIN = "topk, k = 64"
AIM = 32
"""Bytes per supervised token that the aim allows."""
SHOWN = (FULL, PLAIN, "adaptive, mass 0.8, k <= 12, 4 draws")
"""Whose runs are on the page."""
TEMPERATURES = (1.0, 2.0, 4.0)
QUALITY = {"kl_mean": "KL", "ce": "CE", "top1_agreement": "top-1", "acceptance_rate_min": "acceptance"}
ESTIMATORS: dict[str, Estimator] = {
    **{f"topk, k = {k}": TopK(k=k, mass=1.0) for k in (4, 16, 64, 256)},
    **{f"topk, k = 64, mass {mass}": TopK(k=64, mass=mass) for mass in (0.9, 0.97)},
    **{
        f"adaptive, mass {mass}, k <= {k}, 4 draws": Adaptive(kind="adaptive", mass=mass, k_max=k)
        for mass, k in ((0.5, 8), (0.8, 12), (0.9, 16))
    },
    **{f"sampled, {draws} draws": Sampled(kind="sampled", draws=draws) for draws in (12, 50, 100)},
}
GATES = (1e-3, 1e-2)
"""Beside that of all other dumps, 1e-4 nats."""
TEMPERED_K = 16
RENORMALISED = (4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is run."""

    steps: int = 60
    conversations: int = 160
    heldout: int = 100
    heldout_k: int = 2048
    seeds: tuple[int, ...] = (0, 1, 2)


SMOKE = Budget(steps=3, conversations=40, heldout_k=32, seeds=(0,))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    arguments = parser("make frontier", __doc__, out="runs/frontier")
    arguments.add_argument("--learning-rate", type=float, help="Neo's, as `make reproduce` has chosen it")
    chosen = arguments.parse_args(argv)
    if chosen.learning_rate is None and not chosen.smoke:
        arguments.error("--learning-rate is needed: the one that `make reproduce` has chosen for Neo")
    lab, train, heldout = prepared(arguments, chosen)
    rate = chosen.learning_rate or 1e-3
    frontier = Frontier(lab, train, heldout, SMOKE if chosen.smoke else Budget(), rate=rate)
    print(frontier.run([] if chosen.smoke else list(ESTIMATORS), smoke=chosen.smoke))


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a dump costs, and what came out of it, by seed."""

    name: str
    bytes_per_token: float
    runs: list[Result]
    results: list[Result]

    def values(self, name: str) -> list[float]:
        """A measure by seed."""
        return [result[name] for result in self.results]


class Frontier:
    """The same training from many dumps."""

    def __init__(self, lab: Lab, train: Path, heldout: Path, budget: Budget, *, rate: float) -> None:
        """Lay out the data, and count the vocabulary."""
        self.lab, self.budget, self.rate = lab, budget, rate
        self.data = first(train, lab.folder / "train.jsonl", budget.conversations)
        held = first(heldout, lab.folder / "heldout.jsonl", budget.heldout)
        self.heldout = lab.dump("dump-heldout", held, TopK(k=budget.heldout_k, mass=1.0))
        self.vocabulary: int = json.loads((lab.teacher / "config.json").read_text())["vocab_size"]

    def run(self, estimators: Sequence[str], *, smoke: bool) -> str:
        """All of it; returns the tables, and writes them, the picture and the page."""
        gates, renormalised, temperatures = ((), RENORMALISED[:1], ()) if smoke else (GATES, RENORMALISED, TEMPERATURES)
        runs = 1 + len(estimators) + len(gates) + len(renormalised) + 2 * len(temperatures[1:])
        self.lab.plan(runs * len(self.budget.seeds) * (self.budget.steps + EVALUATION))
        # The one that needs most memory first: it should not fail after hours.
        full = self.point(FULL)
        points = {name: self.point(name) for name in estimators}
        contrast = {k: self.contrast(k) for k in renormalised}
        gated = [self.gated(gate) for gate in gates]
        tempered = self.tempered(points, contrast[TEMPERED_K]) if temperatures else []
        before = self.lab.evaluate("before", [self.lab.untrained()], self.heldout)
        default = self.bytes_of(self.lab.dump("default", self.data, TopK()))
        text = "\n".join([
            *self.lab.made("The price of a byte"),
            f"Neo at a learning rate of {self.rate:.1e}; means and deviations of {len(self.budget.seeds)} seeds.",
            "Differences are paired by seed.",
            "",
            *table([*((point, full) for point in points.values()), (full, None)], of=FULL),
            "",
            *aim(list(points.values()), full, default=default),
            "",
            "Top-k renormalised to 1, as most tools store it, against the same k with its tail:",
            "",
            *table([(point, points.get(f"topk, k = {k}")) for k, point in contrast.items()], of="with tail"),
            *(["", f"The gate on the KL of stored log-probs, against {PLAIN} at 1e-4 nats:", "",
               *table([(point, points[PLAIN]) for point in gated], of="1e-4")] if gates else []),
            *(["", f"Temperature, k = {TEMPERED_K}, p^(1/T) on the entries alone against the exact tail:", "",
               *table(tempered, of="exact tail")] if temperatures else []),
        ]) + "\n"  # fmt: skip
        publish(self.lab.folder / "frontier.md", text)
        publish(self.lab.folder / "frontier.svg", picture(list(points.values()), list(contrast.values()), full))
        shown = [points.get(name, full) for name in SHOWN if name == FULL or name in points]
        self.lab.page([pair for point in shown for pair in zip(point.runs, point.results, strict=True)], before)
        return text

    def contrast(self, k: int) -> Point:
        """From top-k as if nothing lay outside of it."""
        name = f"topk, k = {k}, renormalised"
        return self.trained(name, self.without_tail(f"topk, k = {k}", TopK(k=k, mass=1.0), name))

    def without_tail(self, name: str, estimator: Estimator, alone: str, **dump: Any) -> LazyDump:
        """The dump `alone`: that of `name`, as if its entries held all of the probability."""
        source, url = self.lab.dump(_slug(name), self.data, estimator, **dump), self.lab.folder / _slug(alone)
        return LazyDump(url, {"without_tail": source.made_from}, lambda: without_tail(source.opened, url))

    def gated(self, gate: float) -> Point:
        """From log-probs rounded as far as a gate allows: from a coarse grid on, which is refined until it is kept."""
        name = f"gate {gate:g}"
        dump = self.lab.dump(_slug(name), self.data, TopK(k=64, mass=1.0), max_kl=gate, logprob_step=1.0)
        rounding = self.lab.measured("rounding", dump, rounding_of)
        return self.trained(f"{name}: grid {rounding['step']:g}, KL {rounding['kl']:.1e}", dump, label=name)

    def bytes_of(self, dump: LazyDump) -> float:
        """Bytes per supervised token."""
        found = self.lab.measured("bytes", dump, lambda opened: {"per_token": bytes_per_supervised_token(opened)})
        return float(found["per_token"])

    def point(self, name: str) -> Point:
        """Of an estimator by its name."""
        estimator = TopK(k=self.vocabulary, mass=1.0) if name == FULL else ESTIMATORS[name]
        return self.trained(name, self.lab.dump(_slug(name), self.data, estimator))

    def tempered(self, points: Mapping[str, Point], alone_at_1: Point) -> "list[tuple[Point, Point | None]]":
        """At each temperature, the stored tail and p^(1/T) on the entries alone."""
        name = f"topk, k = {TEMPERED_K}"
        rows: list[tuple[Point, Point | None]] = [(points[name], None), (alone_at_1, points[name])]
        estimator = TopK(k=TEMPERED_K, mass=1.0)
        source = self.lab.dump("tempered", self.data, estimator, temperatures=TEMPERATURES)
        alone = self.without_tail("tempered", estimator, "tempered-without-tail", temperatures=TEMPERATURES)
        for temperature in TEMPERATURES[1:]:
            exact = self.trained(f"T = {temperature:g}, exact tail", source, temperature=temperature)
            entries = self.trained(f"T = {temperature:g}, entries alone", alone, temperature=temperature)
            rows += [(exact, None), (entries, exact)]
        return rows

    def trained(self, name: str, dump: LazyDump, *, temperature: float = 1.0, label: str = "") -> Point:
        """Neo from one dump, with each seed; `label` names the runs, if not `name`."""
        runs, results = [], []
        for seed in self.budget.seeds:
            of_seed = f"{_slug(label or name)}-{seed}"
            run = self.lab.train(
                of_seed, dump, self.heldout, loss={"alpha": 0.5, "temperature": temperature},
                method="lora_kd", learning_rate=self.rate, seed=seed, max_steps=self.budget.steps,
                shuffle_block_units=1,
            )  # fmt: skip
            runs.append(run)
            results.append(self.lab.evaluate(of_seed, [run], self.heldout))
        return Point(name=name, bytes_per_token=self.bytes_of(dump), runs=runs, results=results)


def table(rows: "Sequence[tuple[Point, Point | None]]", *, of: str) -> list[str]:
    """A row for each dump, with the differences in KL and CE to its partner, which `of` names."""
    lines = [
        "| stored | bytes per supervised token | " + " | ".join(QUALITY.values()) + f" | KL - {of} | CE - {of} |",
        "|---|---:|" + "---:|" * len(QUALITY) + "---:|---:|",
    ]
    for point, partner in rows:
        cells = [f"{point.bytes_per_token:,.1f}", *(spread(point.values(name)) for name in QUALITY)]
        for name in ("kl_mean", "ce"):
            cells.append(interval(by_seed(partner.values(name), point.values(name))) if partner else "")
        lines.append(f"| {point.name} | " + " | ".join(cells) + " |")
    return lines


def aim(points: Sequence[Point], full: Point, *, default: float) -> list[str]:
    """Which settings of at most `AIM` bytes are within one standard deviation, of seeds, of the full distribution."""
    if len(full.results) < 2:
        return ["One seed says nothing of the aim."]
    kl, deviation = fmean(full.values("kl_mean")), stdev(full.values("kl_mean"))
    within, lines = [], []
    for point in sorted((point for point in points if point.bytes_per_token <= AIM), key=lambda p: p.bytes_per_token):
        off = (fmean(point.values("kl_mean")) - kl) / deviation
        lines.append(f"- {point.name}: {point.bytes_per_token:.1f} bytes, {off:+.1f} standard deviations")
        within += [point] if off <= 1 else []
    told = f"Aim, at most {AIM} bytes and within the spread of seeds ({deviation:.4f} nats) of all of the vocabulary: "
    if not within:
        return [told + "no such setting.", "", *lines]
    half = [point.name for point in within if point.bytes_per_token < default / 2]
    told += f"reached by {'; '.join(point.name for point in within)}. "
    told += f"The default has {default:.1f} bytes; of less than half of that: {'; '.join(half) or 'none'}."
    return [told, "", *lines]


def picture(points: Sequence[Point], contrast: Sequence[Point], full: Point) -> str:
    """Held-out KL over bytes per supervised token, with the seeds' spread; SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    series: dict[str, list[Point]] = {}
    for point in points:
        kind = "topk, cut at a mass" if "k = 64, mass" in point.name else point.name.split(",")[0]
        series.setdefault(kind, []).append(point)
    series["topk renormalised, no tail"] = list(contrast)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="bytes per supervised token", ylabel="held-out KL, nats")
        for name, found in series.items():
            found.sort(key=lambda point: point.bytes_per_token)
            x, kl = [point.bytes_per_token for point in found], [point.values("kl_mean") for point in found]
            axes.errorbar(x, list(map(fmean, kl)), list(map(_deviation, kl)), marker="o", markersize=3, linewidth=1,
                          capsize=2, label=name)  # fmt: skip
        mean, deviation = fmean(full.values("kl_mean")), _deviation(full.values("kl_mean"))
        axes.axhspan(mean - deviation, mean + deviation, color=INK, alpha=0.3, linewidth=0)
        axes.axhline(mean, color=INK, linewidth=1, label=f"{full.name}, {full.bytes_per_token:,.0f} bytes")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
        return str(svg(figure))


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def bytes_per_supervised_token(dump: Dump) -> float:
    """Of a dump's data, all columns and the footer included, in one file: users have 512 samples in a unit.

    Of all of the vocabulary as it lies there: a file of it would be gigabytes, of which a footer is nothing.
    """
    records = dump.read_records()
    supervised, size = (
        sum(getattr(record, name) for record in records.values()) for name in ("supervised_tokens", "bytes")
    )
    if sum(record.entries for record in records.values()) < 1000 * supervised:
        whole = concatenate_units([dump.read_unit(unit) for unit in sorted(records)])
        size = len(encode(whole, {}, step=min(record.logprob_step for record in records.values())))
    return size / supervised


def rounding_of(dump: Dump) -> Result:
    """The grid of a dump's log-probs in nats, and the KL to them that it leaves."""
    records = dump.read_records().values()
    return {"step": max(one.logprob_step for one in records), "kl": fmean(one.fidelity[0] for one in records)}


def without_tail(dump: Dump, url: Path) -> None:
    """A dump whose entries hold all of the probability at every temperature, as if nothing lay outside of them."""
    # Another gate, by a hundredth, so that the two are not taken for one dump.
    writer = DumpWriter.open(str(url), dump.provenance.model_copy(update={"max_kl": 1.01 * dump.provenance.max_kl}))
    if (url / "SEALED.json").is_file():
        return
    writer.put_tokenizer(dump.read_tokenizer())
    for unit in range(dump.provenance.units):
        rows = dump.read_unit(unit)
        writer.commit_unit(unit, [
            replace(row, targets=None if row.targets is None else renormalised(row.targets))
            for row in map(rows.row, range(len(rows)))
        ])  # fmt: skip
    writer.seal()


def renormalised(targets: Targets) -> Targets:
    """p / sum p over a token's entries, and no tail."""
    logprobs = targets.logprobs.astype(np.float64)
    total = np.logaddexp.reduceat(logprobs, targets.offsets[:-1])
    return replace(
        targets,
        logprobs=(logprobs - np.repeat(total, targets.lengths)).astype(np.float32),
        tail_logprob=np.full_like(targets.tail_logprob, -np.inf),
    )


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).split())


if __name__ == "__main__":
    main()
