"""What is kept between starts: a frozen corpus, under a key that names everything that it was made from."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage_schemas.common.errors import MismatchError, NeoError, TemporaryError, cannot_write
from storage_schemas.common.hashes import SETTLED_SECONDS, file_state, this_boot
from storage_schemas.common.locks import locked, read_or_make
from storage_schemas.common.publish import give_name, publish
from storage_schemas.rows import STATUSES
from teacher_dump.config import CorpusSection
from teacher_dump.corpus.columns import COLUMNS, JOURNAL, Columns, Frozen, mapped, read_journal, whole_parts
from teacher_dump.corpus.remote import RemoteFile
from teacher_dump.corpus.sources import Found, Records

log = logging.getLogger(__name__)

_MADE_BY = (
    "formats", "masks", "turns", "template", "sources", "lines", "naming", "remote", "tokenise", "freeze", "columns",
)  # fmt: skip
"""Modules whose code decides what a corpus holds."""
_NOT_CONTENT: dict[str, Any] = {
    **dict.fromkeys(("cache_dir", "num_proc", "max_bad_share", "chat_template", "template_kwargs"), True),
    "sources": {"__all__": {"storage_options"}},
}
_LIBRARIES = ("transformers", "tokenizers", "datasets", "jinja2")
_DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What reading a damaged corpus may end in."""


def cache_folder(section: CorpusSection | None = None) -> Path:
    """Where files are kept between starts."""
    if section is not None and section.cache_dir is not None:
        return Path(section.cache_dir).expanduser()
    return Path(os.environ.get("LLM_NEO_CACHE") or Path.home() / ".cache" / "llm-neo")


def is_looked_up(found: Found) -> bool:
    """Whether only `datasets` finds out what a source holds: on a hub, or at a URL."""
    return (not found.files and not Path(found.path).is_dir()) or any(isinstance(file, str) for file in found.files)


