"""The report of a slide: what it says is what the table says, and the page shows it in a browser, alone and small."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.classify import classify_table
from cellslide.cli.main import cli
from cellslide.config import SegmentConfig, TissueConfig
from cellslide.errors import UsageError
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.report import keep_report, needs_report, write_report
from cellslide.report import slide as report_slide
from cellslide.report import statistics as tally
from cellslide.report.images import color_of, shape_of
from cellslide.report.page import Budget, render
from cellslide.report.statistics import Frame, tally_cells
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import open_slide
from cellslide.store.anndata_columns import Columns
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, TableExtender, open_table
from cellslide.store.lock import hold
from cellslide.store.run_record import read_record, write_record
from cellslide.types import ClassSpec
from tests.classify.test_rows import BREAST, INFER, OUTPUT, classifier, rule
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.browser import Chromium
from tests.support.fakes import fake_model
from tests.support.random_cells import CLASSES, ellipses, model_spec, slide_info, write_table

NEITHER = (118, 60, 124)
WHOLE = (0.0, 0.0, 4000.0, 3000.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide's folder with typed cells and its report, beside the slide."""
    root = tmp_path_factory.mktemp("report")
    places = [(x, y) for y in range(40, 380, 40) for x in range(40, 560, 40)]
    colors = [(DISC, PINK_DISC, NEITHER)[k % 3] for k in range(len(places))]
    paint_slide(root / "s.tif", 600, 400, 0.5, places, 7.0, disc_color=colors, background="tissue")
    settings = SegmentConfig(tissue=TissueConfig(enabled=False), infer=INFER, output=OUTPUT)
    with open_segmenter(fake_model(), settings) as segmenter:
        segment_slide(SlideInput(root / "s.tif", slide_id="s"), segmenter, root)
    with open_slide(root / "s.tif") as slide:
        classify_table(root / "s", slide, classifier(), rule("local", abstain=0.7), BREAST)
    write_report(root / "s")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the slide's folder, to be changed."""
    shutil.copytree(made / "s", tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def table(made: Path) -> Iterator[CellTable]:
    with open_table(made / "s" / "cells.zarr") as opened:
        yield opened


def said(table: CellTable) -> np.ndarray:
    """Return the class of each cell, -1 where it abstained."""
    codes = table.codes("class")
    return np.where(codes == len(table.class_names), -1, codes)


def test_the_page_says_what_the_table_says(chromium: Chromium, made: Path, table: CellTable) -> None:
    named, abstained = said(table), table.vector("abstained")
    with chromium.page() as page:
        page.open(made / "s" / "report.html")
        assert page.text("h1") == "s" and page.run("document.title") == "s: report"
        rows = [row.split() for row in page.texts("#classes tbody tr")]
        assert [row[:2] for row in rows[:2]] == [["pink", str(sum(named == 0))], ["blue", str(sum(named == 1))]]
        assert rows[2][-1] == str(abstained.sum()) and 0 < abstained.sum() < len(table)
        assert f"{abstained.sum()} of {len(table)}" in page.text("#confidence")
        local, global_ = (table.matrix(name).argmax(axis=1) for name in ("prob_local", "prob_global"))
        counts = [[int(((local == i) & (global_ == j)).sum()) for j in (0, 1)] for i in (0, 1)]
        shown = [re.findall(r"\d+", row) for row in page.texts("#paths tbody tr")]
        assert [[int(n) for n in row] for row in shown] == counts
        assert f"{np.mean(local == global_):.1%}" in page.text("#paths")
        assert "fake-classifier" in page.text("#run") and "Apache-2.0" in page.text("#run")
        page.shot("report-typed-1280")
        page.click("#gallery a.crop")
        place = page.text("figure:target .place")
        assert page.run("decodeURI(location.hash)") == place
        assert page.run("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.run(
            "document.querySelectorAll('[id]').length"
        )
        x, y, w = (float(word.split("=")[1]) for word in place.strip("#").split("&"))
        assert np.hypot(table.vector("x") - x, table.vector("y") - y).min() < 1 and w == 300
        assert f"cellslide view {made / 's'}" in page.text("#gallery")


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (400, False), (400, True)])
def test_the_page_fits_and_follows_the_light(chromium: Chromium, made: Path, width: int, dark: bool) -> None:
    with chromium.page(width_px=width, dark=dark) as page:
        page.open(made / "s" / "report.html")
        assert not page.overflows()
        assert (sum(page.color_at(width - 3, 300)) < 150) == dark
        page.shot(f"report-typed-{width}-{'dark' if dark else 'light'}")


