"""What is answered about the slides of one folder: an address names slides and files of the package by look-up.

Of the folder only plain files that lie inside it are given, with policies that let nothing of them run or reach out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from cellslide.errors import CellslideError, UsageError
from cellslide.view.cells import Box
from cellslide.view.folders import find_slides, served_file
from cellslide.view.index import index_page
from cellslide.view.rule import DecisionRule
from cellslide.view.session import Session
from cellslide.view.slide import ViewedSlide, ViewedSlides

SCRIPT = "text/javascript; charset=utf-8"
STATIC = {
    "view.css": "text/css; charset=utf-8",
    "openseadragon.min.js": SCRIPT,
    **{f"{name}.js": SCRIPT for name in ("view", "decide", "cells", "draw", "controls", "panel", "find", "correct")},
}
HTML, JSON, BINARY = "text/html; charset=utf-8", "application/json", "application/octet-stream"
JPEG, PNG = "image/jpeg", "image/png"
OWN_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Pages of the folder are strangers' text. A script or a meta refresh could lead the browser elsewhere and take along
# what it knows, which no policy forbids, so that nothing of them runs: a sandbox without any permission.
OTHER_PAGE = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Answers about slides that are made at the same time; each may need some 100 MB.
MOST_AT_WORK = 4
AGAIN = "again"
NEW_LINK = "press Enter where `cellslide view` runs for a new one, or end it and start it again"


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: `file` is sent in place of a body, `to` is where to look instead, `cookie` one to be kept."""

    body: bytes = b""
    kind: str = JSON
    status: HTTPStatus = HTTPStatus.OK
    policy: str = OWN_PAGE
    file: Path | None = None
    to: str = ""
    cookie: str = ""


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
        self.session = Session(token)
        self.scenes = ViewedSlides(self.root, self.folders, moved_to)
        self._at_work = BoundedSemaphore(MOST_AT_WORK)

    @property
    def token(self) -> str:
        """The token of the last link."""
        return self.session.token

    def admit(self, target: str, port: int) -> Answer | None:
        """Return the answer to a link, used up by it: a cookie and the way to the clean address; None for no link."""
        token, _, rest = target.lstrip("/").partition("/")
        if self.session.spend(token):
            # A path of two slashes would name another machine.
            return Answer(status=HTTPStatus.SEE_OTHER, to="/" + rest.lstrip("/\\"), cookie=self.session.cookie(port))
        if self.session.is_link(token):
            return refusal(HTTPStatus.FORBIDDEN, f"this link has been used: it works once; {NEW_LINK}")
        return None

    def answer(self, target: str) -> Answer:
        """Return what a request's target, path and query, asks for; whoever asks has been let in."""
        path, _, query = target.partition("?")
        if query == AGAIN:
            return Answer(status=HTTPStatus.SEE_OTHER, to="/" + path.lstrip("/\\"))
        names = [unquote(part, errors="surrogateescape") for part in path.split("/")[1:]]
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
                with self._at_work, self.scenes.use(slide) as scene:
                    return _of_scene(scene, what, query) or MISSING
        return MISSING

    def _start(self) -> Answer:
        if len(self.folders) > 1:
            pages = [page.name for page in sorted(self.root.glob("*.html")) if served_file(self.root, page.name)]
            return Answer(index_page(self.root, list(self.folders), pages).encode(), HTML)
        return self._to(next(iter(self.folders)))

    def _to(self, slide: str) -> Answer:
        name = quote(slide, safe="", errors="surrogateescape")
        return Answer(status=HTTPStatus.FOUND, to=f"/s/{name}/")

    def _file(self, name: str) -> Answer:
        found = served_file(self.root, name)
        if found is None:
            return MISSING
        path, kind = found
        return Answer(kind=kind, policy=OTHER_PAGE, file=path)


def _of_scene(scene: ViewedSlide, what: list[str], query: dict[str, str]) -> Answer | None:
    """Return what is asked of an open slide, None where there is no such thing."""
    match what:
        case [name] if name.endswith(".json"):
            found = _facts_of_scene(scene, name, query)
            return None if found is None else _json(found)
        case ["cells"]:
            return Answer(scene.cells(_box(query), _scale(query), DecisionRule.asked(query, scene.stored)), BINARY)
        case ["tile", level, x, y]:
            return _picture(scene.tiles.tile(_whole(level), _whole(x), _whole(y)), JPEG)
        case ["cell", row]:
            cell = scene.cell(_whole(row))
            return None if cell is None else _json(cell)
        case ["crop", row, name]:
            return _picture(scene.crop(_whole(row), name), PNG)
    return None


def _facts_of_scene(scene: ViewedSlide, name: str, query: dict[str, str]) -> dict[str, Any] | None:
    match name:
        case "facts.json":
            return scene.facts()
        case "counts.json":
            return scene.counts(DecisionRule.asked(query, scene.stored))
        case "ranked.json":
            return scene.ranked(query.get("by", ""))
        case "find.json":
            return scene.find(query.get("id", ""))
        case "regions.json":
            return scene.regions()
    return None


def _picture(body: bytes | None, kind: str) -> Answer | None:
    return None if body is None else Answer(body, kind)


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


def turned_away(target: str) -> Answer:
    """Return the answer to a browser without the cookie.

    Browsers leave a strict cookie out where a page of another site leads here, and a sandboxed page counts as one:
    they ask once more, now led by a page of this server.
    """
    words = f"not let in: this browser has not opened the link of this run of `cellslide view`; {NEW_LINK}"
    if target.partition("?")[2]:
        return refusal(HTTPStatus.FORBIDDEN, words)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>cellslide view</title>'
        f'<meta http-equiv="refresh" content="0; url=?{AGAIN}"><p>{words}</p></html>\n'
    )
    return Answer(page.encode(), HTML, HTTPStatus.FORBIDDEN)
