"""A reader of a hundred thousand committed units starts in seconds; synthetic records, no data."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.dumps import run_info

from storage_schemas.commit import CommitRecord, Seal, data_key, manifest_bytes, totals
from storage_schemas.store import Store

UNITS = 100_000
READ = """
import sys, time
from storage_schemas.reader import Dump
from storage_schemas.store import Store

requests = []
for name in ("get_if_present", "size", "list"):
    ask = getattr(Store, name)
    setattr(Store, name, lambda self, key, ask=ask: requests.append(key) or ask(self, key))
start = time.process_time()
dump = Dump.open(sys.argv[1])
assert dump.sealed()
records = dump.records()
assert len(records) == 100_000
assert dump.record(77_777).unit == 77_777
seconds = time.process_time() - start
memory = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(seconds, int(memory) / 1024, len(requests))
"""


@pytest.mark.slow
def test_a_reader_of_a_hundred_thousand_units(tmp_path: Path) -> None:
    run = run_info(samples=4 * UNITS, samples_per_unit=4)
    records = {}
    for unit in range(UNITS):
        digest = hashlib.sha256(str(unit).encode()).hexdigest()
        records[unit] = CommitRecord(
            fingerprint=run.fingerprint,
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
        fingerprint=run.fingerprint,
        units=UNITS,
        statuses={"ok": 4 * UNITS},
        tokenizer={},
        records_sha256="0" * 64,
        manifest=f"manifest-{hashlib.sha256(manifest).hexdigest()}.parquet",
        **totals(records),
    )
    store = Store(str(tmp_path))
    for key, data in {"run.json": run.to_json(), seal.manifest: manifest, "SEALED.json": seal.to_json()}.items():
        assert store.put_new(key, data)
    output = subprocess.check_output([sys.executable, "-c", READ, str(tmp_path)], text=True)
    seconds, megabytes, requests = map(float, output.split())
    assert seconds <= 5
    assert megabytes <= 300
    assert requests <= 300
