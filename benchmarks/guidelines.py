"""`make guidelines`: rank, learning rate, alpha, data and LoRA's variants as curves (docs/design/evidence.md).

Neo as in `make reproduce`, half as long. About three hours on two cores; what is done stays done. Ends with
`guidelines.md`.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evidence import BATCH, EVALUATION, Result, first, parser, prepared
from reproduce import FACTOR, LORA, SMOKE, Budget, Study, rate_table, undecided

from storage_schemas.common.publish import publish

NEO = "lora_kd"
QUALITY = {"kl_mean": "KL", "ce": "CE", "top1_agreement": "top-1"}
Curve = dict[str, Result]
"""Setting -> what `llm-neo evaluate` says of the student that it made."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied."""

    ranks: tuple[int, ...] = (4, 16, 64)
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    conversations: tuple[int, ...] = (150, 600, 1400)
    variants: tuple[str, ...] = ("lora", "rslora", "dora", "pissa", "moslora")

    @property
    def runs(self) -> int:
        """Trainings, but for those that look for a learning rate."""
        return len(self.ranks) + len(self.alphas) + len(self.conversations) + len(self.variants)


BUDGET = Budget(steps=75, tuning_samples=100, conversations=1500, first_rate=2)
HELDOUT = 100
SMALL = Grid(ranks=(2, 16), alphas=(0.0, 0.5), conversations=(16, 32), variants=("lora", "dora"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    arguments = parser("make guidelines", __doc__, out="runs/guidelines")
    chosen = arguments.parse_args(argv)
    lab, train, heldout = prepared(arguments, chosen)
    heldout = first(heldout, lab.folder / "heldout.jsonl", HELDOUT)
    study = Study(lab, train, heldout, SMOKE if chosen.smoke else BUDGET)
    text = Guidelines(study, SMALL if chosen.smoke else Grid()).run()
    publish(lab.folder / "guidelines.md", text)
    print(text)


class Guidelines:
    """Neo with one setting varied at a time, one seed each."""

    def __init__(self, study: Study, grid: Grid) -> None:
        """Announce the work."""
        self.study, self.grid, self.lab = study, grid, study.lab
        budget = study.budget
        self.lab.plan((grid.runs + len(budget.seeds)) * (budget.steps + EVALUATION))
        tunings = len(grid.ranks) * budget.rates + 2 * (len(grid.variants) - 1)
        self.lab.plan(tunings * (budget.tuning_steps + EVALUATION))

    def run(self) -> str:
        """All of it; returns the tables."""
        rates = {rank: self.study.rate(NEO, rank) for rank in self.grid.ranks}
        best = rates[LORA["r"]]
        seeds = [self.point("", best, seed=seed)["kl_mean"] for seed in self.study.budget.seeds]
        ranks = {f"{rank}": self.point(f"r{rank}", rates[rank], lora={"r": rank}) for rank in self.grid.ranks}
        alphas = {f"{alpha:g}": self.point(f"alpha-{alpha:g}", best, alpha=alpha) for alpha in self.grid.alphas}
        data = {
            f"{count // BATCH * BATCH:,}": self.point(f"data-{count}", best, steps=count // BATCH)
            for count in self.grid.conversations
        }
        own = {name: self.variant_rate(name, best) for name in self.grid.variants}
        variants = {
            name: self.point(name, rate, lora=LORA if name == "lora" else LORA | {"variant": name})
            for name, rate in own.items()
        }
        spread = statistics.stdev(seeds) if len(seeds) > 1 else float("inf")
        scores = {rank: self.study.scores.get((NEO, rank), {}) for rank in self.grid.ranks}
        return "\n".join([
            *self.lab.made("Neo's settings, one at a time"),
            f"One seed per row; over {len(seeds)} seeds of one setting KL has a standard deviation of {spread:.4f}.",
            "",
            *rate_table("rank, KL on the tuning set at", scores),
            "",
            *table("rank, at its own best rate", ranks),
            "",
            *table("alpha", alphas),
            "",
            *table("conversations, one epoch", data),
            "",
            *table("variant", {f"{name}, at {own[name]:.1e}": result for name, result in variants.items()}),
            "",
            "| claim | here |",
            "|---|---|",
            *(f"| {claim} | {told} |" for claim, told in verdicts(spread, scores, rates, ranks, data, variants)),
        ]) + "\n"  # fmt: skip

    def variant_rate(self, name: str, best: float) -> float:
        """The better one of LoRA's and a `FACTOR` less: a variant may move further at the same rate."""
        if name == "lora":
            return best
        lora = LORA | {"variant": name}
        scores = {
            rate: self.study.tuned(f"tune-{NEO}-{name}-{rate:.1e}", NEO, rate, lora) for rate in (best / FACTOR, best)
        }
        return min(scores, key=lambda rate: scores[rate])

    def point(
        self, name: str, rate: float, *, seed: int = 0, steps: int | None = None, alpha: float = 0.5,
        lora: Mapping[str, Any] = LORA,
    ) -> Result:  # fmt: skip
        """One training and what came out on held-out samples; that of a seed where it is the same."""
        as_there = (steps or self.study.budget.steps, alpha, lora) == (self.study.budget.steps, 0.5, LORA)
        name = f"{NEO}-{seed}" if as_there else f"{NEO}-{name}"
        run = self.study.trained(NEO, rate, seed, steps=steps, name=name, alpha=alpha, lora=lora)
        return self.lab.evaluate(name, [run], self.study.heldout)


def table(title: str, curve: Curve) -> list[str]:
    """A row for each setting."""
    lines = [f"| {title} | " + " | ".join(QUALITY.values()) + " |", "|---|" + "---:|" * len(QUALITY)]
    for setting, result in curve.items():
        lines.append(f"| {setting} | " + " | ".join(f"{result[name]:.4f}" for name in QUALITY) + " |")
    return lines


def verdicts(
    spread: float,
    scores: Mapping[int, Mapping[float, float]],
    rates: Mapping[int, float],
    ranks: Curve,
    data: Curve,
    variants: Curve,
) -> list[tuple[str, str]]:
    """Each claim, and whether it holds by the rule of docs/design/evidence.md; `spread` is that of seeds."""

    def falls(curve: Curve) -> str:
        kl = [result["kl_mean"] for result in curve.values()]
        steps = [after - before for before, after in itertools.pairwise(kl)]
        if all(step < -2 * spread for step in steps):
            return "holds"
        if any(step > spread for step in steps):
            return "contradicted"
        return "not shown: a difference is within twice the spread of seeds"

    chosen = [rates[rank] for rank in sorted(rates)]
    lower = chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]
    told = undecided({f"rank {rank}": of for rank, of in scores.items()}) or ("holds" if lower else "does not hold")
    plain = variants["lora"]["kl_mean"]
    worse = [name for name, result in variants.items() if result["kl_mean"] > plain + 2 * spread]
    return [
        ("a larger rank is better", falls(ranks)),
        ("a larger rank wants a lower rate", f"{told}: "
                                             + ", ".join(f"r = {rank}: {rates[rank]:.1e}" for rank in sorted(rates))),
        ("LoRA's variants do no harm", f"does not hold: {', '.join(worse)}" if worse else "holds"),
        ("more data is better", falls(data)),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