def test_nuclei_are_drawn_where_they_lie_and_can_be_hidden(chromium: Chromium, made: Path, table: CellTable) -> None:
    """Each mark has the colour of its class where the nucleus lies; hiding a class bares the slide below it."""
    named = said(table)
    xy = np.stack([table.vector("x"), table.vector("y")], axis=1)
    with chromium.page() as page:
        page.open(made / "s" / "report.html")
        with_marks = page.pixels("#scene")
        scale = (with_marks.shape[1] - 2) / 600
        for k in (0, 1):
            place = np.rint(xy[named == k] * scale).astype(int)
            colors = with_marks[place[:, 1], place[:, 0]].astype(int)
            assert np.median(np.abs(colors - color_of(k, 2)).max(axis=1)) < 30, k
        page.click("#show-1")
        without = page.pixels("#scene")
        changed = np.abs(without.astype(int) - with_marks).max(axis=2) > 60
        blue = np.rint(xy[named == 1] * scale).astype(int)
        pink = np.rint(xy[named == 0] * scale).astype(int)
        assert changed[blue[:, 1], blue[:, 0]].mean() > 0.9 and not changed[pink[:, 1], pink[:, 0]].any()
        for box in page.raw.locator(".legend input").all():
            box.set_checked(False)
        bare = page.pixels("#scene")[1:-1, 1:-1]
        with open_slide(made / "s.tif") as slide:
            picture = slide.thumbnail(1100)
        expected = cv2.resize(picture, bare.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(bare.astype(int) - expected)[:-40].mean() < 6


def test_keys_reach_everything(chromium: Chromium, made: Path) -> None:
    with chromium.page() as page:
        page.open(made / "s" / "report.html")
        page.press("Tab")
        assert page.focused().startswith("a Skip")
        reached = []
        for _ in range(30):
            page.press("Tab")
            reached.append(page.focused())
        assert {"input#show-0", "input#show-1", "input#show-lines"} <= set(reached)
        page.run("document.getElementById('show-0').focus()")
        page.press(" ")
        assert page.run("getComputedStyle(document.querySelector('.dots-0')).display") == "none"


def test_the_page_is_whole_without_scripts_and_on_paper(chromium: Chromium, made: Path) -> None:
    with chromium.page(scripts=False, printed=True, dark=True, width_px=800) as page:
        page.open(made / "s" / "report.html")
        assert page.raw.locator("#gallery figure").count() > 4
        assert len(page.raw.pdf()) > 20_000
        assert sum(page.color_at(2, 2)) > 700, "paper is white, also where screens are dark"


class Loads(HTMLParser):
    """Collects what a page would fetch or run, and whether what should have words has them."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0
        self.mute: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script" or any(name.startswith("on") for name in values)
        for name in ("src", "href", "srcset"):
            value = values.get(name) or ""
            if value and not value.startswith(("data:image/", "#")):
                self.loads.append(f"{tag} {name}={value[:80]}")
        if (tag == "img" and "alt" not in values) or (tag == "svg" and not {"aria-label", "aria-hidden"} & set(values)):
            self.mute.append(tag)


def test_the_page_needs_nothing_else(made: Path) -> None:
    text = (made / "s" / "report.html").read_text()
    page = Loads()
    page.feed(text)
    assert not page.loads and not page.scripts and not page.mute
    assert "default-src 'none'" in text and "url(http" not in text and "@import" not in text
    assert len(text) < 1_000_000


def test_text_of_strangers_stays_text(tmp_path: Path, chromium: Chromium) -> None:
    name = '</style><script>alert(1)</script><img src=x onerror="alert(2)">'
    classes = (ClassSpec(name, (1, 2, 3)), *CLASSES[1:])
    write_table(tmp_path, ellipses(60), model_spec(classes=classes), replace(slide_info(), slide_id=name)).close()
    write_report(tmp_path)
    with chromium.page() as page:
        page.open(tmp_path / "report.html")
        assert name in page.text("#classes") and name in page.text("h1")
        assert page.run("document.querySelectorAll('script,[onerror]').length") == 0


def test_a_slide_that_is_gone_leaves_a_page_without_pictures(folder: Path, made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.tif"
    shutil.copy(made / "s.tif", moved)
    hidden = (made / "s.tif").rename(made / "hidden.tif")
    try:
        text = write_report(folder).read_text()
        assert "not there any more" in text and 'class="crop"' not in text and "dots-0" in text
        assert 'class="crop"' in write_report(folder, moved).read_text()
        paint_slide(moved, 600, 400, 0.5, [(9, 9)], 5.0)
        with pytest.raises(UsageError, match=r"elsewhere\.tif.*--slide"):
            write_report(folder, moved)
        with pytest.raises(UsageError, match=r"--slide .*nowhere\.tif"):
            write_report(folder, tmp_path / "nowhere.tif")
    finally:
        hidden.rename(made / "s.tif")


def test_no_cells_make_a_page_that_says_so(tmp_path: Path, chromium: Chromium) -> None:
    write_table(tmp_path, ellipses(0)).close()
    write_report(tmp_path)
    with chromium.page(width_px=400) as page:
        page.open(tmp_path / "report.html")
        assert "No nucleus was found" in page.text("#checks") and not page.raw.locator("#counts").count()


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_every_kind_of_nucleus_has_a_page(tmp_path: Path, kind: str) -> None:
    from tests.support.random_cells import as_kind

    write_table(tmp_path, as_kind(ellipses(200, 0), kind), model_spec(kind, ())).close()  # type: ignore[arg-type]
    text = write_report(tmp_path).read_text()
    assert ("Outlines that cross themselves" in text) == (kind == "mask")
    assert "confidence of the detector" in text and "probability of the class" not in text


def test_sums_do_not_depend_on_the_blocks(table: CellTable, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Frame.of(table.slide, (0.0, 0.0, 600.0, 400.0))
    whole = tally_cells(table, frame)
    monkeypatch.setattr(tally, "BLOCK_ROWS", 7)
    parts = tally_cells(table, frame)
    for name in ("counts", "abstained", "density", "where_both", "where_differ", "agreement"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)
    for name in ("confidence", "score", "gate", "area"):
        np.testing.assert_array_equal(getattr(parts, name).counts, getattr(whole, name).counts, err_msg=name)
    assert parts.picks.kept == whole.picks.kept
    np.testing.assert_array_equal(np.concatenate(parts.dots_class), np.concatenate(whole.dots_class))
    assert whole.density.sum() == whole.counts.sum() and whole.n == len(table)


def test_the_gallery_shows_the_extremes(table: CellTable) -> None:
    found = tally_cells(table, Frame.of(table.slide, (0.0, 0.0, 600.0, 400.0)))
    top, prob = table.codes("class_top"), table.vector("class_prob")
    for k in (0, 1):
        mine = np.sort(prob[top == k])
        assert [p.value for p in found.picks.of(k, "sure", 3)] == pytest.approx(mine[::-1][:3].tolist())
        assert [p.value for p in found.picks.of(k, "unsure", 3)] == pytest.approx(mine[:3].tolist())
    local, global_ = (table.matrix(name) for name in ("prob_local", "prob_global"))
    differ = local.argmax(axis=1) != global_.argmax(axis=1)
    sure = np.where(differ, np.minimum(local.max(axis=1), global_.max(axis=1)), 0)
    disputed = [pick for k in (0, 1) for pick in found.picks.of(k, "disputed", 8)]
    assert differ.any() and max(p.value for p in disputed) == pytest.approx(sure.max())
    assert all(differ[p.row] and p.local != p.global_ for p in disputed)


def test_what_is_no_nucleus_is_in_no_sum(made: Path, table: CellTable, tmp_path: Path) -> None:
    shutil.copytree(made / "s", tmp_path / "s")
    frame = Frame.of(table.slide, WHOLE)
    keep = np.random.default_rng(0).random(len(table)) < 0.7
    with open_table(tmp_path / "s" / "cells.zarr") as opened:
        extender = TableExtender(opened)
        for start in range(0, len(opened), BLOCK_ROWS):
            extender.append(Columns({"is_nucleus": keep[start : start + BLOCK_ROWS]}, {}))
        extender.close(opened.run, tuple(map(ClassSpec, opened.class_names, opened.colors)))
    with open_table(tmp_path / "s" / "cells.zarr") as opened:
        found = tally_cells(opened, frame)
    whole = tally_cells(table, frame)
    assert (found.n, found.rejected, whole.rejected) == (keep.sum(), (~keep).sum(), 0)
    codes = said(table)[keep]
    np.testing.assert_array_equal(found.counts, np.bincount(codes[codes >= 0], minlength=len(found.counts)))
    assert found.density.sum() == found.counts.sum() and found.score.counts.sum() == keep.sum()
    shown = {pick.row for kept in found.picks.kept.values() for _, pick in kept}
    assert shown and keep[list(shown)].all()


def test_many_nuclei_are_sampled_and_counted_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MOST_DOTS", 100)
    with write_table(tmp_path, ellipses(3000)) as table:
        found = tally_cells(table, Frame.of(table.slide, WHOLE))
    assert 80 < found.n_dots <= 100 and found.counts.sum() == 3000 == found.density.sum()
    assert "of 3,000 nuclei are drawn" in write_report(tmp_path).read_text()


def test_pages_stay_small_by_giving_up_detail(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_table(made / "s" / "cells.zarr") as table, open_slide(made / "s.tif") as slide:
        material = report_slide.gather(made / "s", table, slide, None)
        noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
        material = replace(material, picture=noise)
        sizes = [len(render(material, budget)) for budget in report_slide.BUDGETS]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.7 * sizes[0]
        assert sizes[0] > report_slide.MOST_BYTES > len(report_slide.fitted(material))
        few = render(material, Budget(50, 6))
    assert few.count('class="crop"') < render(material, Budget(50, 60)).count('class="crop"')


def test_no_two_classes_look_alike() -> None:
    looks = {(color_of(k, 32), shape_of(k, 32)) for k in range(32)}
    assert len(looks) == 32 and color_of(32, 32) not in {color for color, _ in looks}


def test_commands_write_reports_and_only_when_needed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "report.html").unlink()
    assert needs_report(folder)
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert result.exit_code == 0 and result.stdout.strip() == str(folder / "report.html")
    assert not needs_report(folder)
    record = read_record(folder)
    assert record is not None
    page = folder / "report.html"
    os.utime(page, ns=(1, 1))
    write_record(folder, record)
    assert needs_report(folder)
    assert CliRunner().invoke(cli, ["report", str(tmp_path / "none")]).exit_code == 2
    two = CliRunner().invoke(cli, ["report", str(folder), str(folder.parent), "--slide", str(folder)])
    assert two.exit_code == 2 and "--slide" in two.stderr


def test_a_run_writes_the_report_and_links_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fake_model()
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: loaded)
    paint_slide(tmp_path / "two.tif", 400, 300, 0.5, [(100, 100), (250, 200)], 7.0)
    command = ["segment", str(tmp_path / "two.tif"), "-o", str(tmp_path / "out"), "--no-tissue", "--device", "cpu"]
    command += ["--workers", "0", "--no-progress"]
    page = tmp_path / "out" / "two" / "report.html"
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert "Nucleus" in page.read_text()
    assert "two/report.html" in (tmp_path / "out" / "cohort.html").read_text()
    written = page.stat().st_mtime_ns
    assert CliRunner().invoke(cli, command).exit_code == 0 and page.stat().st_mtime_ns == written
    page.unlink()
    assert CliRunner().invoke(cli, command).exit_code == 0 and page.is_file()


def test_a_page_that_fails_costs_no_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its fault is; the slide counts as done, and the page of the next one is written."""
    loaded, real = fake_model(), report_slide.write_report

    def write(folder: Path, slide_path: Path | None = None) -> Path:
        return real(folder, slide_path) if folder.name == "b" else [][int(folder.name == "a")]

    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: loaded)
    monkeypatch.setattr(report_slide, "write_report", write)
    for name in ("a", "b"):
        paint_slide(tmp_path / f"{name}.tif", 200, 160, 0.5, [(100, 100)], 7.0, (1,))
    command = ["segment", str(tmp_path / "*.tif"), "-o", str(tmp_path / "out"), "--no-tissue", "--device", "cpu"]
    result = CliRunner().invoke(cli, [*command, "--workers", "0", "--format", "csv", "--no-progress", "--log-json"])
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["done", "done"]
    assert "a: no report: IndexError: " in caplog.text and "b: no report" not in caplog.text
    assert not (tmp_path / "out" / "a" / "report.html").exists() and (tmp_path / "out" / "b" / "report.html").is_file()


def test_no_page_is_written_where_another_run_works(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "report.html").unlink()
    with hold(folder):
        keep_report(folder, folder / "nowhere.tif")
        assert "no report" in caplog.text and "another run works here" in caplog.text
        assert not (folder / "report.html").exists()
    keep_report(folder, folder / "nowhere.tif")
    assert (folder / "report.html").is_file()


def test_a_damaged_tissue_file_costs_no_page(folder: Path) -> None:
    for text in ("{", json.dumps({"features": [{"geometry": {"type": "Nothing"}}]}), json.dumps({"features": 3})):
        (folder / "tissue.geojson").write_text(text)
        assert "nuclei" in write_report(folder).read_text()
