"""Which cells are chosen, where the maps point, and what the page shows of them."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cellslide.classify.decision import PATHS
from cellslide.cli.explain import command, parse_ids
from cellslide.errors import UsageError
from cellslide.report.explain import Selection, explain_slide, select_cells
from cellslide.report.explain.gallery import Bars, Card, Heading, Picture, overlay_heat, scale_bar_um, write_gallery
from cellslide.slides.identity import describe_slide
from cellslide.slides.slide import open_slide
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.cell_table import CellTable, TableExtender, open_table
from cellslide.store.run_record import plain, write_record
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Cells, ClassSpec, ModelSpec, RunRecord, SlideInfo
from tests.painted import paint_slide
from tests.support.browser import Chromium
from tests.support.fake_paths import CLASSES, SPEC, fake_classifier

NAN = float("nan")
# local, global, g; the fourth cell was not typed, the global path of the fifth did not run.
PROBS = (
    ((0.7, 0.2, 0.1), (0.8, 0.1, 0.1), 0.5),
    ((0.4, 0.35, 0.25), (0.3, 0.4, 0.3), 0.5),
    ((0.9, 0.05, 0.05), (0.1, 0.85, 0.05), 0.25),
    ((NAN,) * 3, (NAN,) * 3, NAN),
    ((0.34, 0.33, 0.33), (NAN,) * 3, NAN),
    ((0.95, 0.03, 0.02), (0.05, 0.05, 0.9), 0.75),
)
# The last cell sits in the slide's corner, so its crops reach beyond the edge.
CENTRES = ((60.0, 70.0), (200.5, 90.25), (330.0, 210.0), (120.0, 200.0), (250.0, 160.0), (10.0, 12.0))


def typed_columns() -> Columns:
    """Return the columns that `classify` writes, decided by the local path."""
    local, global_ = (np.array([p[k] for p in PROBS], np.float32) for k in (0, 1))
    known = np.isfinite(local).all(axis=1)
    code = np.where(known, np.nan_to_num(local).argmax(axis=1), -1)
    names, abstained = tuple(c.name for c in CLASSES), np.arange(len(PROBS)) == 1
    obs = {
        "class": Categorical(np.where(abstained, len(names), code), (*names, "abstained")),
        "class_top": Categorical(code, names),
        "class_prob": local.max(axis=1),
        "gate": np.array([p[2] for p in PROBS], np.float32),
        "path": Categorical(np.where(known, 1, -1), PATHS),
        "abstained": abstained,
        "organ": Categorical(np.where(known, 0, -1), ("lung",)),
    }
    return Columns(obs, {"prob": local, "prob_local": local, "prob_global": global_})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a painted slide (0.25 µm/px, twice the plane's), and `out/s` with its six cells typed."""
    top = tmp_path_factory.mktemp("explain")
    colors = [(225, 60, 60), (60, 60, 225)] * 3
    scaled = np.array(CENTRES) * 2
    paint_slide(top / "s.tif", 800, 500, 0.25, scaled, 16.0, disc_color=colors)
    write_table(top / "out" / "s", open_slide(top / "s.tif").info, scaled)
    return top


@pytest.fixture()
def folder(made: Path) -> Path:
    """Return the slide's folder; no test may change it but for the page."""
    return made / "out" / "s"


def write_table(folder: Path, info: SlideInfo, centres: np.ndarray) -> None:
    """Write cells of radius 4 µm at level-0 centres (N, 2), typed as PROBS says."""
    n = len(centres)
    angle = np.arange(16) * np.pi / 8
    rings = centres[:, None] + 16.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    whole = np.zeros(n, np.int32)
    cells = Cells(
        centres, whole, whole, np.ones(n, np.float32), np.full(n, 50, np.float32), None, None,
        rings.reshape(-1, 2), np.arange(0, 16 * n + 1, 16, dtype=np.int64),
    )  # fmt: skip
    run = RunRecord("0", "done", describe_slide(info), {}, [], "cpu", "torch", "fp32", 0, "2026-01-01T00:00:00Z")
    writer = CellTableWriter(folder / "cells.zarr", info, ModelSpec("m", "mask", 0.5, 256, 64, (0.0,) * 3, (1.0,) * 3))
    writer.append(cells)
    writer.close(run)
    run.config["classify"] = {"spec": plain(SPEC), "organ": "lung", "weights": None}
    with open_table(folder / "cells.zarr") as table:
        extender = TableExtender(table)
        extender.append(typed_columns())
        extender.close(run, CLASSES)
    write_record(folder, run)


