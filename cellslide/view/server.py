"""The page's server: on the loopback only, behind a secret path, for one folder, reading only.

Every address begins with a token made for this run, so that neither another user of the machine nor a page of another
site finds anything; the Host header must name this machine, against names that were turned to it (DNS rebinding). An
address names slides and files of the package by look-up; of the folder only plain files that lie inside it are given.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from cellslide.errors import CellslideError, MissingDependencyError, UsageError
from cellslide.view.cells import Box
from cellslide.view.folders import find_slides, served_file
from cellslide.view.index import index_page
from cellslide.view.rule import DecisionRule
from cellslide.view.slide import ViewedSlide, ViewedSlides

LOOPBACK = "127.0.0.1"
SCRIPT = "text/javascript; charset=utf-8"
STATIC = {
    "view.css": "text/css; charset=utf-8",
    "openseadragon.min.js": SCRIPT,
    **{f"{name}.js": SCRIPT for name in ("view", "decide", "cells", "draw", "controls", "panel")},
}
HTML, JSON, BINARY = "text/html; charset=utf-8", "application/json", "application/octet-stream"
JPEG, PNG = "image/jpeg", "image/png"
OWN_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Pages of the folder are strangers' text: they may run, but neither read what is served here nor reach anything.
OTHER_PAGE = (
    "sandbox allow-scripts allow-popups; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GUARDS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
IDLE_S = 60

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: `keep` lets the browser keep it, `to` is where it shall look instead."""

    body: bytes
    kind: str = JSON
    status: HTTPStatus = HTTPStatus.OK
    keep: bool = False
    policy: str = OWN_PAGE
    to: str = ""


def refusal(status: HTTPStatus, words: str) -> Answer:
    """Return an answer that says in one line why nothing is given."""
    return Answer(f"{words}\n".encode(), "text/plain; charset=utf-8", status)


MISSING = refusal(HTTPStatus.NOT_FOUND, "nothing here")


class Viewer:
    """Answers the page's requests about the slides of one folder; knows nothing of sockets."""

    def __init__(self, root: Path, moved_to: Path | None = None, token: str | None = None) -> None:
        """Raises UsageError where the folder holds no table, or `moved_to` is given for more than one slide."""
        self.root = root.resolve()
        self.folders = find_slides(self.root)
        if moved_to is not None and len(self.folders) != 1:
            raise UsageError(f"--slide {moved_to}: {root} holds {len(self.folders)} slides; give the folder of one")
        self.token = token or secrets.token_urlsafe(18)
        self.scenes = ViewedSlides(self.root, self.folders, moved_to)

    def answer(self, target: str) -> Answer:
        """Return what a request's target, path and query, asks for."""
        path, _, query = target.partition("?")
        if path == "/favicon.ico":
            # Browsers ask for it unasked, without the token.
            return Answer(b"", "image/x-icon", HTTPStatus.NO_CONTENT)
        _, token, *rest = [*path.split("/"), ""]
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return MISSING
        # The last word was added above; "/TOKEN" alone leaves none.
        names = [unquote(part, errors="surrogateescape") for part in rest[:-1]]
        try:
            return self._route(names, dict(parse_qsl(query)))
        except UsageError as error:
            return refusal(HTTPStatus.BAD_REQUEST, str(error))
        except CellslideError as error:
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _route(self, names: list[str], query: dict[str, str]) -> Answer:
        match names:
            case [""]:
                return self._start()
            case ["static", name] if name in STATIC:
                return Answer(_packaged(name), STATIC[name])
            case ["files", slide, ""] if slide in self.folders:
                return self._to(slide)
            case ["files", *path]:
                return self._file("/".join(path))
            case ["s", slide, ""] if slide in self.folders:
                return Answer(_packaged("view.html"), HTML)
            case ["s", slide, *what] if slide in self.folders:
                with self.scenes.use(slide) as scene:
                    return _of_scene(scene, what, query) or MISSING
        return MISSING

    def _start(self) -> Answer:
        if len(self.folders) > 1:
            pages = [page.name for page in sorted(self.root.glob("*.html")) if served_file(self.root, page.name)]
            return Answer(index_page(self.root, list(self.folders), pages).encode(), HTML)
        return self._to(next(iter(self.folders)))

    def _to(self, slide: str) -> Answer:
        name = quote(slide, safe="", errors="surrogateescape")
        return Answer(b"", HTML, HTTPStatus.FOUND, to=f"/{self.token}/s/{name}/")

    def _file(self, name: str) -> Answer:
        found = served_file(self.root, name)
        if found is None:
            return MISSING
        path, kind = found
        return Answer(path.read_bytes(), kind, policy=OTHER_PAGE)


