"""A writer that can be killed: forks prepared processes on request, so that one costs milliseconds.

Run as a script, it reads one JSON object per line (`start`, `wait`) and answers with one. A child writes a small dump
from prepared rows, under the fault that the request names, and ends with the exit code that a command would have.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from support.forks import ForkServer, wait_for


class Zygote(ForkServer):
    """The test's side: start workers, wait for them."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def start(self, url: Path, *, fault: str = "", log: str = "", order: list[int] | None = None) -> int:
        """Fork a worker; its pid."""
        return self._ask(do="start", url=str(url), fault=fault, log=log, order=order)

    def run(self, url: Path, **options: Any) -> int | str:
        """Start and wait."""
        return self.wait(self.start(url, **options))


def _work(request: dict[str, Any], rows: list[Any], provenance: Any) -> int:
    from support.dumps import TOKENIZER

    from storage_schemas.common.errors import NeoError
    from storage_schemas.common.exits import Exit
    from storage_schemas.writer import DumpWriter

    os.environ["LLM_NEO_FAULT"], os.environ["LLM_NEO_FAULT_LOG"] = request["fault"], request["log"]
    try:
        writer = DumpWriter.open(request["url"], provenance)
        writer.put_tokenizer(TOKENIZER)
        for unit in request["order"] or range(provenance.units):
            if not writer.is_committed(unit):
                writer.commit_unit(unit, rows[unit])
        assert writer.seal()
    except NeoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return Exit.BUG
    return Exit.DONE


def _serve() -> None:
    from support.dumps import some_provenance, unit_rows

    provenance = some_provenance()
    rows = [unit_rows(provenance, unit) for unit in range(provenance.units)]
    from storage_schemas.stores.store import Store
    from storage_schemas.writer import DumpWriter

    # What Arrow does on first use is done here, once. No thread may be started before a fork, but the allocator's own.
    for unit in range(provenance.units):
        DumpWriter(Store("/nowhere"), provenance)._encode(unit, rows[unit], "0" * 32)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert len([name for name in threads if not name.startswith("jemalloc")]) == 1, threads

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            answer: Any = wait_for(request["pid"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os._exit(_work(request, rows, provenance))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
