"""Records of one source: JSON, text and tables are read by line, all else through `datasets`."""

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.json.json import JsonConfig

from storage_schemas.common.errors import DataError, NeoError
from storage_schemas.stores.address import local_path
from storage_schemas.targets import I64
from teacher_dump.config import SourceSection
from teacher_dump.corpus.formats import FORMATS, READ, detect_format, fitting_format, is_filled, unread_columns
from teacher_dump.corpus.lines import READERS, RawRecord
from teacher_dump.corpus.masks import Unusable
from teacher_dump.corpus.naming import named
from teacher_dump.corpus.remote import RemoteFile, fetch, find_remote, is_remote

log = logging.getLogger(__name__)

_BATCH = 256
_PROBED = 1000
"""Records of a source among which one must be of a known format."""
_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".csv": "csv", ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
_BELOW = ("json", "parquet")
"""What is read of a directory or below a prefix; the other kinds are named, or found by a glob."""
_SAVED = ("state.json", "dataset_dict.json")
"""What `Dataset.save_to_disk` leaves in a directory."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HIDDEN = re.compile(r"/[._]|/dataset_infos?\.json$")


@dataclass(frozen=True, slots=True)
class Found:
    """What a source's path stands for."""

    builder: str | None
    """Kind of its files, one of `_BUILDERS`; None: a directory or a hub dataset, which `datasets` finds out about."""
    path: str
    """For such a directory or dataset."""
    files: Sequence[str | Path | RemoteFile] = ()
    """For a builder: its files, in order."""


def find_source(source: SourceSection) -> Found:
    """Look a source's files up; nothing is read.

    Raises:
        DataError: there is none, or they are of different kinds.
        MismatchError: an object store's URL is not understood, or it denies access.
        TemporaryError: an object store does not answer.
    """
    if is_remote(source.path):
        remote = find_remote(source.path, source.storage_options, wanted=lambda key: _builder(key) in _BELOW)
        return Found(_one_kind({_builder(file.url) for file in remote}, source), source.path, remote)
    path = local_path(source.path)
    if path is None:  # Another protocol of `datasets`, such as https://.
        builder = _builder(source.path)
        return Found(builder, source.path, [source.path] if builder else ())
    if path.exists():
        builder = _builder(path.name) if path.is_file() else None
        if path.is_file() and builder is None:
            raise DataError(
                f"a source of the corpus is of a kind that is not read: {source.path}",
                got=f"a file that ends in {path.suffix}" if path.suffix else "a file without a suffix",
                expected=f"{', '.join(_BUILDERS)}; text also with {', '.join(_COMPRESSED)}; or a directory",
                fix="convert the file to JSONL or Parquet, or give it its suffix",
            )
        return Found(builder, str(path), [path] if builder else ())
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if files:
        return Found(_one_kind({_builder(file.name) for file in files}, source), str(path), files)
    if _builder(path.name) or glob.has_magic(str(path)) or source.path.startswith("file://"):
        raise DataError(
            "a source of the corpus is missing",
            got=f"no file {source.path}",
            expected="a file (kinds: `llm-neo docs data_formats`), a glob, a directory, or a dataset id",
            fix="correct corpus.sources[].path; a relative path begins where the command is run",
        )
    return Found(None, source.path)


@dataclass(frozen=True, slots=True)
class Records:
    """What a source gives."""

    total: int
    """Records of its split."""
    used: int
    """Records that its weight leaves."""
    numbered: Iterator[tuple[int, RawRecord]]
    """(place in the split, record) of these, in order."""
    identity: tuple[str, tuple[int, ...]] | None = None
    """What `datasets` knows its content by: a hash of name, configuration, version, commit and split, and the bytes of
    its files; None where it read lines."""
    uniform: bool = True
    """Whether each record has the columns of all."""


