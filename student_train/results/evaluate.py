"""How far a student is from the teacher of a dump: in one process, token by token, without gradients."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage_schemas.common.batching import length_sorted_batches
from storage_schemas.common.devices import no_such_device
from storage_schemas.common.errors import DataError, TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.rows import OK
from student_train.config import LossSection
from student_train.data.batch import TrainBatch, collate
from student_train.metrics import Closeness
from student_train.model.load import load_model
from student_train.model.student import Distilled, distilled, refuse_other_dump
from student_train.results.measures import (
    ENTROPIES,
    PLACES,
    Difference,
    TokenGroup,
    TokenMeasures,
    calibration_error,
    groups,
    measure,
    paired,
)
from student_train.results.saved import is_adapter, load_adapter, source_of


class EvalResult(Closeness):
    """What one evaluation has found: means over supervised tokens, and what is behind them."""

    kl_mean: float
    """KL(teacher || student) at the temperature, as `HeldoutResult.kl`."""
    kl_p50: float | None
    """Median over tokens; null, as the next three, with drawn targets, of which a single token says little."""
    kl_p90: float | None
    kl_p99: float | None
    kl_max: float | None
    teacher_ce_min: float | None
    """The teacher's cross-entropy, or less: tokens that are not among the entries count with the least that they can
    be. Null at other temperatures than 1, and where the dump leaves a token no probability."""
    labels_stored: float
    """Share of tokens that are among the entries."""
    top5_overlap: float | None
    """Share of the teacher's five most likely tokens that are the student's, too; of as many as the head has where it
    has fewer. Null for dumps without an exact head."""
    ece: float
    """Expected calibration error of the student's most likely token, at temperature 1, see `calibration_error`."""
    samples: int
    """Samples that they are of, those without supervised tokens included."""
    dump_samples: int
    """Samples that the dump has or will have."""
    by_position: tuple[TokenGroup, ...]
    """Tokens by their place among the supervised ones of their sample, from 0."""
    by_teacher_entropy: tuple[TokenGroup, ...]
    """Tokens by the entropy of the teacher's distribution, nats, the tail as one outcome; none with drawn targets,
    whose entropy and KL have one noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A model on a dump, token by token."""

    tokens: TokenMeasures
    sample: npt.NDArray[np.int64]
    """(n,) index of each token's sample."""
    place: npt.NDArray[np.int64]
    """(n,) place of each token among the supervised ones of its sample."""
    samples: int
    dump: Dump
    temperature: float

    def result(self) -> EvalResult:
        """What it comes to."""
        tokens, estimator = self.tokens, self.dump.provenance.estimator
        exact_head = estimator.kind != "sampled"

        def mean(values: npt.NDArray[np.generic]) -> float:
            return float(values.mean(dtype=np.float64))

        teacher_ce = mean(tokens.label_ce)
        p50, p90, p99, most = (
            np.quantile(tokens.kl, [0.5, 0.9, 0.99, 1]).tolist() if not estimator.draws else [None] * 4
        )
        return EvalResult(
            kl_mean=mean(tokens.kl), kl_p50=p50, kl_p90=p90, kl_p99=p99, kl_max=most,
            ce=mean(tokens.ce),
            teacher_ce_min=teacher_ce if self.temperature == 1.0 and math.isfinite(teacher_ce) else None,
            labels_stored=mean(tokens.label_stored),
            top1_agreement=mean(tokens.same_first) if exact_head else None,
            top5_overlap=mean(tokens.top5) if exact_head else None,
            ece=calibration_error(tokens.confidence, tokens.correct),
            acceptance_rate_min=mean(tokens.overlap_least), acceptance_rate_max=mean(tokens.overlap_most),
            supervised_tokens=len(tokens.kl), samples=self.samples, dump_samples=self.dump.provenance.corpus.samples,
            by_position=groups(tokens, self.place, PLACES, exact_head=exact_head),
            by_teacher_entropy=()
            if estimator.draws
            else groups(tokens, tokens.entropy, ENTROPIES, exact_head=exact_head),
        )  # fmt: skip

    def less(self, other: "Evaluated") -> dict[str, Difference]:
        """How far it differs from another model on the same tokens: KL, cross-entropy and acceptance rate.

        Raises:
            TemporaryError: the other one was evaluated on other samples of a growing dump.
        """
        if not np.array_equal(self.sample, other.sample):
            raise TemporaryError(
                f"the dump {self.dump.store.url} has grown between the two evaluations",
                got=f"{other.samples} and then {self.samples} samples",
                expected="the same ones for both models",
                fix="run the same command again, with --limit, or once the dump is complete",
            )
        measures = {"kl_mean": "kl", "ce": "ce", "acceptance_rate_min": "overlap_least"}
        return {
            name: paired(getattr(other.tokens, field), getattr(self.tokens, field), self.sample)
            for name, field in measures.items()
        }


