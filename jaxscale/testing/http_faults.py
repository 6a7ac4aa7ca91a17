"""A proxy before an HTTP server that does what outages do: refuses, stalls, cuts answers short, disappears.

One request at a time goes through a connection (no keep-alive), so that a fault that begins holds from the next request
on. Read next: `s3_server.py`, which it stands before.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["none", "503", "slow-down", "stall", "cut", "reset", "403"]
"""slow-down: 429. stall: no answer as long as it lasts. cut: half of the body. reset: the connection ends at once."""
SKIPPED = {"connection", "transfer-encoding", "content-length", "expect"}


class FaultyProxy:
    """In threads of this process. `only` bounds a fault to requests with that in the path."""

    def __init__(self, target: str) -> None:
        self.fault: Fault = "none"
        self.only = ""
        self.met = 0
        """Requests that met a fault."""
        self._healed = threading.Event()
        place = urlsplit(target)
        self._target = (place.hostname or "", place.port or 80)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def begin(self, fault: Fault, only: str = "") -> None:
        self._healed.clear()
        self.only, self.fault = only, fault

    def heal(self) -> None:
        """Requests that stall end without an answer; new ones go through."""
        self.fault = "none"
        self._healed.set()

    def close(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.send_response_only(100)
            request.end_headers()
        body = _body(request)
        fault = self.fault if self.only in request.path else "none"
        self.met += fault != "none"
        if fault == "stall":
            self._healed.wait()
            return
        if fault == "reset":
            return
        if fault in ("503", "slow-down", "403"):
            _answer(
                request, {"503": 503, "slow-down": 429, "403": 403}[fault], [], b"<Error><Code>Fault</Code></Error>"
            )
            return
        with contextlib.closing(http.client.HTTPConnection(*self._target, timeout=60)) as connection:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in SKIPPED}
            connection.request(request.command, request.path, body, {**headers, "Connection": "close"})
            answer = connection.getresponse()
            data = answer.read()
        length = answer.headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(data))
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in SKIPPED]
        sent = data[: len(data) // 2] if fault == "cut" and request.command == "GET" else data
        _answer(request, answer.status, kept, sent, length)


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", "").lower():
        parts = []
        while size := int(request.rfile.readline().split(b";")[0], 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        while request.rfile.readline().strip():
            pass
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))


def _answer(
    request: BaseHTTPRequestHandler, code: int, headers: list[tuple[str, str]], data: bytes, length: str | None = None
) -> None:
    with contextlib.suppress(OSError):  # whoever asked is gone
        request.send_response_only(code)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)) if length is None else length)
        request.send_header("Connection", "close")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


@contextlib.contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy to `http://host:port`, ended on the way out."""
    proxy = FaultyProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
