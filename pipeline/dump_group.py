"""One of the processes that hold one teacher together: what torchrun starts as `python -m pipeline.dump_group`.

Process 0 works on the dump and leaves its summary in the folder; the others follow it. As in stage two, each leaves its
exit code there, since torchrun turns every failure into 1, and the file `exit/stop` asks for an end.
"""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import quiet_libraries
from pipeline.config import Config, load_config, need
from pipeline.files import write_whole
from pipeline.launch import Placement
from pipeline.processes import SUMMARY
from storage_schemas.errors import Exit, NeoError
from storage_schemas.run_info import canonical_json
from student_train.worker import ExitCodes, end, leave_with_others, unexpected

if TYPE_CHECKING:
    from teacher_dump.group import GroupTeacher


def main() -> int:
    """Run as one process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.dump_group")
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--events", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    arguments = parser.parse_args()
    process, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    codes = ExitCodes(arguments.folder, process, size)
    quiet_libraries()
    threading.Thread(target=leave_with_others, args=(codes,), daemon=True, name="watchdog").start()
    try:
        config = load_config(arguments.config, arguments.overrides)
        teacher = join(config, process, size, local)
        placement = Placement(arguments.rank, arguments.world_size)
        code = run(config, placement, teacher, arguments.folder, codes, events=arguments.events)
    except NeoError as error:
        print(f"llm-neo: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except Exception as error:
        code = unexpected(error, codes, process)
    codes.write(code)
    return code


def join(config: Config, process: int, size: int, local: int) -> "GroupTeacher":
    """Meet the other processes; the teacher that they hold together."""
    from teacher_dump.group import Group, GroupTeacher

    section = need(config.teacher, "teacher", "dump")
    return GroupTeacher(section, Group.join(process, size, local, device=section.device))


def run(
    config: Config,
    placement: Placement,
    teacher: "GroupTeacher",
    folder: Path,
    codes: ExitCodes,
    *,
    events: Path | None,
) -> int:
    """Lead or follow."""
    from pipeline.stages import run_dumps

    if teacher.group.leads:
        threading.Thread(target=pass_on_stop, args=(codes,), daemon=True, name="stop").start()
        summary = run_dumps(config, placement, teacher, events=events)
        write_whole(folder / SUMMARY, canonical_json(summary).decode())
    else:
        teacher.follow()
    # Not after an error: the others may wait in the middle of a batch. torchrun ends them.
    teacher.group.close()
    return int(Exit.DONE)


def pass_on_stop(codes: ExitCodes) -> None:
    """Become the signal that stage one knows, once somebody asks for an end."""
    while not codes.stop_requested():
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end(main())
