"""How far a student is from the teacher of a dump: in one process, through the same fused head, without gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from storage_schemas.common.batching import length_sorted_batches
from storage_schemas.common.devices import no_such_device
from storage_schemas.common.errors import DataError, TemporaryError
from storage_schemas.reader import Dump
from storage_schemas.rows import OK
from student_train.config import LossSection
from student_train.data.batch import collate
from student_train.metrics import Closeness, closeness
from student_train.model.head import SUMS
from student_train.model.load import load_model
from student_train.model.student import distilled, refuse_other_dump
from student_train.results.saved import is_adapter, load_adapter, source_of


class EvalResult(Closeness):
    """What one evaluation has found."""

    kl_mean: float
    """KL(teacher || student) at the temperature, as `HeldoutResult.kl`."""
    samples: int
    """Samples that they are of, those without supervised tokens included."""
    dump_samples: int
    """Samples that the dump has or will have."""


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
) -> EvalResult:
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
        DataError: a unit or the model is damaged, or nothing is supervised.
        TemporaryError: not all of the samples are there yet, and `partial` is not set.
    """
    index = dump.provenance.temperature_index(temperature)
    total = min(dump.provenance.corpus.samples, limit or dump.provenance.corpus.samples)
    spans = [dump.provenance.unit_range(unit) for unit in range(dump.provenance.units)]
    there = {
        unit: range(span.start, min(span.stop, total))
        for unit, span in enumerate(spans)
        if span.start < total and (dump.sealed() or dump.record(unit) is not None)
    }
    samples = sum(map(len, there.values()))
    if samples < total and not partial:
        raise TemporaryError(
            f"the dump {dump.store.url} is not complete yet",
            got=f"{samples} of {total} samples",
            expected="all of them",
            fix="let stage one finish, or give --partial (in Python `partial=True`) to evaluate on what there is",
        )
    where = device_named(device)
    student, source, revision = load_ready(model, base, device=where, revision=revision, trust=trust)
    refuse_other_dump(student, source, revision, dump)
    module = distilled(student, [LossSection(temperature=temperature)], dump.provenance).eval()
    valid = module.head.spec.valid_vocab
    module.to(where)

    sums, tokens = torch.zeros(SUMS, dtype=torch.float64), 0
    for unit, span in there.items():
        stored = dump.read_unit(unit)
        usable = [stored.row(i) for i in range(len(span)) if stored.status[i] == OK]
        for places in length_sorted_batches([len(row.input_ids) for row in usable], budget=batch_tokens):
            rows = [usable[place] for place in places]
            batch = collate(rows, temperature_index=index, temperature=temperature, vocab_size=valid)
            with torch.no_grad():
                sums += module(batch.to(where))[1].cpu()
            tokens += len(batch.targets)
        if progress is not None:
            progress(span.stop, total)
    if not tokens:
        raise DataError(
            "the dump has no supervised tokens to evaluate on",
            got=f"{len(dump.records())} committed units",
            expected="at least one sample with the status `ok`",
            fix="let stage one finish, or raise the limit",
        )
    kl, means = closeness(sums.tolist(), tokens, exact_head=dump.provenance.estimator.kind != "sampled")
    return EvalResult(kl_mean=kl, **means, samples=samples, dump_samples=dump.provenance.corpus.samples)


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
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise no_such_device(name, error, setting="--device") from error
