"""The dataset card: README.md of a dump, so that hub viewers and `datasets` open data/ as it is."""

from storage_schemas.provenance import Provenance
from storage_schemas.records import Seal

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- knowledge-distillation
- teacher-logits
- llm-neo
---

# Teacher distributions of {run.origin.model}

| | |
|---|---|
| teacher | `{run.origin.model}`, revision {revision}, {run.teacher.dtype} |
| estimator | `{estimator}` |
| temperatures | {temperatures} |
| samples | {seal.rows:,} in {seal.units:,} units |
| supervised tokens | {seal.supervised_tokens:,} |
| bytes per supervised token | {per_token:.1f} |
| fingerprint | `{run.fingerprint}` |

One row is one sample. Per supervised token `t` (`loss_mask[t]`), in order, `target_ids` and `target_logprobs` hold the
teacher's distribution of token `t` given the tokens before it: absolute token ids and natural log-probabilities at
T = 1. The first `head_size` entries are exact, `target_counts` says how often each of the others was drawn.
`tail_logprob` and `logsumexp` hold one value per temperature: the log of the mass outside the head, and the log-sum-exp
of the raw logits. {use}
{precision}
```sql
-- DuckDB: the teacher's probability of the most likely token that is stored, by token
SELECT sample_index, list_transform(target_logprobs, lambda t: exp(list_max(t))) FROM 'data/*.parquet';
```
"""

_DRAWS = "An entry that was drawn c times weighs `exp(tail_logprob) * c / sum(target_counts)`, at T = 1 alone."

_IMPORTED = """
These distributions were imported from a store of the layout `{layout}`: run.json has what was claimed of its numbers
(`engine.arguments`), and no hash of the teacher, which this project did not run.
"""

_PRECISION = """
The teacher's weights and body computed in {dtype}. How far these distributions are from those of the same teacher in
float32 is in no number of this dump: `fidelity` in the commit records is what storing added alone. Measured once, on
SmolLM2-135M-Instruct in bfloat16, the mean KL divergence was 8.1e-4 nats per token.
"""


def dataset_card(provenance: Provenance, seal: Seal) -> str:
    """The card of a sealed dump."""
    return _CARD.format(
        run=provenance,
        seal=seal,
        revision=provenance.origin.revision
        or ("of a model in memory" if provenance.teacher.in_memory else "of a local directory"),
        estimator=provenance.estimator.model_dump(),
        use=_DRAWS if provenance.estimator.draws else "Rescale the head to `1 - exp(tail_logprob)` before use.",
        temperatures=", ".join(map(str, provenance.temperatures)),
        per_token=seal.bytes / max(seal.supervised_tokens, 1),
        precision=_precision(provenance),
    )


def _precision(provenance: Provenance) -> str:
    if provenance.imported:
        return _IMPORTED.format(layout=provenance.imported)
    dtype = provenance.teacher.dtype
    return "" if dtype == "float32" else _PRECISION.format(dtype=dtype)
