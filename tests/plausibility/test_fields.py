"""Fields: each is measured once whatever the tiles, and what is no clean tissue is found where it lies."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely

from cellslide.config import SegmentConfig, TileConfig, TissueConfig
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.plausibility.artefacts import BLUR, EOSIN, FOLD, INK, Artefacts, find_artefacts, read_fields
from cellslide.plausibility.fields import centres, edge_px, measure_fields
from cellslide.slides import painted
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import slide_from_array
from cellslide.slides.tiles import tile_grid
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.types import Fields, Plane, UInt8
from tests.classify.test_rows import INFER, OUTPUT
from tests.painted import paint_slide
from tests.support.fakes import fake_model

MPP = 0.5
PLANE = Plane(MPP, 1.0, 1.0, 1024, 768)
EDGE = edge_px(PLANE)


@pytest.fixture(scope="module")
def tissue() -> UInt8:
    """Painted H&E of 512 x 384 µm at 0.5 µm a pixel."""
    image = painted.paint().image
    return np.asarray(cv2.resize(image, (1024, 768), interpolation=cv2.INTER_AREA), np.uint8)


def fields_of(image: UInt8, size_px: int = 1024, overlap_px: int = 128, seed: int | None = None) -> Fields:
    """Measure an image tile by tile, the tiles in any order."""
    slide, grid = slide_from_array(image, MPP), tile_grid(PLANE, size_px, overlap_px)
    tiles = list(grid.tiles())
    if seed is not None:
        np.random.default_rng(seed).shuffle(tiles)
    parts = [measure_fields(slide.read_plane(PLANE, t.read_xyxy), t, PLANE, MPP, 8.0) for t in tiles]
    return Fields.of(parts)


def kind_at(found: Artefacts, x: int, y: int) -> int:
    """Return what is wrong with the field in column x and row y."""
    (row,) = np.flatnonzero((found.fields.place == (x, y)).all(axis=1))
    return int(found.kind[row])


def test_fields_do_not_depend_on_tiles(tissue: UInt8) -> None:
    whole, parts, shuffled = fields_of(tissue), fields_of(tissue, 384, 128), fields_of(tissue, 384, 128, seed=1)
    np.testing.assert_array_equal(whole.place, parts.place)
    assert len(whole) == (1024 // EDGE) * (768 // EDGE) == len(np.unique(whole.place, axis=0))
    for name in ("tissue", "density", "contrast", "haematoxylin_r", "eosin_g", "ink", "nuclei", "dense_eosin"):
        np.testing.assert_allclose(whole.column(name), parts.column(name), atol=1e-5, err_msg=name)
    # Steps between pixels see one pixel beyond the field.
    np.testing.assert_allclose(whole.column("blur"), parts.column("blur"), atol=0.05)
    np.testing.assert_array_equal(parts.values, shuffled.values)


def test_clean_tissue_is_clean(tissue: UInt8) -> None:
    found = find_artefacts(fields_of(tissue), PLANE)
    assert not found.kind.any() and not found.regions() and not found.contains(np.array([[100.0, 100.0]])).any()
    fields = found.fields
    haematoxylin, eosin = (np.median(fields.vectors(name), axis=0) for name in ("haematoxylin", "eosin"))
    assert haematoxylin[0] > eosin[0] + 0.1 and eosin[1] == max(eosin)
    assert np.nanmedian(fields.column("blocks")) < 1.3


def test_faults_are_found_where_they_lie(tissue: UInt8) -> None:
    image = tissue.copy()
    rows, cols = slice(4 * EDGE, 5 * EDGE), slice(5 * EDGE, 6 * EDGE)
    image[rows, cols] = cv2.GaussianBlur(image, (0, 0), 5)[rows, cols]
    image[:EDGE, 2 * EDGE : 3 * EDGE] = (30, 60, 150)
    image[2 * EDGE : 3 * EDGE, :EDGE] = (22, 20, 24)
    dense = (image[2 * EDGE : 3 * EDGE, 2 * EDGE : 3 * EDGE] / 245.0) ** 4 * 245
    image[2 * EDGE : 3 * EDGE, 2 * EDGE : 3 * EDGE] = dense.astype(np.uint8)
    image[2 * EDGE : 3 * EDGE, 4 * EDGE : 5 * EDGE] = (215, 90, 130)
    found = find_artefacts(fields_of(image), PLANE)
    kinds = {(5, 4): BLUR, (2, 0): INK, (0, 2): INK, (2, 2): FOLD, (4, 2): EOSIN}
    assert {place: kind_at(found, *place) for place in kinds} == kinds
    assert int((found.kind > 0).sum()) <= len(kinds) + 2
    at = centres(np.array([*kinds]), PLANE)
    assert found.contains(at).all() and not found.contains(at + (-EDGE, EDGE)).any()
    regions = found.regions()
    assert {*regions} == {"out of focus", "ink", "fold", "dense eosin"}
    assert shapely.contains_xy(regions["out of focus"], *at[0])


def test_blocks_of_jpeg_are_seen(tissue: UInt8) -> None:
    def blocks(quality: int) -> float:
        _, packed = cv2.imencode(".jpg", tissue[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = np.ascontiguousarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)[..., ::-1])
        return float(np.nanmedian(fields_of(image).column("blocks")))

    assert blocks(90) < 1.3 < blocks(5)


def test_a_run_marks_nuclei_and_regions(tmp_path: Path) -> None:
    """Fields are kept with the tiles: runs with small and large tiles give the same column and the same regions."""
    places = [(x, y) for y in range(40, 380, 40) for x in range(40, 560, 40)]
    paint_slide(tmp_path / "s.tif", 600, 400, 0.5, places, 7.0, background="tissue")
    marked, runs = {}, (256, 512)
    for size in runs:
        config = SegmentConfig(
            tissue=TissueConfig(enabled=False), tiles=TileConfig(size, 64), infer=INFER, output=OUTPUT
        )
        with open_segmenter(fake_model(), config) as segmenter:
            segment_slide(SlideInput(tmp_path / "s.tif", slide_id="s"), segmenter, tmp_path / str(size))
        folder = tmp_path / str(size) / "s"
        with open_table(folder / "cells.zarr") as table:
            fields = read_fields(table)
            plane = Plane.of(table.slide, 0.5)
            expected = find_artefacts(fields, plane)
            xy = np.stack([table.vector("x"), table.vector("y")], axis=1)
            np.testing.assert_array_equal(table.vector("in_artefact"), expected.contains(xy))
            assert len(fields) == round(600 / edge_px(plane)) * round(400 / edge_px(plane))
            marked[size] = fields.column("tissue")
        record = read_record(folder)
        assert record is not None and record.verdict is not None
        assert {"artefacts", "out_of_focus", "stain"} <= {check.name for check in record.verdict.checks}
    np.testing.assert_allclose(marked[256], marked[512], atol=1e-5)
