"""`make reproduce`: the paper's four methods on one corpus, as docs/design/evidence.md lays down.

Three hours on two quiet cores; what is done stays done, so it may be stopped and started at will. Ends with
`reproduce.md` in its directory: every number, and of the claims that it tests whether they hold here.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from evidence import EVALUATION, Lab, Result, interval, parser, prepared, split, spread
from pydantic import ValidationError

from storage_schemas.common.exits import Exit
from storage_schemas.common.publish import publish
from storage_schemas.config import TopK
from student_train.results.measures import by_seed

METHODS = {"full_sft": 2e-5, "lora_sft": 2e-4, "full_kd": 2e-5, "lora_kd": 2e-4}
"""Method -> least learning rate of its grid."""
NAMES = {"full_sft": "SFT", "lora_sft": "LoRA", "full_kd": "KD", "lora_kd": "Neo"}
CHOSEN_BY = {"full_sft": "ce", "lora_sft": "ce", "full_kd": "kl_mean", "lora_kd": "kl_mean"}
FACTOR = 3.0
LORA = {"r": 16}
QUALITY = {"kl_mean": "KL", "ce": "CE", "top1_agreement": "top-1", "ece": "ECE"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is run."""

    steps: int = 150
    tuning_steps: int = 50
    rates: int = 3
    first_rate: int = 0
    """How many of the least rates of `METHODS`' grids are left out."""
    extensions: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_samples: int = 200
    conversations: int | None = None
    k: int = 64


