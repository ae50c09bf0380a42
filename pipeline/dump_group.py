"""One of the processes that hold one teacher together: `python -m pipeline.dump_group`.

Process 0 works on the dump, or on the pilot of a plan, and leaves what it found in `--result`; the others follow, and
end with it. As in stage two, each leaves its exit code in `--folder`. Process 0 answers signals.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import quiet_libraries
from pipeline.config import Config, load_config, need
from pipeline.launch import Placement
from storage_schemas.common.exits import Exit
from storage_schemas.common.publish import publish
from storage_schemas.common.ranks import ExitCodes, end, failed
from storage_schemas.common.signals import ignore, interrupt

MEMORY = "lower teacher.batch_tokens, or spread the teacher over more GPUs (--nproc); what is committed is kept"
"""What to change when the teacher runs out of memory."""

if TYPE_CHECKING:
    from teacher_dump.teachers.group import GroupTeacher


def main() -> int:
    """Run as one process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.dump_group")
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--events", type=Path)
    parser.add_argument("--pilot", type=json.loads)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--rendezvous", required=True)
    arguments = parser.parse_args()
    process, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    codes = ExitCodes(arguments.folder, process, size)
    quiet_libraries()
    # The leader may be in the middle of a batch, which it can end only with the others.
    ignore() if process else interrupt()
    codes.watch()
    try:
        config = load_config(arguments.config, arguments.overrides)
        teacher = join(config, process, size, local, arguments.rendezvous)
        placement = Placement(arguments.rank, arguments.world_size)
        code = run(config, placement, teacher, arguments.result, events=arguments.events, pilot=arguments.pilot)
    except KeyboardInterrupt:
        code = int(Exit.TEMPORARY)
    except BaseException as error:
        code = failed(error, codes, process, memory=MEMORY)
    codes.write(code)
    return code


def join(config: Config, process: int, size: int, local: int, rendezvous: str) -> "GroupTeacher":
    """Meet the other processes; the teacher that they hold together."""
    from teacher_dump.teachers.group import Group, GroupTeacher

    section = need(config.teacher, "teacher", "dump")
    return GroupTeacher(section, Group.join(process, size, local, device=section.device, rendezvous=rendezvous))


def run(
    config: Config,
    placement: Placement,
    teacher: "GroupTeacher",
    result: Path,
    *,
    events: Path | None,
    pilot: dict[str, Any] | None,
) -> int:
    """Lead or follow."""
    from pipeline.commands import run_dumps, run_plan

    if teacher.group.leads:
        planned = None if pilot is None else run_plan(config, pilot, teacher)
        publish(result, json.dumps(planned or run_dumps(config, placement, teacher, events=events)))
    else:
        teacher.follow()
    # Not after an error: the others may wait in the middle of a batch. They end without it.
    teacher.group.close()
    return int(Exit.DONE)


if __name__ == "__main__":
    end(main())
