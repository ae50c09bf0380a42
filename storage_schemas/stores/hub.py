"""Repositories on the Hugging Face hub: what a URL names, read-only files, and what the hub says told to the user.

The hub has no put-if-absent, so nothing that workers agree by is written to it; `pipeline/hub.py` pushes what is done.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from storage_schemas.common.errors import MismatchError, NeoError, TemporaryError, explained, first_line
from storage_schemas.common.secrets import masked

_URL = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@\s]+))?(/(?P<folder>[\w./-]+))?"
)
READ_ONLY = "write to a local directory or an object store, then `llm-neo push` it"


class HubPlace(NamedTuple):
    """What a URL of the hub names."""

    kind: str
    """`dataset` or `model`."""
    repo: str
    """USER/NAME"""
    revision: str | None
    """Branch, tag or commit."""
    folder: str
    """In the repository; empty for its root."""


def hub_place(url: str) -> HubPlace:
    """What `hf://datasets/USER/NAME[@REVISION][/FOLDER]`, or `hf://USER/NAME` of a model, names.

    Raises:
        ValueError: it is not of this form.
    """
    match = _URL.fullmatch(url)
    if match is None or match["repo"].split("/")[0] in ("datasets", "models", "spaces", "buckets", "kernels"):
        raise ValueError(
            "is no repository of the hub; write hf://datasets/USER/NAME for a dump, hf://USER/NAME for a model"
        )
    revision = match["revision"] and match["revision"].replace("%2F", "/")
    kind = "dataset" if match["datasets"] else "model"
    return HubPlace(kind, match["repo"], revision, (match["folder"] or "").strip("/"))


class HubFiles:
    """The files of a repository at one commit, the one that its revision names when it is first asked."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, hub_place(url)

    @cached_property
    def _repository(self) -> Any:
        from huggingface_hub import HfApi

        place = self._place
        return HfApi().repo_info(place.repo, repo_type=place.kind, revision=place.revision)

    @property
    def _commit(self) -> str:
        return str(self._repository.sha)

    @cached_property
    def _files(self) -> Any:
        from huggingface_hub import HfFileSystem, constants

        return HfFileSystem(endpoint=constants.ENDPOINT, skip_instance_cache=True)

    def get(self, key: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            MismatchError, TemporaryError: the hub refuses, or does not answer.
        """
        with asking(self._url):
            path = f"{'datasets/' * (self._place.kind == 'dataset')}{self._place.repo}@{self._commit}/{self._path(key)}"
            with self._files.open(path, "rb", block_size=0) as file:
                return bytes(file.read())

    def head(self, key: str) -> dict[str, Any]:
        """`path` and `size` of a file, and when the repository was last modified; errors as in `get`."""
        found = [each for each in self._info([self._path(key)]) if each["path"] == key]
        if not found:
            raise FileNotFoundError(key)
        return found[0]

    def heads(self, folder: str) -> Sequence[dict[str, Any]]:
        """The same of all files under a folder."""
        from huggingface_hub import HfApi

        place, path = self._place, self._path(folder) or None
        try:
            with asking(self._url):
                listed = HfApi().list_repo_tree(
                    place.repo, path, recursive=True, revision=self._commit, repo_type=place.kind
                )
                return self._heads(list(listed))
        except FileNotFoundError:  # The hub has no empty folders.
            return []

    def _info(self, paths: list[str]) -> list[dict[str, Any]]:
        from huggingface_hub import HfApi

        place = self._place
        with asking(self._url):
            return self._heads(HfApi().get_paths_info(place.repo, paths, revision=self._commit, repo_type=place.kind))

    def _heads(self, tree: Sequence[Any]) -> list[dict[str, Any]]:
        cut = len(self._place.folder) + 1 if self._place.folder else 0
        when = self._repository.last_modified
        files = (each for each in tree if hasattr(each, "size"))
        return [{"path": each.path[cut:], "size": each.size, "last_modified": when} for each in files]

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self._place.folder, key) if part)


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Requests to the hub, whose errors become ours; that a file is not there is a FileNotFoundError.

    Raises:
        MismatchError: no repetition can help.
        TemporaryError: the hub does not answer.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        yield
    except NeoError:
        raise
    except LocalEntryNotFoundError as error:  # The hub was not reached.
        raise (failure(error.__cause__ or error, url) or error) from error
    except (EntryNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(str(error)) from error
    except Exception as error:
        raise (failure(error, url) or error) from error


def failure(error: BaseException, url: str) -> NeoError | None:
    """What the user is told of an error of huggingface_hub; None for what may be a bug."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # Of one file of several.
        return failure(error.__cause__, url)
    if isinstance(error, OSError) and error.filename is not None and (told := explained(error)):
        return told  # Of a file here, or of a full disk.
    got = masked(" ".join([type(error).__name__, *str(error).split()])[:400])
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MismatchError(
            f"{url} cannot be asked", got="HF_HUB_OFFLINE is set", fix="unset it, or `llm-neo pull` first"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MismatchError(
            f"{url} has no such revision", got=got, expected="a branch, tag or commit", fix="correct it"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.DisabledRepoError) or status in (401, 403):
        return MismatchError(
            f"{url} is not there, or not for you",
            got=got,
            expected="a repository that your token may read; to write, in `push`",
            fix="correct the name, or log in: `hf auth login`, or the environment variable HF_TOKEN",
        )
    if isinstance(error, errors.HfHubHTTPError | errors.HFValidationError):
        if status is None or (400 <= status < 500 and status not in (408, 409, 412, 429)):
            return MismatchError(f"{url} is refused by the hub", got=got, expected="an answer", fix="correct the URL")
        return TemporaryError(f"the hub does not answer for {url}", got=got, fix="run the same command again")
    if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore")):
        return TemporaryError(
            f"the hub does not answer for {url}", got=masked(first_line(error)), fix="run the same command again"
        )
    return None