def read_source(
    source: SourceSection, records: Records, *, quiet: bool = False
) -> Iterator[tuple[str, str, RawRecord]]:
    """(where, format, record) of the records of a source; with `auto`, each record by its own columns.

    Columns that are not read are told, unless `quiet`.

    Raises:
        DataError: the format of its first record is not known.
    """
    read = named(source, records.numbered, uniform=records.uniform)
    usual, read = _usual(read, where=source.path) if source.format == "auto" else (source.format, read)
    seen: Counter[str] = Counter()
    unknown: set[str] = set()
    for number, record in read:
        where = f"{source.path}, record {number + 1}"
        if isinstance(record, Unusable):
            yield where, usual, record
            continue
        kind = usual if source.format != "auto" else _kind(record, usual)
        seen[kind] += 1
        decisive, odd = unread_columns(record, kind)
        if decisive:
            raise DataError(
                f"{where}: a column decides what the sample is, and format `{kind}` does not read it",
                got=", ".join(sorted(decisive)),
                expected="columns that are read, or that do not matter",
                fix="convert the records, or name the column in ignore_columns of this source",
            )
        if not quiet and (odd := odd - unknown):
            unknown |= odd
            log.warning("%s: columns that format `%s` does not read: %s", where, kind, ", ".join(sorted(odd)))
        yield where, kind, record
    if len(seen) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in seen.most_common())
        log.warning("%s holds records of several formats: %s", source.path, counted)


def _usual(read: Iterator[tuple[int, RawRecord]], *, where: str) -> tuple[str, Iterator[tuple[int, RawRecord]]]:
    """The format of the first record that fits one, and all records: those before it may lack columns.

    Raises:
        DataError: none of the first `_PROBED` fits.
    """
    seen: list[tuple[int, RawRecord]] = []
    columns: Collection[str] | None = None
    for number, record in islice(read, _PROBED):
        seen.append((number, record))
        if isinstance(record, Unusable):
            continue
        if (kind := fitting_format(record.keys())) is not None:
            return kind, chain(seen, read)
        columns = columns or record.keys()
    if columns is None:
        return "text", chain(seen, read)
    return detect_format(columns, where=where), chain(seen, read)


def _kind(record: Mapping[str, Any], usual: str) -> str:
    """The format of one record. Columnar files give it the columns of all others, too; these are null or empty."""
    if any(is_filled(record.get(column)) for column in FORMATS[usual]):
        return usual
    return fitting_format({column for column, value in record.items() if is_filled(value)}) or usual


def open_source(source: SourceSection, found: Found, *, seed: int, cache: Path) -> Records:
    """Records of a source that its weight leaves, in order.

    Args:
        seed: of the choice that a weight below 1 makes.
        cache: where copies of remote files are kept.

    Raises:
        DataError: the source cannot be read.
        MismatchError: an object store denies access.
        TemporaryError: an object store does not answer.
    """
    files: list[str | Path] = [file for file in found.files if not isinstance(file, RemoteFile)]
    files += fetch([file for file in found.files if isinstance(file, RemoteFile)], source.storage_options, cache)
    reader = found.builder if found.builder in READERS else None
    if reader == "json" and (_is_union(source.split) or not all(isinstance(file, Path) for file in files)):
        reader = None  # At a URL `datasets` keeps a copy, and knows its version.
    try:
        if reader is not None:
            if _split_name(source.split) != "train":
                raise ValueError(f"Unknown split {source.split!r}: of a file there is ['train'] alone")
            return _by_line(files, reader, source, seed)
        if (lines := _json_below(source, found)) is not None:
            return _by_line(lines, "json", source, seed)
        dataset = _load(source, found, files)
    except NeoError:
        raise
    except Exception as error:  # Each compression and protocol has errors of its own.
        raise _unreadable(source, error if reader is not None else error.__cause__ or error) from error
    read = {*READ, *source.columns.values()}
    if mixed := [name for name in dataset.column_names if name in read and "Json(" in repr(dataset.features[name])]:
        log.warning(
            "%s: `datasets` may round numbers and decode strings of %s, whose records differ; to have them as they "
            "are, download the files and name them in corpus.sources[].path", source.path, ", ".join(mixed),
        )  # fmt: skip
    total = len(dataset)
    identity = (dataset._fingerprint, tuple(Path(file["filename"]).stat().st_size for file in dataset.cache_files))
    if source.weight == 1:
        return Records(total, total, enumerate(_rows(dataset)), identity)
    chosen = chosen_records(total, source.weight, seed=seed)
    numbered = zip(chosen.tolist(), _rows(dataset.select(chosen)), strict=True)
    return Records(total, len(chosen), numbered, identity)