def evaluate(
    model: str | Path,
    dump: Dump,
    *,
    temperature: float = 1.0,
    batch_tokens: int = 8192,
    device: str = "auto",
    limit: int | None = None,
    partial: bool = False,
    base: Path | None = None,
    revision: str | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluated:
    """Compare a model with the teacher's stored targets.

    Args:
        model: a model's directory or hub id, or the directory of a peft adapter, which names its base.
        dump: any dump of the same tokenizer.
        temperature: one that the dump was made with.
        batch_tokens: tokens of a batch with its padding, at most, unless one sample is longer.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        limit: evaluate no more than the first samples.
        partial: leave out units that are not committed yet.
        base: where an adapter's base model lies, if not where the adapter says.
        revision: of `model`, on the hub.
        trust: run the code that the model brings; that of an adapter's base if `base` names it.
        progress: called with (samples done, samples in all).

    Raises:
        MismatchError: another tokenizer, a temperature that the dump does not have, or no such model or device.
        DataError: a unit or the model is damaged, nothing is supervised, or what the model says is not finite.
        TemporaryError: not all of the samples are there yet, and `partial` is not set.
    """
    index = dump.provenance.temperature_index(temperature)
    there, total = _units(dump, limit, partial=partial)
    where = device_named(device)
    student, source, revision = load_ready(model, base, device=where, revision=revision, trust=trust)
    refuse_other_dump(student, source, revision, dump)
    module = distilled(student, [LossSection(temperature=temperature)], dump.provenance).eval()
    valid = module.head.spec.valid_vocab
    module.to(where)

    found: list[TokenMeasures] = []
    sample: list[npt.NDArray[np.int64]] = []
    place: list[npt.NDArray[np.int64]] = []
    for unit, span in there.items():
        stored = dump.read_unit(unit)
        usable = [stored.row(i) for i in range(len(span)) if stored.status[i] == OK]
        for places in length_sorted_batches([len(row.input_ids) for row in usable], budget=batch_tokens):
            batch_rows = [usable[place] for place in places]
            batch = collate(batch_rows, temperature_index=index, temperature=temperature, vocab_size=valid)
            found += _measures(module, batch.to(where), valid, temperature)
            lengths = [len(row.positions.tokens) for row in batch_rows]
            sample.append(np.repeat([row.sample_index for row in batch_rows], lengths))
            place += map(np.arange, lengths)
        if progress is not None:
            progress(span.stop, total)
    if not found:
        raise DataError(
            "the dump has no supervised tokens to evaluate on",
            got=f"{sum(map(len, there.values()))} samples without any",
            expected="at least one sample with the status `ok`",
            fix="`llm-neo inspect` counts the dump's samples by status" if dump.is_sealed() and limit is None
            else "let stage one finish, or raise the limit",
        )  # fmt: skip
    tokens, of = TokenMeasures.joined(found), np.concatenate(sample)
    finite = np.isfinite(tokens.kl) & np.isfinite(tokens.ce) & np.isfinite(tokens.confidence)
    if not finite.all():
        raise DataError(
            f"what {model} says of the dump's tokens is not finite",
            got=f"NaN or infinity at {(~finite).sum()} of {len(finite)} tokens, first in sample {of[~finite][0]}",
            expected="finite logits",
            fix="train again at a lower learning rate; weights in float16 give in bfloat16 or float32",
        )
    return Evaluated(
        tokens=tokens, sample=of, place=np.concatenate(place), samples=sum(map(len, there.values())), dump=dump,
        temperature=temperature,
    )  # fmt: skip


def _units(dump: Dump, limit: int | None, *, partial: bool) -> tuple[dict[int, range], int]:
    """Samples to evaluate on in each unit that is there, and how many samples were asked for.

    Raises:
        TemporaryError: not all of them are there yet, and `partial` is not set.
    """
    total = min(dump.provenance.corpus.samples, limit or dump.provenance.corpus.samples)
    spans = [dump.provenance.unit_range(unit) for unit in range(dump.provenance.units)]
    there = {
        unit: range(span.start, min(span.stop, total))
        for unit, span in enumerate(spans)
        if span.start < total and (dump.is_sealed() or dump.read_record(unit) is not None)
    }
    samples = sum(map(len, there.values()))
    if samples < total and not partial:
        raise TemporaryError(
            f"the dump {dump.store.url} is not complete yet",
            got=f"{samples} of {total} samples",
            expected="all of them",
            fix="let stage one finish, or give --partial (in Python `partial=True`) to evaluate on what there is",
        )
    return there, total


@torch.no_grad()
def _measures(module: Distilled, batch: TrainBatch, valid: int | None, temperature: float) -> Iterator[TokenMeasures]:
    """Of a batch's tokens, one chunk of logits at a time."""
    hidden, targets, size = module.hidden(batch), batch.targets, module.head.spec.chunk_tokens
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        yield measure(module.head(hidden[chunk], None)[0][:, :valid], targets[chunk], temperature=temperature)


def load_ready(
    model: str | Path, base: Path | None, *, device: torch.device, revision: str | None = None, trust: bool = False
) -> tuple[Any, str, str | None]:
    """A model, or an adapter on its base, to be run on a device: in fp32 on a CPU, else as it is stored.

    Args:
        model: directory or hub id of a model, or directory of a peft adapter.
        base: where an adapter's base model lies, if not where the adapter says.
        device: where it shall run; it is not moved there.
        revision: of a model on the hub; an adapter names that of its base.
        trust: run the code that the model brings; that of an adapter's base if `base` names it.

    Returns:
        It, and name and revision of the model itself.
    """
    source, pinned = source_of(model, base, trust=trust)
    revision = pinned or revision
    dtype = torch.float32 if device.type == "cpu" else "auto"
    loaded: Any = load_model(source, revision, dtype=dtype, trust=trust)
    ready = load_adapter(loaded, Path(model)) if is_adapter(model) else loaded.eval()
    return ready, source, revision


def device_named(name: str) -> torch.device:
    """A device by its name; `auto` is a GPU, if there is one. Raises MismatchError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # `meta` holds no numbers.
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise no_such_device(name, error, setting="--device") from error
