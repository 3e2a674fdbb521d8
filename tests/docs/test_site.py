"""The site is built without a warning, every link of it leads somewhere, and it needs no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import cellslide
from cellslide.cli.main import COMMANDS
from tests.conftest import CHECKOUT


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        found = {name: value or "" for name, value in attrs}
        self.anchors.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built site."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'cellslide[docs]'")
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "NO_MKDOCS_2_WARNING": "1"}
    answer = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0 and not answer.stderr, answer.stdout + answer.stderr
    return out


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc and (path.parent / address.split("?")[0]).is_file(), (path, address)
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {address}"


def test_reference_holds_each_command_and_name_and_the_search_finds_them(site: Path) -> None:
    commands = Page((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    assert {f"cellslide-{name}" for name in COMMANDS} <= commands.anchors
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert all(f"cellslide.{name}" in python for name in cellslide.__all__)
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("abstained" in entry["text"] for entry in index["docs"])


def test_notebooks_are_pages(site: Path) -> None:
    for path in (CHECKOUT / "examples" / "notebooks").glob("*.ipynb"):
        text = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "<code>" in text and re.search(r"<h1", text)
