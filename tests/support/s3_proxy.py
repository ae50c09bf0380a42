"""What stands before an object store: it passes requests on as they are, and answers some of them itself."""

import http.client
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

ERRORS = {
    "SlowDown": (503, "Please reduce your request rate."),
    "ExpiredToken": (400, "The provided token has expired."),
}
"""Status and words of S3's errors that a store of our own does not give."""
_HOP_BY_HOP = {"connection", "content-length", "transfer-encoding"}


class Request(NamedTuple):
    """What a client asks for."""

    method: str
    key: str
    """Bucket and key of the object."""
    access_key: str
    """Of who asks; empty if nobody has signed."""
    ahead: timedelta
    """Of the clock of this machine is that by which it was signed; zero if nobody has signed."""


class Proxy:
    """Stands before a store on this machine.

    `error(request)` is asked at each request: None passes it on, a name of `ERRORS` is the answer. The signature of a
    request stays valid, since the name of the host is part of what is passed on. While the store is away, connections
    are closed without an answer.
    """

    def __init__(self, *, port: int, store_port: int, enter: Callable[[], None] = lambda: None) -> None:
        """Start it.

        Args:
            port: that it listens on, at all addresses.
            store_port: of the store, on 127.0.0.1.
            enter: called first by its thread, and so in force for all of them: a network namespace.
        """
        self.error: Callable[[Request], str | None] = lambda request: None
        self.seen: list[tuple[Request, str | None]] = []
        """Requests in turn, and with which error they were answered here, if they were."""
        self._lock = threading.Lock()
        self._store_port = store_port
        ready = threading.Event()

        def serve() -> None:
            enter()
            self._server = ThreadingHTTPServer(("0.0.0.0", port), _handler(self))
            self._server.daemon_threads = True
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
            ready.set()
            self._server.serve_forever()

        threading.Thread(target=serve, name="s3-proxy", daemon=True).start()
        assert ready.wait(30), "the proxy does not start"

    def close(self) -> None:
        """Go away."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Request) -> str | None:
        """What a request is answered with here, if it is."""
        with self._lock:
            said = self.error(request)
            self.seen.append((request, said))
        return said

    def passed_on(self, method: str, path: str, headers: Any, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The store's answer and its body."""
        store = http.client.HTTPConnection("127.0.0.1", self._store_port)
        try:
            store.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                store.putheader(name, value)
            store.endheaders(body or None)
            response = store.getresponse()
            return response, response.read()
        finally:
            store.close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = proxy.answer(self._request())
            if said is not None:
                status, words = ERRORS[said]
                data = f"<Error><Code>{said}</Code><Message>{words}</Message></Error>".encode()
                self._send(status, {"Content-Type": "application/xml", "Content-Length": str(len(data))}, data)
                return
            try:
                response, data = proxy.passed_on(self.command, self.path, self.headers, body)
            except (OSError, http.client.HTTPException):
                self.close_connection = True
                return
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._send(response.status, headers | {"Content-Length": length or str(len(data))}, data)

        def _request(self) -> Request:
            signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization") or "")
            now = datetime.now(UTC)
            at = self.headers.get("X-Amz-Date")
            return Request(
                method=self.command,
                key=unquote(urlsplit(self.path).path).strip("/"),
                access_key=signed[1] if signed else "",
                ahead=datetime.strptime(at, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) - now if at else timedelta(),
            )

        def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
