"""Writers of a small dump from prepared rows that can be killed: a script for `ForkServer`."""

import os
from pathlib import Path
from typing import Any

from support.dumps import TOKENIZER, some_provenance, unit_rows
from support.forks import serve

from storage_schemas.common.exits import Exit
from storage_schemas.stores.store import Store
from storage_schemas.writer import DumpWriter

PROVENANCE = some_provenance()
ROWS = [unit_rows(PROVENANCE, unit) for unit in range(PROVENANCE.units)]


def _work(job: dict[str, Any]) -> int:
    """Write to `url`, the units in `order`; ends with the exit code that a command would have."""
    writer = DumpWriter.open(job["url"], PROVENANCE)
    writer.put_tokenizer(TOKENIZER)
    for unit in job.get("order", range(PROVENANCE.units)):
        if not writer.is_committed(unit):
            writer.commit_unit(unit, ROWS[unit])
    assert writer.seal()
    return Exit.DONE


if __name__ == "__main__":
    # What Arrow does on first use is done here, once. No thread may be started before a fork, but the allocator's own.
    for unit in range(PROVENANCE.units):
        DumpWriter(Store("/nowhere"), PROVENANCE)._encode(unit, ROWS[unit], "0" * 32)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert len([name for name in threads if not name.startswith("jemalloc")]) == 1, threads
    serve(_work)
