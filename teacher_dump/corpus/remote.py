"""Files of a source in an object store: found by name, glob or prefix, and fetched once into the cache."""

import hashlib
import json
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from storage_schemas.common.errors import DataError, TemporaryError
from storage_schemas.common.interrupt import in_background
from storage_schemas.common.publish import give_name
from storage_schemas.stores.address import STORES
from storage_schemas.stores.store import Store

log = logging.getLogger(__name__)

_SETTING = "corpus.sources[] (path, storage_options)"
_MAGIC = re.compile(r"[*?[]")
_PARALLEL = 8
"""Objects that are fetched at the same time."""
_TIDY_SECONDS = 3.0
"""How long a failed or stopped start waits for the other fetches to remove what they began."""


class _Ended(BaseException):
    """Another fetch failed, or the process is to stop."""


class RemoteFile(NamedTuple):
    """One object, as it was when it was found."""

    url: str
    bytes: int
    version: str
    """Its e_tag, or when it was modified: another content has another version."""


def is_remote(path: str) -> bool:
    """Whether a source's path is the URL of an object store."""
    return path.partition("://")[0] in STORES and "://" in path


def find_remote(url: str, options: Mapping[str, str], *, wanted: Callable[[str], bool]) -> list[RemoteFile]:
    """Files of a source, by name.

    Args:
        url: of an object, of all objects under a prefix, or with `*`, `?`, `[...]` and `**` in the key.
        wanted: whether a file below a prefix belongs to the source; hidden ones (`.x`, `_x`) never do.

    Raises:
        DataError: there is no such object.
        MismatchError: the URL or an option is not understood, or access is denied.
        TemporaryError: the store does not answer.
    """
    bucket, key = _split(url)
    store = Store(bucket, options=options, setting=_SETTING)
    heads: Sequence[Any]
    if magic := _MAGIC.search(key):
        pattern = re.compile(glob_translate(key))
        heads = [head for head in _heads(store, key[: magic.start()].rpartition("/")[0]) if pattern.match(head["path"])]
    elif key and not key.endswith("/") and (head := store.head(key)):
        heads = [head]
    else:
        below = _heads(store, key.rstrip("/"))
        heads = [h for h in below if wanted(h["path"]) and not _hidden(h["path"].removeprefix(key))]
    found = [RemoteFile(f"{bucket}/{head['path']}", head["size"], _version(head)) for head in heads]
    if not found:
        raise DataError(
            "a source of the corpus is missing",
            got=f"no object matches {url}",
            expected="a JSONL, JSON or Parquet file, a glob, or a prefix with such files below it",
            fix=f"correct {_SETTING}",
        )
    return sorted(found)


def fetch(files: Sequence[RemoteFile], options: Mapping[str, str], cache: Path) -> list[Path]:
    """Local copies of objects, some at a time; a copy of the same version that is there already is taken.

    Raises:
        DataError: one is gone, or was changed meanwhile.
        MismatchError: access is denied.
        TemporaryError: the store does not answer, or the disk is full.
    """
    paths: dict[int, Path] = {}
    todo = iter(enumerate(files))
    ended = threading.Event()

    def work() -> None:
        for place, file in todo:
            if ended.is_set():
                return
            paths[place] = _fetch(file, options, cache, ended)

    workers = [in_background(work) for _ in range(min(_PARALLEL, len(files)))]
    try:
        for worker in workers:
            worker.result()
    finally:
        ended.set()
        wait(workers, timeout=_TIDY_SECONDS)
    return [paths[place] for place in range(len(files))]


def _fetch(file: RemoteFile, options: Mapping[str, str], cache: Path, ended: threading.Event) -> Path:
    name = hashlib.sha256(json.dumps([file.url, file.bytes, file.version]).encode()).hexdigest()[:32]
    bucket, key = _split(file.url)
    target = cache / "sources" / name / PurePosixPath(key).name
    proof = target.with_name(f"{target.name}.sha256")
    if target.is_file() and target.stat().st_size == file.bytes and proof.is_file():
        with target.open("rb") as copy:
            if hashlib.file_digest(copy, "sha256").hexdigest() == proof.read_text():
                return target
        log.warning("%s is damaged; %s is fetched again", target, file.url)
    part, note = (target.with_name(f".{what}-{uuid.uuid4().hex}") for what in ("part", "proof"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as out:

            def take(head: Any, chunks: Iterable[Any]) -> str:
                if _version(head) != file.version:
                    raise _changed(file)
                digest = hashlib.sha256()
                out.seek(0)
                out.truncate()
                for chunk in chunks:
                    if ended.is_set():
                        raise _Ended
                    digest.update(chunk)
                    out.write(chunk)
                return digest.hexdigest()

            sha256 = Store(bucket, options=options, setting=_SETTING).stream(key, take)
        if part.stat().st_size != file.bytes:
            raise _changed(file)
        note.write_text(sha256)
        # Another process may do the same at the same time; it gives the same content.
        give_name(note, proof)
        give_name(part, target)
    except FileNotFoundError as error:
        raise _changed(file) from error
    except OSError as error:
        raise TemporaryError(
            f"cannot keep a copy of {file.url}",
            got=f"{error.strerror}: {target.parent}",
            expected=f"{file.bytes:,} bytes free in a directory that can be written to",
            fix="free space, or set corpus.cache_dir",
        ) from error
    finally:
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    return target


def _split(url: str) -> tuple[str, str]:
    """URL of the bucket, and the key. Not urllib's work: `?` and `#` are characters like any other in a key."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def _heads(store: Store, folder: str) -> list[Any]:
    try:
        return [head for head in store.heads(folder) if head["size"]]
    except FileNotFoundError:
        return []


def _version(meta: Any) -> str:
    return str(meta.get("e_tag") or meta["last_modified"].isoformat())


def _hidden(key: str) -> bool:
    return any(part.startswith((".", "_")) for part in key.strip("/").split("/"))


def _changed(file: RemoteFile) -> DataError:
    return DataError(
        f"{file.url} changed while it was read",
        got="another version, or nothing",
        expected=f"{file.bytes:,} bytes, version {file.version}",
        fix="let nobody write to the corpus while workers start, then run the same command again",
    )
