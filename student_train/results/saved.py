"""Adapters and models on disk: the record of what a run has left in `final/`, and whether it still is that."""

from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from storage_schemas.canonical import ProvenJson
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.models import refuse_torn
from student_train.model.adapter import ADAPTER
from student_train.model.student_files import identity, sha256
from student_train.results.model_card import CARD

RECORD = "llm-neo.json"
_RESTORE = (
    "restore it, or run `llm-neo train` again, which writes it anew from the last checkpoint; "
    f"if it was changed on purpose, remove {RECORD}"
)
_SHAPING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
"""Of peft's configuration, what decides what the weights mean."""
_KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA")
"""Kinds of adapters whose configuration names no other models or files, as those of X-LoRA, Shadow and prompts do."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Record(ProvenJson):
    """llm-neo.json, which also holds the checksum of all this."""

    indent: ClassVar[int | None] = 2
    restore: ClassVar[str] = _RESTORE
    other_version: ClassVar[str] = "use the version of llm-neo that wrote it"

    format_version: int = 1
    files: dict[str, str]
    """sha256 of each file, but for the card, which is the user's to change."""
    base: dict[str, str] | None
    """Of an adapter: identity of the model that it belongs to, see `student_files.identity`."""


def write_record(folder: Path, base: dict[str, str] | None) -> str:
    """Record all files of a directory; the hash of the record."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != CARD}
    (folder / RECORD).write_bytes(Record(files=files, base=base).to_json())
    return sha256(folder / RECORD)


def read_record(folder: Path) -> Record | None:
    """The record of a directory, all of whose files are as they were written; None where there is none.

    Raises:
        DataError: a file is missing or was changed, or the record itself.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record = Record.from_json(path.read_bytes(), str(path))
    for name, expected in record.files.items():
        file = folder / name
        found = sha256(file) if Path(name).name == name and file.is_file() else "no such file"
        if found != expected:
            raise DataError(
                f"{file} is not what the run has written",
                got=found[:16],
                expected=f"sha256 {expected[:16]}",
                fix=_RESTORE,
            )
    return record


def is_adapter(model: str | Path) -> bool:
    """Whether this is the directory of a peft adapter."""
    return (Path(model) / ADAPTER_CONFIG).is_file()


def source_of(model: str | Path, base: Path | None = None, *, trust: bool = False) -> tuple[str, str | None]:
    """(directory or hub id, revision) of the model itself, which for an adapter is its base.

    Args:
        model: what the user named; if a run has left it, its files are proven.
        base: where an adapter's base lies now, if not where the adapter says.
        trust: code that the model itself brings shall be run.

    Raises:
        MismatchError: the adapter does not say what it belongs to, its base is not there, or is another model; or the
            adapter alone would say whose code is run.
        DataError: a file is torn, or is not what the run has written.
    """
    record = read_record(Path(model))
    if not is_adapter(model):
        if base is not None:
            raise MismatchError(f"{model} is no adapter", got=f"--base {base}", fix="leave out --base")
        return str(model), None
    config = _config(Path(model))
    source, revision = config.base_model_name_or_path, config.revision
    if base is not None:
        source, revision = str(base), None
    if trust and base is None:
        raise MismatchError(
            f"the adapter in {model} would say whose code is run",
            got=f"{ADAPTER_CONFIG}: {source}",
            expected="a base model that you name yourself, since whoever made the adapter chose this one",
            fix="read the code of that model, download it if it is on the hub, and name its directory: --base DIR",
        )
    if not source:
        raise MismatchError(
            f"the adapter in {model} does not name its base model",
            got="base_model_name_or_path: null",
            expected="a directory or hub id",
            fix="name it: --base DIR",
        )
    if (base is not None or Path(source).is_absolute()) and not Path(source).is_dir():
        raise MismatchError(
            f"the base model of the adapter in {model} is not there",
            got=f"no directory {source}",
            expected="the model that the adapter was trained on",
            fix="say where it lies now: --base DIR",
        )
    _refuse_other_identity(
        record, source, revision,
        what=f"{source} is not the model that the adapter in {model} was trained on",
        fix="say where that model lies: --base DIR",
    )  # fmt: skip
    return source, revision


