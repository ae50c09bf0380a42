"""One of the processes that hold one teacher together: `python -m pipeline.dump_group`.

Process 0 works on the dump, or on the pilot of a plan, and leaves what it found in a file; the others follow, and end
with it. As in stage two, each leaves its exit code, in the same folder. Process 0 answers signals.

`--job` is JSON, of `processes.dump_group`: `config` and `overrides` as on the command line, `rank` and `world_size` of
this group among all workers of the dump, `events`, the file for these or null, `pilot`, what `run_plan` is told of it
or null, and `result`, the file.
"""

import argparse
import json
import os
from pathlib import Path

from pipeline.cli import quiet_libraries
from pipeline.config import load_config, need
from pipeline.launch import Placement
from storage_schemas.common.exits import Exit
from storage_schemas.common.publish import publish
from storage_schemas.common.ranks import ExitCodes, end, failed
from storage_schemas.common.signals import ignore, interrupt

MEMORY = "lower teacher.batch_tokens, or spread the teacher over more GPUs (--nproc); what is committed is kept"
"""What to change when the teacher runs out of memory."""


def main() -> int:
    """Run as one process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.dump_group")
    parser.add_argument("--job", type=json.loads, required=True)
    parser.add_argument("--rendezvous", required=True)
    arguments = parser.parse_args()
    job, result = arguments.job, Path(arguments.job["result"])
    process, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    codes = ExitCodes(result.parent, process, size)
    quiet_libraries()
    # The leader may be in the middle of a batch, which it can end only with the others.
    ignore() if process else interrupt()
    codes.watch()
    try:
        from pipeline.commands import run_dumps, run_plan
        from teacher_dump.teachers.group import Group, GroupTeacher

        config = load_config(job["config"], job["overrides"])
        section = need(config.teacher, "teacher", "dump")
        group = Group.join(process, size, local, device=section.device, rendezvous=arguments.rendezvous)
        teacher = GroupTeacher(section, group)
        if not group.leads:
            teacher.follow()
        elif job["pilot"] is not None:
            publish(result, json.dumps(run_plan(config, job["pilot"], teacher)))
        else:
            placement, events = Placement(job["rank"], job["world_size"]), job["events"] and Path(job["events"])
            publish(result, json.dumps(run_dumps(config, placement, teacher, events=events)))
        # Not after an error: the others may wait in the middle of a batch. They end without it.
        group.close()
        code = int(Exit.DONE)
    except KeyboardInterrupt:
        code = int(Exit.TEMPORARY)
    except BaseException as error:
        code = failed(error, codes, process, memory=MEMORY)
    codes.write(code)
    return code


if __name__ == "__main__":
    end(main())
