"""The run directory: refused where it is something else, and held by one training at a time.

Two locks, each of the operating system (`flock`), so that they die with who holds them, by SIGKILL or power too:
`.lock` is the launcher's, for all that it does in the directory, and `.lock-training` is rank 0's, which may outlive a
launcher that was killed. On NFS (Linux, v3 with lockd and v4) the server keeps them, for all nodes; Lustre keeps them
if it is mounted with `flock` (with `localflock` they hold on one node only). Where there are none, a warning says so.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage_schemas.common.errors import NEVER, MismatchError, TemporaryError

log = logging.getLogger(__name__)

LAUNCHER, TRAINING = ".lock", ".lock-training"
"""Files that are locked. They stay: removing one would let two processes lock two files of one name."""
DYING_SECONDS = 60.0
"""How long a start waits for the ranks of a launcher that is gone: they may be writing a checkpoint."""
_ABSENT = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_LEFT = {"config.yaml", "events.jsonl", "checkpoints", "final", "final.staged", "summary.json", "exit", "cache"}
_LEFT |= {"steps", "merged", "report.md", "tensorboard", "wandb", "profile"}
"""What runs leave in their directory."""
_HARMLESS = re.compile(r"^\.|\.(log|out|err|txt|ya?ml)$")
"""Names that schedulers and users put there before a run."""


def refuse_foreign(output: Path, *, dump: Path | None, named: Collection[Path] = ()) -> None:
    """Refuse a directory that is not a run's: a run clears `exit/`, thins `cache/` and `checkpoints/`.

    Args:
        output: the run directory, which need not exist.
        dump: the dump's directory, if it is a local one.
        named: other local paths of the configuration, such as corpora and models, which may lie in the run directory.

    Raises:
        MismatchError: it is in a dump, or holds what no run has left there, or cannot be used.
    """
    expected = "a new or empty directory, or one that training has used before"
    fix = "choose another train.output"
    try:
        here = output.resolve()
        inside = [path for path in (here, *here.parents) if path == (dump and dump.resolve()) or _is_dump(path)]
        if inside:
            raise MismatchError(f"train.output lies in the dump {inside[0]}", got=output, expected=expected, fix=fix)
        if not here.exists() and not output.is_symlink():
            return
        if (output / "exit").is_symlink():
            raise MismatchError(f"{output}/exit is a link; runs empty that directory", expected=expected, fix=fix)
        used = (output / LAUNCHER).exists() or any((output / "checkpoints").glob("step-????????"))
        below = [path for path in (path.resolve() for path in named) if here in path.parents]
        own = {path.relative_to(here).parts[0] for path in below}
        names = sorted(entry.name for entry in here.iterdir())
    except (OSError, RuntimeError) as error:
        raise _unusable(output, error) from error
    foreign = [name for name in names if name not in _LEFT | own and not _HARMLESS.search(name)]
    if foreign and not used:
        raise MismatchError(
            f"train.output {output} holds what no training has left there",
            got=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            expected=expected,
            fix=fix,
        )


def _is_dump(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "commits").is_dir()


@contextmanager
def held(output: Path, name: str) -> Iterator[None]:
    """Hold a lock of the run directory, which is made if it is not there.

    A launcher also waits until the ranks of one that was killed are gone.

    Raises:
        TemporaryError: another training holds it.
        MismatchError: the directory cannot be written to.
    """
    descriptor = -1
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(output / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            _lock(output, name, descriptor, seconds=0.0 if name == LAUNCHER else DYING_SECONDS)
        except OSError as error:
            raise _unusable(output, error) from error
        if name == LAUNCHER and (output / TRAINING).exists():
            with held(output, TRAINING):
                pass
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _lock(output: Path, name: str, descriptor: int, *, seconds: float) -> None:
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(descriptor)
            if time.monotonic() >= deadline:
                raise TemporaryError(
                    "another training holds this run directory",
                    got=f"{output}, held by {holder}",
                    expected="one training per train.output",
                    fix="wait until it has ended, then run the same command again; or choose another train.output",
                ) from None
            if not told:
                log.warning("waiting for the training that still writes to %s: %s", output, holder)
            told = True
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            log.warning("%s has no locks; do not start a second training there: %s", output, error.strerror)
            return
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        return ", ".join(f"{key} {value}" for key, value in json.loads(os.pread(descriptor, 1000, 0)).items())
    except (ValueError, AttributeError):
        return "a process that has not said which"


def _unusable(output: Path, error: Exception) -> MismatchError | TemporaryError:
    what = f"train.output {output} cannot be used"
    got = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError) or error.errno in (*NEVER, errno.ENOENT, errno.ELOOP):
        fix = "correct train.output, or the permissions of that place"
        return MismatchError(what, got=got, expected="a directory that can be written to, or the name of one", fix=fix)
    return TemporaryError(what, got=got, fix="free space or repair the file system, then run the same command again")