@pytest.fixture()
def table(folder: Path) -> CellTable:
    return open_table(folder / "cells.zarr")


class Page(HTMLParser):
    """Collects what the tests ask of a page: cells, captions, addresses, tags, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.images: list[tuple[str, np.ndarray]] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "article":
            self.cells.append(str(values["id"]).removeprefix("cell-"))
        if tag == "img":
            self.images.append((str(values["alt"]), decoded(str(values["src"]))))
        self.addresses += [str(v)[:30] for k, v in attrs if k in {"src", "href", "srcset"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def decoded(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_uncertain_cells_come_least_sure_first_and_untyped_ones_never(table: CellTable) -> None:
    assert select_cells(table, Selection("uncertain", 3)).tolist() == [4, 1, 0]
    assert select_cells(table, Selection("uncertain", 99)).tolist() == [4, 1, 0, 2, 5]


def test_disagreeing_cells_come_surest_first(table: CellTable) -> None:
    assert select_cells(table, Selection("disagree", 9)).tolist() == [5, 2, 1]
    assert select_cells(table, Selection("disagree", 1)).tolist() == [5]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_choice_does_not_depend_on_the_block(table: CellTable, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("cellslide.report.explain.select.BLOCK_ROWS", rows)
    assert select_cells(table, Selection("uncertain", 2)).tolist() == [4, 1]
    assert select_cells(table, Selection("disagree", 2)).tolist() == [5, 2]


def test_equal_cells_go_by_id(table: CellTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.report.explain.select.BLOCK_ROWS", 2)
    monkeypatch.setattr("cellslide.report.explain.select.doubt", lambda table, start, stop: np.full(stop - start, 0.5))
    assert select_cells(table, Selection("uncertain", 4)).tolist() == [0, 1, 2, 3]


def test_cells_by_id_and_uuid_keep_their_order(table: CellTable, caplog: pytest.LogCaptureFixture) -> None:
    uuid = str(table.vector("uuid")[2])
    assert select_cells(table, Selection("cells", ids=("5", uuid, "3", "0"))).tolist() == [5, 2, 0]
    assert "1 of the cells asked for were not typed" in caplog.text
    with pytest.raises(UsageError, match="--cells 77: no such cell among the 6"):
        select_cells(table, Selection("cells", ids=("1", "77")))


def test_untyped_table_and_empty_choice_are_refused(made: Path, tmp_path: Path) -> None:
    info = open_slide(made / "s.tif").info
    writer = CellTableWriter(tmp_path / "x.zarr", info, ModelSpec("m", "mask", 0.5, 256, 64, (0.0,) * 3, (1.0,) * 3))
    writer.close(RunRecord("0", "done", {}, {}, [], "cpu", "torch", "fp32", 0, "2026-01-01T00:00:00Z"))
    with pytest.raises(UsageError, match="cellslide classify"):
        select_cells(open_table(tmp_path / "x.zarr"), Selection("uncertain", 3))
    with pytest.raises(UsageError, match="--disagree 0"):
        Selection("disagree", 0)


def test_page_shows_cells_with_pictures_of_both_paths(folder: Path) -> None:
    page, n = explain_slide(folder, Selection("disagree", 5), fake_classifier(), runner_up=True)
    read = read_page(page)
    assert (page, n) == (folder / "explain.html", 3)
    assert read.cells == ["5", "2", "1"]
    captions = [caption for caption, _ in read.images[:8]]
    assert captions[:2] == ["local crop, 16 µm", "context, 64 µm"]
    assert [c.partition(": ")[0] for c in captions[2:5]] == [
        "local path", "global path, own crop", "global path, context",
    ]  # fmt: skip
    assert [c.partition(": ")[2].removesuffix(" (nothing speaks for it)") for c in captions[2:]] == ["red"] * 3 + [
        "blue"
    ] * 3
    assert len(read.images) == 24


def test_page_needs_nothing_else(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("uncertain", 2), fake_classifier())
    text, read = page.read_text(encoding="utf-8"), read_page(page)
    assert not {"script", "link", "iframe", "object", "audio", "video"} & set(read.tags)
    assert all(address.startswith("data:image/") for address in read.addresses)
    assert "http" not in re.sub(r'src="[^"]*"', "", text) and "url(" not in text and "@import" not in text
    assert not list(folder.glob("*.tmp"))


def test_page_tells_what_was_decided(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("1", "4")), fake_classifier())
    words = read_page(page).text
    assert "abstained (red 0.400)" in words and "cell 1 local" in words
    assert "level-0 x 401.0, y 180.5; organ lung" in words
    assert "g = 0.500" in words and "g: the global path did not run" in words
    assert "global path: not run" in words
    assert "typed by fake-typer" in words and "2 shown of 6" in words


def test_skipped_global_path_has_no_pictures(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("4",)), fake_classifier())
    assert [caption for caption, _ in read_page(page).images] == ["local crop, 16 µm", "local path: red"]


def test_picture_is_the_slide_around_the_nucleus(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("0",)), fake_classifier())
    images = dict(read_page(page).images)
    local, context = images["local crop, 16 µm"].astype(int), images["context, 64 µm"].astype(int)
    assert local.shape == (32, 32, 3) and context.shape == (128, 128, 3)
    # The disc of radius 8 plane pixels is red, the glass around it grey; JPEG blurs single pixels.
    for picture in (local, context):
        middle = picture.shape[0] // 2
        assert picture[middle - 3 : middle + 3, middle - 3 : middle + 3].mean((0, 1)) == pytest.approx(
            [225, 60, 60], abs=8
        )
        assert picture[middle - 15 : middle - 11, middle - 15 : middle - 11].mean((0, 1)) == pytest.approx(
            [243] * 3, abs=8
        )


def test_map_lies_on_the_nucleus(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("0", "1")), fake_classifier())
    images = read_page(page).images
    plain_crop, heated = (
        next(i for c, i in images if c.startswith(word)) for word in ("local crop", "local path: red")
    )
    change = np.abs(heated.astype(int) - plain_crop.astype(int)).sum(axis=2)
    rows, cols = np.nonzero(change > 60)
    assert (rows.mean(), cols.mean()) == pytest.approx((15.5, 15.5), abs=1.0)
    assert change[:4].max() < 60


def test_outline_and_centre_are_drawn_where_they_are(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("1",)), fake_classifier())
    paths = re.findall(r'<path d="M([^"]*)"', page.read_text())
    ring = np.array([[float(v) for v in p.split(",")] for p in paths[0].rstrip("Z").split("L")])
    # Centre 200.5, 90.25 of the plane; the corner of a crop of 32 px is round(184.5) = 184 (halves to even), 74.
    assert ring.mean(axis=0) == pytest.approx((16.5, 16.25), abs=0.01)
    assert np.hypot(*(ring - ring.mean(axis=0)).T) == pytest.approx(8.0, abs=0.01)
    assert "h32.00v32.00" in paths[2]


def test_organ_of_the_table_is_what_the_path_gets(folder: Path) -> None:
    loaded = fake_classifier()
    explain_slide(folder, Selection("cells", ids=("0", "1")), loaded)
    assert [organ.tolist() for organ in loaded.module.organs] == [[1, 1]]


def test_page_says_where_it_differs_from_the_table(folder: Path) -> None:
    page, _ = explain_slide(folder, Selection("cells", ids=("5",)), fake_classifier())
    assert "The local path says" in read_page(page).text


def test_other_weights_and_other_slides_are_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made / "out" / "s", folder)
    at_home = open_table(folder / "cells.zarr").slide.path
    other = fake_classifier(replace(SPEC, weights_id="other", weights_sha256="cd" * 32))
    with pytest.raises(UsageError, match="fake-typer.*other"):
        explain_slide(folder, Selection("uncertain", 1), other)
    with at_home.open("ab") as file:
        file.write(b"x")
    try:
        with pytest.raises(UsageError, match="--slide"):
            explain_slide(folder, Selection("uncertain", 1), fake_classifier())
    finally:
        with at_home.open("rb+") as file:
            file.truncate(at_home.stat().st_size - 1)
    at_home.rename(tmp_path / "gone.tif")
    try:
        with pytest.raises(UsageError, match="--slide"):
            explain_slide(folder, Selection("uncertain", 1), fake_classifier())
        moved = explain_slide(folder, Selection("uncertain", 1), fake_classifier(), moved_to=tmp_path / "gone.tif")
        assert moved == (folder / "explain.html", 1)
    finally:
        (tmp_path / "gone.tif").rename(at_home)


def test_same_choice_gives_the_same_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = explain_slide(folder, Selection("uncertain", 5), fake_classifier(), tmp_path / "a.html")
    monkeypatch.setattr("cellslide.report.explain.slide.CELLS_AT_ONCE", 2)
    second, _ = explain_slide(folder, Selection("uncertain", 5), fake_classifier(), tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()


def test_heat_leaves_cold_places_alone() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:, :2] = 1
    shown = overlay_heat(image, heat)
    assert (shown[:, 5:] == 100).all()
    assert shown[0, 0, 0] > shown[0, 0, 2]


@pytest.mark.parametrize(("width_um", "bar"), [(56, 20), (28, 10), (256, 100), (1.5, 1)])
def test_scale_bar_fits(width_um: float, bar: int) -> None:
    assert scale_bar_um(width_um) == bar


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    evil = ClassSpec('<img src=x onerror="y">', (1, 2, 3))
    picture = Picture("a < b", np.zeros((8, 8, 3), np.uint8), 0.5, (4, 4))
    bars = (Bars("p", np.array([1.0], np.float32), (evil,)),)
    card = Card(7, "u", (1.0, 2.0), evil.name, evil.name, 0.5, 0.5, "mix", "<b>", bars, ((picture,),))
    read = read_page(write_gallery(tmp_path / "p.html", Heading("<t>"), [card]))
    assert read.tags.count("img") == 1 and "b" not in read.tags
    assert evil.name in read.text


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_page_fits_and_follows_the_light(
    chromium: Chromium, folder: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    made, _ = explain_slide(folder, Selection("uncertain", 2), fake_classifier(), tmp_path / "e.html")
    with chromium.page(width_px=width, dark=dark) as page:
        page.open(made)
        assert not page.overflows() and (sum(page.color_at(width - 3, 3)) < 150) == dark


def test_failed_page_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "p.html").write_text("old")

    def broken() -> Any:
        raise ValueError("no card")
        yield

    with pytest.raises(ValueError, match="no card"):
        write_gallery(tmp_path / "p.html", Heading("t"), broken())
    assert (tmp_path / "p.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_ids_are_parsed() -> None:
    assert parse_ids("7, 10-12,007,ABC-def-1") == ("7", "10", "11", "12", "abc-def-1")
    with pytest.raises(UsageError, match="--cells"):
        parse_ids(" , ")


@pytest.mark.parametrize("flags", [[], ["--uncertain", "3", "--disagree", "2"]])
def test_command_wants_one_choice(folder: Path, flags: list[str]) -> None:
    result = CliRunner().invoke(command, [str(folder), *flags])
    assert isinstance(result.exception, UsageError) and "give one of" in str(result.exception)


def test_command_takes_the_classifier_that_typed_the_cells(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(model: str | None, weights: Path | None) -> Any:
        asked.append((model, weights))
        return fake_classifier()

    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", load)
    for flags in (["--disagree", "1"], ["--uncertain", "1", "--model", "x"], ["--uncertain", "1", "--runner-up"]):
        result = CliRunner().invoke(command, [str(folder), *flags, "-o", str(tmp_path / f"{len(asked)}.html")])
        assert result.exit_code == 0, result.output
        assert result.output.endswith("1 cells\n")
    assert asked == [("fake-typer", None), ("x", None), ("fake-typer", None)]
    # Two paths disagree on what, so both classes are shown; the uncertain cell has no global path.
    assert [len(read_page(tmp_path / f"{k}.html").images) for k in range(3)] == [8, 2, 3]


def test_command_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), "--uncertain", "1"])
    assert isinstance(result.exception, UsageError) and "no run.json" in str(result.exception)
    run = json.loads((folder / "run.json").read_text())
    del run["config"]["classify"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    result = CliRunner().invoke(command, [str(tmp_path), "--uncertain", "1"])
    assert isinstance(result.exception, UsageError) and "run `cellslide classify" in str(result.exception)


def test_point_is_marked_by_a_cross(tmp_path: Path) -> None:
    picture = Picture("p", np.zeros((40, 40, 3), np.uint8), 0.5, (10.0, 30.0))
    card = Card(1, "u", (0, 0), "c", "c", 0.5, 0.5, "mix", "o", (), ((picture,),))
    text = write_gallery(tmp_path / "p.html", Heading("t"), [card]).read_text()
    assert 'd="M9.00,30.00H11.00M10.00,29.00V31.00"' in text
