"""Outlines drawn over a slide land where the cells are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellslide.errors import UsageError
from cellslide.report.overlay import densest_region, render_overlay
from cellslide.slides.painted import write_pyramid
from cellslide.slides.slide import Slide, open_slide
from cellslide.store.anndata_columns import Columns
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Cells, ClassSpec, ModelSpec, RunRecord

GREEN, RED = (0, 255, 0), (255, 0, 0)
SQUARES = ((100, 60, 140, 90), (500, 300, 560, 330), (20, 380, 50, 396))


@pytest.fixture()
def slide(tmp_path: Path) -> Slide:
    write_pyramid(tmp_path / "grey.tif", np.full((400, 640, 3), 200, np.uint8), 0.25)
    return open_slide(tmp_path / "grey.tif")


@pytest.fixture()
def table(tmp_path: Path, slide: Slide) -> Path:
    boxes = np.array(SQUARES, np.float64)
    x0, y0, x1, y1 = boxes.T
    rings = np.stack([np.stack(c, 1) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], 1)
    n = len(boxes)
    zeros = np.zeros(n, np.int32)
    cells = Cells(
        centroid_xy=rings.mean(1), tile_index=zeros, row=zeros, score=np.ones(n, np.float32),
        area_um2=np.full(n, 50, np.float32), class_prob=np.eye(2, dtype=np.float32)[[0, 1, 0]],
        contour_xy=rings.reshape(-1, 2), contour_start=np.arange(0, 4 * n + 1, 4, dtype=np.int64),
    )  # fmt: skip
    classes = (ClassSpec("one", GREEN), ClassSpec("two", RED))
    spec = ModelSpec("fake", "mask", 0.25, 256, 64, (0.5,) * 3, (0.5,) * 3, classes)
    run = RunRecord("0", "done", {}, {}, [], "cpu", "torch", "fp32", 0, "2000-01-01T00:00:00Z")
    writer = CellTableWriter(tmp_path / "cells.zarr", slide.info, spec)
    writer.append(cells)
    writer.close(run)
    return tmp_path / "cells.zarr"


def drawn(path: Path) -> np.ndarray:
    """Where the picture is not grey any more."""
    pixels = np.asarray(Image.open(path)).astype(int)
    return np.ptp(pixels, axis=2) > 60


def test_outlines_lie_on_the_edges(slide: Slide, table: Path, tmp_path: Path) -> None:
    out = render_overlay(slide, table, tmp_path / "pictures" / "overlay.png")
    pixels = np.asarray(Image.open(out)).astype(int)
    assert pixels.shape == (400, 640, 3)
    rows, cols = np.nonzero(drawn(out)[:200])
    assert (cols.min(), rows.min()) == pytest.approx((100, 60), abs=2)
    assert (cols.max(), rows.max()) == pytest.approx((140, 90), abs=2)
    # The line is two pixels wide; half a pixel off and its middle would show it.
    assert ((cols.min() + cols.max()) / 2, (rows.min() + rows.max()) / 2) == pytest.approx((119.5, 74.5), abs=0.6)
    assert pixels[75, 120] == pytest.approx([200] * 3, abs=3)
    assert pixels[60, 120, 1] > pixels[60, 120, 0] + 50
    assert pixels[330, 530, 0] > pixels[330, 530, 1] + 50
    assert not list(out.parent.glob("*.tmp"))


def test_region_moves_the_picture(slide: Slide, table: Path, tmp_path: Path) -> None:
    out = render_overlay(slide, table, tmp_path / "o.png", region=(480, 280, 640, 400))
    rows, cols = np.nonzero(drawn(out))
    assert Image.open(out).size == (160, 120)
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == pytest.approx((20, 20, 80, 50), abs=2)


def test_large_region_is_shrunk(slide: Slide, table: Path, tmp_path: Path) -> None:
    out = render_overlay(slide, table, tmp_path / "o.png", max_px=320)
    assert Image.open(out).size == (320, 200)
    rows, cols = np.nonzero(drawn(out)[:100])
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == pytest.approx((50, 30, 70, 45), abs=2)


def test_what_is_no_nucleus_is_hatched(slide: Slide, table: Path, tmp_path: Path) -> None:
    before = np.asarray(Image.open(render_overlay(slide, table, tmp_path / "before.png")))
    with open_table(table) as opened:
        extender = TableExtender(opened)
        extender.append(Columns({"is_nucleus": np.array([False, True, False])}, {}))
        extender.close(opened.run, (ClassSpec("one", GREEN), ClassSpec("two", RED)))
    after = np.asarray(Image.open(render_overlay(slide, table, tmp_path / "after.png")))
    changed = (before != after).any(axis=2)
    for (x0, y0, x1, y1), hatched in zip(SQUARES, (True, False, True), strict=True):
        inside = changed[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].mean()
        assert inside == pytest.approx(0.25 if hatched else 0, abs=0.05)
        changed[y0:y1, x0:x1] = False
    assert not changed.any()


def test_a_point_that_is_no_nucleus_is_struck(slide: Slide, tmp_path: Path) -> None:
    n = 2
    zeros = np.zeros(n, np.int32)
    xy = np.array([[100.0, 100.0], [400.0, 300.0]])
    cells = Cells(xy, zeros, zeros, np.ones(n, np.float32), np.zeros(n, np.float32), np.eye(2, dtype=np.float32))
    classes = (ClassSpec("one", GREEN), ClassSpec("not_nucleus", RED))
    spec = ModelSpec("fake", "point", 0.25, 256, 64, (0.5,) * 3, (0.5,) * 3, classes)
    writer = CellTableWriter(tmp_path / "cells.zarr", slide.info, spec)
    writer.append(cells)
    writer.close(RunRecord("0", "done", {}, {}, [], "cpu", "torch", "fp32", 0, "2000-01-01T00:00:00Z"))
    out = render_overlay(slide, tmp_path / "cells.zarr", tmp_path / "points.png")
    pixels = np.asarray(Image.open(out)).astype(int)
    whole, struck = (drawn(out)[y - 4 : y + 4, x - 4 : x + 4].sum() for x, y in xy.astype(int).tolist())
    assert whole > 2 * struck > 0
    assert (pixels[298:302, 398:402].min(axis=2) > 220).any()


def test_empty_region_is_refused(slide: Slide, table: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="region"):
        render_overlay(slide, table, tmp_path / "o.png", region=(10, 10, 10, 50))


def test_densest_region_holds_the_cells_and_stays_inside(slide: Slide, table: Path) -> None:
    box = densest_region(slide.info, table, 100)
    inside = [box[0] <= (x0 + x1) / 2 < box[2] and box[1] <= (y0 + y1) / 2 < box[3] for x0, y0, x1, y1 in SQUARES]
    assert sum(inside) == 1
    assert (box[2] - box[0], box[3] - box[1]) == (100, 100)
    assert densest_region(slide.info, table, 5000) == (0, 0, 640, 400)