def chosen_records(records: int, weight: float, *, seed: int) -> I64:
    """Which of `records` records a source of `weight` gives, ascending; `weight` x records of them, rounded half up.

    Record i has the i-th number of one random stream, and those with the smallest numbers are taken: the choice knows
    nothing of other sources or of contents, and a larger weight only adds to it. Raw bits of numpy's Philox, unlike
    its distributions, do not change between versions.
    """
    share = (Decimal(str(weight)) * records).to_integral_value(ROUND_HALF_UP)
    numbers = np.random.Philox(key=seed).random_raw(records)
    return np.sort(np.argsort(numbers, kind="stable")[: max(1, int(share))]).astype(np.int64)


def _builder(name: str) -> str | None:
    suffixes = Path(name).suffixes
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    kind = next((_BUILDERS.get(suffix) for suffix in reversed(suffixes) if suffix not in _COMPRESSED), None)
    return None if packed and kind == "arrow" else kind  # Arrow compresses inside.


def _one_kind(builders: set[str | None], source: SourceSection) -> str:
    if len(builders) == 1 and (builder := next(iter(builders))):
        return builder
    raise DataError(
        f"a source of the corpus holds files of different or unknown kinds: {source.path}",
        got=", ".join(sorted(builder or "unknown" for builder in builders)),
        expected="only JSONL and JSON, or only files of another kind",
        fix="narrow corpus.sources[].path by a glob such as dir/*.jsonl, or make two sources of it",
    )