SMOKE = Budget(
    steps=4, tuning_steps=2, rates=1, extensions=0, seeds=(0,), tuning_samples=8, conversations=48, k=8,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table."""
    arguments = parser("make reproduce", __doc__, out="runs/reproduce")
    chosen = arguments.parse_args(argv)
    lab, train, heldout = prepared(arguments, chosen)
    budget = SMOKE if chosen.smoke else Budget()
    print(Study(lab, train, heldout, budget).run())


class Study:
    """The four methods: learning rates, seeds, table."""

    def __init__(self, lab: Lab, train: Path, heldout: Path, budget: Budget) -> None:
        """Make the dumps."""
        self.lab, self.budget = lab, budget
        self.scores: dict[tuple[str, int], dict[float, float]] = {}
        """Method and rank -> learning rate -> what it came to on the tuning set."""
        mine, tuning = split(train, lab.folder, held=budget.tuning_samples, limit=budget.conversations)
        self.dump = lab.dump("dump", mine, TopK(k=budget.k, mass=1.0))
        self.tuning = lab.dump("dump-tuning", tuning, TopK(k=4 * budget.k, mass=1.0))
        self.heldout = lab.dump("dump-heldout", heldout, TopK(k=4 * budget.k, mass=1.0))

    def run(self) -> str:
        """All of it; returns the report, which lies beside the results."""
        budget = self.budget
        evaluations = len(METHODS) * (budget.rates + len(budget.seeds)) + 7
        self.lab.plan(len(METHODS) * (budget.rates * budget.tuning_steps + len(budget.seeds) * budget.steps))
        self.lab.plan(EVALUATION * evaluations)
        before = self.lab.evaluate("before", [self.lab.untrained()], self.heldout)
        rates = {method: self.rate(method) for method in METHODS}
        runs: dict[str, list[Result]] = {method: [] for method in METHODS}
        # Methods alternate, so that a slow hour of the machine is no method's alone.
        for seed in self.budget.seeds:
            for method in METHODS:
                runs[method].append(self.trained(method, rates[method], seed))
        found = {
            method: [self.lab.evaluate(f"{method}-{seed}", [run], self.heldout)
                     for seed, run in zip(self.budget.seeds, runs[method], strict=True)]
            for method in METHODS
        }  # fmt: skip
        pairs = {
            other: self.lab.evaluate(f"{other}-and-neo", [runs[other][0], runs["lora_kd"][0]], self.heldout)
            for other in ("full_sft", "lora_sft", "full_kd")
        }
        scores = {method: self.scores.get((method, LORA["r"]), {}) for method in METHODS}
        text = "\n".join(
            [*self.lab.made("The paper's four methods"), report(before, rates, scores, runs, found, pairs)]
        )
        publish(self.lab.folder / "reproduce.md", text)
        neo_first = sorted(METHODS, key=lambda method: method != "lora_kd")
        self.lab.page([pair for method in neo_first for pair in zip(runs[method], found[method], strict=True)], before)
        return text

    def trained(
        self, method: str, rate: float, seed: int, *, steps: int | None = None, name: str = "", alpha: float = 0.5,
        lora: Mapping[str, Any] = LORA,
    ) -> Result:  # fmt: skip
        """One training; LoRA's settings are for the methods that have it."""
        return self.lab.train(
            name or f"{method}-{seed}",
            self.dump,
            self.heldout,
            student={"lora": dict(lora)} if method.startswith("lora") else {},
            loss={"alpha": alpha},
            method=method,
            learning_rate=rate,
            seed=seed,
            max_steps=steps or self.budget.steps,
        )

    def rate(self, method: str, rank: int = LORA["r"]) -> float:
        """The best learning rate on the tuning set; an end of the grid is not the best one before the next is worse."""
        if self.budget.rates == 1:
            return METHODS[method]
        scores = self.scores.setdefault((method, rank), {})

        def score(rate: float) -> None:
            name = f"tune-{method}-{rate:.1e}" if rank == LORA["r"] else f"tune-{method}-r{rank}-{rate:.1e}"
            scores[rate] = self.tuned(name, method, rate, {"r": rank})

        for step in range(self.budget.rates):
            score(METHODS[method] * FACTOR ** (self.budget.first_rate + step))
        for _ in range(self.budget.extensions):
            best = min(scores, key=lambda rate: scores[rate])
            if best not in (min(scores), max(scores)):
                break
            self.lab.plan(self.budget.tuning_steps + EVALUATION)
            score(best * FACTOR if best == max(scores) else best / FACTOR)
        return min(scores, key=lambda rate: scores[rate])

    def tuned(self, name: str, method: str, rate: float, lora: Mapping[str, Any]) -> float:
        """What a short training comes to on the tuning set; infinity if it diverges."""
        try:
            run = self.trained(method, rate, 0, steps=self.budget.tuning_steps, name=name, lora=lora)
            score: float = self.lab.evaluate(name, [run], self.tuning)[CHOSEN_BY[method]]
        except SystemExit as error:
            if error.code != Exit.BAD_DATA:
                raise
            return math.inf
        except ValidationError:  # No result holds a NaN.
            return math.inf
        self.lab.forget(name)
        return score


def rate_table(title: str, scores: Mapping[Any, Mapping[float, float]]) -> list[str]:
    """A row per method or rank: CE or KL on the tuning set by learning rate."""
    rates = sorted({rate for of_one in scores.values() for rate in of_one})
    lines = [f"| {title} | " + " | ".join(f"{rate:.1e}" for rate in rates) + " |", "|---|" + "---:|" * len(rates)]
    for name, of_one in scores.items():
        cells = [f"{of_one[rate]:.4f}" if rate in of_one else "" for rate in rates]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def undecided(scores: Mapping[str, Mapping[float, float]]) -> str | None:
    """Why a claim on learning rates is not decided, if a best one is the least or the greatest of those tried."""
    ends = [name for name, of in scores.items() if of and min(of, key=lambda rate: of[rate]) in (min(of), max(of))]
    return f"not decided, the best rate of {', '.join(ends)} lies at the end of its grid" if ends else None


def report(
    before: Result,
    rates: dict[str, float],
    scores: dict[str, dict[float, float]],
    runs: dict[str, list[Result]],
    found: dict[str, list[Result]],
    pairs: dict[str, Any],
) -> str:
    """The tables, and of each claim whether it holds here."""
    seeds = len(found["lora_kd"])
    lines = [
        "| | learning rate | " + " | ".join(QUALITY.values()) + " |",
        "|---|---:|" + "---:|" * len(QUALITY),
        "| before | | " + " | ".join(f"{before[name]:.4f}" for name in QUALITY) + " |",
    ]
    for method, results in found.items():
        cells = [spread([result[name] for result in results]) for name in QUALITY]
        lines.append(f"| {NAMES[method]} | {rates[method]:.1e} | " + " | ".join(cells) + " |")
    tokens = before["supervised_tokens"]
    told = {f"{NAMES[method]}, {'CE' if CHOSEN_BY[method] == 'ce' else 'KL'}": of for method, of in scores.items()}
    lines += [
        "",
        f"Mean and standard deviation of {seeds} seeds, on {tokens:,} held-out tokens; KL and CE in nats. A student",
        "whose weights are all trained is evaluated as it is stored, in bfloat16, an adapter in float32.",
        "",
        *rate_table("on the tuning set, at", told),
        "",
        "Seconds per step: the median of all steps and seeds. Memory: the most that the training's process held, with",
        "the copy from which a checkpoint is written; the median of the seeds. The verdicts on time are medians over",
        "steps of the ratio on the same samples, not ratios of these medians.",
        "",
        "| | seconds per step | peak memory, GiB | optimizer state, MB | trained parameters |",
        "|---|---:|---:|---:|---:|",
    ]
    pace = {method: [run["step_seconds"] for run in results] for method, results in runs.items()}
    for method, results in runs.items():
        lines.append(
            f"| {NAMES[method]} | {statistics.median(chain.from_iterable(pace[method])):.2f} | {_memory(results):.2f} "
            f"| {results[0]['state_bytes'] / 1e6:,.0f} | {results[0]['trained_parameters']:,} |"
        )
    lines += ["", "| difference | KL, by seed | CE, by seed | KL, by sample (seed 0) |", "|---|---:|---:|---:|"]
    for other in ("full_sft", "lora_sft", "full_kd"):
        by = [
            interval(by_seed(*([r[name] for r in found[m]] for m in (other, "lora_kd")))) for name in ("kl_mean", "ce")
        ]
        sample = pairs[other]["kl_mean"] if other in pairs else None
        told = interval((sample["difference"], sample["interval"])) if sample else ""
        lines.append(f"| Neo - {NAMES[other]} | {by[0]} | {by[1]} | {told} |")
    lines += [
        "",
        "| claim | here |",
        "|---|---|",
        *(f"| {claim} | {held} |" for claim, held in verdicts(rates, scores, runs, pace, found)),
    ]
    return "\n".join(lines) + "\n"


def verdicts(
    rates: dict[str, float],
    scores: dict[str, dict[float, float]],
    runs: dict[str, list[Result]],
    pace: dict[str, list[list[float]]],
    found: dict[str, list[Result]],
) -> list[tuple[str, str]]:
    """Each claim, and whether it holds by the rule of docs/design/evidence.md; `pace` is by method and seed."""

    def values(method: str, name: str) -> list[float]:
        return [result[name] for result in found[method]]

    def below(other: str, name: str) -> str:
        _, ends = by_seed(values(other, name), values("lora_kd", name))
        if ends is None:
            return "one seed says nothing"
        return "holds" if ends[1] < 0 else "contradicted" if ends[0] > 0 else "not shown: the interval contains 0"

    mean = {method: statistics.fmean(values(method, "kl_mean")) for method in found}
    gained, kept = mean["full_sft"] - mean["full_kd"], mean["full_sft"] - mean["lora_kd"]
    share = f"{kept / gained:.0%} of KD's gain over SFT in KL" if gained > 0 else "KD gains nothing over SFT in KL"

    def ratio(other: str) -> float:
        """Of the time of a step of Neo to that of another method on the same samples: the median."""
        both = [
            pair for one, two in zip(pace["lora_kd"], pace[other], strict=True) for pair in zip(one, two, strict=False)
        ]
        return statistics.median(neo / theirs for neo, theirs in both)

    cost = ratio("lora_sft"), _memory(runs["lora_kd"]) / _memory(runs["lora_sft"])
    same_state = runs["lora_kd"][0]["state_bytes"] == runs["lora_sft"][0]["state_bytes"]
    against_kd = ratio("full_kd"), _memory(runs["lora_kd"]) / _memory(runs["full_kd"])
    state = runs["lora_kd"][0]["state_bytes"] / runs["full_kd"][0]["state_bytes"]
    tenfold = [rates[f"lora_{loss}"] / rates[f"full_{loss}"] for loss in ("sft", "kd")]
    cheaper = against_kd[1] < 1 and state < 1
    ten = undecided({NAMES[method]: of for method, of in scores.items()}) or _held(all(3 <= x <= 30 for x in tenfold))
    return [
        ("Neo is closer to the teacher than LoRA (KL)", below("lora_sft", "kl_mean")),
        ("Neo is closer to the teacher than SFT (KL)", below("full_sft", "kl_mean")),
        ("Neo predicts held-out text better than LoRA (CE)", below("lora_sft", "ce")),
        ("Neo has the quality of KD", f"{_held(gained > 0 and kept >= 0.9 * gained)}: {share}"),
        ("Neo costs what LoRA costs", f"{_held(max(cost) <= 1.05 and same_state)}: {cost[0]:.2f} of the time, "
                                      f"{cost[1]:.2f} of the memory, state {'the same' if same_state else 'another'}"),
        ("Neo costs less than KD", f"{_held(cheaper)}: {against_kd[0]:.2f} of the time, {against_kd[1]:.2f} of the "
                                   f"memory, {state:.3f} of the state"),
        ("low rank wants ten times the learning rate", f"{ten}: {tenfold[0]:.2g} (CE), {tenfold[1]:.2g} (with KL)"),
    ]  # fmt: skip


def _held(whether: bool) -> str:
    return "holds" if whether else "does not hold"


def _memory(results: Sequence[Result]) -> float:
    return statistics.median(result["peak_rss_bytes"] for result in results) / 2**30


if __name__ == "__main__":
    main()
