"""`llm-neo push` and `pull`: dumps and models to the Hugging Face hub and from it, proven at both ends."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError, UsageError, cannot_write
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.provenance import Provenance
from storage_schemas.records import RUN, SEAL
from storage_schemas.stores.hub import HubPlace, asking, hub_place
from storage_schemas.verify import verify

_OF_THE_HUB = (".gitattributes",)
_CARD = "README.md"
_DOWNLOADS = ".cache"
"""Where huggingface_hub keeps what a download goes on from."""
Progress = Callable[[int, int], None]


class Exchanged(FrozenModel):
    """What was pushed or pulled."""

    url: str
    """The repository."""
    commit: str
    """That holds it."""
    folder: str
    """On this machine."""
    files: int
    """That are the same there and here, by their hashes."""
    bytes: int
    """Of these."""
    fingerprint: str | None
    """Of a dump; null: a model."""


def push(
    source: Path, url: str, *, private: bool = False, replace: bool = False, progress: Progress | None = None
) -> Exchanged:
    """Upload a sealed dump, or the directory of a model or adapter. Again, it goes on and does what is missing.

    Of a dump run.json goes first, and the seal last: a reader meanwhile sees a dump that is not complete yet.

    Args:
        source: on this machine.
        url: `hf://datasets/USER/NAME` for a dump, `hf://USER/NAME` for a model; the repository is made if need be.
        private: whether a new one is; one that is there must be.
        replace: overwrite files of another model, and remove its others; never of a dump, whose card stays as it is
            there.
        progress: of verifying, called with (units done, units in all).

    Raises:
        UsageError: the URL is not one for what is there.
        DataError: the dump is damaged or not sealed.
        MismatchError: the repository holds something else, is public against `private`, or may not be written to.
        TemporaryError: the hub does not answer.
    """
    run = source / RUN
    if not run.is_file():
        _refuse_no_model(source)
    place = _place(url, "dataset" if run.is_file() else "model")
    ignored = [*_OF_THE_HUB, f"{_DOWNLOADS}/*", ".git/*"]
    fingerprint = None
    if run.is_file():
        fingerprint, orphans = _verified(
            source,
            progress,
            problem=f"{source} is not pushed: it is damaged or not sealed",
            expected="a sealed dump without errors",
            fix="let `llm-neo dump` finish, or restore what `llm-neo verify` names",
        )
        ignored += [*orphans, "*.staged-*", "probe/*"]
    files = _local(source, ignored)
    api = HfApi()
    with asking(url):
        there = _tree(api, place)
        if there is None:
            api.create_repo(place.repo, repo_type=place.kind, private=private or None, exist_ok=True)
            there = _tree(api, place) or {}
        if private:
            _refuse_public(api, place, url)
        if fingerprint is not None:
            _refuse_other_dump(source, url, there)
            if _CARD in files and _CARD in there and _different(source, {_CARD: 0}, there):
                # Somebody has edited it there, or made it with the repository.
                ignored.append(_CARD)
                del files[_CARD]
        kept = _OF_THE_HUB if replace else (*_OF_THE_HUB, _CARD)
        stale = [] if fingerprint is not None else sorted(there.keys() - files.keys() - {*kept})
        if fingerprint is None and not replace:
            _refuse_other_model(source, url, files, there, stale)
        steps = [[RUN], [name for name in files if name not in (RUN, SEAL)], [SEAL]] if fingerprint else [list(files)]
        for step in steps:
            wrong = _different(source, {name: files[name] for name in step}, there)
            if len(step) == 1 and wrong:
                # Nobody else's may be overwritten, whoever came in between.
                head = api.repo_info(place.repo, repo_type=place.kind).sha
                operation = CommitOperationAdd(step[0], source / step[0])
                api.create_commit(
                    place.repo, [operation], commit_message=f"Add {step[0]}", repo_type=place.kind, parent_commit=head
                )
            elif wrong or stale:
                api.upload_folder(
                    repo_id=place.repo,
                    folder_path=source,
                    repo_type=place.kind,
                    commit_message="Add data" if fingerprint else "Add model",
                    ignore_patterns=[*ignored, *([RUN, SEAL] if fingerprint else [])],
                    # Other weights beside these might be loaded in their place.
                    delete_patterns=stale or None,
                )
        commit = str(api.repo_info(place.repo, repo_type=place.kind).sha)
        there = _tree(api, place, commit) or {}
        wrong = _different(source, files, there) + [name for name in stale if name in there]
    if wrong:
        raise TemporaryError(
            f"{url} does not hold what was pushed",
            got=f"{', '.join(wrong[:5])} missing or different there",
            expected="the files of this machine",
            fix="run the same command again",
        )
    return _exchanged(url, commit, source, files, fingerprint)


def pull(url: str, out: Path, *, progress: Progress | None = None) -> Exchanged:
    """Download a dump or a model, and prove it. Again, it goes on and fetches what is missing.

    Args:
        url: `hf://datasets/USER/NAME` or `hf://USER/NAME`, with `@REVISION` if it is not to be the newest.
        out: directory to write to; what is there already must be of the repository.
        progress: of verifying, called with (units done, units in all).

    Raises:
        MismatchError: there is no such repository, or `out` holds something else.
        DataError: what came is not what the hub holds, or no sealed dump.
        TemporaryError: the hub does not answer, or the disk is full.
    """
    place, api = _place(url, None), HfApi()
    with asking(url):
        commit = str(api.repo_info(place.repo, repo_type=place.kind, revision=place.revision).sha)
        there = _tree(api, place, commit) or {}
        files = {name: int(each.size) for name, each in there.items() if name not in _OF_THE_HUB}
        if not {RUN, "config.json", "adapter_config.json"} & files.keys():
            raise MismatchError(
                f"{url} holds neither a dump nor a model",
                got=", ".join(sorted(files)[:5]) or "no files",
                expected=f"{RUN}, config.json or adapter_config.json",
                fix="correct the URL: datasets/ comes before the name of a dump's repository",
            )
        here = _local(out, [f"{_DOWNLOADS}/*"]) if out.exists() else {}
        if strange := sorted({*here} - {*files}) + _different(out, {n: here[n] for n in here if n in files}, there):
            raise MismatchError(
                f"{out} holds something else",
                got=", ".join(strange[:5]),
                expected="a new directory, or what an earlier pull of the same commit has left",
                fix="choose another OUT",
            )
        try:
            for ignored in ([*_OF_THE_HUB, SEAL], list(_OF_THE_HUB)):
                snapshot_download(
                    place.repo, repo_type=place.kind, revision=commit, local_dir=out, ignore_patterns=ignored
                )
            wrong = _different(out, files, there)
        except OSError as error:
            if getattr(error, "response", None) is None and error.errno is not None:
                raise cannot_write(str(out), error, setting="OUT") from error
            raise
    if wrong:
        raise DataError(
            f"{out} is not what {url} holds",
            got=f"{', '.join(wrong[:5])} different",
            expected="the hashes that the hub names",
            fix="remove these files and run the same command again",
        )
    fingerprint = None
    if RUN in files:
        fingerprint, _ = _verified(
            out,
            progress,
            problem=f"{url} is no sealed dump",
            expected="what `llm-neo push` leaves when it is done",
            fix="push it again from where it was made",
        )
    shutil.rmtree(out / _DOWNLOADS / "huggingface", ignore_errors=True)
    if (out / _DOWNLOADS).is_dir() and not any((out / _DOWNLOADS).iterdir()):
        (out / _DOWNLOADS).rmdir()
    return _exchanged(url, commit, out, files, fingerprint)


def _verified(
    folder: Path, progress: Progress | None, *, problem: str, expected: str, fix: str
) -> tuple[str, list[str]]:
    """Fingerprint of a dump, and data files that no record names. Raises DataError unless it is sealed and whole."""
    report = verify(str(folder), progress=progress)
    if not report.ok:
        raise DataError(problem, got="; ".join(report.errors[:5]), expected=expected, fix=fix)
    return Provenance.from_json((folder / RUN).read_bytes(), RUN).fingerprint, report.orphans


def _place(url: str, kind: str | None) -> HubPlace:
    try:
        place = hub_place(url)
    except ValueError as error:
        raise UsageError(f"the URL {error}", got=url) from error
    form = "hf://datasets/USER/NAME" if (kind or place.kind) == "dataset" else "hf://USER/NAME"
    if kind is None and place.folder:
        raise UsageError(f"{url} names a folder", got=url, expected=f"{form}, with @REVISION if need be")
    if kind is not None and (place.folder or place.kind != kind or place.revision):
        what = "a dump" if kind == "dataset" else "a model"
        raise UsageError(f"{url} is no place for {what}", got=url, expected=form)
    return place


def _refuse_no_model(source: Path) -> None:
    weights = [path.name for path in source.glob("*.safetensors")] if source.is_dir() else []
    if not weights or not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"{source} is neither a dump nor a model on this machine",
            got=f"no {RUN}, and no config.json or adapter_config.json with *.safetensors",
            expected="a directory such as runs/a/final or runs/a/merged, or that of a dump",
            fix="copy a dump of an object store here first",
        )


def _refuse_public(api: HfApi, place: HubPlace, url: str) -> None:
    """Raise MismatchError unless nobody else may read the repository."""
    if not api.repo_info(place.repo, repo_type=place.kind).private:
        raise MismatchError(
            f"{url} is public: all could read what is pushed there",
            got="--private, and a repository that was made before",
            expected="a new repository, or a private one",
            fix="make it private on the hub, push to another name, or leave out --private",
        )


def _refuse_other_dump(source: Path, url: str, there: Mapping[str, Any]) -> None:
    """Raise MismatchError unless the repository is new, or holds this dump or a part of it."""
    foreign = sorted(there.keys() - {*_OF_THE_HUB, _CARD})
    if not foreign or (RUN in there and not _different(source, {RUN: 0}, there)):
        return
    raise MismatchError(
        f"{url} holds {'another dump' if RUN in there else 'something else'}",
        got=f"{'another run.json, ' if RUN in there else ''}{len(foreign)} files, such as {foreign[0]}",
        expected="a new repository, or one with this dump's run.json",
        fix="push to another name: one repository holds one dump, and nothing of it is overwritten",
    )


def _refuse_other_model(
    source: Path, url: str, files: Mapping[str, int], there: Mapping[str, Any], stale: list[str]
) -> None:
    """Raise MismatchError if a file there would be overwritten, or stay beside those of this model."""
    new = not there.keys() - {*_OF_THE_HUB, _CARD}
    shared = {name: size for name, size in files.items() if name in there and not (new and name == _CARD)}
    if wrong := [*_different(source, shared, there), *stale]:
        raise MismatchError(
            f"{url} holds another model",
            got=f"{', '.join(wrong[:5])} there",
            expected="a new repository, or the same files",
            fix="push to another name, or give --replace",
        )


def _tree(api: HfApi, place: HubPlace, revision: str | None = None) -> dict[str, Any] | None:
    """What the hub knows of each file of a repository; None: there is no repository."""
    try:
        found = api.list_repo_tree(place.repo, recursive=True, revision=revision, repo_type=place.kind)
        return {each.path: each for each in found if hasattr(each, "size")}
    except RepositoryNotFoundError:
        return None


def _local(folder: Path, ignored: list[str]) -> dict[str, int]:
    """Size of each file below a folder, by its name there."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {n: path.stat().st_size for n, path in found.items() if not any(fnmatch(n, pattern) for pattern in ignored)}


def _different(folder: Path, files: Mapping[str, int], there: Mapping[str, Any]) -> list[str]:
    """Files that the hub does not have, or has with another content: by sha256, or by git's hash of small ones."""
    return [name for name in sorted(files) if name not in there or not _same(folder / name, there[name])]


def _same(path: Path, remote: Any) -> bool:
    """Whether a file here has the hash that the hub names."""
    if not path.is_file() or path.stat().st_size != remote.size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256)
        header = f"blob {remote.size}\0".encode()
        return bool(hashlib.sha1(header + file.read(), usedforsecurity=False).hexdigest() == remote.blob_id)


def _exchanged(url: str, commit: str, folder: Path, files: Mapping[str, int], fingerprint: str | None) -> Exchanged:
    return Exchanged(
        url=url, commit=commit, folder=str(folder), files=len(files), bytes=sum(files.values()), fingerprint=fingerprint
    )
