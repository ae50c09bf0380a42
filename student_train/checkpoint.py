"""Checkpoints free of world size and ZeRO stage: fp32 weights and Adam moments as safetensors, and a little JSON.

    checkpoints/step-00000100/<attempt>-master-000.safetensors, -exp_avg-000, -exp_avg_sq-000, ...
                              <attempt>-state.json
                              COMMIT.json       written last: every file with its size and sha256

A checkpoint exists once its commit record does; files without one are left-overs. Nothing is overwritten, and nothing
is unpickled. What is read is verified as it is read, the commit record by a checksum of its own.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from storage_schemas.canonical import ProvenJson, canonical_json, digest, parse_json, refuse_other_version, validated
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.records import proven
from storage_schemas.stores.store import Store
from student_train.metrics import Event, HeldoutResult

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_OTHER_VERSION = "resume with the version of llm-neo that wrote it, or choose another train.output"
_RESTORE = "nothing, if an earlier checkpoint is complete; else restore the file"
MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
"""Kinds of tensors: fp32 weights, and Adam's first and second moments. A tensor's key is `kind/parameter name`."""
COMMIT = "COMMIT.json"
INITIAL = "initial"
"""Kind of the tensors that the adapter's start has taken out of the base weights, see `adapter.initial_factors`."""
FILE_BYTES = 1 << 24
"""Size at which a new file is begun. Saving holds one of them in memory; while that is put together no other thread
runs, ten times as long where the allocator has new memory for each, as it does above 32 MiB."""

_STEP = re.compile(r"^step-(\d{8})$")


class Extension(FrozenModel):
    """A run went on under other settings, see `train.extend`."""

    step: int
    """Steps that were done by then."""
    before: dict[str, Any]
    """The settings that have changed: dotted name -> value until then."""
    after: dict[str, Any]
    """Their values from then on."""


class Beginning(FrozenModel):
    """The checkpoint of another run that a run began from, see `train.warm_start`."""

    source: str
    """The directory of that run, as it was named."""
    step: int
    """Of the checkpoint."""
    digest: str
    """`Checkpoint.digest`."""


class TrainState(FrozenModel):
    """All that is needed to go on, apart from tensors. The world size is not part of it."""

    format_version: int = FORMAT_VERSION
    """Version of this format."""
    step: int
    """Optimizer steps done; the position in the data is a function of it."""
    updates: int
    """Adam's step count: steps whose global batch had supervised tokens, and those before of `train.warm_start`."""
    consumed: str
    """Hash over the units that were trained on, see `resume.consumed_root`."""
    identity: dict[str, Any]
    """What must be equal for a resumed run to be the same run: dotted name -> value."""
    began: Beginning | None = None
    """Where the run began, if with the weights and moments of another one."""
    extended: tuple[Extension, ...] = ()
    """Where the run went on under other settings."""
    heldout: tuple[HeldoutResult, ...] = ()
    """All evaluations up to this step, oldest first."""
    supervised_tokens: int = 0
    """That were trained on up to this step."""
    told: Event | None = None
    """The last line of events.jsonl by then, should the run directory be lost."""
    best: int | None = None
    """A step whose checkpoint stays as long as this one, see `Checkpoints.save`."""


class FileRecord(FrozenModel):
    """One file of a checkpoint."""

    name: str
    kind: Literal["state", "master", "exp_avg", "exp_avg_sq", "initial"]
    """`state`, or the kind of its tensors."""
    bytes: int
    sha256: str


class Commit(ProvenJson):
    """COMMIT.json, which also holds the checksum of all this."""

    restore: ClassVar[str] = _RESTORE
    other_version: ClassVar[str] = _OTHER_VERSION

    format_version: int = FORMAT_VERSION
    step: int
    files: tuple[FileRecord, ...]


