"""A stand-in for the Hugging Face hub's HTTP API: repositories in memory, with commits, LFS files and tokens.

What huggingface_hub asks of it is answered as the hub does; its storage protocol (Xet) is switched off on the client.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "canary" * 6
"""With which one may write, and read what is private."""
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")
_LFS = re.compile(r"/(datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_FILE = re.compile(r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """Its commits, the newest last: each all files by path."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.parquet filter=lfs\n"}])
    private: bool = False

    def name(self, number: int) -> str:
        """The hash of a commit."""
        return hashlib.sha1(str((id(self), number)).encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a revision."""
        if revision == "main":
            return self.name(len(self.commits) - 1), self.commits[-1]
        return next(((self.name(i), files) for i, files in enumerate(self.commits) if self.name(i) == revision), None)


@dataclass
class Hub:
    """All repositories, what was asked, and what goes wrong."""

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Content of LFS files by sha256."""
    asked: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    """Part of a request line -> status that such requests get."""
    damage: set[str] = field(default_factory=set)
    """Names of files that are sent with a byte changed."""
    lose: set[str] = field(default_factory=set)
    """Names of files that no commit keeps."""
    meanwhile: dict[str, bytes] = field(default_factory=dict)
    """What somebody else commits after the next question what is to be uploaded."""

    def files(self, repo: str, kind: str = "datasets") -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.repositories[kind, repo].commits[-1]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub at a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def is_large(path: str) -> bool:
    """What the hub keeps by LFS."""
    return path.endswith((".parquet", ".safetensors"))


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
    if is_large(path):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.asked.append(line)
        for part, status in self.hub.fail.items():
            if part in line:
                self._say({"error": "no"}, status)
                return
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not authorised and "/paths-info/" not in path:
            self._say({"error": f"bad token {self.headers.get('Authorization')}"}, 401)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            key = (f"{wanted.get('type', 'model')}s", f"{wanted['organization']}/{wanted['name']}")
            self.hub.repositories.setdefault(
                key, Repository(private=wanted.get("visibility") == "private" or wanted.get("private", False))
            )
            self._say({"url": f"{self.hub.url}/{'datasets/' * (key[0] == 'datasets')}{key[1]}"})
        elif path == "/api/validate-yaml":
            self._say({"warnings": [], "errors": []})
        elif path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.hub.large[path.removeprefix("/lfs/")] = body
            self._say({})
        elif match := _LFS.fullmatch(path):
            objects = json.loads(body)["objects"]
            new = [each for each in objects if each["oid"] not in self.hub.large]
            for each in new:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self._say({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif match := _API.fullmatch(path):
            self._api(match["kind"], match["repo"], match["rest"] or "", body, authorised)
        elif match := _FILE.fullmatch(path):
            self._file("datasets" if match["data"] else "models", match["repo"], match["revision"], match["path"])
        else:
            self._say({"error": line}, 404)

    def _api(self, kind: str, repo: str, rest: str, body: bytes, authorised: bool) -> None:
        repository = self.hub.repositories.get((kind, repo))
        if repository is None or (repository.private and not authorised):
            self._say({"error": "Repository not found"}, 404 if authorised else 401, code="RepoNotFound")
            return
        what, _, after = rest.strip("/").partition("/")
        revision, _, path = after.partition("/")
        found = repository.at(revision or "main")
        if found is None:
            self._say({"error": "Invalid rev id"}, 404, code="RevisionNotFound")
            return
        commit, files = found
        if what in ("", "revision"):
            self._say({"id": repo, "sha": commit, "lastModified": "2026-11-30T00:00:00.000Z", "siblings": []})
        elif what == "tree":
            below = [name for name in sorted(files) if not path or name.startswith(f"{path}/")]
            if path and not below:
                self._say({"error": "no"}, 404, code="EntryNotFound")
            else:
                self._say([entry(name, files[name]) for name in below])
        elif what == "paths-info":
            wanted = [v for k, v in self._form(body) if k == "paths"]
            self._say([entry(name, files[name]) for name in wanted if name in files])
        elif what == "preupload":
            wanted = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}
                | ({"oid": entry(name, files[name])["oid"]} if name in files and not is_large(name) else {})
                for name in wanted
            ]
            if self.hub.meanwhile:
                repository.commits.append(files | self.hub.meanwhile)
                self.hub.meanwhile.clear()
            self._say({"files": modes})
        elif what == "commit":
            self._commit(repository, commit, files, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repository: Repository, head: str, files: dict[str, bytes], lines: list[Any]) -> None:
        changed = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                self._say({"error": "A commit has happened since. Please refresh and try again."}, 412)
                return
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del changed[value["path"]]
        repository.commits.append({name: data for name, data in changed.items() if name not in self.hub.lose})
        name = repository.at("main")
        assert name is not None
        self._say({"commitUrl": f"{self.hub.url}/me/it/commit/{name[0]}", "commitOid": name[0], "pullRequestUrl": None})

    def _file(self, kind: str, repo: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get((kind, repo))
        found = repository.at(revision) if repository else None
        if found is None or path not in found[1]:
            self._say({"error": "no"}, 404, code="EntryNotFound" if found else "RepoNotFound")
            return
        data = found[1][path]
        tag = entry(path, data)
        headers = {"ETag": f'"{tag["oid"]}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{tag["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        if path in self.hub.damage:
            data = bytes([data[0] ^ 1]) + data[1:]
        self._send(data, 200, headers | {"Content-Type": "application/octet-stream"})

    def _form(self, body: bytes) -> list[tuple[str, str]]:
        if "json" in (self.headers.get("Content-Type") or ""):
            return [("paths", name) for name in json.loads(body)["paths"]]
        parts = (part.partition("=") for part in body.decode().split("&"))
        return [(unquote(name), unquote(value)) for name, _, value in parts]

    def _say(self, value: Any, status: int = 200, *, code: str = "", kind: str = "application/json") -> None:
        self._send(
            json.dumps(value).encode(), status, {"Content-Type": kind} | ({"X-Error-Code": code} if code else {})
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
