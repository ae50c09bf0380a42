"""Depth pruning: a student that is its teacher with fewer layers, as in the Minitron students of the LLM-Neo paper."""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from storage_schemas.canonical import digest
from storage_schemas.common.errors import DataError, MismatchError, UsageError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.hashes import file_sha256
from storage_schemas.common.models import hashes_of, refuse_torn
from storage_schemas.common.publish import publishing

RECORD = "pruning.json"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
"""Weights of any kind; all else beside them (tokenizer, chat template, generation config, licence) is copied."""
NOT_KEPT = ("config.json", "README.md", "llm-neo.json")
"""Not copied either: the first two are written anew, and a run's record of its files holds for these no longer."""


class Pruning(FrozenModel):
    """What was done; lies as pruning.json beside the weights."""

    source: str
    """Name of the directory or hub id that was pruned."""
    source_layers: int
    """Layers before."""
    kept: tuple[int, ...]
    """The source's layers that were kept, ascending; they are renumbered from 0."""
    source_sha256: str | None = None
    """Of its config.json and weight files; null: pruned before this was recorded."""

    def __str__(self) -> str:
        dropped = _ranges([layer for layer in range(self.source_layers) if layer not in self.kept]) or "none"
        return f"{len(self.kept)} of {self.source_layers} layers kept: {_ranges(self.kept)}; dropped: {dropped}"


def layers_to_keep(layers: int, keep: int) -> list[int]:
    """Which layers stay: the first half and the last half of what is kept; one block from the middle goes.

    The first and the last layers hold most of what cannot be missed. KL to the teacher of SmolLM2-135M without
    6, 10, 14 and 18 of its 30 layers, on answers about Python: 0.9, 3.8, 5.0 and 6.6 nats with this rule; 2.9, 7.5
    and 11.5 when 24, 20 and 12 layers are spread evenly; 21.0 and 23.7 when the block ends before the last layer.

    Raises:
        UsageError: not 1 <= keep <= layers.
    """
    if not 1 <= keep <= layers:
        raise UsageError("impossible number of layers to keep", got=keep, expected=f"1 to {layers}, the model's layers")
    last = keep // 2
    return [*range(keep - last), *range(layers - last, layers)]


def parse_keep(text: str, layers: int) -> list[int]:
    """Layers named by hand: `0,1,2` or `0-9,20-29`.

    Raises:
        UsageError: not of that form, out of range, or not ascending.
    """
    example = _ranges(layers_to_keep(layers, max(1, layers - 1))).replace(" ", "")
    expected = f"ascending layer numbers from 0 to {layers - 1}, such as {example}"
    kept: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise UsageError("layers to keep that cannot be understood", got=text, expected=expected)
        first, last = int(match[1]), int(match[2] or match[1])
        if not (kept[-1] if kept else -1) < first <= last < layers:
            problem = "layers to keep that the model does not have, or not in order"
            raise UsageError(problem, got=text, expected=expected)
        kept += range(first, last + 1)
    return kept


def prune(model: str, out: Path, *, layers: int | None = None, keep: str | None = None) -> Pruning:
    """Write a copy of a Llama-like model with fewer layers; does nothing where the same copy already lies.

    Args:
        model: directory with safetensors and config.json, or a hub id.
        out: directory to make.
        layers: keep this many, chosen by `layers_to_keep`.
        keep: keep these, see `parse_keep`; exactly one of the two is given.

    Raises:
        UsageError: neither or both of `layers` and `keep`, or out of range.
        DataError: no safetensors, torn ones, or no layers named model.layers.N.
        MismatchError: `out` holds something else, or what another model of this name was pruned to.
    """
    if (layers is None) == (keep is None):
        raise UsageError("say which layers stay", expected="exactly one of --layers N and --keep 0,1,2")
    source = Path(model) if Path(model).is_dir() else _download(model)
    config = _read_json(source / "config.json")
    there = config.get("num_hidden_layers")
    if not isinstance(there, int):
        raise DataError(f"{source}/config.json does not say how many layers there are", expected="num_hidden_layers")
    kept = layers_to_keep(there, layers) if layers is not None else parse_keep(str(keep), there)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise DataError(f"{source} has no weights that can be pruned", got="no *.safetensors", fix="convert it first")
    pruning = Pruning(
        source=Path(model).name if Path(model).is_dir() else model,
        source_layers=there,
        kept=tuple(kept),
        source_sha256=_identity(source, files),
    )
    if out.exists():
        _refuse_other(out, pruning)
        return pruning
    refuse_torn(*files)
    with publishing(out, setting="OUT") as staged:
        _write_weights(source, files, staged, kept)
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(NOT_COPIED) and file.name not in NOT_KEPT:
                shutil.copyfile(file, staged / file.name)
        (staged / "config.json").write_text(json.dumps(_pruned_config(config, kept), indent=2, sort_keys=True) + "\n")
        (staged / "README.md").write_text(
            f"# {pruning.source}, depth-pruned\n\n{pruning}. Nothing was trained after that: this is a starting point "
            "for distillation, not a usable model.\n"
        )
        (staged / RECORD).write_text(pruning.model_dump_json(indent=2) + "\n")
    return pruning