class Checkpoint:
    """One complete checkpoint."""

    def __init__(self, store: Store, step: int) -> None:
        """Read the commit record and the state.

        Raises:
            DataError: torn, tampered with, or not there.
            MismatchError: written by another version of this format.
        """
        self._store, self.step = store, step
        name = f"{store.url}/{_folder(step)}/{COMMIT}"
        self._commit = Commit.from_json(store.get(f"{_folder(step)}/{COMMIT}"), name)
        record = next((record for record in self._commit.files if record.kind == "state"), None)
        if record is None or self._commit.step != step:
            raise DataError(f"{name} does not describe step {step}", fix="remove this checkpoint's directory")
        state = parse_json(self._read(record), name=record.name)
        refuse_other_version(state, name=record.name, readable=(FORMAT_VERSION,), fix=_OTHER_VERSION)
        self.state = validated(TrainState, state, name=record.name)

    def tensors(self, kinds: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(`kind/name`, fp32 tensor) of some kinds; each file is verified before its tensors are given.

        Raises:
            DataError: a file is torn, tampered with or missing.
        """
        for record in self._commit.files:
            if record.kind in kinds:
                try:
                    loaded = safetensors.torch.load(self._read(record))
                except SafetensorError as error:
                    raise DataError(f"{record.name} is not a safetensors file", got=str(error)) from error
                yield from sorted(loaded.items())

    def by_name(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind, by parameter name. Raises DataError as `tensors` does."""
        return {key.split("/", 1)[1]: tensor for key, tensor in self.tensors((kind,))}

    @property
    def digest(self) -> str:
        """Hash of the commit record, and so of all files."""
        return digest(self._commit.model_dump(mode="json"))

    def verify(self) -> None:
        """Read every file. Raises DataError."""
        for record in self._commit.files:
            self._read(record)

    def refuse_incomplete(self) -> None:
        """Ask the store for the size of every file. Raises DataError."""
        there = {head["path"]: int(head["size"]) for head in self._store.heads(_folder(self.step))}
        for record in self._commit.files:
            key = f"{_folder(self.step)}/{record.name}"
            if there.get(key) != record.bytes:
                raise DataError(
                    f"the checkpoint of step {self.step} is not what was written: {self._store.url}/{key}",
                    got=f"{there[key]} bytes" if key in there else "no such file",
                    expected=f"{record.bytes} bytes",
                    fix="see what removes or cuts off files there; older checkpoints are kept",
                )

    def _read(self, record: FileRecord) -> bytes:
        key = f"{_folder(self.step)}/{record.name}"
        name = f"{self._store.url}/{key}"
        return proven(self._store.get(key), name, sha256=record.sha256, size=record.bytes, fix=_RESTORE)


class Checkpoints:
    """The checkpoints of a run. One rank saves; every rank may read."""

    def __init__(self, url: str, *, options: Mapping[str, str] | None = None) -> None:
        """Nothing is contacted or created.

        Args:
            url: a directory, which need not exist yet, or a place in an object store.

        Raises:
            MismatchError: the URL or an option is not understood.
        """
        self._open = partial(Store, url, options=options, setting="train.checkpoint_url")
        self._store = self._open()
        self.url = self._store.url

    def steps(self) -> list[int]:
        """Steps of which there is any trace, ascending."""
        folder = self._store.root
        if folder is None:
            names = {entry["path"].split("/", 1)[0] for entry in self._store.heads("")}
        else:
            names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        return sorted(int(match[1]) for name in names if (match := _STEP.match(name)))

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, verified; one that is not complete is passed over with a warning.

        Raises:
            MismatchError: the newest one is of another format version: it is complete, but not for us.
            TemporaryError: the disk is away.
        """
        for step in reversed(self.steps()):
            try:
                checkpoint = self.at(step)
                checkpoint.verify()
            except DataError as error:
                log.warning("checkpoint of step %d is refused, looking for an earlier one: %s", step, error)
            else:
                return checkpoint
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises DataError if it is not complete."""
        return Checkpoint(self._store, step)

    def save(
        self, state: TrainState, tensors: Iterable[tuple[str, Tensor]], *, keep: int, best: int | None = None
    ) -> None:
        """Write a checkpoint, and remove older ones once the store has all of it.

        Each file is hashed once, as it is written. Then commit record and state are read back, and the store says how
        large each file is; the hashes are compared by whoever reads, see `Checkpoint`.

        Args:
            state: step and identity.
            tensors: (`kind/name`, tensor), grouped by kind.
            keep: how many complete checkpoints stay. The record of the start of training goes with the first other.
            best: a step whose checkpoint stays beside these, as do those that these were saved with: who goes on from
                an older one needs the best of its time.

        Raises:
            TemporaryError: the disk is full or away; what is committed stays.
            DataError: the store has not kept what was written.
        """
        if not state.step and self._store.root is None:
            self._store.probe()
        self._remove(state.step)
        attempt = uuid.uuid4().hex[:8]
        state = state.model_copy(update={"best": best})
        files = [self._put(state.step, f"{attempt}-state.json", "state", canonical_json(state.model_dump(mode="json")))]
        for kind, number, part in _files(tensors):
            name = f"{attempt}-{kind}-{number:03d}.safetensors"
            files.append(self._put(state.step, name, kind, safetensors.torch.save(part)))
        commit = Commit(step=state.step, files=tuple(files))
        self._store.put_new(f"{_folder(state.step)}/{COMMIT}", commit.to_json())
        self.at(state.step).refuse_incomplete()
        older = [step for step in self.steps() if step < state.step]
        others = [step for step in older if step not in (0, best)]
        kept = {step for step in older if step == best or step in others[max(0, len(others) + 1 - keep) :]}
        if best is not None:
            kept |= {needed for step in kept if (needed := self._best_of(step)) is not None}
        for step in older:
            if step not in kept:
                self._remove(step)

    def _best_of(self, step: int) -> int | None:
        """`TrainState.best` of a checkpoint; None where it is damaged, and so of no use."""
        with suppress(DataError, MismatchError):
            return self.at(step).state.best
        return None

    def _put(self, step: int, name: str, kind: str, data: bytes) -> FileRecord:
        self._store.put_new(f"{_folder(step)}/{name}", data)
        return FileRecord(name=name, kind=kind, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _remove(self, step: int) -> None:
        """The commit record goes first, so that a half-removed checkpoint does not look like a complete one."""
        if self._store.root is None:
            for key in sorted(self._store.list(_folder(step)), key=lambda key: not key.endswith(COMMIT)):
                self._store.delete(key)
            return
        folder = self._store.root / _folder(step)
        if folder.is_symlink():  # What lies behind it is not ours.
            folder.unlink()
        if not folder.is_dir():
            return
        self._store.delete(f"{_folder(step)}/{COMMIT}")
        for file in folder.iterdir():
            if file.is_symlink() or not file.is_dir():
                file.unlink()
        with suppress(OSError):  # A network file system may hold a name that is still open elsewhere.
            folder.rmdir()
        self._store = self._open()  # The other one remembers the directory.


def exactly(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """`tensors` as they come, which must be one for each key of `shapes`, of that shape, and no others.

    Raises:
        DataError: at the first that does not belong, or at the end if some are missing.
    """
    missing = dict(shapes)
    for key, tensor in tensors:
        if key not in missing or tuple(tensor.shape) != tuple(missing[key]):
            raise _other_tensors(f"{key} of the shape {tuple(tensor.shape)}", missing.get(key, "no such tensor here"))
        del missing[key]
        yield key, tensor
    if missing:
        raise _other_tensors("nothing", f"{len(missing)} more, such as {', '.join(list(missing)[:3])}")


def _other_tensors(got: str, expected: object) -> DataError:
    return DataError(
        "the checkpoint does not hold the weights and moments of this student",
        got=got,
        expected=expected,
        fix="restore the checkpoint, or remove its directory to go on from the one before",
    )


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """(kind, number, tensors) of the files to write: one kind each, and not much above FILE_BYTES."""
    for kind, group in groupby(tensors, key=lambda pair: pair[0].split("/", 1)[0]):
        part: dict[str, Tensor] = {}
        number = size = 0
        for key, tensor in group:
            if size >= FILE_BYTES:
                yield kind, number, part
                part, number, size = {}, number + 1, 0
            part[key] = tensor.contiguous()
            size += tensor.nbytes
        yield kind, number, part
