"""A real browser for tests: headless Chromium behind closed doors, and what went wrong on its pages.

The fixture `chromium` (conftest.py) gives a `Chromium`; a test opens pages with it:

    with chromium.page(width_px=400, dark=True) as page:
        page.open(folder / "report.html")
        assert "12 nuclei" in page.text("#counts")
        assert page.pixels("#map").std() > 10
        page.shot("report-400-dark")

Leaving the block fails the test when the page wrote an error to its console, threw one, failed to load something, or
asked for anything that is not on this machine. `page.raw` is the page of playwright, for keys, touch and all else.
Names of other machines do not resolve and other addresses lead to a closed port, so that a request that a test does not
expect goes nowhere.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from cellslide.types import UInt8

if TYPE_CHECKING:
    from playwright.sync_api import Browser as RawBrowser
    from playwright.sync_api import ConsoleMessage, Request
    from playwright.sync_api import Page as RawPage

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A port of this machine at which nothing listens; loopback addresses never go through a proxy.
FLAGS = (
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost", "--proxy-server=127.0.0.1:9",
    "--disable-gpu", "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip
INSIDE = {"file", "data", "blob", "about"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# Where screenshots go, for somebody to look at; without it they are not kept.
SHOTS = "CELLSLIDE_SHOTS"
PATIENCE_MS = 30_000


class Page:
    """One open page; points are CSS pixels (x, y) from the window's upper left corner."""

    def __init__(self, raw: RawPage) -> None:
        self.raw = raw
        self.problems: list[str] = []
        self.requests: list[str] = []
        raw.set_default_timeout(PATIENCE_MS)
        raw.on("console", self._said)
        raw.on("pageerror", lambda error: self.problems.append(f"thrown: {error}"))
        raw.on("request", self._asked)
        raw.on("requestfailed", self._failed)
        raw.on("response", lambda r: self.problems.append(f"status {r.status}: {r.url[:200]}") if r.status > 399 else 0)
        raw.on("websocket", lambda socket: self._goes_to(socket.url))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            self.problems.append(f"console: {message.text}")

    def _asked(self, request: Request) -> None:
        self.requests.append(request.url)
        self._goes_to(request.url)

    def _failed(self, request: Request) -> None:
        # A page that moves on drops what it no longer needs.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"failed: {request.url[:200]} {request.failure}")

    def _goes_to(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in INSIDE and parts.hostname not in LOOPBACK:
            self.problems.append(f"left this machine: {url[:200]}")

    def open(self, target: Path | str) -> Page:
        """Open a file or an address and wait until it is loaded."""
        self.raw.goto(target.resolve().as_uri() if isinstance(target, Path) else target)
        return self

    def text(self, selector: str = "body") -> str:
        """Return the text that a reader sees in the first element of that selector; hidden parts are left out."""
        return self.raw.inner_text(selector)

    def texts(self, selector: str) -> list[str]:
        """Return the seen texts of all elements of a selector, in the page's order."""
        return self.raw.locator(selector).all_inner_texts()

    def run(self, script: str, argument: Any = None) -> Any:
        """Return what a script gives in the page: an expression, or a function of one argument."""
        return self.raw.evaluate(script, argument)

    def wait(self, condition: str, argument: Any = None) -> None:
        """Wait until a script is true in the page; fails after half a minute.

        Asked again and again from outside: playwright's own way is an eval in the page, which a page may forbid.
        """
        end = time.monotonic() + PATIENCE_MS / 1000
        while not self._holds(condition, argument):
            assert time.monotonic() < end, f"never true: {condition}"
            self.raw.wait_for_timeout(20)

    def _holds(self, condition: str, argument: Any) -> bool:
        from playwright.sync_api import Error

        try:
            return bool(self.run(condition, argument))
        except Error as error:
            if "context was destroyed" in str(error):  # the page moves on to another
                return False
            raise

    def click(self, selector: str) -> None:
        """Click the first element of a selector."""
        self.raw.locator(selector).first.click()

    def press(self, *keys: str) -> None:
        """Press keys one after another, as "Tab", "Enter" or "a"."""
        for key in keys:
            self.raw.keyboard.press(key)

    def focused(self) -> str:
        """Return tag, id and text of what has the keyboard, as "button#hide Hide"."""
        return self.run(
            "(() => { const e = document.activeElement;"
            "return (e.tagName.toLowerCase() + (e.id ? '#' + e.id : '') + ' ' + (e.innerText || '')).trim(); })()"
        )

    def pixels(self, selector: str | None = None) -> UInt8:
        """Return what is drawn, uint8 (H, W, 3): the window, or one element, scrolled to where it is seen."""
        from PIL import Image

        place = self.raw if selector is None else self.raw.locator(selector).first
        return np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB"))

    def color_at(self, x: float, y: float) -> tuple[int, int, int]:
        """Return the colour of one point of the window."""
        red, green, blue = self.pixels()[int(y), int(x)]
        return int(red), int(green), int(blue)

    def overflows(self) -> bool:
        """Tell whether the page is wider than the window: it would have to be pushed sideways to be read."""
        return self.run("document.documentElement.scrollWidth > window.innerWidth")

    def shot(self, name: str, whole: bool = True) -> None:
        """Keep a screenshot NAME.png in the folder of $CELLSLIDE_SHOTS, the whole page or its window."""
        if folder := os.environ.get(SHOTS):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.raw.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


class Chromium:
    """A running browser. Each page has a profile of its own, thrown away with it."""

    def __init__(self, raw: RawBrowser) -> None:
        self.raw = raw

    @contextmanager
    def page(
        self, *, width_px: int = 1280, height_px: int = 800, dark: bool = False, touch: bool = False,
        scripts: bool = True, printed: bool = False, expected: tuple[str, ...] = (),
    ) -> Iterator[Page]:  # fmt: skip
        """Give an empty page; fails on leaving when something went wrong on it.

        touch, scripts   a touch screen; whether scripts run.
        printed          laid out as for paper.
        expected         problems that hold one of these words are what the test wants to see.
        """
        context = self.raw.new_context(
            viewport={"width": width_px, "height": height_px}, color_scheme="dark" if dark else "light",
            has_touch=touch, java_script_enabled=scripts,
        )  # fmt: skip
        try:
            page = Page(context.new_page())
            if printed:
                page.raw.emulate_media(media="print")
            yield page
            problems = [p for p in page.problems if not any(word in p for word in expected)]
            assert not problems, f"on {page.raw.url[:200]}: {problems[:8]}"
        finally:
            context.close()


def program() -> str | None:
    """Return the path of a Chromium on this machine ($CELLSLIDE_CHROMIUM first), or None."""
    named = os.environ.get("CELLSLIDE_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def started() -> Iterator[Chromium]:
    """Start Chromium for the block; skips the test, with the reason, where there is none."""
    path = program()
    if path is None:
        pytest.skip("no Chromium here: install it (Debian: chromium), or name it in CELLSLIDE_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        raw = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield Chromium(raw)
        finally:
            raw.close()