def _of_scene(scene: ViewedSlide, what: list[str], query: dict[str, str]) -> Answer | None:
    """Return what is asked of an open slide, None where there is no such thing."""
    match what:
        case ["facts.json"]:
            return _json(scene.facts())
        case ["cells"]:
            return Answer(scene.cells(_box(query), _scale(query), DecisionRule.asked(query, scene.stored)), BINARY)
        case ["counts.json"]:
            return _json(scene.counts(DecisionRule.asked(query, scene.stored)))
        case ["tile", level, x, y]:
            return _picture(scene.tiles.tile(_whole(level), _whole(x), _whole(y)), JPEG)
        case ["cell", row]:
            cell = scene.cell(_whole(row))
            return None if cell is None else _json(cell)
        case ["crop", row, name]:
            return _picture(scene.crop(_whole(row), name), PNG)
    return None


def _picture(body: bytes | None, kind: str) -> Answer | None:
    return None if body is None else Answer(body, kind, keep=True)


def _whole(word: str) -> int:
    """Return a number of an address, -1 (which names nothing) for what is none."""
    return int(word) if word.isascii() and word.isdigit() and len(word) < 12 else -1


def _box(query: dict[str, str]) -> Box:
    try:
        x0, y0, x1, y1 = (float(query[name]) for name in ("x0", "y0", "x1", "y1"))
    except (KeyError, ValueError):
        raise UsageError("a box needs x0, y0, x1, y1 as numbers") from None
    if not (abs(x0) < 1e9 and abs(y0) < 1e9 and 0 < x1 - x0 < 1e9 and 0 < y1 - y0 < 1e9):
        raise UsageError(f"box {x0:g},{y0:g},{x1:g},{y1:g}: must have x1 > x0 and y1 > y0")
    return x0, y0, x1, y1


def _scale(query: dict[str, str]) -> float:
    try:
        scale = float(query.get("scale", "1"))
    except ValueError:
        scale = 0.0
    if not 1e-6 < scale < 1e6:
        raise UsageError("scale: must be a number of screen pixels per pixel of the slide")
    return scale


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content, allow_nan=False).encode())


def _packaged(name: str) -> bytes:
    return resources.files("cellslide").joinpath("data", "view", name).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for the `viewer` of its server: GET and HEAD, nothing else."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "cellslide", ""
    timeout = IDLE_S

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

    def _answer(self) -> Answer:
        if self.headers.get("Host") not in self.server.hosts:
            return refusal(HTTPStatus.FORBIDDEN, "asked for by another name than this machine's")
        try:
            return self.server.viewer.answer(self.path)
        except Exception:
            log.exception("%s could not be answered", self.path.partition(self.server.viewer.token)[2])
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "this could not be answered; the terminal says why")

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Content-Security-Policy": answer.policy,
            "Cache-Control": "private, max-age=3600" if answer.keep else "no-store",
            **GUARDS,
        }
        if answer.to:
            headers["Location"] = answer.to
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep requests out of the terminal but for -v, the token always."""
        log.debug("%s", (format % args).replace(self.server.viewer.token, "…"))


class Server(ThreadingHTTPServer):
    """Listens on the loopback for one viewer."""

    daemon_threads = True

    def __init__(self, viewer: Viewer, port: int = 0) -> None:
        self.viewer = viewer
        super().__init__((LOOPBACK, port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.viewer.token}/"

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
