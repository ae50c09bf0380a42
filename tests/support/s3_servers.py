"""Object stores on loopback: SeaweedFS (a real one), moto's server, and a tiny one whose faults are injected.

Ports are free ones, processes are ended when a test is over, nothing is reached beyond 127.0.0.1.
"""

import json
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from storage_schemas.stores import requests as remote

BUCKET = "logits"
WRITER = {"access_key_id": "testkey", "secret_access_key": "testsecret"}
READER = {"access_key_id": "readkey", "secret_access_key": "readsecret"}


def options(port: int, identity: dict[str, str] = WRITER) -> dict[str, str]:
    """`dump.storage_options` of a store at `port`."""
    return {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1", **identity}


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up within a second, and notice a body that stalls within a fifth of one."""
    backoff = {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.1), "base": 2}
    retry = {"max_retries": 1, "retry_timeout": timedelta(seconds=1), "backoff": backoff}
    monkeypatch.setattr(remote, "RETRY", retry)
    monkeypatch.setattr(remote, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(remote, "READING", remote.READING | {"read_timeout": "200ms"})


def free_ports(n: int) -> list[int]:
    """Ports that are free, and whose sum with 10,000 is free as well: SeaweedFS puts its gRPC there."""
    found: list[int] = []
    while len(found) < n:
        port = random.SystemRandom().randrange(20_000, 32_000)
        if port not in found and all(_is_free(p) for p in (port, port + 10_000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def _running(command: list[str], folder: Path, is_ready: Callable[[], bool]) -> Iterator[None]:
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


Identities = Mapping[str, tuple[Mapping[str, str], Sequence[str]]]
"""Name -> keys, and what they allow."""
IDENTITIES: Identities = {
    "writer": (WRITER, ("Admin", "Read", "Write", "List")),
    "reader": (READER, ("Read", "List")),
}


def weed_command(folder: Path, ports: Sequence[int], identities: Identities, *, bind: str = "127.0.0.1") -> list[str]:
    """The command line of SeaweedFS with a bucket, which keeps its data in `folder/data`.

    Args:
        folder: its own.
        ports: of S3, master, volume, filer and administration.
        identities: who may do what.
        bind: the address it listens on.
    """
    told = [
        {
            "name": name,
            "credentials": [{"accessKey": keys["access_key_id"], "secretKey": keys["secret_access_key"]}],
            "actions": list(allowed),
        }
        for name, (keys, allowed) in identities.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": told}))
    (folder / "data").mkdir(exist_ok=True)
    s3, master, volume, filer, admin = ports
    return [
        str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini", "-ip=127.0.0.1",
        f"-ip.bind={bind}", f"-dir={folder / 'data'}", "-master.telemetry=false", f"-master.port={master}",
        f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}",
        f"-bucket={BUCKET}", "-admin.ui=false", f"-admin.port={admin}", "-webdav=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]  # fmt: skip


@contextmanager
def seaweedfs(folder: Path) -> Iterator[int]:
    """SeaweedFS with a bucket, a writer and a reader; its S3 port."""
    ports = free_ports(5)
    ready = lambda: "S3 Endpoint" in (folder / "log").read_text(errors="replace")  # noqa: E731
    command = weed_command(folder, ports, IDENTITIES)
    with _running(command, folder, lambda: ready() and _answers(f"http://127.0.0.1:{ports[0]}/")):
        yield ports[0]


@contextmanager
def moto(folder: Path) -> Iterator[int]:
    """moto's server with a bucket; its port."""
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder, lambda: _answers(f"http://127.0.0.1:{port}/moto-api/")):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield port


@contextmanager
def tls(folder: Path) -> Iterator[int]:
    """A server with a certificate for localhost that nobody has signed whom anybody knows."""
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=DNS:localhost",
            "-keyout", str(folder / "key"), "-out", str(folder / "certificate")]  # fmt: skip
    subprocess.run(make, check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class TinyS3:
    """Just enough of S3, in process, with faults.

    `fault(method, key, n)` is asked at the n-th request of a method for a key; its answer is None or one of `before`
    (500, nothing done), `after` (done, then 500), `lost` (done, then the connection is cut), `damaged` (one bit of the
    body is wrong), `stall` and `reset` (half of the body, then nothing more or the end), or a status and a body.
    """

    def __init__(self, *, conditional: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.conditional = conditional
        self.fault: Callable[[str, str, int], str | tuple[int, bytes] | None] = lambda method, key, n: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Go away."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, key: str, query: dict[str, list[str]], body: bytes, only_new: bool) -> Any:
        """Status, body and fault of a request."""
        with self._lock:
            self.requests.append((method, key))
            fault = self.fault(method, key, self.requests.count((method, key)))
            if fault == "before":
                return 500, b"", None
            if isinstance(fault, tuple):
                return *fault, None
            if method == "PUT":
                if only_new and self.conditional and key in self.objects:
                    return 412, b"<Error><Code>PreconditionFailed</Code></Error>", fault
                self.objects[key] = body
                return (500 if fault == "after" else 200), b"", fault
            if method == "DELETE":
                self.objects.pop(key, None)
                return 204, b"", fault
            if "list-type" in query:
                prefix = f"{BUCKET}/{query.get('prefix', [''])[0]}"
                entries = "".join(
                    f"<Contents><Key>{escape(k.removeprefix(BUCKET + '/'))}</Key><Size>{len(v)}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
                    for k, v in sorted(self.objects.items())
                    if k.startswith(prefix)
                )
                result = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
                return 200, result.encode(), fault
            if key not in self.objects:
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", fault
            data = self.objects[key]
            return 200, bytes([data[0] ^ 1]) + data[1:] if fault == "damaged" else data, fault


def _handler(store: TinyS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            only_new = self.headers.get("If-None-Match") == "*"
            key = unquote(url.path).strip("/")
            method = "GET" if self.command == "HEAD" else self.command
            status, data, fault = store.answer(method, key, parse_qs(url.query), body, only_new)
            if fault == "lost":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if fault in ("stall", "reset"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.rfile.read(1) if fault == "stall" else self.connection.shutdown(socket.SHUT_RDWR)
                return
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
