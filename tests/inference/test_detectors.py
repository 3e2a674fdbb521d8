"""Boxes and points through the whole flow: tiles, resume, table, files, pictures and typing, as for outlines."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cellslide.classify import classify_table
from cellslide.config import OutputConfig, SegmentConfig, TileConfig
from cellslide.errors import Interrupted, UsageError
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_array, segment_slide
from cellslide.progress import Watch
from cellslide.report.overlay import render_overlay
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import open_slide
from cellslide.store.anndata_columns import Categorical
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.run_record import read_record
from cellslide.store.shapes import polygons_from_wkb, ring_boxes
from cellslide.types import DetectDecode, Float32, ModelKind, RunRecord
from cellslide.weights import LoadedModel
from tests.classify.test_rows import BREAST, classifier, rule
from tests.painted import DISC, PINK_DISC, PaintedSlide, paint_slide
from tests.support.fakes import CLASSES, EMBEDDED, fake_model
from tests.support.qupath_rules import file_faults, read_features
from tests.test_pipeline import BASE, StopAfter, assert_same, columns

KINDS = pytest.mark.parametrize("kind", ["box", "point"])
WIDTH, HEIGHT = 701, 533


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    """Discs 30 px apart, also on the seams of tiles of 256 and 512 px; pink and blue by turns."""
    places = [(x + 0.5 * (y % 3), y) for y in range(20, HEIGHT - 15, 30) for x in range(14, WIDTH - 15, 30)]
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    return paint_slide(tmp_path_factory.mktemp("slides") / "s.tif", WIDTH, HEIGHT, 0.5, places, 7.0, disc_color=colors)


def detector(kind: ModelKind, nms_um: float = 0.0) -> LoadedModel:
    """Return a fake detector that types and embeds."""
    return fake_model(kind, classes=CLASSES, embedding_dim=EMBEDDED, detect=DetectDecode(0.4, nms_um))


def run(
    slide: PaintedSlide, out: Path, kind: ModelKind, config: SegmentConfig = BASE, watch: Watch | None = None
) -> tuple[RunRecord, CellTable]:
    with open_segmenter(detector(kind), config) as segmenter:
        record, _ = segment_slide(SlideInput(slide.path, slide_id="s"), segmenter, out, watch or Watch())
    return record, open_table(out / "s" / "cells.zarr")


def everything(table: CellTable) -> dict[str, np.ndarray]:
    """Return all that the table says of its cells, sorted by place."""
    order = np.lexsort((table.vector("x"), table.vector("y")))
    return columns(table) | {"embedding": table.matrix("embedding")[order], "prob": table.matrix("prob")[order]}


def true_colors(slide: PaintedSlide, table: CellTable) -> Float32:
    """Return the painted colour (N, 3), 0 to 1, at the middle of each cell."""
    x, y = (np.floor(table.vector(name)).astype(int) for name in ("x", "y"))
    return slide.image[y, x].astype(np.float32) / 255


@KINDS
def test_every_disc_is_found_typed_and_embedded_whatever_the_tile(
    slide: PaintedSlide, tmp_path: Path, kind: ModelKind
) -> None:
    record, small = run(slide, tmp_path / "256", kind)
    _, large = run(slide, tmp_path / "512", kind, replace(BASE, tiles=TileConfig(512)))
    assert small.n == len(slide.centres_xy) == record.counts.nuclei > 300
    assert record.counts.nuclei_raw > small.n
    assert_same(everything(small), everything(large))
    embedding, color = small.matrix("embedding"), true_colors(slide, small)
    np.testing.assert_allclose(embedding, np.concatenate([color, np.ones((small.n, 1))], axis=1), atol=1e-5)
    named = small.column("class")
    assert isinstance(named, Categorical) and named.names == ("pink", "blue", "abstained")
    np.testing.assert_array_equal(named.codes, color[:, 2] > color[:, 0])
    assert 0 < named.codes.sum() < small.n


@KINDS
def test_an_interrupted_slide_ends_the_same_embeddings_too(
    slide: PaintedSlide, tmp_path: Path, kind: ModelKind
) -> None:
    _, whole = run(slide, tmp_path / "whole", kind)
    for done in (0, 4):
        hears = StopAfter(4)
        with pytest.raises(Interrupted):
            run(slide, tmp_path / "parts", kind, watch=Watch(hears, hears.stop))
        assert hears.begun[1] == done
    infer = replace(BASE.infer, batch_size=3)
    _, table = run(slide, tmp_path / "parts", kind, replace(BASE, infer=infer))
    assert_same(everything(whole), everything(table))


@KINDS
def test_the_record_holds_what_decided_and_no_more(slide: PaintedSlide, tmp_path: Path, kind: ModelKind) -> None:
    record, _ = run(slide, tmp_path, kind)
    spec = record.config["spec"]
    assert spec["detect"] == {"score_threshold": 0.4, "nms_um": 0.0} and spec["embedding_dim"] == EMBEDDED
    assert "decode" not in spec
    stricter = fake_model(kind, classes=CLASSES, embedding_dim=EMBEDDED, detect=DetectDecode(0.5))
    with open_segmenter(stricter, BASE) as segmenter, pytest.raises(UsageError, match="detect.score_threshold"):
        segment_slide(SlideInput(slide.path, slide_id="s"), segmenter, tmp_path)


def test_masks_keep_their_record() -> None:
    with open_segmenter(fake_model(), BASE) as segmenter:
        from cellslide.inference.segmenter import resolved

        spec = resolved(segmenter.config, segmenter.spec)["spec"]
    assert "decode" in spec and "detect" not in spec and "embedding_dim" not in spec


@KINDS
def test_files_hold_boxes_and_points(slide: PaintedSlide, tmp_path: Path, kind: ModelKind) -> None:
    output = OutputConfig(formats=("zarr", "geojson", "parquet", "csv"), profile="full")
    _, table = run(slide, tmp_path, kind, replace(BASE, output=output))
    folder = tmp_path / "s"
    assert file_faults(folder / "cells.geojson.gz") == []
    features = read_features(folder / "cells.geojson.gz")
    shapes = pq.read_table(folder / "cells.parquet").column("geometry").combine_chunks()
    xy = np.stack([table.vector("x"), table.vector("y")], axis=1)
    for feature, place in zip(features, xy, strict=True):
        coordinates = np.array(feature["geometry"]["coordinates"])
        measured = feature["properties"]["measurements"]
        if kind == "point":
            assert feature["geometry"]["type"] == "Point" and "area µm²" not in measured
            np.testing.assert_allclose(coordinates, place, atol=0.0051)
        else:
            assert feature["geometry"]["type"] == "Polygon" and coordinates.shape == (1, 5, 2)
            low, high = coordinates[0].min(axis=0), coordinates[0].max(axis=0)
            np.testing.assert_allclose((low + high) / 2, place, atol=0.0051)
            assert measured["area µm²"] == pytest.approx(np.prod(high - low) * 0.25, abs=0.01)
    if kind == "box":
        (chunk,) = table.iter_chunks()
        np.testing.assert_allclose(ring_boxes(*polygons_from_wkb(shapes)), chunk.cells.box_xyxy)
        assert 12 < np.ptp(chunk.cells.box_xyxy[0, ::2]) < 17
    else:
        np.testing.assert_array_equal(np.frombuffer(shapes[5].as_py()[5:], "<f8"), xy[5])
    with gzip.open(folder / "cells.csv.gz", "rt") as stream:
        assert ("perimeter_um" in stream.readline()) == (kind == "box")


def test_points_are_circles_for_spatialdata(slide: PaintedSlide, tmp_path: Path) -> None:
    _, table = run(slide, tmp_path, "point")
    assert table.shapes is not None
    # No area is known, so a circle of 3 µm stands for each.
    np.testing.assert_allclose(table.shapes.columns(0, table.n).column("radius").to_numpy(), 6.0)


@KINDS
def test_the_picture_shows_boxes_and_points_where_they_are(
    slide: PaintedSlide, tmp_path: Path, kind: ModelKind
) -> None:
    _, table = run(slide, tmp_path, kind)
    with open_slide(slide.path) as opened:
        path = render_overlay(opened, table.path, tmp_path / "o.png", (90, 90, 290, 290))
    picture, bare = np.asarray(Image.open(path)).astype(int), slide.image[90:290, 90:290].astype(int)
    drawn = np.abs(picture - bare).max(axis=2) > 60
    (chunk,) = table.iter_chunks()
    centre = chunk.cells.centroid_xy - 90
    inside = np.flatnonzero(((centre > 12) & (centre < 188)).all(axis=1))
    assert len(inside) > 20
    for i in inside:
        x, y = np.floor(centre[i]).astype(int)
        color = table.colors[chunk.class_index[i]]
        if kind == "box":
            assert not drawn[y, x]
            assert all(drawn[y - 1 : y + 2, x + dx - 1 : x + dx + 2].any() for dx in (-7, 7))
        else:
            np.testing.assert_array_equal(picture[y, x], color)
            assert picture[y, x - 4 : x + 5].min(axis=1).max() > 150  # the white rim
            assert not drawn[y, [x - 6, x + 6]].any()


@KINDS
def test_a_classifier_types_what_a_detector_found(slide: PaintedSlide, tmp_path: Path, kind: ModelKind) -> None:
    formats = OutputConfig(formats=("zarr", "geojson"))
    _, before = run(slide, tmp_path, kind, replace(BASE, output=formats))
    embedding, uuid = before.matrix("embedding"), before.vector("uuid")
    color = true_colors(slide, before)
    with open_slide(slide.path) as opened:
        classify_table(tmp_path / "s", opened, classifier(), rule(), BREAST)
    after = open_table(tmp_path / "s" / "cells.zarr")
    assert after.kind == kind
    np.testing.assert_array_equal(after.matrix("embedding"), embedding)
    np.testing.assert_array_equal(after.vector("uuid"), uuid)
    local = after.matrix("prob_local").argmax(axis=1)
    np.testing.assert_array_equal(local, color[:, 2] > color[:, 0])
    assert 0 < local.sum() < len(local)
    features = read_features(tmp_path / "s" / "cells.geojson.gz")
    assert {f["geometry"]["type"] for f in features} == {"Point" if kind == "point" else "Polygon"}
    assert all("gate" in f["properties"]["measurements"] for f in features)
    record = read_record(tmp_path / "s")
    assert record is not None and [w.id for w in record.weights] == ["fake", "fake-classifier"]


def test_labels_of_points_are_refused_before_any_work(slide: PaintedSlide, tmp_path: Path) -> None:
    config = replace(BASE, output=OutputConfig(formats=("zarr", "labels")))
    with pytest.raises(UsageError, match="--format labels: fake gives points.*leave labels out"):
        open_segmenter(detector("point"), config)
    _, table = run(slide, tmp_path, "box", config)
    assert (tmp_path / "s" / "labels.ome.zarr").is_dir() and table.n > 0


@KINDS
def test_nothing_found_keeps_the_columns(tmp_path: Path, kind: ModelKind) -> None:
    blank = np.full((90, 70, 3), 240, np.uint8)
    cells = segment_array(detector(kind), blank, 0.5, BASE)
    assert len(cells) == 0 and cells.contour_xy is None and (cells.box_xyxy is not None) == (kind == "box")
    assert cells.embedding is not None and cells.embedding.shape == (0, EMBEDDED)


def test_near_points_are_one_nucleus_in_a_tile_and_across_a_seam(tmp_path: Path) -> None:
    """Dots 8 px (4 µm) apart, also astride of a seam: two nuclei without suppression, one within 5 µm."""
    pairs = [(100.5, 60.5), (220.5, 60.5), (220.5, 120.5), (60.5, 220.5)]
    places = [(x + dx, y) for x, y in pairs for dx in (0, 8)]
    slide = paint_slide(tmp_path / "dots.tif", 500, 400, 0.5, places, 2.0)
    found = {um: run_points(slide, tmp_path / str(um), um) for um in (0.0, 5.0)}
    assert (found[0.0].n, found[5.0].n) == (8, 4)


def run_points(slide: PaintedSlide, out: Path, nms_um: float) -> CellTable:
    with open_segmenter(detector("point", nms_um), BASE) as segmenter:
        segment_slide(SlideInput(slide.path, slide_id="s"), segmenter, out)
    return open_table(out / "s" / "cells.zarr")
