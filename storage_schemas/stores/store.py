"""Files under one URL, with the one operation that everything rests on: put-if-absent.

Local directories and object stores (S3, GCS, Azure) behave the same. Nothing is ever overwritten, appended to or
renamed over; a key that is visible is complete, and on local files also durable.
"""

import errno
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, MismatchError, NeoError, cannot_write
from storage_schemas.common.publish import fsync_directory
from storage_schemas.common.secrets import masked
from storage_schemas.stores.address import dump_url, local_path
from storage_schemas.stores.hub import READ_ONLY, HubFiles
from storage_schemas.stores.requests import SETTING, WRITING, failure, object_store, persistently

T = TypeVar("T")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
"""Keys are plain relative names: no absolute path, no `..`, no empty or hidden part, no backslash."""
PARALLEL_REQUESTS = 32
"""Requests in flight when many small keys are read."""
_PAGE = 1000
"""Keys of one answer of a listing, on S3 and GCS."""
JSON_BYTES = 64 * 2**20
"""The largest JSON file that is read."""
_CHUNK = 8 * 2**20
"""Bytes of a stream's chunks."""
_STAGED = re.compile(r"\.staged-(?P<name>.+)-[0-9a-f]{32}")


class Store:
    """Keys and bytes under a URL."""

    def __init__(self, url: str, *, options: Mapping[str, str] | None = None, setting: str = SETTING) -> None:
        """Open a store; nothing is created or contacted.

        Args:
            url: local path, `file://`, `s3://`, `gs://` or `az://`; `hf://datasets/`, to read.
            options: settings of the object store, such as `endpoint`; credentials come from the environment.
            setting: where the user wrote both.

        Raises:
            MismatchError: the URL or an option is not understood, or the URL carries credentials.
        """
        try:
            self.url = dump_url(url)
        except ValueError as error:
            raise MismatchError(
                f"the URL {error}",
                got=masked(ascii(url)[:200]),
                expected="a local path, file://, s3://, gs:// or az://",
                fix=f"correct {setting}",
            ) from error
        self._setting = setting
        self.root = local_path(self.url)
        self._store: Any = None
        self._durable: set[Path] = set()
        self._answered = False
        self._hub = HubFiles(self.url) if self.url.startswith("hf://") else None
        if self.root is None and self._hub is None:
            self._store = object_store(self.url, options or {}, setting=setting)
            self._writing = object_store(self.url, options or {}, setting=setting, client=WRITING)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `data` under `key` unless the key exists; True if this call's bytes are what the key holds.

        An attempt whose answer was lost is read back: a key with our very bytes counts as written by us.

        Raises:
            TemporaryError: the store cannot be written to (disk full, unreachable).
            MismatchError: the store refuses access or lacks what the protocol needs.
        """
        _check(key)
        self.refuse_read_only()
        kind = re.split("[/-]", key)[0]
        try:
            faults.point(f"put:{kind}:before")
            won = self._put_new_local(key, data) if self.root is not None else self._put_new_remote(key, data)
            faults.point(f"put:{kind}:after")
        except OSError as error:
            raise cannot_write(f"{self.url}/{key}", error, setting=self._setting) from error
        return won

    def refuse_read_only(self) -> None:
        """Raise MismatchError if nothing can be written here, whoever asks: a repository of the hub."""
        if self._hub is not None:
            raise MismatchError(
                f"{self.url} cannot be written to",
                got="the Hugging Face hub, which has no put-if-absent",
                expected="a local path, file://, s3://, gs:// or az://",
                fix=READ_ONLY,
            ) from PermissionError("read-only")

    def get(self, key: str, *, limit: int | None = None) -> bytes:
        """All bytes of `key`.

        Args:
            limit: the most bytes that it may have, refused before any is read.

        Raises:
            DataError: there is no such key, it is larger, or no file.
            TemporaryError: the store cannot be reached.
        """
        return self._there(key, self.get_if_present(key, limit=limit))

    def get_if_present(self, key: str, *, limit: int | None = None) -> bytes | None:
        """All bytes of `key`, or None if there is no such key; otherwise as `get`."""
        _check(key)
        if self._absent():
            return None

        def read() -> bytes:
            if self.root is not None:
                self._refuse_device(key)
            found: Any = None if self._hub is not None else obstore.get(self._store, key)
            meta = self._hub.head(key) if self._hub is not None else found.meta
            if limit is not None and (size := int(meta["size"])) > limit:
                raise DataError(
                    f"{self.url}/{key} is larger than it can be",
                    got=f"{size} bytes",
                    expected=f"at most {limit}",
                    fix="the file is damaged or was replaced: restore it; run `llm-neo verify`",
                )
            return self._hub.get(key) if self._hub is not None else bytes(found.bytes())

        try:
            return self._ask(read)
        except FileNotFoundError:
            return None

    def _refuse_device(self, key: str) -> None:
        """Opening a FIFO would wait for a writer for ever."""
        assert self.root is not None
        if not stat.S_ISREG((self.root / key).stat().st_mode):
            raise DataError(
                f"{self.url}/{key} is no regular file",
                got=stat.filemode((self.root / key).stat().st_mode),
                expected="a file",
                fix="the dump was not written by this project; do not use it",
            )

    def parsed(self, key: str, parse: Callable[[bytes, str], T], *, limit: int = JSON_BYTES) -> T:
        """What `parse` makes of the bytes of `key` and its name for messages.

        What an object store sent may have been damaged on its way: bytes that `parse` refuses are fetched once more.

        Raises:
            NeoError: as `parse` and `get`.
        """
        return self._there(key, self.parsed_if_present(key, parse, limit=limit))

    def parsed_if_present(self, key: str, parse: Callable[[bytes, str], T], *, limit: int = JSON_BYTES) -> T | None:
        """As `parsed`, or None if there is no such key."""
        data, name = self.get_if_present(key, limit=limit), f"{self.url}/{key}"
        if data is None:
            return None
        try:
            return parse(data, name)
        except NeoError:
            again = None if self.root is not None else self.get_if_present(key, limit=limit)
            if again is None or again == data:
                raise
            return parse(again, name)

    def parsed_many(self, keys: Sequence[str], parse: Callable[[bytes, str], T]) -> Iterator[T]:
        """What `parse` makes of each of `keys`, in order, with many requests in flight; errors as in `parsed`."""
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            for start in range(0, len(keys), 1024):
                yield from pool.map(lambda key: self.parsed(key, parse), keys[start : start + 1024])

    def _there(self, key: str, found: T | None) -> T:
        if found is None:
            fix = "check the URL; run `llm-neo verify`"
            raise DataError(f"{self.url} has no {key}", got="nothing", expected="a file", fix=fix)
        return found

    def size(self, key: str) -> int | None:
        """Size of `key` in bytes, or None if there is no such key."""
        _check(key)
        found = self.head(key)
        return None if found is None else int(found["size"])

    def head(self, key: str) -> Any:
        """What the store knows of a key, whatever its name (`path`, `size`, `e_tag`, `last_modified`), or None."""
        if self._absent():
            return None
        try:
            return self._ask(lambda: self._hub.head(key) if self._hub is not None else obstore.head(self._store, key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> list[str]:
        """All keys under the folder `prefix`, in no particular order."""
        _check(prefix)
        return [head["path"] for head in self.heads(prefix) if KEY.fullmatch(head["path"])]

    def list_after(self, key: str) -> tuple[Sequence[str], bool]:
        """Keys of the folder of `key` behind it, whatever their names, and whether there may be more.

        Of an object store it is one page, in the order of names, and one request; of local files and of the hub all.
        """
        _check(key)
        folder = key.rpartition("/")[0]
        if self.root is not None or self._hub is not None:
            return [head["path"] for head in self.heads(folder) if head["path"] > key], False
        page = self._ask(lambda: next(iter(obstore.list(self._store, folder, offset=key, chunk_size=_PAGE)), []))
        return [head["path"] for head in page], len(page) >= _PAGE

    def heads(self, folder: str) -> Sequence[Any]:
        """What `head` knows of all keys under a folder, whatever their names."""
        if self._absent():
            return []
        if self._hub is not None:
            return self._hub.heads(folder)
        # A listing that failed in its middle does not go on: it is made again.
        return self._ask(lambda: [e for batch in obstore.list(self._store, folder or None) for e in batch])

    def stream(self, key: str, take: Callable[[Any, Iterable[Any]], T]) -> T:
        """What `take` makes of an object's `head` and of its bytes in chunks; called again where the store failed."""

        def whole() -> T:
            found = obstore.get(self._store, key)
            return take(found.meta, found.stream(_CHUNK))

        return persistently(whole, self.url, setting=self._setting, answered=self._answered)

    def delete(self, key: str) -> None:
        """Remove `key`; a key that is not there is no error."""
        _check(key)
        self.refuse_read_only()
        if self.root is not None:
            self._refuse_outside((self.root / key).parent)

        def remove() -> None:
            faults.point(f"delete:{key.split('/')[0]}")
            obstore.delete(self._store, key)

        try:
            if not self._absent():
                self._ask(remove)
        except FileNotFoundError:
            pass

    def settle(self, folder: str) -> None:
        """On local files, make names that others created in `folder` durable, before they are relied upon."""
        if self.root is not None and (self.root / folder).is_dir():
            try:
                fsync_directory(self.root / folder)
                fsync_directory(self.root)
            except OSError as error:
                raise failure(error, self.url) from error

    def remove_staged(self, decided: Callable[[str], bool]) -> int:
        """On local files, remove what killed writers left staged for the keys that are `decided`; how many."""
        found = 0
        for path in self.root.rglob(".staged-*") if self.root is not None else ():
            assert self.root is not None
            match = _STAGED.fullmatch(path.name)
            if match and decided(path.with_name(match["name"]).relative_to(self.root).as_posix()):
                path.unlink(missing_ok=True)
                found += 1
        return found

    def probe(self) -> None:
        """Refuse a store that ignores the condition of a conditional write.

        Raises:
            MismatchError: the second put of one key was accepted; several writers would lose work there.
        """
        # Twice, because somebody's clean-up may remove the key between the two writes, once.
        if not (self._is_conditional() or self._is_conditional()):
            raise MismatchError(
                f"the store {self.url} does not honour put-if-absent (If-None-Match: *)",
                got="a second write of the same key was accepted",
                expected="412 Precondition Failed",
                fix="use a store with conditional writes: AWS S3, GCS, Azure, SeaweedFS, MinIO, a local or shared disk",
            )

    def _is_conditional(self) -> bool:
        key = f"probe/{uuid.uuid4().hex}"
        first, second = self.put_new(key, b"first"), self.put_new(key, b"second")
        kept = self.get_if_present(key)
        with suppress(NeoError):  # A worker needs no right to delete; the seal cleans up.
            self.delete(key)
        return first and not second and kept == b"first"

    def _absent(self) -> bool:
        """Whether this is a local directory that does not exist yet; opens it once it does."""
        if self._store is None and self.root is not None and self.root.is_dir():
            self._store = LocalStore(prefix=self.root.absolute())
        return self._store is None and self._hub is None

    def _put_new_local(self, key: str, data: bytes) -> bool:
        """Staged file, fsync, hard link, fsync of the directory: a name is visible only with durable content."""
        assert self.root is not None
        target = self.root / key
        self._ensure(target.parent)
        staged = target.with_name(f".staged-{target.name}-{uuid.uuid4().hex}")
        try:
            with open(staged, "xb") as file:
                faults.point("local:write")
                file.write(data)
                file.flush()
                faults.point("local:fsync")
                os.fsync(file.fileno())
                faults.point("local:close")
            faults.point("local:link")
            try:
                os.link(staged, target)
            except FileExistsError:
                return target.read_bytes() == data
            except FileNotFoundError:
                # A clean-up removed the staged file, which it does only where the key is decided.
                return target.is_file() and target.read_bytes() == data
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise MismatchError(
                        f"the file system of {self.url} has no hard links",
                        got="link: not permitted",
                        expected="a file system on which a name can be created only once (ext4, XFS, NFS, Lustre)",
                        fix="choose a dump.url on another file system or on an object store",
                    ) from error
                # On a network file system the link may have been made and only the answer lost.
                if not (target.is_file() and target.samefile(staged)):
                    raise
            faults.point("local:linked")
            return True
        finally:
            staged.unlink(missing_ok=True)
            faults.point("local:directory")
            fsync_directory(target.parent)

    def _ensure(self, folder: Path) -> None:
        """Create `folder` with what is missing above it, and make their names durable, once per store."""
        assert self.root is not None
        if folder in self._durable:
            return
        existed = self.root.is_dir()
        self._refuse_outside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Somebody else may have made them and died before they were durable.
        within = [folder, *folder.parents]
        within = within[: within.index(self.root) + 1]
        for path in within if existed else [folder, *folder.absolute().parents]:
            fsync_directory(path.absolute().parent)
        self._durable.add(folder)

    def _refuse_outside(self, folder: Path) -> None:
        """Raise DataError if a link leads a folder of a dump elsewhere: nothing is written or deleted there."""
        assert self.root is not None
        if not (found := folder.resolve()).is_relative_to(self.root.resolve()):
            raise DataError(
                f"{folder} leads out of {self.url}",
                got=str(found),
                expected="a folder inside",
                fix="the link was not made by this project: remove it; a link in place of all of it is followed",
            )

    def _put_new_remote(self, key: str, data: bytes) -> bool:
        def read() -> bytes | None:
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

        def put() -> bool:
            try:
                obstore.put(self._writing, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # Ours, if an earlier try of this very request was applied and its answer lost.
                return read() == data
            except BaseError:
                # It may have been applied and only the answer lost.
                with suppress(BaseError):
                    if (found := read()) is not None:
                        return found == data
                raise
            return True

        try:
            return self._ask(put)
        except FileNotFoundError as error:
            raise failure(error, self.url) from error

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            if self.root is None:
                found = persistently(call, self.url, setting=self._setting, answered=self._answered)
                self._answered = True
            else:
                found = call()
        except FileNotFoundError:
            self._answered = True
            raise
        except (BaseError, OSError) as error:
            raise failure(error, self.url, setting=self._setting) from error
        return found


def _check(key: str) -> None:
    if not KEY.fullmatch(key):
        raise DataError(
            "a name in the dump is not a plain relative path",
            got=ascii(key[:200]),
            expected=KEY.pattern,
            fix="the record that names it was not written by this project; do not use this dump",
        )
