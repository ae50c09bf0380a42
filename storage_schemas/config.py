"""The sections of the configuration that both stages read, because the dump is where they meet."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from storage_schemas.common.frozen import FrozenModel
from storage_schemas.stores.address import DumpUrl


class DumpSection(FrozenModel):
    """Where the dump lies and how it is cut."""

    url: DumpUrl
    """Local path, `file://`, `s3://bucket/prefix`, `gs://` or `az://`: the only thing that the two stages share.
    Training reads `hf://datasets/USER/NAME` too, to which `llm-neo push` uploads a dump."""
    samples_per_unit: int = Field(512, ge=1)
    """Samples per shard file. A shard is one unit of work, and is fetched and decoded as a whole."""
    logprob_step: float = Field(0.0625, ge=0.0, le=1.0)
    """Quantization step in nats of stored log-probs from -4 to -2, doubled per octave below; refined until the error is
    within `max_kl`. 0: exact."""
    max_kl: float = Field(1e-4, gt=0.0)
    """Largest quantization error: mean KL(exact || stored) in nats, over the tokens of a unit, at every temperature."""
    logsumexp: bool = True
    """Store log sum exp(z/T) of the raw logits per temperature, from which logits can be recovered."""
    storage_options: dict[str, str] = {}
    """Passed to the object store, e.g. `{endpoint: "http://127.0.0.1:8333"}`. Secrets belong into the environment."""


class TopK(FrozenModel):
    """The k largest probabilities, ending early once they hold `mass`; one bucket for the rest. Exact bucketed KL."""

    kind: Literal["topk"] = "topk"
    k: int = Field(64, ge=1)
    """At most this many entries per token."""
    mass: float = Field(0.999, gt=0.0, le=1.0)
    """End the head once it holds this much probability, as top-p does. 1.0: always k entries."""
    draws: ClassVar[int] = 0
    """Draws per token."""


class Adaptive(FrozenModel):
    """Fewest entries that reach `mass`, then systematic draws from the tail: an unbiased full-vocabulary gradient."""

    kind: Literal["adaptive"]
    mass: float = Field(0.9, gt=0.0, le=1.0)
    """Probability that the exact head shall hold, as in top-p."""
    k_min: int = Field(1, ge=1)
    """Head entries per token, at least."""
    k_max: int = Field(16, ge=1)
    """Head entries per token, at most."""
    tail_draws: int = Field(4, ge=1)
    """Systematic draws from the tail per token."""
    seed: int = 0
    """Seed of the draws; a draw depends on (seed, sample_index, position) alone."""

    @property
    def draws(self) -> int:
        """Draws per token."""
        return self.tail_draws

    @model_validator(mode="after")
    def _k_min_is_least(self) -> Self:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min must not be above k_max ({self.k_max}), got {self.k_min}")
        return self


class Sampled(FrozenModel):
    """n independent draws from p, with counts (random-sampling KD, "Sparse Logit Sampling", ACL 2025)."""

    kind: Literal["sampled"]
    draws: int = Field(50, ge=1)
    """Draws per token: the paper's sampling rounds."""
    seed: int = 0
    """Seed of the draws; a draw depends on (seed, sample_index, position) alone."""


Estimator = Annotated[TopK | Adaptive | Sampled, Field(discriminator="kind")]
"""Targets with `draws` are valid at temperature 1 alone, and unbiased for the forward KL alone."""


def described(estimator: Estimator) -> str:
    """An estimator for people: `topk (k 64, mass 0.999)`."""
    parameters = ", ".join(f"{key} {value}" for key, value in estimator.model_dump(exclude={"kind"}).items())
    return f"{estimator.kind} ({parameters})"


def retempered(estimator: Estimator, *temperatures: float) -> bool:
    """Whether one of these is a temperature that targets of the estimator cannot be used at: draws are made at 1."""
    return estimator.draws > 0 and any(temperature != 1.0 for temperature in temperatures)


def _usable(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    if not temperatures or temperatures[0] != 1.0:
        raise ValueError("the first temperature must be 1.0; add others after it")
    if len(set(temperatures)) != len(temperatures) or min(temperatures) <= 0:
        raise ValueError("temperatures must be positive and different from each other")
    return temperatures


Temperatures = Annotated[tuple[float, ...], AfterValidator(_usable)]
"""Temperatures that the tail mass is stored for; training can use these and no others. 1.0 comes first."""