def _identity(source: Path, files: Sequence[Path]) -> str:
    """Hash of what decides how the source computes, wherever it lies."""
    from teacher_dump.corpus.cache import cache_folder

    return digest(hashes_of([source / "config.json", *files], partial(file_sha256, folder=cache_folder() / "hashes")))


def _refuse_other(out: Path, pruning: Pruning) -> None:
    record = out / RECORD
    if not record.is_file():
        raise MismatchError(f"{out} already exists and is not a pruned model", fix="choose another directory")
    there = Pruning.model_validate_json(record.read_bytes())
    if there.source_sha256 is None:
        there = there.model_copy(update={"source_sha256": pruning.source_sha256})
    if there != pruning:
        got, expected = (f"{one.source} (sha256 {str(one.source_sha256)[:16]}), {one}" for one in (there, pruning))
        fix = "choose another directory, or delete this one"
        raise MismatchError(f"{out} holds another pruned model", got=got, expected=expected, fix=fix)


def _write_weights(source: Path, files: Sequence[Path], out: Path, kept: Sequence[int]) -> None:
    """Copy the tensors that stay, file by file, under their new names, with an index if there are several files."""
    # torch takes seconds to import, and is not needed to choose layers.
    from safetensors import safe_open
    from safetensors.torch import save_file

    renamed = {old: new for new, old in enumerate(kept)}
    where: dict[str, str] = {}
    seen: set[int] = set()
    total = 0
    for file in files:
        tensors: dict[str, Any] = {}
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata()
            for name in weights.keys():  # noqa: SIM118 - not a dict
                match = LAYER.match(name)
                if match is None:
                    tensors[name] = weights.get_tensor(name)
                elif int(match[1]) in renamed:
                    new = f"model.layers.{renamed[int(match[1])]}.{name[match.end() :]}"
                    tensors[new] = weights.get_tensor(name)
                    seen.add(int(match[1]))
        if tensors:
            save_file(tensors, out / file.name, metadata=metadata or {"format": "pt"})
            where |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if seen != set(kept):
        missing = sorted(set(kept) - seen)
        raise DataError(f"{source} is not a Llama-like model", got=f"no tensors model.layers.N.* for N in {missing}")
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _pruned_config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The configuration with fewer layers; lists with one entry per layer (`layer_types`) lose the same ones."""
    layers = config["num_hidden_layers"]
    pruned = {
        key: [value[layer] for layer in kept] if isinstance(value, list) and len(value) == layers else value
        for key, value in (config | _derived(config)).items()
    }
    pruned |= {"num_hidden_layers": len(kept), "pruned_layers_kept": list(kept)}
    if isinstance(pruned.get("max_window_layers"), int):
        pruned["max_window_layers"] = min(pruned["max_window_layers"], len(kept))
    return pruned


def _derived(config: dict[str, Any]) -> dict[str, list[Any]]:
    """What transformers makes of the layers' numbers where config.json does not say it: these are about to change."""
    from transformers import CONFIG_MAPPING

    whole: dict[str, Any] = {}
    with suppress(Exception):  # What transformers does not know or take, it derives nothing from.
        whole = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    return {
        key: value
        for key, value in whole.items()
        if "layer" in key
        and config.get(key) is None
        and isinstance(value, list)
        and len(value) == config["num_hidden_layers"]
    }


def _ranges(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    # Within a block, layers grow as their places do.
    blocks = [[layer for _, layer in block] for _, block in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(block[0]) if len(block) == 1 else f"{block[0]}-{block[-1]}" for block in blocks)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}", got=error, fix="point at a directory saved by transformers") from None
    return dict(data)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise UsageError(f"no such model: {model}", got=got, expected="a directory or a hub id") from None