def corpus_key(
    section: CorpusSection, found: Sequence[Found], opened: Mapping[int, Records], tokenizer: Any, *, lm_head_rows: int
) -> str | None:
    """Hash of all that a frozen corpus depends on; None if something is not known, so that nothing can be kept.

    Local files are known by path, size and modification time, remote ones by size and version, and what `datasets`
    looked up by what it knows of that (`opened`, by number of the source).
    """
    files = [opened[i].identity if i in opened else _identity(source) for i, source in enumerate(found)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if None in files or backend is None:
        return None
    tokens = [backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    code = [(Path(__file__).parent / f"{name}.py").read_text() for name in _MADE_BY]
    parts = [
        files,
        section.model_dump(mode="json", exclude=_NOT_CONTENT),
        lm_head_rows,
        STATUSES,
        hashlib.sha256(json.dumps([tokens, code], default=str).encode()).hexdigest(),
        {name: version(name) for name in ("llm-neo", *_LIBRARIES)},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def why_unknown(found: Sequence[Found], opened: Mapping[int, Records]) -> NeoError:
    """Why `corpus_key` knows no key; arguments as there."""
    expected = "files, objects, or a dataset of the hub, which nobody writes to"
    for number, source in enumerate(found):
        if number not in opened and _identity(source) is None:
            got, fix = f"{source.path} was written a moment ago", "run the same command again when it is complete"
            return TemporaryError("the tokenised corpus cannot be kept", got=got, expected=expected, fix=fix)
    lines = [source.path for number, source in enumerate(found) if number in opened and not opened[number].identity]
    got = f"{', '.join(lines) or 'the tokenizer'}: no version of its content is known"
    fix = "download it, and name the file in corpus.sources[].path"
    return MismatchError("the tokenised corpus cannot be kept", got=got, expected=expected, fix=fix)


def kept(folder: Path, key: str | None, *, make: Callable[[Columns], None], must_keep: bool = False) -> Frozen:
    """The corpus that lies under `folder / key`, or else the one that `make` fills, which lies there afterwards.

    What is proven is read without a lock. Of several workers one makes it and the others wait; of those of one machine
    one proves it, on all machines at the same time. What is damaged is made again; a cache that cannot be written to is
    no error, unless it `must_keep`. What is not kept never has a name.

    Args:
        key: of the corpus; None: it cannot be kept.
        make: appends to columns that may already hold what an interrupted start has made, and finishes them.

    Raises:
        NeoError: whatever `make` raises. Parts are left behind if it is temporary.
    """
    target, lock = folder / f"{key}", folder / f"{key}.lock"
    if key is not None and (found := _proven(target)):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if key is not None:
            with suppress(BlockingIOError), locked(lock, shared=True, wait=False):
                pass
    except OSError as error:
        if must_keep:
            raise cannot_write(f"the cache {folder}", error, setting="corpus.cache_dir") from error
        log.warning("nothing is kept in %s between starts: %s", folder, error)
        found = None if key is None else _whole(target)
        return found or _made(None, None, make)
    if key is None:
        return _made(None, folder, make)
    return read_or_make(
        lock,
        partial(_whole, target),
        partial(_make_and_keep, target, make, must_keep=must_keep),
        state=lambda: target.stat().st_ino if target.is_dir() else None,
        waiting="another worker is tokenising the corpus; waiting for it",
    )


def _make_and_keep(target: Path, make: Callable[[Columns], None], *, must_keep: bool) -> Frozen:
    part = target.with_name(f"{target.name}.part")
    try:
        part.mkdir(exist_ok=True)
        found = _made(part, None, make)
    except NeoError as error:
        if not isinstance(error, TemporaryError):
            shutil.rmtree(part, ignore_errors=True)
        raise
    except OSError as error:
        raise cannot_write(f"the cache {part}", error, setting="corpus.cache_dir") from error
    try:
        shutil.rmtree(target, ignore_errors=True)
        give_name(part, target)
        found, seen = _opened(target)
        _write_proof(target, seen)
    except _DAMAGE as error:
        if must_keep:
            raise cannot_write(f"the cache {target}", error, setting="corpus.cache_dir") from error
        log.warning("the tokenised corpus is not kept in %s: %s", target.parent, error)
    return found


def _whole(folder: Path) -> Frozen | None:
    """A kept corpus that is proven, or that this process proves while others of this machine wait."""
    if not folder.is_dir():
        return None
    with ExitStack() as stack:
        with suppress(OSError):  # Where nothing can be written, each reads it.
            stack.enter_context(locked(folder / f".{_proof_name()}.lock"))
        return _proven(folder) or _prove(folder)


def _made(folder: Path | None, scratch: Path | None, make: Callable[[Columns], None]) -> Frozen:
    with closing(Columns(folder, scratch=scratch)) as columns:
        make(columns)
        return columns.frozen()


def _proven(folder: Path) -> Frozen | None:
    """A kept corpus whose files are those that were read from end to end since this machine was started."""
    with suppress(*_DAMAGE):
        found, seen = _opened(folder)
        if seen == json.loads((folder / _proof_name()).read_bytes()):
            log.info("the tokenised corpus is taken from %s", folder)
            return found
    return None


def _prove(folder: Path) -> Frozen | None:
    """Read every byte of a kept corpus; None if one of them is not what was written."""
    log.info("the tokenised corpus in %s is read once, to see that it is whole", folder)
    try:
        found, seen = _opened(folder)
        sizes = {name: seen[name][1] for name in COLUMNS}
        if found.parts == whole_parts(folder) and found.parts[-1]["ends"] == sizes:
            _write_proof(folder, seen)
            return found
        reason = "its content has another hash"
    except _DAMAGE as error:
        reason = str(error)
    log.warning("%s is damaged (%s); the corpus is tokenised again", folder, reason)
    return None


def _opened(folder: Path) -> tuple[Frozen, dict[str, list[int]]]:
    """A kept corpus, and the states of the very files that are mapped."""
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb")) for name in (*COLUMNS, JOURNAL)}
        frozen = Frozen(arrays=mapped(files), parts=read_journal(folder), folder=folder)
        return frozen, {name: file_state(file.fileno()) for name, file in files.items()}


def _write_proof(folder: Path, seen: Mapping[str, Any]) -> None:
    try:
        publish(folder / _proof_name(), json.dumps(seen))
    except OSError as error:
        log.warning("%s is read again at each start: %s", folder, error)


def _proof_name() -> str:
    return f"proven-{this_boot()}.json"


def _identity(found: Found) -> list[Sequence[Any]] | None:
    """What is known of each file of a source that is not `is_looked_up`; None: one was written a moment ago."""
    known: list[Sequence[Any]] = []
    for file in found.files or sorted(p for p in Path(found.path).rglob("*") if p.is_file()):
        if isinstance(file, RemoteFile):
            known.append((file.url, file.bytes, file.version))
            continue
        path = Path(file)
        seen = path.stat()
        if seen.st_mtime > time.time() - SETTLED_SECONDS:
            return None
        known.append((str(path.absolute()), seen.st_size, seen.st_mtime_ns))
    return known
