"""Write the golden dump again: only for a new format version, never because a test is red.

python tests/golden/regenerate.py

v1-content is of this code. v1 is of writers whose fingerprint covered the path of the teacher; v1-first is of the first
ones, which declared all elements of lists nullable, too.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from support.dumps import make_dump, some_provenance  # noqa: E402

from storage_schemas.config import Adaptive, Sampled, TopK  # noqa: E402
from storage_schemas.reader import Dump  # noqa: E402

ESTIMATORS = {
    "topk": TopK(k=4),
    "adaptive": Adaptive(kind="adaptive", k_max=3, tail_draws=3),
    "sampled": Sampled(kind="sampled", draws=6),
}


def contents(dump: Dump) -> list[dict[str, Any]]:
    """Every row of a dump as plain values: floats as hexadecimal text, so that not a bit may differ."""
    rows = []
    for unit in range(dump.provenance.units):
        read = dump.read_unit(unit)
        for row in map(read.row, range(len(read))):
            found: dict[str, Any] = {name: getattr(row, name) for name in ("sample_index", "sample_id", "status")}
            found |= {"input_ids": row.input_ids.tolist(), "loss_mask": row.loss_mask.tolist(), "targets": None}
            if row.targets is not None:
                found["targets"] = {
                    name: None if (values := getattr(row.targets, name)) is None else _plain(values)
                    for name in ("offsets", "ids", "logprobs", "head_size", "counts", "tail_logprob", "logsumexp")
                }
            rows.append(found)
    return rows


def _plain(values: Any) -> Any:
    return [float(x).hex() for x in values.reshape(-1)] if values.dtype.kind == "f" else values.tolist()


if __name__ == "__main__":
    for name, estimator in ESTIMATORS.items():
        folder = HERE / "v1-content" / name
        shutil.rmtree(folder, ignore_errors=True)
        temperatures = (1.0, 2.0) if name == "topk" else (1.0,)
        provenance = some_provenance(
            samples=7, samples_per_unit=7, lm_head_rows=40, estimator=estimator, temperatures=temperatures
        )  # fmt: skip
        make_dump(folder, provenance)
        (HERE / "v1-content" / f"{name}.json").write_text(json.dumps(contents(Dump.open(str(folder)))) + "\n")
