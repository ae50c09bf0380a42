"""What is kept between starts: a frozen corpus, under a key that names everything that it was made from."""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from teacher_dump.config import CorpusSection
from teacher_dump.remote import RemoteFile
from teacher_dump.sources import Found

log = logging.getLogger(__name__)
T = TypeVar("T")

_MADE_BY = ("formats", "masks", "turns", "sources", "remote", "tokenise", "corpus")
"""Modules whose code decides what a corpus holds."""
_LIBRARIES = ("transformers", "tokenizers", "datasets", "jinja2")
_SETTLED_SECONDS = 2.0
"""A file that was written less than this ago may be written again without a new time."""


def cache_folder(section: CorpusSection) -> Path:
    """Where files are kept between starts."""
    if section.cache_dir is not None:
        return Path(section.cache_dir).expanduser()
    return Path(os.environ.get("LLM_NEO_CACHE") or Path.home() / ".cache" / "llm-neo")


def corpus_key(section: CorpusSection, found: Sequence[Found], tokenizer: Any, *, head_size: int) -> str | None:
    """Hash of all that a frozen corpus depends on; None if something is not known, so that nothing can be kept.

    Local files are known by path, size and modification time, remote ones by size and version. What `datasets` would
    look up on a hub is not known before it does.
    """
    files = [_identity(source) for source in found]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if None in files or backend is None:
        return None
    tokens = [backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    code = [(Path(__file__).parent / f"{name}.py").read_text() for name in _MADE_BY]
    parts = [
        files,
        section.model_dump(mode="json", exclude={"cache_dir": True, "sources": {"__all__": {"storage_options"}}}),
        head_size,
        hashlib.sha256(json.dumps([tokens, code], default=str).encode()).hexdigest(),
        {name: version(name) for name in ("llm-neo", *_LIBRARIES)},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def kept(
    folder: Path, key: str, *, load: Callable[[Path], T], make: Callable[[], T], save: Callable[[T, Path], None]
) -> T:
    """What lies under `folder / key`, or else what `make` returns, which lies there afterwards.

    Of several workers one makes it and the others wait. What cannot be loaded is made again; a cache that cannot be
    written to is no error.

    Args:
        folder: of the cache.
        key: of the value.
        load: reads a directory; whatever it raises means that this is damaged.
        make: may raise anything.
        save: fills a directory.
    """
    target = folder / key
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(stack, folder / f"{key}.lock")
        except (OSError, NotImplementedError) as error:
            log.warning("nothing is kept in %s between starts: %s", folder, error)
            return make()
        if target.is_dir():
            try:
                value = load(target)
                log.info("the tokenised corpus is taken from %s", target)
                return value
            except Exception as error:
                log.warning("%s is damaged (%s); the corpus is tokenised again", target, error)
        value = make()
        part = folder / f".part-{uuid.uuid4().hex}"
        try:
            part.mkdir()
            save(value, part)
            _sync(part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        except OSError as error:
            log.warning("the tokenised corpus is not kept in %s: %s", folder, error)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return value


def _lock(stack: ExitStack, path: Path) -> None:
    lock = FileLock(path)
    try:
        stack.enter_context(lock.acquire(timeout=0))
    except Timeout:
        log.info("another worker is tokenising the corpus; waiting for it")
        stack.enter_context(lock.acquire())


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _identity(found: Found) -> Any:
    if found.builder is not None:
        return _file_identities(found.files)
    path = Path(found.path)
    return _file_identities(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else None


def _file_identities(files: Iterable[str | Path | RemoteFile]) -> Any:
    known: list[Sequence[Any]] = []
    for file in files:
        if isinstance(file, RemoteFile):
            known.append((file.url, file.bytes, file.version))
        elif isinstance(file, Path):
            seen = file.stat()
            if seen.st_mtime > time.time() - _SETTLED_SECONDS:
                return None
            known.append((str(file.absolute()), seen.st_size, seen.st_mtime_ns))
        else:
            return None
    return known
