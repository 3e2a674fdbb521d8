"""Summaries of many slides: rows are never lost, text of strangers stays text, what differs is marked."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellslide.batch import summary as ledger_module
from cellslide.batch.run import SlideOutcome
from cellslide.batch.summary import (
    PAGE_FILE,
    ROWS_FOLDER,
    SUMMARY_FILE,
    Ledger,
    read_rows,
    summary_folders,
    write_row,
    write_summary,
)
from cellslide.classify.targets import Target
from cellslide.report.cohort_page import page
from cellslide.report.cohort_row import Row, batch_effects, outliers
from cellslide.report.images import webp_uri
from cellslide.slides.inputs import SlideInput
from cellslide.store.atomic import write_json
from tests.support.browser import Chromium
from tests.support.random_cells import CLASSES, ellipses, write_table


def record_of(folder: Path, status: str = "done", nuclei: int = 50, **more: object) -> None:
    """Put a slide's folder there as `segment` leaves it."""
    counts = {"tiles": 4, "tiles_empty": 0, "tiles_failed": 0, "nuclei_raw": nuclei, "nuclei": nuclei}
    slide = {"path": f"/slides/{folder.name}.svs", "mpp": 0.25, "width": 900, "height": 800, "vendor": "aperio"}
    content = {
        "cellslide_version": "1", "status": status, "slide": slide, "config": {}, "device": "cpu", "engine": "torch",
        "weights": [{"id": "w", "sha256": "0", "licence": "x"}], "precision": "fp32", "seed": 0, "started": "a",
        "finished": "b", "counts": counts, "failed_tiles": [], "seconds": {"total": 3.0}, "searched_mm2": 1.0, **more,
    }  # fmt: skip
    write_json(folder / "run.json", content)
    feature = {"properties": {"measurements": {"area mm2": 0.5}}}
    (folder / "tissue.geojson").write_text(json.dumps({"features": [feature, feature]}))


