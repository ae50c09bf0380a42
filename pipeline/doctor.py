"""What a machine and a configuration lack to run with, found before anything is paid for. Nothing is raised or changed.

Every finding is one line. What can be asked of the packages themselves is asked of them, so that it is refused here in
the words in which a run would refuse it.
"""

import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.text import Text

from pipeline.config import Config, heldout_elsewhere, load_config
from pipeline.launch import dump_placement, training_nodes
from pipeline.pairing import refuse_unlike, teacher_vocabulary
from pipeline.processes import refuse_output
from pipeline.views.report import PACKAGES
from storage_schemas.common.devices import refuse_idle_gpus, usable_cores, visible_gpus
from storage_schemas.common.errors import DataError, MismatchError, NeoError, TemporaryError, explained, first_line
from storage_schemas.common.exits import Exit
from storage_schemas.common.extras import STAGE_TWO, installed
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.models import refuse_torn
from storage_schemas.common.secrets import masked
from storage_schemas.config import DumpSection
from storage_schemas.reader import Dump
from storage_schemas.records import RUN
from storage_schemas.stores.address import local_path
from storage_schemas.stores.requests import is_refusal
from storage_schemas.stores.store import Store
from student_train.config import StudentSection, TrainSection, sections_of
from student_train.results.model_card import package_version
from teacher_dump.config import CorpusSection, TeacherSection

