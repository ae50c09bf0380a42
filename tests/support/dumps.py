"""Dumps of random targets, made without a model: what the storage tests write and damage."""

import hashlib
from pathlib import Path

import numpy as np

from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.provenance import (
    CorpusIdentity,
    EngineIdentity,
    MadeBy,
    Provenance,
    TeacherIdentity,
    TokenizerIdentity,
)
from storage_schemas.records import CommitRecord, record_key
from storage_schemas.rows import EMPTY, NONFINITE, OK, Row
from storage_schemas.targets import Targets
from storage_schemas.writer import DumpWriter

HASH = "0" * 64
ESTIMATORS: tuple[Estimator, ...] = (
    TopK(k=8),
    Adaptive(kind="adaptive", k_max=6, tail_draws=4),
    Sampled(kind="sampled", draws=12),
)
"""One of each kind."""


def some_provenance(
    *,
    samples: int = 10,
    samples_per_unit: int = 4,
    lm_head_rows: int = 100,
    max_length: int = 128,
    vocab_sha256: str = HASH,
    estimator: Estimator | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    **changes: object,
) -> Provenance:
    """A run.json of a made-up teacher."""
    provenance = Provenance(
        teacher=TeacherIdentity(
            config_sha256=HASH, weights_sha256={"model.safetensors": HASH}, dtype="float32", lm_head_rows=lm_head_rows
        ),
        tokenizer=TokenizerIdentity(vocab_size=lm_head_rows, vocab_sha256=vocab_sha256, chat_template_sha256=None),
        corpus=CorpusIdentity(
            fingerprint=HASH, samples=samples, mask="assistant", max_length=max_length, too_long="truncate"
        ),
        samples_per_unit=samples_per_unit,
        estimator=estimator or TopK(k=8),
        temperatures=temperatures,
        logsumexp=True,
        logprob_step=0.0625,
        max_kl=1e-4,
        engine=EngineIdentity(name="test", arguments={}),
        made_by=MadeBy(model="teacher", config_file_sha256=HASH, versions={"test": "1"}),
    )
    return provenance.model_copy(update=changes)


def dense_targets(
    logits: np.ndarray, *, k: int, temperatures: tuple[float, ...] = (1.0,), draws: int = 0, seed: int = 0
) -> Targets:
    """Targets of (n, V) float64 logits, written from the definition: the k largest, the tail, and optional draws."""
    n, vocab = logits.shape
    lse = np.stack([_logsumexp(logits / t) for t in temperatures], axis=1)
    logp = logits - lse[:, :1]
    head = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)
    outside = np.ones((n, vocab), bool)
    np.put_along_axis(outside, head, False, axis=1)
    tail = np.stack(
        [_logsumexp(np.where(outside, logits / t, -np.inf)) - lse[:, i] for i, t in enumerate(temperatures)], axis=1
    )
    rng = np.random.default_rng(seed)
    ids, logprobs, counts, offsets = [], [], [], [0]
    for i in range(n if draws else 0):
        p_tail = np.where(outside[i], np.exp(logp[i]), 0.0)
        drawn, times = np.unique(rng.choice(vocab, size=draws, p=p_tail / p_tail.sum()), return_counts=True)
        ids += [*head[i], *drawn]
        logprobs += [*logp[i][head[i]], *logp[i][drawn]]
        counts += [*[0] * k, *times]
        offsets.append(len(ids))
    if not draws:
        ids, logprobs, offsets = (
            head.reshape(-1),
            np.take_along_axis(logp, head, axis=1).reshape(-1),
            np.arange(n + 1) * k,
        )
    return Targets(
        offsets=np.array(offsets, np.int64),
        ids=np.array(ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        head_size=np.full(n, k, np.int32),
        counts=np.array(counts, np.int32) if draws else None,
        tail_logprob=tail.astype(np.float32),
        logsumexp=lse.astype(np.float32),
    )


def unit_rows(provenance: Provenance, unit: int, *, seed: int = 0) -> list[Row]:
    """The rows of one unit, of all kinds: ordinary ones, one without supervised tokens, one with non-finite logits."""
    rows = []
    for index in provenance.unit_range(unit):
        rng = np.random.default_rng([seed, index])
        length = int(rng.integers(2, 12))
        ids = rng.integers(0, provenance.teacher.lm_head_rows, length).astype(np.int32)
        mask = rng.random(length) < 0.6
        mask[0] = False
        mask[-1] = True
        status = NONFINITE if index % 7 == 5 else EMPTY if index % 7 == 6 else OK
        if status == EMPTY:
            mask[:] = False
        targets = None
        if status == OK:
            logits = rng.normal(0, 3, (int(mask.sum()), provenance.teacher.lm_head_rows))
            targets = random_targets(provenance, logits, seed=index)
        rows.append(
            Row(sample_index=index, sample_id=f"sample-{index}", status=status, input_ids=ids, loss_mask=mask,
                targets=targets)
        )  # fmt: skip
    return rows


def random_targets(provenance: Provenance, logits: np.ndarray, *, seed: int) -> Targets:
    """Targets of the run's estimator, without early ending."""
    match provenance.estimator:
        case TopK(k=k):
            return dense_targets(logits, k=min(k, logits.shape[1]), temperatures=provenance.temperatures)
        case Adaptive(k_max=k, tail_draws=draws):
            return dense_targets(logits, k=k, temperatures=provenance.temperatures, draws=draws, seed=seed)
        case Sampled(draws=draws):
            return dense_targets(logits, k=0, temperatures=provenance.temperatures, draws=draws, seed=seed)


TOKENIZER = {"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}"}


def make_dump(
    url: str | Path, provenance: Provenance | None = None, *, seal: bool = True, options: dict[str, str] | None = None
) -> Provenance:
    """A whole dump of random targets."""
    provenance = provenance or some_provenance()
    writer = DumpWriter.open(str(url), provenance, options=options)
    writer.put_tokenizer(TOKENIZER)
    for unit in range(provenance.units):
        assert writer.commit_unit(unit, unit_rows(provenance, unit)) is not None
    assert writer.seal() if seal else True
    return provenance


def record_of(folder: Path, unit: int) -> CommitRecord:
    """A unit's commit record, as it stands in a local dump."""
    return CommitRecord.from_json((folder / record_key(unit)).read_bytes(), name="record")


def replace_unit(url: Path, provenance: Provenance, unit: int, data: bytes, **claims: object) -> None:
    """Put `data` in the place of a unit's file and make its commit record say so: a hostile or broken writer."""
    record = record_of(url, unit)
    changes = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **claims}
    (url / record.file).write_bytes(data)
    (url / record_key(unit)).write_bytes(record.model_copy(update=changes).to_json())


def metadata_of(provenance: Provenance, unit: int) -> dict[str, str]:
    """Key-value metadata of a unit's file."""
    return {
        "llm_neo.format_version": "1",
        "llm_neo.fingerprint": provenance.fingerprint,
        "llm_neo.unit": str(unit),
        "llm_neo.run": provenance.to_json().decode(),
    }


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(x - safe[:, None]).sum(axis=1))
