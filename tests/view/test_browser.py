"""The browser that other tests look through sees what is drawn, and tells what goes wrong."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.browser import Chromium


def page_of(folder: Path, body: str) -> Path:
    """Write a page."""
    path = folder / "page.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><title>t</title><body style='margin:0'>{body}")
    return path


def test_what_is_drawn_is_seen(chromium: Chromium, tmp_path: Path) -> None:
    body = "<div id=box style='width:40px;height:30px;background:#12a0ff'></div><p>seen</p><p hidden>not seen</p>"
    with chromium.page() as page:
        page.open(page_of(tmp_path, body))
        assert page.text().split() == ["seen"]
        assert page.color_at(5, 5) == (0x12, 0xA0, 0xFF)
        assert page.pixels("#box").shape == (30, 40, 3) and np.ptp(page.pixels("#box"), axis=(0, 1)).max() == 0


@pytest.mark.parametrize(("dark", "shade"), [(False, 255), (True, 0)])
def test_dark_and_narrow_are_asked_for(chromium: Chromium, tmp_path: Path, dark: bool, shade: int) -> None:
    style = "<style>body{background:#fff}@media(prefers-color-scheme:dark){body{background:#000}}</style>"
    with chromium.page(width_px=400, dark=dark) as page:
        page.open(page_of(tmp_path, style + "<div style='width:500px'>wide</div>"))
        assert page.color_at(300, 300) == (shade,) * 3
        assert page.overflows()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<script>console.error('bad thing')</script>", "console: bad thing"),
        ("<script>nothing.here()</script>", "thrown: .*nothing is not defined"),
        ("<img src='http://slides.example/x.png'>", "left this machine: http://slides.example/x.png"),
        ("<script>fetch('http://192.0.2.1/').catch(()=>0)</script>", "left this machine: http://192.0.2.1/"),
        ("<img src='missing.png'>", "failed: file:.*missing.png"),
    ],
)
def test_what_goes_wrong_fails_the_test(chromium: Chromium, tmp_path: Path, body: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem), chromium.page() as page:
        page.open(page_of(tmp_path, body))
        page.wait("performance.now() > 0")


class Silent(http.server.BaseHTTPRequestHandler):
    """Answers with nothing, and says nothing of it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def test_no_other_machine_is_reached_and_this_one_is(chromium: Chromium, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        with chromium.page(expected=("192.0.2.1", "ERR_PROXY")) as page:
            page.open(page_of(tmp_path, "x"))
            reached = "url => fetch(url, {mode: 'no-cors'}).then(() => true, () => false)"
            assert page.run(reached, address) and not page.run(reached, "http://192.0.2.1/")
        server.shutdown()


def test_keys_reach_the_page(chromium: Chromium, tmp_path: Path) -> None:
    with chromium.page() as page:
        page.open(page_of(tmp_path, "<button id=a onclick='this.innerText=\"done\"'>do</button>"))
        page.press("Tab")
        assert page.focused() == "button#a do"
        page.press("Enter")
        assert page.text("#a") == "done"
