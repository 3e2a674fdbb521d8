"""Tissue: found, not cut where a field is full of it, not invented on glass; pens and borders; masks and regions."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from PIL import Image
from shapely.geometry import shape

from cellslide.config import TissueConfig
from cellslide.errors import UsageError
from cellslide.slides.slide import Slide, open_slide, slide_from_array
from cellslide.slides.tiles import select_tiles, tile_grid
from cellslide.slides.tissue import TissueMask, find_tissue, write_tissue
from cellslide.types import Plane, SlideInfo, UInt8
from tests.painted import GLASS, TISSUE, grid_centres, paint_slide

MPP = 0.5
AUTO = TissueConfig()


def glass(height: int, width: int, color: tuple[int, int, int] = GLASS, noise: int = 2) -> UInt8:
    """Return empty glass with a little grain, uint8 (height, width, 3)."""
    grain = np.random.default_rng(0).integers(-noise, noise + 1, (height, width, 1))
    return np.clip(np.asarray(color) + grain, 0, 255).astype(np.uint8)


def with_tissue(image: UInt8, xyxy: tuple[int, int, int, int], color: tuple[int, int, int] = TISSUE) -> UInt8:
    x0, y0, x1, y1 = xyxy
    image[y0:y1, x0:x1] = color
    return image


def share(tissue: TissueMask, xyxy: tuple[int, int, int, int]) -> float:
    """Return the share of a level-0 box that the mask covers."""
    x0, y0, x1, y1 = xyxy
    xy = np.stack(np.meshgrid(np.linspace(x0, x1 - 1, 60), np.linspace(y0, y1 - 1, 60)), axis=-1).reshape(-1, 2)
    return float(tissue.contains(xy + 0.5).mean())


def test_tissue_is_found_with_a_rim_and_glass_is_left(tmp_path: Path) -> None:
    box = (700, 300, 1500, 900)
    painted = paint_slide(
        tmp_path / "a.tif", 1700, 1000, MPP, grid_centres(1700, 1000, 90), 6, background="tissue", tissue_xyxy=box
    )
    image = with_tissue(glass(1000, 1700), box)
    with open_slide(painted.path) as slide:
        # The discs on glass are debris of 28 µm² each, too small to be searched for.
        assert share(find_tissue(slide, AUTO), box) == 1
    tissue = find_tissue(slide_from_array(image, MPP), AUTO)
    assert share(tissue, (690, 290, 1510, 910)) == 1  # A rim of at least 5 µm.
    assert share(tissue, (0, 0, 600, 1000)) == share(tissue, (1600, 0, 1700, 1000)) == 0
    assert sum(p.area for p in tissue.polygons()) < 900 * 700


@pytest.mark.parametrize("color", [(255, 255, 255), (243, 243, 243), (226, 221, 228), (200, 200, 190), (0, 0, 0)])
def test_empty_slides_have_no_tissue(color: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    slide = slide_from_array(glass(1200, 1600, color, noise=3), MPP)
    tissue = find_tissue(slide, AUTO)
    assert not tissue.mask.any() and tissue.is_empty and tissue.polygons() == []
    assert select_tiles(tile_grid(Plane.of(slide.info, MPP), 256, 64), tissue) == []
    assert "no tissue found" in caplog.text


@pytest.mark.parametrize("size", [60, 200, 1100])
def test_a_field_full_of_tissue_is_kept_whole(size: int) -> None:
    image = with_tissue(glass(size, size), (0, 0, size, size))
    image[: size // 2] = (150, 90, 170)  # Otsu alone would keep the darker half.
    tissue = find_tissue(slide_from_array(image, 0.25), AUTO)
    assert tissue.mask.all()


def test_holes_are_filled_when_small_and_debris_is_dropped() -> None:
    image = with_tissue(glass(2000, 2000), (200, 200, 1800, 1800))
    cv2.circle(image, (600, 600), 100, GLASS, -1)  # 100 µm across: a vessel.
    cv2.circle(image, (1200, 1200), 400, GLASS, -1)  # 400 µm: a gap in the section.
    cv2.circle(image, (80, 80), 30, TISSUE, -1)  # 30 µm: a crumb.
    tissue = find_tissue(slide_from_array(image, MPP), AUTO)
    assert share(tissue, (550, 550, 650, 650)) == 1
    assert share(tissue, (1100, 1100, 1300, 1300)) == 0
    assert share(tissue, (50, 50, 110, 110)) == 0
    assert len(tissue.polygons()) == 1 and len(tissue.polygons()[0].interiors) == 1


@pytest.mark.parametrize("ink", [(40, 70, 170), (20, 20, 25), (40, 130, 70), (60, 120, 180)])
def test_pen_marks_are_no_tissue(ink: tuple[int, int, int]) -> None:
    image = with_tissue(glass(1200, 1600), (150, 150, 650, 1000))
    cv2.line(image, (1000, 150), (1300, 1050), ink, 150)
    image = cv2.GaussianBlur(image, (0, 0), 4)  # Pens lie above the focus.
    tissue = find_tissue(slide_from_array(image, 2 * MPP), AUTO)
    assert share(tissue, (150, 150, 650, 1000)) == 1
    assert share(tissue, (850, 100, 1500, 1150)) < 0.02


def test_black_scanner_border_is_no_tissue() -> None:
    image = with_tissue(glass(2000, 2000), (800, 800, 1400, 1400))
    image[:400], image[:, :300] = 3, 3
    tissue = find_tissue(slide_from_array(image, MPP), AUTO)
    assert share(tissue, (0, 0, 2000, 380)) == share(tissue, (0, 0, 280, 2000)) == 0
    assert share(tissue, (800, 800, 1400, 1400)) == 1


def test_every_labelled_nucleus_of_real_fields_is_searched(shared: Path) -> None:
    """Pale stroma and fat of TNBC, where colour alone finds a thirtieth of the field."""
    root = shared / "data" / "tnbc"
    pale = ("tnbc_03_4", "tnbc_04_2", "tnbc_04_3", "tnbc_04_5", "tnbc_11_2")
    rows = [r for r in csv.DictReader((root / "manifest.csv").open()) if Path(r["file"]).stem in pale]
    assert len(rows) == len(pale)
    for row in rows:
        image = np.asarray(Image.open(root / row["file"]).convert("RGB"))
        labels = np.asarray(Image.open(root / row["mask"]))
        tissue = find_tissue(slide_from_array(image, float(row["mpp"])), AUTO)
        assert tissue.contains(np.argwhere(labels)[:, ::-1] + 0.5).all(), row["file"]


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high", "glass_xyxy"),
    [
        ("CMU-1-Small-Region.svs", None, 0.35, 0.65, (20, 1400, 350, 2900)),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.55, 0.80, (500, 520, 1200, 650)),
        ("HE_example.tif", None, 0.70, 0.92, (0, 1250, 120, 1480)),
        ("OS-1-detail.ome.tif", None, 1.0, 1.0, None),
    ],
)
def test_real_slides(
    shared: Path, name: str, mpp: float | None, low: float, high: float, glass_xyxy: tuple[int, int, int, int] | None
) -> None:
    with open_slide(shared / "data" / "wsi" / name, mpp=mpp) as slide:
        tissue = find_tissue(slide, AUTO)
        assert low <= tissue.mask.mean() <= high
        thumb = slide.thumbnail(600).astype(int)
        ys, xs = np.nonzero(thumb.max(axis=2) - thumb.min(axis=2) > 60)  # Plainly stained.
        factor = slide.info.width_px / thumb.shape[1]
        assert tissue.contains((np.stack([xs, ys], axis=1) + 0.5) * factor).mean() > 0.998
        if glass_xyxy:
            assert share(tissue, glass_xyxy) < 0.01


# ---------------------------------------------------------------- given masks and regions


@pytest.fixture
def blank() -> Slide:
    return slide_from_array(glass(400, 600), MPP)


def square(x0: float, y0: float, x1: float, y1: float) -> dict[str, object]:
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "I;16", "P"])
def test_mask_image_is_scaled_to_the_slide(tmp_path: Path, blank: Slide, mode: str) -> None:
    cells = np.zeros((20, 30), np.uint8)
    cells[5:10, 15:30] = 1
    image = Image.fromarray(cells.astype(np.uint16)) if mode == "I;16" else Image.fromarray(cells * 255).convert(mode)
    image.save(tmp_path / "mask.png")
    tissue = find_tissue(blank, TissueConfig(mask=tmp_path / "mask.png"))
    assert [p.bounds for p in tissue.polygons()] == [(300, 100, 600, 200)]
    assert tissue.hit((290, 90, 301, 101)) and not tissue.hit((290, 90, 300, 100)) and not tissue.hit((0, 0, 0, 0))


def test_mask_of_another_slide_is_refused(tmp_path: Path, blank: Slide) -> None:
    Image.fromarray(np.ones((30, 20), np.uint8)).save(tmp_path / "turned.png")
    (tmp_path / "no.png").write_text("no image")
    for name in ("turned.png", "no.png"):
        with pytest.raises(UsageError, match=f"--tissue-mask .*{name}"):
            find_tissue(blank, TissueConfig(mask=tmp_path / name))


def test_no_tissue_searches_everything(blank: Slide) -> None:
    tissue = find_tissue(blank, TissueConfig(enabled=False))
    grid = tile_grid(Plane.of(blank.info, MPP), 128, 32)
    assert select_tiles(grid, tissue) == list(grid.tiles())
    assert [p.bounds for p in tissue.polygons()] == [(0, 0, 600, 400)]


@pytest.mark.parametrize("form", ["geometry", "feature", "collection", "list", "gz", "multi"])
def test_roi_limits_the_search(tmp_path: Path, blank: Slide, form: str) -> None:
    feature = {"type": "Feature", "properties": {}, "geometry": square(100, 50, 200, 150)}
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [5, 5]}}
    content = {
        "geometry": feature["geometry"],
        "feature": feature,
        "collection": {"type": "FeatureCollection", "features": [point, feature]},
        "list": [feature, point],
        "gz": feature,
        "multi": {"type": "MultiPolygon", "coordinates": [square(100, 50, 200, 150)["coordinates"]]},
    }[form]
    path = tmp_path / "roi.geojson"
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if form == "gz" else text)
    tissue = find_tissue(blank, TissueConfig(enabled=False, roi=path))
    assert [p.bounds for p in tissue.polygons()] == [(100, 50, 200, 150)]
    assert tissue.hit((190, 140, 300, 300)) and not tissue.hit((210, 160, 300, 300))
    xy = np.array([[150.0, 100.0], [250.0, 100.0], [-5.0, 3.0]])
    assert tissue.contains(xy).tolist() == [True, False, False]


@pytest.mark.parametrize("text", ["no json", "{}", "[]", '{"type": "Point", "coordinates": [1, 2]}', "3", "null"])
def test_useless_roi_is_refused(tmp_path: Path, blank: Slide, text: str) -> None:
    (tmp_path / "roi.geojson").write_text(text)
    with pytest.raises(UsageError, match="--roi .*roi.geojson"):
        find_tissue(blank, TissueConfig(roi=tmp_path / "roi.geojson"))


def test_what_is_written_reads_back_as_a_roi_in_both_frames(tmp_path: Path, blank: Slide) -> None:
    blank.info = replace(blank.info, bounds=(40, 30, 500, 300))
    (tmp_path / "in.geojson").write_text(json.dumps(square(100, 50, 200, 150)))
    for origin, corner in (("level0", (100, 50)), ("bounds", (60, 20))):
        config = TissueConfig(enabled=False, roi=tmp_path / "in.geojson", roi_origin="level0")
        write_tissue(find_tissue(blank, config), tmp_path / "out.geojson", blank.info, origin)
        written = shape(json.loads((tmp_path / "out.geojson").read_text())["features"][0]["geometry"])
        assert written.bounds[:2] == corner
        again = find_tissue(blank, TissueConfig(enabled=False, roi=tmp_path / "out.geojson", roi_origin=origin))
        assert [p.bounds for p in again.polygons()] == [(100, 50, 200, 150)]


def test_written_file_is_what_qupath_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    mask = cv2.GaussianBlur(rng.standard_normal((90, 130)), (0, 0), 3) > 0.02
    info = slide_from_array(glass(700, 1000), MPP).info
    tissue = TissueMask(mask, 1000 / 130, 700 / 90, 1000, 700)
    write_tissue(tissue, tmp_path / "sub" / "tissue.geojson", info)
    content = json.loads((tmp_path / "sub" / "tissue.geojson").read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) > 3
    assert len({uuid.UUID(f["id"]) for f in content["features"]}) == len(content["features"])
    for feature in content["features"]:
        _check_feature(feature, info)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["tissue.geojson"]


def _check_feature(feature: dict, info: SlideInfo) -> None:
    assert feature["properties"]["objectType"] == "annotation"
    assert len(feature["properties"]["classification"]["color"]) == 3
    for ring in feature["geometry"]["coordinates"]:
        assert ring[0] == ring[-1] and len(ring) >= 4
        assert all(round(v, 2) == v for point in ring for v in point)
    polygon = shape(feature["geometry"])
    assert polygon.is_valid and not shapely.set_precision(polygon, 0.01).is_empty
    assert shapely.box(0, 0, info.width_px, info.height_px).covers(polygon)


def test_outlines_follow_the_mask() -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[5:30, 10:50], mask[12:20, 20:35], mask[35, 55] = True, False, True
    tissue = TissueMask(mask, 10, 8, 600, 320)
    assert [p.area for p in tissue.polygons()] == pytest.approx([880 * 80, 80], rel=0.03)
    assert [p.bounds for p in tissue.polygons()] == [(100, 40, 500, 240), (550, 280, 560, 288)]
    assert [len(p.interiors) for p in tissue.polygons()] == [1, 0]
