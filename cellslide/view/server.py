"""The page's server: on the loopback only, behind a cookie, for one folder, reading only.

A browser is let in by a link that works once (`session.Session`), so that neither another user of the machine nor a
page of another site finds anything; the Host header must name this machine, against names that were turned to it (DNS
rebinding). What one connection may take of time, memory and threads is bounded.
"""

from __future__ import annotations

import io
import logging
import socket
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore
from typing import Any, BinaryIO

from cellslide.errors import MissingDependencyError
from cellslide.view.answers import MISSING, Answer, Viewer, refusal, turned_away

LOOPBACK = "127.0.0.1"
GUARDS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-DNS-Prefetch-Control": "off",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_CONNECTIONS = 64
# How long a request's head may take and how large it may be, and how long an answer may take to be fetched.
HEAD_S, MOST_HEAD_BYTES, SEND_S = 10.0, 32 << 10, 60.0
BLOCK_BYTES = 1 << 20

log = logging.getLogger(__name__)


class HeadTooLarge(Exception):
    """A request's head is longer than any browser's."""


class HeadReader(io.RawIOBase):
    """Reads a connection within a time and a size for each request's head, however slowly or long it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.begin()

    def begin(self) -> None:
        """Start the clock and the count of the next head."""
        self._end, self._left = time.monotonic() + HEAD_S, MOST_HEAD_BYTES

    def readable(self) -> bool:
        """Say that this is a file to read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there; raises TimeoutError and HeadTooLarge."""
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if not self._left:
            raise HeadTooLarge
        self.connection.settimeout(left_s)
        n = self.connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= n
        return n


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for the `viewer` of its server: GET and HEAD, nothing else."""

    server: Server
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version = "cellslide", ""
    command, requestline, request_version = "", "", protocol_version

    def setup(self) -> None:
        """Read through a bound of time and size."""
        super().setup()
        self.rfile.close()
        self._head = HeadReader(self.connection)
        self.rfile = io.BufferedReader(self._head)

    def handle_one_request(self) -> None:
        """Answer one request, or end the connection where its head is too slow or too large."""
        self._head.begin()
        try:
            super().handle_one_request()
        except HeadTooLarge:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def do_GET(self) -> None:
        """Answer with head and body."""
        self._send(self._answer())

    def do_HEAD(self) -> None:
        """Answer with the head alone."""
        self._send(self._answer())

    def _refuse(self) -> None:
        # A body may follow that nobody reads.
        self.close_connection = True
        self._send(refusal(HTTPStatus.METHOD_NOT_ALLOWED, "this server is read only"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request, with the same headers as everything else."""
        self.close_connection = True
        status = HTTPStatus(code)
        self._send(refusal(status, status.phrase.lower()))

    def _answer(self) -> Answer:
        if self.headers.get("Host") not in self.server.hosts:
            return refusal(HTTPStatus.FORBIDDEN, "asked for by another name than this machine's")
        viewer, port = self.server.viewer, self.server.server_port
        if self.path == "/favicon.ico":
            # Browsers ask for it unasked.
            return Answer(kind="image/x-icon", status=HTTPStatus.NO_CONTENT)
        # What only looks ahead at a link must not use it up.
        if self.command == "GET" and (answer := viewer.admit(self.path, port)):
            return answer
        if not viewer.session.knows(self.headers.get("Cookie", ""), port):
            return turned_away(self.path)
        try:
            return viewer.answer(self.path)
        except Exception:
            log.exception("%s could not be answered", self.path)
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "this could not be answered; the terminal says why")

    def _send(self, answer: Answer) -> None:
        self.connection.settimeout(SEND_S)
        if answer.file is None:
            self._send_stream(answer, io.BytesIO(answer.body), len(answer.body))
            return
        try:
            stream = answer.file.open("rb")
        except OSError:
            return self._send(MISSING)
        with stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            self._send_stream(answer, stream, size)

    def _send_stream(self, answer: Answer, stream: BinaryIO, size: int) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(size),
            "Content-Security-Policy": answer.policy,
            **GUARDS,
        }
        if answer.to:
            headers["Location"] = answer.to
        if answer.cookie:
            headers["Set-Cookie"] = answer.cookie
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        # Exactly what the head announces, also of a file that grows meanwhile.
        while size and (block := stream.read(min(size, BLOCK_BYTES))):
            self.wfile.write(block)
            size -= len(block)
        self.close_connection |= size > 0

    def log_message(self, format: str, *args: Any) -> None:
        """Keep requests out of the terminal but for -v, the token of a link always."""
        log.debug("%s", (format % args).replace(self.server.viewer.token, "…"))


class Server(ThreadingHTTPServer):
    """Listens on the loopback for one viewer."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, viewer: Viewer, port: int = 0) -> None:
        self.viewer = viewer
        self._free = BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((LOOPBACK, port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def address(self) -> str:
        """What to open in a browser: a link that works once, a new one if the last was used."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.viewer.session.fresh_token()}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own; close it at once where too many are open."""
        if not self._free.acquire(blocking=False):
            log.debug("more than %d connections", MOST_CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say under -v what went wrong with a connection; a browser that leaves is no error."""
        log.debug("a connection ended early", exc_info=True)

    def server_close(self) -> None:
        """Stop listening and close the slides."""
        super().server_close()
        self.viewer.scenes.close()


def open_server(viewer: Viewer, port: int = 0) -> Server:
    """Listen on a port of 127.0.0.1, any free one for 0; raises MissingDependencyError where it is taken."""
    try:
        return Server(viewer, port)
    except OSError as error:
        raise MissingDependencyError(f"--port {port}: cannot be used ({error.strerror}); give another, or 0") from error