def refuse_no_adapter(folder: Path, *, expected: str, fix: str) -> None:
    """Raise MismatchError unless this is the directory of a peft adapter."""
    if not is_adapter(folder):
        got = f"no {ADAPTER_CONFIG}" if folder.is_dir() else "no such directory"
        raise MismatchError(f"{folder} is not an adapter", got=got, expected=expected, fix=fix)


def refuse_other_base(adapter: Path, model: str, revision: str | None) -> None:
    """Raise MismatchError if this is no adapter with weights that can be read, or if it was trained on another model.

    DataError if a file of it is torn, or is not what the run has written.
    """
    fix = "correct student.adapter; a whole model belongs in student.model"
    refuse_no_adapter(adapter, expected="the directory of a peft adapter", fix=fix)
    _refuse_unreadable(adapter)
    _refuse_other_identity(
        read_record(adapter), model, revision,
        what=f"the adapter in {adapter} was trained on another model than {model}",
        fix="set student.model to the model that it was trained on",
    )  # fmt: skip


def begin_from(model: PeftModel, folder: Path) -> None:
    """Give a new adapter the weights of one that was trained before.

    Raises:
        MismatchError: they differ in rank, scaling or modules.
    """
    ours, theirs = model.peft_config[ADAPTER], _config(folder)
    different = [name for name in _SHAPING if getattr(ours, name) != getattr(theirs, name, None)]
    state = load_file(folder / ADAPTER_WEIGHTS)
    shapes = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if not different and {name: tensor.shape for name, tensor in state.items()} != shapes:
        different = ["target_modules", "modules_to_save"]
    if different:
        raise MismatchError(
            f"the adapter in {folder} is another one than student.lora describes: {', '.join(different)}",
            got="; ".join(f"{name} = {getattr(theirs, name, None)}" for name in different),
            expected="; ".join(f"{name} = {getattr(ours, name)}" for name in different),
            fix=f"set student.lora to what {ADAPTER_CONFIG} says",
        )
    set_peft_model_state_dict(model, state)


def load_adapter(base: Any, folder: Path) -> Any:
    """An adapter on its base, from safetensors alone.

    Raises:
        MismatchError: there are no safetensors, or they do not fit the base.
        DataError: they are torn.
    """
    _refuse_unreadable(folder)
    try:
        return PeftModel.from_pretrained(base, str(folder), use_safetensors=True).eval()
    except (RuntimeError, ValueError) as error:
        raise MismatchError(
            f"the adapter in {folder} does not fit its base model", got=str(error)[:500],
            expected="the model that it was trained on", fix="say where that model lies: --base DIR",
        ) from error  # fmt: skip


def _refuse_unreadable(folder: Path) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MismatchError(
            f"the adapter in {folder} has no weights that can be read",
            got=f"no {ADAPTER_WEIGHTS}",
            expected="weights as safetensors: other formats can run code",
            fix="convert it with the peft that wrote it: save_pretrained(..., safe_serialization=True)",
        )
    refuse_torn(folder / ADAPTER_WEIGHTS)


def _refuse_other_identity(record: Record | None, model: str, revision: str | None, *, what: str, fix: str) -> None:
    """Raise MismatchError if the adapter of a record, if there is one, belongs to another model."""
    if record is None or record.base is None:
        return
    try:
        found = identity(model, revision, code="code" in record.base)
    except OSError:  # No such model: whoever loads it says so.
        return
    if found != record.base:
        raise MismatchError(what, got=found, expected=record.base, fix=fix)


def _config(folder: Path) -> Any:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder / ADAPTER_CONFIG} is torn, or of a kind that peft does not know",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="peft's configuration of an adapter",
            fix="restore the file",
        ) from error
    if config.peft_type not in _KINDS:
        raise MismatchError(
            f"the adapter in {folder} is of a kind that is not read",
            got=f"peft_type: {config.peft_type}",
            expected=f"one whose weights lie in the modules of its base model: {', '.join(_KINDS)}",
            fix="use an adapter of such a kind",
        )
    return config
