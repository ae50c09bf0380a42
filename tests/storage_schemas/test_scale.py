"""What reading costs: a hundred thousand units to start with, and memory while one unit is decoded."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.dumps import dense_targets, make_dump, metadata_of, replace_unit, some_provenance

from storage_schemas import codec
from storage_schemas.config import Adaptive, Estimator, TopK
from storage_schemas.records import CommitRecord, Seal, data_key, manifest_bytes, totals
from storage_schemas.rows import OK, UnitRows
from storage_schemas.stores.store import Store

UNITS = 100_000
READ = """
import sys, time
from storage_schemas.reader import Dump
from storage_schemas.stores.store import Store

requests = []
for name in ("get_if_present", "size", "list"):
    ask = getattr(Store, name)
    setattr(Store, name, lambda self, key, ask=ask, **limit: requests.append(key) or ask(self, key, **limit))
start = time.process_time()
dump = Dump.open(sys.argv[1])
assert dump.is_sealed()
records = dump.read_records()
assert len(records) == 100_000
assert dump.read_record(77_777).unit == 77_777
seconds = time.process_time() - start
memory = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(seconds, int(memory) / 1024, len(requests))
"""


@pytest.mark.slow
def test_a_reader_of_a_hundred_thousand_units(tmp_path: Path) -> None:
    provenance = some_provenance(samples=4 * UNITS, samples_per_unit=4)
    records = {}
    for unit in range(UNITS):
        digest = hashlib.sha256(str(unit).encode()).hexdigest()
        records[unit] = CommitRecord(
            fingerprint=provenance.fingerprint,
            unit=unit,
            file=data_key(unit, digest[:32]),
            bytes=10**7,
            sha256=digest,
            rows=4,
            tokens=100,
            supervised_tokens=50,
            entries=400,
            max_id=99,
            statuses={"ok": 4},
            mean_kept_mass=0.98,
            mean_entropy=1.2 + unit / 1e6,
            fidelity=(5e-5 + unit / 1e11,),
            logprob_step=0.0625,
        )
    manifest = manifest_bytes(records)
    seal = Seal(
        fingerprint=provenance.fingerprint,
        units=UNITS,
        statuses={"ok": 4 * UNITS},
        tokenizer={},
        records_sha256="0" * 64,
        manifest=f"manifest-{hashlib.sha256(manifest).hexdigest()}.parquet",
        **totals(records),
    )
    store = Store(str(tmp_path))
    for key, data in {"run.json": provenance.to_json(), seal.manifest: manifest, "SEALED.json": seal.to_json()}.items():
        assert store.put_new(key, data)
    output = subprocess.check_output([sys.executable, "-c", READ, str(tmp_path)], text=True)
    seconds, megabytes, requests = map(float, output.split())
    assert seconds <= 5
    assert megabytes <= 300
    assert requests <= 300


DECODE = """
import sys
from storage_schemas.reader import Dump

def resident(which):
    return int(next(line for line in open("/proc/self/status") if line.startswith(which)).split()[1]) * 1024

Dump.open(sys.argv[1]).read_unit(1)  # What pyarrow needs once is not what a unit costs.
before = resident("VmRSS")
unit = Dump.open(sys.argv[1]).read_unit(0)
peak = resident("VmHWM") - before
arrays = [unit.input_ids, unit.loss_mask, *(getattr(unit.targets, name) for name in unit.targets.__slots__)]
print(peak / sum(array.nbytes for array in arrays if array is not None))
"""


@pytest.mark.parametrize("estimator", [TopK(k=64), Adaptive(kind="adaptive", k_max=60)], ids=lambda e: e.kind)
def test_a_unit_is_decoded_in_three_times_its_memory(estimator: Estimator, tmp_path: Path) -> None:
    """Peak resident memory, the file's own bytes included, for 45,000 tokens with 64 entries each."""
    provenance = some_provenance(
        estimator=estimator, samples=40, samples_per_unit=20, lm_head_rows=2000, logprob_step=0.0
    )
    provenance = provenance.model_copy(update={"corpus": provenance.corpus.model_copy(update={"max_length": 10_000})})
    make_dump(tmp_path, provenance, seal=False)
    few = dense_targets(np.random.default_rng(0).normal(0, 3, (100, 2000)), k=64)
    copies, n = 450, 45_000
    draws = None if estimator.kind == "topk" else 4
    targets = replace(
        few,
        offsets=np.arange(n + 1) * 64,
        ids=np.tile(few.ids, copies),
        logprobs=codec.round_logprobs(np.tile(few.logprobs, copies), 0.0625),
        head_size=np.full(n, 64 - (draws or 0), np.int32),
        counts=None if draws is None else np.tile(np.arange(64) >= 60, n).astype(np.int32),
        tail_logprob=np.tile(few.tail_logprob, (copies, 1)),
        logsumexp=np.tile(few.logsumexp, (copies, 1)),
    )
    length = n // 20 + 1
    unit = UnitRows(
        sample_index=np.arange(20),
        sample_id=list("abcdefghijklmnopqrst"),
        status=[OK] * 20,
        token_offsets=np.arange(21) * length,
        input_ids=np.zeros(20 * length, np.int32),
        loss_mask=np.tile(np.arange(length) > 0, 20),
        target_offsets=np.arange(21) * (n // 20),
        targets=targets,
    )
    data = codec.encode(unit, metadata_of(provenance, 0), step=0.0625)
    claims = {"tokens": 20 * length, "supervised_tokens": n, "entries": 64 * n, "statuses": {OK: 20}}
    replace_unit(tmp_path, provenance, 0, data, **claims)
    assert float(subprocess.check_output([sys.executable, "-c", DECODE, str(tmp_path)])) <= 3