def target_of(out: Path, name: str) -> Target:
    return Target(SlideInput(Path(f"/slides/{name}.svs"), slide_id=name), out / name)


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / SUMMARY_FILE).open(newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def test_a_row_says_what_the_record_and_the_outcome_say(tmp_path: Path) -> None:
    typing = {"organ": "lung", "counts": {"typed": 50, "abstained": 5, "classes": {"tumour": 30, "stroma": 15}}}
    record_of(tmp_path / "a", config={"classify": typing})
    ledger = Ledger([tmp_path])
    ledger.keep(target_of(tmp_path, "a"), SlideOutcome("a", "done", 50, 12.346))
    ledger.keep(target_of(tmp_path, "b"), SlideOutcome("b", "failed", None, 1.0, "b.svs: truncated", 1))
    ledger.write()
    rows = rows_of(tmp_path)
    a, b = rows["a"], rows["b"]
    assert (a["status"], a["cells"], a["tissue_mm2"], a["seconds"]) == ("done", "50", "1.0", "12.35")
    assert (a["organ"], a["typed"], a["abstained"], a["classes"]) == ("lung", "50", "5", "tumour=30 stroma=15")
    assert (b["status"], b["cells"], b["error"]) == ("failed", "", "b.svs: truncated")
    text = (tmp_path / PAGE_FILE).read_text()
    assert 'href="./a/"' in text and 'href="./a/run.json"' in text and "b.svs: truncated" in text


def test_classes_of_a_network_that_types_as_it_finds(tmp_path: Path) -> None:
    spec = {"classes": [{"name": c.name, "color": list(c.color)} for c in CLASSES]}
    for name in ("a", "without a table"):
        record_of(tmp_path / name, config={"spec": spec})
    with write_table(tmp_path / "a", ellipses(40)) as table:
        counts = table.count_classes()
    ledger = Ledger([tmp_path])
    for name in ("a", "without a table"):
        ledger.keep(target_of(tmp_path, name), SlideOutcome(name, "done", 40, 1.0))
    ledger.write()
    said = [f"{name}={n}" for name, n in counts.items() if n]
    assert sum(counts.values()) == 40 and len(said) == len(CLASSES)
    assert len(text := rows_of(tmp_path)["a"]["classes"]) == len(" ".join(said)) and all(pair in text for pair in said)
    assert rows_of(tmp_path)["without a table"]["classes"] == ""


def test_a_row_holds_the_checks_of_its_slide_and_what_they_measured(tmp_path: Path) -> None:
    stain = "haematoxylin 0.64 0.71 0.29, eosin 0.10 0.85 0.51"
    checks = [("nucleus_diameter_um", 6.2, "good"), ("stain", stain, "look"), ("out_of_focus", 0.04, "good")]
    verdict = {
        "word": "look",
        "checks": [{"name": n, "value": v, "expected": "x", "word": w, "advice": ""} for n, v, w in checks],
    }
    record_of(tmp_path / "a", verdict=verdict)
    picture = webp_uri(np.full((300, 900, 3), (200, 100, 150), np.uint8), 80)
    (tmp_path / "a" / "report.html").write_text(f'<img class="base" src="{picture}" width="900">')
    write_summary(tmp_path)
    row = read_rows(tmp_path)[0]
    assert (row.width_um, row.out_of_focus, row.stain) == (6.2, 0.04, 0.34) and row.checks["stain"] == "look"
    with Image.open(io.BytesIO(base64.b64decode(row.thumbnail.split(",")[1]))) as small:
        assert small.size == (64, 21) and np.abs(np.asarray(small).mean(axis=(0, 1)) - (200, 100, 150)).max() < 6
    assert row.thumbnail in (tmp_path / PAGE_FILE).read_text() and "webp" not in (tmp_path / SUMMARY_FILE).read_text()


def test_rows_of_earlier_runs_stay_and_newer_records_win(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record_of(tmp_path / name)
        Ledger([tmp_path]).keep(target_of(tmp_path, name), SlideOutcome(name, "done", 50, 2.0))
    record_of(tmp_path / "c", "interrupted")  # Killed before it could leave a row.
    write_summary(tmp_path)
    assert {name: row["status"] for name, row in rows_of(tmp_path).items()} == {
        "a": "done", "b": "done", "c": "interrupted",
    }  # fmt: skip
    record_of(tmp_path / "a", "running")
    row = next((tmp_path / ROWS_FOLDER).iterdir())
    assert row.stat().st_mtime_ns < (tmp_path / "a" / "run.json").stat().st_mtime_ns
    write_summary(tmp_path)
    assert rows_of(tmp_path)["a"]["status"] == "running"
    next(tmp_path.glob(f"{ROWS_FOLDER}/*")).write_text("{ damaged")
    write_summary(tmp_path)
    assert len(rows_of(tmp_path)) == 3


def test_a_skipped_slide_keeps_its_time_and_a_slide_with_bad_tiles_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record_of(tmp_path / name)
    ledger = Ledger([tmp_path])
    ledger.keep(target_of(tmp_path, "a"), SlideOutcome("a", "skipped", 50, 0.01))
    ledger.keep(target_of(tmp_path, "b"), SlideOutcome("b", "failed", 48, 5.0, "1 of 4 tiles failed", 1))
    ledger.write()
    rows = rows_of(tmp_path)
    assert (rows["a"]["status"], rows["a"]["seconds"], rows["a"]["ended"]) == ("done", "3.0", "b")
    assert (rows["b"]["status"], rows["b"]["cells"]) == ("done_with_errors", "48")


def test_runs_at_once_lose_no_row(tmp_path: Path) -> None:
    def shard(number: int) -> None:
        ledger = Ledger([tmp_path])
        for k in range(number, 40, 4):
            (tmp_path / f"s{k}").mkdir()
            ledger.keep(target_of(tmp_path, f"s{k}"), SlideOutcome(f"s{k}", "done", k, 1.0))
            ledger.write(tries=1)
        ledger.write()

    threads = [threading.Thread(target=shard, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rows_of(tmp_path)) == sorted(f"s{k}" for k in range(40))


def test_a_row_added_while_the_summary_is_written_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row comes after the first reading and before the rename: what a lock would have kept out."""
    write_row(tmp_path, Row("a", "failed", folder="a"))
    put, late = ledger_module.write_text, [Row("late", "failed", folder="late")]

    def put_slowly(path: Path, text: str) -> None:
        while late:
            write_row(tmp_path, late.pop())
        put(path, text)

    monkeypatch.setattr(ledger_module, "write_text", put_slowly)
    write_summary(tmp_path)
    assert sorted(rows_of(tmp_path)) == ["a", "late"]


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    name = '=HYPERLINK("http://x")<script>alert(1)</script>'
    write_row(tmp_path, Row(name, "failed", error="@SUM(1)\n+2", folder="=a/../b c&d"))
    write_row(tmp_path, Row("ünïcode\n2", "failed", folder="ü", error="-1", organ="\t=1"))
    write_summary(tmp_path)
    rows = list(csv.reader((tmp_path / SUMMARY_FILE).open(newline="")))
    assert all(not cell.startswith(("=", "+", "-", "@", "\t")) and "\n" not in cell for row in rows for cell in row)
    assert rows_of(tmp_path)["'" + name]["error"] == "'@SUM(1) +2"
    text = (tmp_path / PAGE_FILE).read_text()
    assert text.count("<script>") == 1 and "&lt;script&gt;alert" in text


def test_links_stay_inside_the_folder() -> None:
    row = Row("x", "done", cells=1, folder='a/../"b c', files=("run.json",))
    text = page([row], [[]], "out")
    assert re.findall(r'href="([^"]*)"', text) == ["./a%2F..%2F%22b%20c/", "./a%2F..%2F%22b%20c/run.json"]


def test_what_differs_is_marked_and_what_varies_is_not() -> None:
    usual = [Row(f"s{k}", "done", cells=1000 + 40 * k, tissue_mm2=1.0, mpp=0.25, folder=f"s{k}") for k in range(12)]
    odd = [
        Row("empty", "done", cells=0, tissue_mm2=1.0, mpp=0.25),
        Row("sparse", "done", cells=30, tissue_mm2=1.0, mpp=0.25),
        Row("coarse", "done", cells=1200, tissue_mm2=1.0, mpp=0.5),
    ]
    why = outliers([*usual, *odd])
    assert not any(why[:12])
    assert why[12] == ["no nuclei"] and why[13][0].startswith("few nuclei: 30/mm²") and "coarse" in why[14][0]
    assert not any(outliers([*usual[:4], odd[1]])), "too few slides to say what is usual"


class Table(HTMLParser):
    """Counts the cells of each row of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "srcset") or (tag == "link" and k == "href")]


def test_page_of_many_slides_is_whole_and_loads_nothing() -> None:
    rows = [
        Row(f"s{k}", ("done", "failed")[k % 7 == 0], cells=k, tissue_mm2=1.5, typed=9, abstained=1, classes={"x": 8})
        for k in range(5000)
    ]
    text = page(rows, outliers(rows), "out")
    table = Table()
    table.feed(text)
    assert len(table.rows) == 5001 and len(set(table.rows)) == 1 and not table.loads
    assert len(text) < 5_000_000 and "url(" not in text and "@import" not in text


def test_scanners_that_differ_are_told_and_chance_is_not() -> None:
    rows = [
        Row(f"s{k}", "done", cells=1000 + 10 * k, tissue_mm2=1.0, width_um=(5.0, 7.5)[k % 2] + 0.01 * k,
            vendor=("aperio", "hamamatsu")[k % 2], ended="2026-12-01T10:00:00Z")
        for k in range(12)
    ]  # fmt: skip
    told = batch_effects(rows)
    assert len(told) == 1 and told[0].startswith("scanner aperio (6 slides): small nuclei, median 5.05")
    assert not batch_effects(rows[:5]), "two slides are no group"
    assert not batch_effects([replace(row, width_um=6.0) for row in rows])


def test_a_class_that_is_common_on_one_slide_stands_out_with_its_z() -> None:
    rows = [Row(f"s{k}", "done", classes={"a": 50 + k, "b": 50}) for k in range(12)]
    why = outliers([*rows, Row("odd", "done", classes={"a": 5, "b": 95})])
    assert not any(why[:12]) and re.match(r"little a: 5\.0%, usual 52\.4% \(robust z -\d+", why[12][0])


def test_checks_are_a_matrix_of_symbols(chromium: Chromium, tmp_path: Path) -> None:
    words = {"pixel_size_um": "good", "stain": "look", "organ": "do not use"}
    picture = "data:image/webp;base64," + "A" * 40
    rows = [Row("a", "done", checks=words, verdict="do not use", folder="a", files=("run.json",), thumbnail=picture)]
    rows += [
        Row("b", "done", checks={"stain": "good"}, verdict="good", thumbnail="https://elsewhere/x.webp", folder="b")
    ]
    text = page(rows, [[], []], "out")
    assert picture in text and "elsewhere" not in text
    (tmp_path / "cohort.html").write_text(text.replace(picture, ""))
    with chromium.page() as browser:
        browser.open(tmp_path / "cohort.html")
        assert browser.texts("th.m span") == ["Pixel size", "Stain", "Organ"]
        assert browser.run("[...document.querySelectorAll('td.m')].map(e => e.textContent)") == ["✓○✗", "·✓·"]
        colors = browser.run(
            "[...document.querySelectorAll('tr:first-child td.m *')].map(e => getComputedStyle(e).color)"
        )
        assert len(set(colors)) == 3


def test_ten_thousand_slides_stay_a_page() -> None:
    words = {"stain": "good", "organ": "look"}
    rows = [Row(f"s{k}", "done", 900, 1.5, folder=f"s{k}", checks=words, width_um=6.0 + k % 7) for k in range(10_000)]
    rows[9_999] = Row("last", "failed", folder="last")
    start = time.process_time()
    text = page(rows, outliers(rows), "out")
    assert time.process_time() - start < 20 and len(text) < 6_000_000
    table = Table()
    table.feed(text)
    assert len(table.rows) == 5001 and ">last</td>" in text.replace("\n", "") and "5,000 slides that are done" in text


def test_only_folders_that_are_meant_get_a_summary(tmp_path: Path) -> None:
    out, other, old = tmp_path / "out", tmp_path / "other", tmp_path / "old"
    (old / ROWS_FOLDER).mkdir(parents=True)
    targets = [target_of(folder, "a") for folder in (out, other, old)]
    assert summary_folders(targets, out, []) == [out, old]
    assert summary_folders(targets, out, [other]) == [out, other, old]
    Ledger([out]).keep(targets[1], SlideOutcome("a", "done", 1, 1.0))
    assert not other.exists()


def test_a_folder_that_cannot_be_written_costs_no_slide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ROWS_FOLDER).write_text("in the way")
    ledger = Ledger([tmp_path])
    ledger.keep(target_of(tmp_path, "a"), SlideOutcome("a", "done", 1, 1.0))
    assert "cannot keep the row of a" in caplog.text
    ledger.write()
    assert read_rows(tmp_path) == []


