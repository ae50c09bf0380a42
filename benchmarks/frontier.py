"""`make frontier`: what each stored byte of a target buys, as docs/design/evidence.md lays down.

Neo is trained from dumps of the same samples that store less or more of the teacher's distribution. Hours on two cores;
what is done stays done. Ends with `frontier.md` in its directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from evidence import EVALUATION, Lab, Result, interval, parser, prepared, split, spread

from storage_schemas.common.publish import publish
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.reader import Dump
from storage_schemas.targets import Targets
from storage_schemas.writer import DumpWriter
from student_train.results.measures import by_seed

FULL = "all of the vocabulary"
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
GATES = (1e-4, 1e-3, 1e-2)
RENORMALISED = (4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is run."""

    steps: int = 120
    conversations: int = 320
    heldout_k: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)


SMOKE = Budget(steps=3, conversations=40, heldout_k=32, seeds=(0,))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    arguments = parser("make frontier", __doc__, out="runs/frontier")
    arguments.add_argument("--learning-rate", type=float, default=1e-3, help="Neo's, from `make reproduce`")
    chosen = arguments.parse_args(argv)
    lab, train, heldout = prepared(arguments, chosen)
    frontier = Frontier(lab, train, heldout, SMOKE if chosen.smoke else Budget(), rate=chosen.learning_rate)
    text = frontier.run([FULL] if chosen.smoke else [*ESTIMATORS, FULL], smoke=chosen.smoke)
    publish(lab.folder / "frontier.md", text)
    print(text)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a dump costs, and what came out of it, by seed."""

    name: str
    bytes_per_token: float
    results: list[Result]

    def values(self, name: str) -> list[float]:
        """A measure by seed."""
        return [result[name] for result in self.results]


class Frontier:
    """The same training from many dumps."""

    def __init__(self, lab: Lab, train: Path, heldout: Path, budget: Budget, *, rate: float) -> None:
        """Make the held-out dump, and count the vocabulary."""
        self.lab, self.budget, self.rate = lab, budget, rate
        self.data, _ = split(train, lab.folder, held=0, limit=budget.conversations)
        self.heldout = lab.dump("dump-heldout", heldout, TopK(k=budget.heldout_k, mass=1.0))
        self.vocabulary = Dump.open(str(self.heldout)).provenance.teacher.lm_head_rows

    def run(self, estimators: Sequence[str], *, smoke: bool) -> str:
        """All of it; returns the tables."""
        gates, renormalised, temperatures = ((), RENORMALISED[:1], ()) if smoke else (GATES, RENORMALISED, TEMPERATURES)
        runs = len(estimators) + len(gates) + len(renormalised) + 2 * len(temperatures[1:])
        self.lab.plan(runs * len(self.budget.seeds) * (self.budget.steps + EVALUATION))
        points = [self.point(name) for name in estimators]
        full = points[-1]
        contrast = []
        for k in renormalised:
            name = f"topk, k = {k}, renormalised"
            source = self.lab.dump(_slug(f"topk, k = {k}"), self.data, TopK(k=k, mass=1.0))
            contrast.append(self.trained(name, without_tail(source, self.lab.folder / _slug(name))))
        gated = []
        for gate in gates:
            name = f"topk, k = 64, gate {gate:g}"
            # From a coarse grid on, which is refined until the gate is kept.
            coarse = self.lab.dump(_slug(name), self.data, TopK(k=64, mass=1.0), max_kl=gate, logprob_step=1.0)
            gated.append(self.trained(name, coarse))
        return "\n".join([
            *table(points, full),
            "",
            "Top-k renormalised to 1, as most tools store it:",
            "",
            *table(contrast, full),
            *(["", "The gate on the KL of stored log-probs:", "", *table(gated, full)] if gates else []),
            *(["", "Temperature, k = 16:", "", *self.tempered(full)] if temperatures else []),
        ]) + "\n"  # fmt: skip

    def point(self, name: str) -> Point:
        """Of an estimator by its name."""
        estimator = TopK(k=self.vocabulary, mass=1.0) if name == FULL else ESTIMATORS[name]
        return self.trained(name, self.lab.dump(_slug(name), self.data, estimator))

    def tempered(self, full: Point) -> list[str]:
        """At higher temperatures, the stored tail against p^(1/T) on the entries alone."""
        source = self.lab.dump("tempered", self.data, TopK(k=16, mass=1.0), temperatures=TEMPERATURES)
        alone = without_tail(source, self.lab.folder / "tempered-without-tail")
        points = []
        for temperature in TEMPERATURES[1:]:
            points.append(self.trained(f"T = {temperature:g}, exact tail", source, temperature=temperature))
            points.append(self.trained(f"T = {temperature:g}, entries alone", alone, temperature=temperature))
        return table(points, full)

    def trained(self, name: str, dump: Path, *, temperature: float = 1.0) -> Point:
        """Neo from one dump, with each seed."""
        results = []
        for seed in self.budget.seeds:
            run = self.lab.train(
                f"{_slug(name)}-{seed}", dump, self.heldout, loss={"alpha": 0.5, "temperature": temperature},
                method="lora_kd", learning_rate=self.rate, seed=seed, max_steps=self.budget.steps,
                shuffle_block_units=1,
            )  # fmt: skip
            results.append(self.lab.evaluate(f"{_slug(name)}-{seed}", [run], self.heldout))
        return Point(name=name, bytes_per_token=bytes_per_supervised_token(dump), results=results)


def table(points: Sequence[Point], full: Point) -> list[str]:
    """A row for each dump."""
    lines = [
        "| stored | bytes per supervised token | " + " | ".join(QUALITY.values()) + " | KL - that of all |",
        "|---|---:|" + "---:|" * len(QUALITY) + "---:|",
    ]
    for point in points:
        cells = [spread(point.values(name)) for name in QUALITY]
        off = "" if point is full else interval(by_seed(full.values("kl_mean"), point.values("kl_mean")))
        lines.append(f"| {point.name} | {point.bytes_per_token:,.1f} | " + " | ".join(cells) + f" | {off} |")
    return lines


def bytes_per_supervised_token(dump: Path) -> float:
    """Of a dump's data files, all columns and footers included."""
    records = Dump.open(str(dump)).read_records().values()
    return sum(record.bytes for record in records) / sum(record.supervised_tokens for record in records)


def without_tail(source: Path, url: Path) -> Path:
    """A dump whose entries hold all of the probability at every temperature, as if nothing lay outside of them."""
    dump = Dump.open(str(source))
    # Another gate, by a hundredth, so that the two are not taken for one dump.
    writer = DumpWriter.open(str(url), dump.provenance.model_copy(update={"max_kl": 1.01 * dump.provenance.max_kl}))
    if (url / "SEALED.json").is_file():
        return url
    writer.put_tokenizer(dump.read_tokenizer())
    for unit in range(dump.provenance.units):
        rows = dump.read_unit(unit)
        writer.commit_unit(unit, [
            replace(row, targets=None if row.targets is None else renormalised(row.targets))
            for row in map(rows.row, range(len(rows)))
        ])  # fmt: skip
    writer.seal()
    return url


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