State = Literal["ok", "warning", "failure"]
FULL_BYTES, LOW_BYTES = 2**30, 10 * 2**30
"""Free space of a disk that is a failure, and that is a warning, below."""
_COLOURS = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_LAUNCHERS = {
    "torchrun": (r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE)", "RANK", "WORLD_SIZE"),
    "Slurm": (r"SLURM_.*", "SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": (r"OMPI_.*", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": (r"PMI_.*|MPI_LOCAL.*", "PMI_RANK", "PMI_SIZE"),
    "SkyPilot": (r"SKYPILOT_.*", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "Kubernetes": (r"JOB_COMPLETION.*", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
}
"""Name -> its environment variables, and which of them say the number of a process and how many there are."""


class Finding(FrozenModel):
    """What there is to say of one subject."""

    subject: str
    state: State
    said: str
    fix: str | None = None
    """What to do about it."""
    temporary: bool = False
    """Of a failure: whether it may go away by itself."""

    def line(self) -> Text:
        """For people."""
        text = Text(f"{self.state:8}", _COLOURS[self.state]).append(f"{self.subject:18} ", "bold")
        return text.append(self.said, "not bold default").append(f"; to do: {self.fix}" if self.fix else "")


Check = Callable[[], Iterator[Finding]]


def exit_code(findings: Sequence[Finding]) -> Exit:
    """0 without failures, 75 if all of them are temporary, else 78."""
    failures = [finding for finding in findings if finding.state == "failure"]
    if not failures:
        return Exit.DONE
    return Exit.TEMPORARY if all(finding.temporary for finding in failures) else Exit.MISMATCH


def examine(path: Path | None, overrides: Sequence[str], env: Mapping[str, str]) -> Iterator[Finding]:
    """Every finding, as soon as it is made.

    Args:
        path: the configuration, if there is one; else the machine alone is looked at.

    Raises:
        UsageError: there is no such file.
    """
    config: Config | None = None

    def configuration() -> Iterator[Finding]:
        nonlocal config
        if path is not None:
            config = load_config(path, overrides)
            yield Finding(subject="configuration", state="ok", said=str(path))

    yield from _guarded("configuration", configuration)
    for subject, check in _checks(config, env).items():
        yield from _guarded(subject, check)


def _checks(config: Config | None, env: Mapping[str, str]) -> dict[str, Check]:
    """What there is to look at, by subject."""
    lacking = [package for package in STAGE_TWO if not installed(package)]
    checks: dict[str, Check] = {
        "python": _python,
        "packages": _packages,
        "torch": partial(_torch, env),
        "DeepSpeed": partial(_no_stage_two, lacking, config) if lacking else partial(_deepspeed, env),
        "ranks": partial(_ranks, env),
    }
    checks |= {subject: partial(_disk, subject, folder) for subject, folder in _disks(config).items()}
    if config is None:
        return checks
    if config.train is not None:
        checks["run directory"] = partial(_run_directory, config, config.train.output)
    stores = {f"dump {place.url}": place for place in sections_of(config.dump, config.train)}
    stores = {"dump": config.dump} if len(stores) == 1 else stores
    if config.heldout is not None:
        stores["held-out dump"] = config.dump.model_copy(update={"url": config.heldout.url})
    checks |= {subject: partial(_store, subject, section, config) for subject, section in stores.items()}
    checks["places"] = partial(_places, config)
    trains = config.train is not None
    if config.teacher is not None:
        checks["teacher"] = partial(_of_stage_one, "teacher", partial(_teacher, config, config.teacher), trains=trains)
    if config.corpus is not None:
        checks["corpus"] = partial(_of_stage_one, "corpus", partial(_corpus, config, config.corpus), trains=trains)
    if config.student is not None and not lacking:
        checks["student"] = partial(_student, config.student, config.train)
        checks["tokenizer"] = partial(_tokenizer, config.student, config.dump, config.teacher)
    return checks


def _guarded(subject: str, check: Check) -> Iterator[Finding]:
    """What a check finds; what it raises is a failure. No secret passes."""
    try:
        for finding in check():
            yield finding.model_copy(update={"said": masked(finding.said)})
    except Exception as error:
        told = explained(error)
        if isinstance(told, NeoError) and told.exit_code == Exit.USAGE and subject == "configuration":
            raise
        if told is None:
            said, fix, temporary = f"cannot be checked: {type(error).__name__}: {first_line(error)}", None, False
        else:
            got = "" if told.got is None else f": {told.got}"
            said, fix, temporary = f"{told.what}{got}", told.fix, isinstance(told, TemporaryError)
        said = "; ".join(line.strip() for line in masked(said).splitlines() if line.strip())
        yield Finding(subject=subject, state="failure", said=said, fix=fix, temporary=temporary)


def _python() -> Iterator[Finding]:
    said = f"{platform.python_version()} in {sys.prefix}, {platform.machine()}, {usable_cores()} usable cores"
    yield Finding(subject="python", state="ok", said=said)


def _packages() -> Iterator[Finding]:
    """The packages that this one requires, by what its own metadata say."""
    wrong = []
    for wanted in map(Requirement, requires("llm-neo") or ()):
        extras = ("", "train") if installed(wanted.name) else ("",)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                found = "none"
            if found == "none" or not wanted.specifier.contains(found, prereleases=True):
                wrong.append(f"{wanted.name}{wanted.specifier}, got {found}")
    if wrong:
        fix = "pip install --upgrade llm-neo, or these packages alone"
        yield Finding(subject="packages", state="failure", said=f"needed are {'; '.join(wrong)}", fix=fix)
    else:
        said = ", ".join(f"{name} {package_version(name)}" for name in PACKAGES if name != "torch")
        yield Finding(subject="packages", state="ok", said=said)


def _torch(env: Mapping[str, str]) -> Iterator[Finding]:
    """Its build, and whether that can use the GPUs that are visible."""
    import torch

    made_for = torch.version.cuda and f"CUDA {torch.version.cuda}"
    made_for = made_for or (torch.version.hip and f"ROCm {torch.version.hip}") or "CPUs alone"
    yield Finding(subject="torch", state="ok", said=f"{torch.__version__}, built for {made_for}")
    gpus = visible_gpus(env)
    if not torch.cuda.is_available():
        refuse_idle_gpus(env, build=torch.__version__, fix="set CUDA_VISIBLE_DEVICES= to mean the CPU")
        yield Finding(subject="devices", state="ok", said="no GPU is visible: everything runs on the CPU")
        return
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    said = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    if len(devices) != len(gpus):
        said += f"; {len(gpus)} visible, of which torch sees {len(devices)}"
        yield Finding(subject="devices", state="warning", said=said, fix="check the driver, and CUDA_VISIBLE_DEVICES")
    elif env.get("DS_ACCELERATOR") == "cpu":
        said += "; `train` runs on the CPU, since DS_ACCELERATOR=cpu"
        yield Finding(subject="devices", state="warning", said=said, fix="unset DS_ACCELERATOR")
    else:
        yield Finding(subject="devices", state="ok", said=said)


def _no_stage_two(lacking: Sequence[str], config: Config | None) -> Iterator[Finding]:
    """Packages are missing that training alone needs: here, or on another cluster."""
    only_trains = config is not None and config.teacher is None and config.train is not None
    said = f"{' and '.join(lacking)} not installed: `dump` and what goes with it do without, training does not"
    fix = "where training runs: pip install 'llm-neo[train]'"
    yield Finding(subject="DeepSpeed", state="failure" if only_trains else "warning", said=said, fix=fix)


def _deepspeed(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether it can build its native operators: those for offloading are built when they are first used."""
    import_module("student_train.engine")  # Chooses the accelerator before DeepSpeed looks for one.
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    compiler = next((name for name in (env.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)), None)
    lacking = [] if compiler else ["a C++ compiler"]
    lacking += [] if find_spec("ninja") or shutil.which("ninja") else ["ninja"]
    for name in ("CPUAdam", "FusedAdam"):
        builder = accelerator.create_op_builder(f"{name}Builder")
        if builder is None or not builder.is_compatible(verbose=False):
            lacking.append(f"what its {name} needs")
    where = f"{version('deepspeed')} on {accelerator.device_name()}"
    if lacking:
        said = f"{where}; native operators cannot be built, without {', '.join(lacking)}. Training needs none of them, "
        fix = "install it, and for GPUs the CUDA toolkit of torch's version; `ds_report` says more"
        yield Finding(subject="DeepSpeed", state="warning", said=f"{said}but offloading may", fix=fix)
    else:
        said = f"{where}; native operators (CPUAdam, FusedAdam) can be built by {compiler} and ninja"
        yield Finding(subject="DeepSpeed", state="ok", said=said)


def _ranks(env: Mapping[str, str]) -> Iterator[Finding]:
    """Which launchers say which process this is, whom `dump` and `train` obey, and whether they agree."""
    said = {}
    for name, (_, rank, size) in _LAUNCHERS.items():
        if rank in env:
            said[name] = (env[rank], env.get(size, "?"))
    if not said:
        yield Finding(subject="ranks", state="ok", said="no launcher's variables are set: one process")
        return
    worker, nodes = dump_placement(env), training_nodes(env)
    told = [f"{name} says {rank} of {size}" for name, (rank, size) in said.items()]
    told.append(f"`dump` is worker {worker.rank} of {worker.world_size}{_obeyed(dump_placement, env, list(said))}")
    told.append(f"`train` is node {nodes.node_rank} of {nodes.count}{_obeyed(training_nodes, env, list(said))}")
    # SkyPilot counts nodes; Slurm, and Kubernetes without JOB_COMPLETIONS, may leave it to others to say how many.
    processes = {(rank, size) for name, (rank, size) in said.items() if name != "SkyPilot" and size != "?"}
    many = any(size not in ("?", "1") for _, size in said.values())
    fix = None
    if len(processes) > 1:
        told.append("they disagree")
        fix = "start the command by one of them alone, or give --rank and --world-size"
    elif many and nodes.count == 1:
        told.append("so each `train` would be alone")
        fix = "start `train` once per node, with --nnodes, --node-rank and --rdzv-endpoint where there are several"
    yield Finding(subject="ranks", state="warning" if fix else "ok", said="; ".join(told), fix=fix)


def _obeyed(decide: Callable[[Mapping[str, str]], Any], env: Mapping[str, str], launchers: Sequence[str]) -> str:
    """Whose variables make a difference to what is decided."""

    def without(pattern: str) -> Any:
        try:
            return decide({name: value for name, value in env.items() if not re.fullmatch(pattern, name)})
        except NeoError as error:
            return str(error)

    found = [name for name in launchers if without(_LAUNCHERS[name][0]) != decide(env)]
    return f", by {' and '.join(found)}" if found else ""


def _disks(config: Config | None) -> dict[str, Path]:
    """Where space is needed: subject -> folder, which need not exist."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = {"hub cache": Path(HF_HUB_CACHE)}
    if config is not None and config.train is not None:
        found["run directory"] = config.train.output
    if config is not None and (folder := local_path(config.dump.url)) is not None:
        found["disk of the dump"] = folder
    return found


def _run_directory(config: Config, folder: Path) -> Iterator[Finding]:
    """Whether training may write there, and has room."""
    refuse_output(config, folder)
    yield from _disk("run directory", folder)


def _disk(subject: str, folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    state: State = "failure" if free < FULL_BYTES else "warning" if free < LOW_BYTES else "ok"
    fix = None if state == "ok" else "free space there, or choose another place"
    said = f"{free / 2**30:,.1f} GiB free in {folder}"
    yield Finding(subject=subject, state=state, said=said, fix=fix, temporary=state == "failure")


def _store(subject: str, section: DumpSection, config: Config) -> Iterator[Finding]:
    """Read, write and put-if-absent, with the credentials at hand; what is written is removed again."""
    store = Store(section.url, options=section.storage_options)
    begun = "a dump is there" if store.get_if_present(RUN) is not None else "no dump is there yet"
    if store.root is not None and begun.startswith("no"):
        from teacher_dump.dump import refuse_unusable

        refuse_unusable(section)  # Makes no directory.
    if store.root is not None and not store.root.exists():
        yield Finding(subject=subject, state="ok", said=f"{section.url}: it can be made there")
        return
    key = f"probe/{uuid.uuid4().hex}"
    folder = None if store.root is None else store.root / "probe"
    new_folder = folder is not None and not folder.exists()
    try:
        store.put_new(key, b"first")
    except MismatchError as error:
        locked = store.root is not None and not os.access(store.root, os.W_OK, effective_ids=True)
        if not locked and (store.root is not None or error.__cause__ is None or not is_refusal(error.__cause__)):
            raise
        said = f"{section.url}: {begun}; read only, which is enough for `train` but not for `dump` ({error.got})"
        if config.teacher is None:
            yield Finding(subject=subject, state="ok", said=said)
        else:
            fix = "give credentials that may put objects, if `dump` shall run here"
            yield Finding(subject=subject, state="warning", said=said, fix=fix)
        return
    try:
        if store.put_new(key, b"second"):
            store.probe()  # Somebody's clean-up may have come between; this asks again, and refuses.
    finally:
        with suppress(NeoError):  # To delete may be forbidden; then it is said below.
            store.delete(key)
        if folder is not None and new_folder:
            with suppress(OSError):  # Somebody else's probe is in it.
                folder.rmdir()
    said = f"{section.url}: {begun}; read, write and put-if-absent work"
    if store.size(key) is not None:
        said, fix = f"{said}; the probe {key} cannot be deleted", "remove it, or leave it: `dump` passes it over"
        yield Finding(subject=subject, state="warning", said=said, fix=fix)
    else:
        yield Finding(subject=subject, state="ok", said=said)


def _places(config: Config) -> Iterator[Finding]:
    """Whether what one cluster writes is where the other one reads."""
    if (said := heldout_elsewhere(config)) is not None:
        fix = "give both a URL that both clusters reach, unless both stages run on this machine"
        yield Finding(subject="places", state="warning", said=said, fix=fix)


def _of_stage_one(subject: str, look: Callable[[], str], *, trains: bool) -> Iterator[Finding]:
    """What there is, as `look` says; what it refuses is a warning where training may run and stage one elsewhere."""
    try:
        said = look()
    except (MismatchError, DataError, TemporaryError) as error:
        if not trains:
            raise
        said = f"{error.what}: {error.got}; `dump` would refuse it here, `train` does not need it"
        yield Finding(subject=subject, state="warning", said=said, fix=error.fix)
    else:
        yield Finding(subject=subject, state="ok", said=said)


def _teacher(config: Config, teacher: TeacherSection) -> str:
    """Its files, but weights on the hub, which may be large; what runs it; whether it has as many ids as asked for."""
    from teacher_dump.corpus.preview import DescribedTeacher
    from teacher_dump.dump import refuse_wider_than_vocabulary
    from teacher_dump.teachers.model_files import find_model
    from teacher_dump.teachers.vllm import VllmTeacher

    described, local = DescribedTeacher(teacher), Path(teacher.model).is_dir()
    heldout = [config.heldout_config()] if config.heldout and config.heldout.sources and config.corpus else []
    for part in (config, *heldout):
        refuse_wider_than_vocabulary(part.estimator, described)
    refuse_torn(*find_model(teacher.model, teacher.revision, weights=local).weights)
    if teacher.backend == "vllm":
        VllmTeacher(teacher)
    elif teacher.device != "auto":  # What `auto` finds stands in a line of its own.
        _ = described.device
    if local:
        return f"{teacher.model}: configuration, tokenizer and weights are there"
    return f"{teacher.model}: configuration and tokenizer are there; its weights are fetched when it runs"


def _corpus(config: Config, corpus: CorpusSection) -> str:
    """Files and chat template; nothing is read of the samples, as `llm-neo preview` does."""
    from teacher_dump.corpus.preview import load_tokenizer
    from teacher_dump.corpus.sources import find_source
    from teacher_dump.corpus.template import templated

    sources = [*corpus.sources, *(config.heldout.sources if config.heldout else ())]
    found = [find_source(source) for source in sources]
    tokenizer = None
    if config.teacher is not None:
        with suppress(MismatchError):  # Another check says what the teacher lacks.
            tokenizer = load_tokenizer(config.teacher)[0]
    if tokenizer is not None:
        templated(tokenizer, corpus)
    looked = [file for one in found for file in one.files if not isinstance(file, str)]
    named = [one.path for one in found if not one.files or isinstance(one.files[0], str)]
    there = f"files that are there: {len(looked)}"
    return there if not named else f"{there}; not looked into: {', '.join(named)}"


def _student(student: StudentSection, train: TrainSection | None) -> Iterator[Finding]:
    """What training would refuse whatever the dump is."""
    from student_train.model.load import refuse_unloadable
    from student_train.training_run import refuse_early

    if train is not None:
        refuse_early(student, train)
    else:
        refuse_unloadable(student.model, student.revision, student.attn_implementation, student.trust_remote_code)
    yield Finding(subject="student", state="ok", said=f"{student.model}: configuration and weights are there")


def _tokenizer(student: StudentSection, section: DumpSection, teacher: TeacherSection | None) -> Iterator[Finding]:
    """Whether the student's ids mean what the dump's mean, or the teacher's before there is one."""
    from storage_schemas.common.code import runs_code
    from student_train.model.load import TRUST, described
    from student_train.model.tokenizers import has_tokenizer, refuse_tokenizer, student_vocabulary

    model, revision, whose = student.model, student.revision, "the dump"
    code = runs_code(student.trust_remote_code, model, revision, setting=TRUST)
    try:
        head_rows = described(model, revision, code).get_text_config().vocab_size
    except (OSError, ValueError):  # Another check says what the student lacks.
        return
    if Store(section.url, options=section.storage_options).size(RUN) is not None:
        files = Dump.open(section.url, options=section.storage_options).read_tokenizer()
        refuse_tokenizer(model, revision, files, head_rows=head_rows)
    else:
        whose, theirs = "the teacher", None
        with suppress(MismatchError):  # Then it is not here, which another check says.
            theirs = None if teacher is None else teacher_vocabulary(teacher)
        if theirs is None:
            yield Finding(subject="tokenizer", state="ok", said="nothing to compare with before the dump has begun")
            return
        refuse_unlike(theirs, student_vocabulary(model, revision))
    if has_tokenizer(model, revision):
        yield Finding(subject="tokenizer", state="ok", said=f"the student's is that of {whose}")
    else:
        said = f"the student has none: its ids are taken to mean what those of {whose} mean"
        yield Finding(subject="tokenizer", state="warning", said=said, fix="see that it is so")