def many_rows(n: int) -> list[Row]:
    files = ("report.html", "cells.zarr", "run.json")
    rows = [Row(f"s{k:04d}", "done", 1000 + k * 7 % 5000, 1.5, 9, 0, folder=f"s{k:04d}", files=files) for k in range(n)]
    rows[234] = Row("s0234", "failed", error="torn file", folder="s0234")
    return rows


@pytest.mark.parametrize(("n", "width", "dark"), [(5000, 1280, False), (1250, 1280, True), (1250, 400, False)])
def test_a_large_cohort_is_sorted_and_searched_in_the_browser(
    chromium: Chromium, tmp_path: Path, n: int, width: int, dark: bool
) -> None:
    rows = many_rows(n)
    (tmp_path / "cohort.html").write_text(page(rows, outliers(rows), "out"))
    with chromium.page(width_px=width, dark=dark) as browser:
        browser.open(tmp_path / "cohort.html")
        assert not browser.overflows()
        assert (sum(browser.color_at(width - 4, 4)) < 150) == dark
        assert browser.text("#shown") == f"{n} of {n} found, the first 200 shown"
        seen = "tbody tr:not([hidden])"
        assert browser.raw.locator(seen).count() == 200
        assert browser.run("document.querySelector('td.name > a').getAttribute('href')") == "./s0000/report.html"
        browser.click("#more")
        assert browser.raw.locator(seen).count() == 1200
        browser.raw.locator("th button", has_text="nuclei").click()
        browser.raw.locator("th button", has_text="nuclei").click()
        most = max(rows, key=lambda row: row.cells or 0)
        assert browser.text(f"{seen} td.name > a") == most.slide
        assert browser.run("document.querySelectorAll('th[aria-sort=descending]').length") == 1
        browser.raw.fill("#find", "TORN")
        assert browser.text("#shown") == f"1 of {n} found" and "torn file" in browser.text(seen)
        browser.raw.fill("#find", "")
        browser.raw.check("#only")
        assert browser.text("#shown") == f"1 of {n} found"
        browser.shot(f"cohort-{width}-{'dark' if dark else 'light'}")


def test_a_cohort_is_a_table_without_scripts(chromium: Chromium, tmp_path: Path) -> None:
    rows = many_rows(300)
    (tmp_path / "cohort.html").write_text(page(rows, outliers(rows), "out"))
    with chromium.page(scripts=False) as browser:
        browser.open(tmp_path / "cohort.html")
        assert browser.raw.locator("tbody tr").count() == 300 and browser.raw.locator("tr[hidden]").count() == 0
