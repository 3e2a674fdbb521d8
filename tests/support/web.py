"""A web server in a thread that gives bytes as servers of slides do, or fails in a way that is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Site:
    """Files by their paths, and how they are given; `asked` gathers (method, path with query, first byte asked for).

    breaks   bytes after which an answer breaks off, one number an answer that gives content.
    ranges   parts of files are given.
    claimed  size that is told in place of the true one.
    status   answers with this to all.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    claimed: int | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    address: str = ""

    def sent_from(self) -> list[int]:
        """Return the first bytes of the parts that were asked for."""
        return [first for method, _, first in self.asked if method == "GET"]


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve a site on a free port of this machine; sets its `address`, http://127.0.0.1:PORT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, content: bool) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first = int(found[1]) if found else 0
            site.asked.append((self.command, self.path, first))
            body = site.files.get(self.path.partition("?")[0])
            status = site.status if body is not None or site.status != 200 else 404
            if body is None or status != 200:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            part, size = body, site.claimed or len(body)
            if found and site.ranges:
                last = min(int(found[2] or size), size - 1)
                part, status = body[first : last + 1], 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                size = last + 1 - first
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
            if site.ranges:
                self.send_header("Accept-Ranges", "bytes")
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not content:
                return
            part = part[: site.breaks.pop(0)] if site.breaks else part
            self.wfile.write(part)
            self.close_connection = len(part) < size

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