def _json_below(source: SourceSection, found: Found) -> list[Path] | None:
    """The files of a split of a directory, if they are JSON; None: `datasets` reads it."""
    path = Path(found.path)
    if found.builder is not None or not path.is_dir() or any((path / name).is_file() for name in _SAVED):
        return None
    if _is_union(source.split):
        return None
    config = datasets.load_dataset_builder(found.path, source.name).config
    files = [Path(name) for name in (config.data_files or {}).get(_split_name(source.split), ())]
    # A README.md may say where in a file the records are, and how its text is encoded.
    plain = isinstance(config, JsonConfig) and config.field is None
    plain = plain and (getattr(config, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    if not plain or not files or not all(file.is_file() and _builder(file.name) == "json" for file in files):
        return None
    refuse_elsewhere(found.path, chain.from_iterable((config.data_files or {}).values()))
    _warn_of_unread_files(source, path, {file.resolve() for file in files})
    return files


def _own_cache(files: Iterable[str | Path]) -> str | None:
    """Where `datasets` keeps what it makes of local files: it knows them by path and time alone, and would take those
    of another size for the ones of before."""
    seen = sorted((str(file), Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files)
    name = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "llm-neo" / name)


def _load(source: SourceSection, found: Found, files: Sequence[str | Path]) -> Any:
    if found.builder is not None:
        names = [str(file) for file in files]
        cache = _own_cache(files) if all(isinstance(file, Path) for file in files) else None
        return datasets.load_dataset(found.builder, data_files=names, split=source.split, cache_dir=cache)
    path = Path(found.path)
    if any((path / name).is_file() for name in _SAVED):
        saved = datasets.load_from_disk(str(path.resolve()))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_split_name(source.split)]
        refuse_elsewhere(found.path, [file["filename"] for file in saved.cache_files])
        return saved.select(range(*_split_range(source, len(saved))))
    chosen = datasets.load_dataset_builder(found.path, source.name).config.data_files or {}
    refuse_elsewhere(found.path, chain.from_iterable(chosen.values()))
    if path.is_dir():
        _warn_of_unread_files(
            source, path, {Path(name).resolve() for name in chosen.get(_split_name(source.split), ())}
        )
    cache = _own_cache(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else None
    return datasets.load_dataset(found.path, source.name, split=source.split, cache_dir=cache)


def refuse_elsewhere(dataset: str, files: Iterable[str]) -> None:
    """Raise DataError if a dataset, a directory or one of the hub, names a file that is not in it."""
    folder = Path(dataset).resolve()
    for file in files:
        place = file.rpartition("::")[2]  # Of a file in an archive.
        if folder.is_dir():
            own = Path(os.path.normpath(place)).is_relative_to(folder)
        else:
            own = "://" in dataset or (place.startswith("hf://datasets/") and f"/{dataset}@" in place)
        if not own:
            raise DataError(
                f"the dataset {dataset} names a file that is not its own",
                got=ascii(file),
                expected="files inside of it",
                fix="look into its README.md or state.json; name that file in corpus.sources[].path if it is wanted",
            )


def _warn_of_unread_files(source: SourceSection, folder: Path, read: Set[Path]) -> None:
    """Name the data files of a directory that `datasets` leaves out: of another kind than most, or of another split."""
    there = [file for file in sorted(folder.rglob("*")) if _builder(file.name) in _BELOW and file.resolve() not in read]
    unread = [str(name) for name in (file.relative_to(folder) for file in there) if not _HIDDEN.search(f"/{name}")]
    if unread:
        log.warning("%s: files that split %s leaves out: %s", source.path, source.split, ", ".join(unread[:10]))


def _rows(dataset: Any) -> Iterator[RawRecord]:
    for start in range(0, len(dataset), _BATCH):
        stop = min(start + _BATCH, len(dataset))
        try:
            columns = dataset[start:stop]
        except UnicodeDecodeError:
            yield from (_row(dataset, i) for i in range(start, stop))
            continue
        yield from ({name: column[i] for name, column in columns.items()} for i in range(stop - start))


def _row(dataset: Any, i: int) -> RawRecord:
    try:
        row: Mapping[str, Any] = dataset[i]
    except UnicodeDecodeError as error:
        return Unusable(f"not valid Unicode: {error}")
    return row


def _by_line(files: Sequence[str | Path], kind: str, source: SourceSection, seed: int) -> Records:
    """Records of files of a kind in `READERS`; one that is not UTF-8 is unusable."""
    raw, record_of = READERS[kind]
    first, last = _split_range(source, sum(1 for _ in raw(files)))
    wanted: Collection[int] = range(last - first)
    if source.weight < 1:
        wanted = set(chosen_records(last - first, source.weight, seed=seed).tolist())
    numbered = (
        (number, record_of(where, given))
        for number, (where, given) in enumerate(raw(files), -first)
        if number in wanted
    )
    return Records(last - first, len(wanted), numbered, uniform=kind != "json")


def _is_union(split: str) -> bool:
    """Whether several parts or splits are asked for, which `datasets` puts together."""
    return "+" in split or split == "all"


def _split_name(split: str) -> str:
    return split.split("[")[0]


def _split_range(source: SourceSection, length: int) -> tuple[int, int]:
    """First and last + 1 of a split in the notation of `datasets`, such as `train[:1000]`."""
    try:
        (part,) = datasets.ReadInstruction.from_spec(source.split).to_absolute({_split_name(source.split): length})
    except (ValueError, AssertionError) as error:
        raise _unreadable(source, error) from error
    return part.from_ or 0, length if part.to is None else part.to


def _unreadable(source: SourceSection, error: BaseException) -> DataError:
    return DataError(
        f"a source of the corpus cannot be read: {source.path}",
        got=f"{type(error).__name__}: {str(error)[:300]}",
        expected="a file (kinds: `llm-neo docs data_formats`), a directory or a dataset id, with the configured split",
        fix="correct the file, or corpus.sources[] (path, name, split); without network, download it first",
    )
