"""What a user gives as mask or region: every mode of image and every form of GeoJSON means one thing, or is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cellslide.config import TissueConfig
from cellslide.errors import UsageError
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.slides.tissue import find_tissue

QUARTER = np.zeros((64, 64), np.uint8)
QUARTER[:32, :32] = 255
RNG = np.random.default_rng(5)


@pytest.fixture
def slide() -> Slide:
    return slide_from_array(np.full((512, 512, 3), 240, np.uint8), 0.5)


def share(slide: Slide, **config: Any) -> float:
    tissue = find_tissue(slide, TissueConfig(enabled="mask" in config, **config))
    assert tissue.searched_share() == pytest.approx(sum(p.area for p in tissue.polygons()) / 512**2, abs=0.01)
    return tissue.searched_share()


def palette(indices: Any, *colors: int, transparent: int | None = None) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([*colors] + [0] * (768 - len(colors)))
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def with_alpha(color: Any, alpha: Any) -> Image.Image:
    return Image.fromarray(np.dstack([color, color, color, alpha]).astype(np.uint8), mode="RGBA")


def floats(outside: float) -> Image.Image:
    return Image.fromarray(np.where(QUARTER > 0, 1.0, outside).astype(np.float32))


FULL, NONE = np.full_like(QUARTER, 255), np.zeros_like(QUARTER)
NOISY = np.clip(QUARTER.astype(int) + RNG.integers(-9, 10, QUARTER.shape), 0, 255).astype(np.uint8)
MASKS: dict[str, tuple[Image.Image, str]] = {
    "bits": (Image.fromarray(QUARTER > 0), "png"),
    "grey": (Image.fromarray(QUARTER), "png"),
    "0 and 1": (Image.fromarray(QUARTER // 255), "png"),
    "16 bits": (Image.fromarray((QUARTER // 255).astype(np.uint16)), "png"),
    "32 bits, -1": (Image.fromarray(np.where(QUARTER > 0, 1, -1).astype(np.int32)), "tif"),
    "floats": (floats(0.0), "tif"),
    "floats, NaN": (floats(float("nan")), "tif"),
    "floats, -1": (floats(-1.0), "tif"),
    "probabilities": (
        Image.fromarray((np.where(QUARTER > 0, 0.9, 0.1) + RNG.uniform(-0.1, 0.1, QUARTER.shape)).astype(np.float32)),
        "tif",
    ),
    "LA": (Image.fromarray(QUARTER).convert("LA"), "png"),
    "RGB": (Image.fromarray(QUARTER).convert("RGB"), "png"),
    "dark red": (Image.fromarray(np.dstack([QUARTER // 5, NONE, NONE])), "png"),
    "white where opaque": (with_alpha(FULL, QUARTER), "png"),
    "white on opaque black": (with_alpha(QUARTER, FULL), "png"),
    "an overlay of 40 %": (with_alpha(QUARTER, FULL // 5 * 2), "png"),
    "palette, white first": (palette(QUARTER == 0, 255, 255, 255, 0, 0, 0), "png"),
    "palette, colours": (palette(QUARTER > 0, 0, 0, 0, 200, 30, 30), "png"),
    "palette, see-through": (palette(QUARTER > 0, 255, 255, 255, 200, 30, 30, transparent=0), "png"),
    "JPEG": (Image.fromarray(QUARTER), "jpg"),
    "JPEG, colours": (Image.fromarray(QUARTER).convert("RGB"), "jpg"),
    "JPEG saved as PNG": (Image.fromarray(NOISY), "png"),
    "JPEG saved as PNG, colours": (
        Image.fromarray(np.clip(NOISY[..., None] + RNG.integers(0, 5, (64, 64, 3)), 0, 255).astype(np.uint8)),
        "png",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_mode(tmp_path: Path, slide: Slide, name: str, caplog: pytest.LogCaptureFixture) -> None:
    image, ending = MASKS[name]
    path = tmp_path / f"mask.{ending}"
    image.save(path, **({"transparency": 0} if "transparency" in image.info else {}))
    with caplog.at_level(logging.INFO, logger="cellslide"):
        assert share(slide, mask=path) == pytest.approx(0.25, abs=0.012)
    assert f"--tissue-mask {path}: 2" in caplog.text and "% of the slide is searched" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (with_alpha(NONE, QUARTER), "only its transparency"),
        (with_alpha(QUARTER, NONE), "transparent everywhere"),
        (palette(QUARTER > 0, 7, 7, 7, 7, 7, 7), "all values one colour"),
    ],
)
def test_masks_that_do_not_say_are_refused(tmp_path: Path, slide: Slide, image: Image.Image, words: str) -> None:
    image.save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match=words):
        share(slide, mask=tmp_path / "mask.png")


def test_a_lossy_mask_of_ones_and_a_turned_one_are_refused(tmp_path: Path, slide: Slide) -> None:
    Image.fromarray(QUARTER // 255).save(tmp_path / "ones.jpg")
    with pytest.raises(UsageError, match="lossy format"):
        share(slide, mask=tmp_path / "ones.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(QUARTER).save(tmp_path / "turned.png", exif=exif)
    with pytest.raises(UsageError, match="Orientation"):
        share(slide, mask=tmp_path / "turned.png")
    Image.fromarray(QUARTER[::4, ::4]).save(
        tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(QUARTER)]
    )
    with pytest.raises(UsageError, match="page 1 is larger"):
        share(slide, mask=tmp_path / "pages.tif")


@pytest.mark.parametrize(("value", "words"), [(0, "0.0 % of the slide"), (255, "100.0 % of the slide")])
def test_nothing_and_everything_are_warned_about(
    tmp_path: Path, slide: Slide, value: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(np.full_like(QUARTER, value)).save(tmp_path / "mask.png")
    find_tissue(slide, TissueConfig(mask=tmp_path / "mask.png"))
    assert any(words in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def test_several_values_are_said(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    values = QUARTER // 255
    values[:8, :8] = 7
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert share(slide, mask=tmp_path / "mask.png") == 0.25
    assert "has the values 1, 7" in caplog.text


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def polygon(*rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [*rings]}


def feature(geometry: Any, kind: Any = None, **more: Any) -> dict[str, Any]:
    properties = {"objectType": "annotation"} | ({} if kind is None else {"classification": kind})
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


WHOLE, HALF = box(0, 0, 512, 512), box(0, 0, 512, 256)
REGIONS: dict[str, Any] = {
    "a hole that shares its rim": polygon(WHOLE, HALF),
    "the same in a MultiPolygon": {"type": "MultiPolygon", "coordinates": [[WHOLE, HALF]]},
    "a hole twice": polygon(WHOLE, HALF, HALF),
    "a hole that leaves the outline": polygon(WHOLE, box(-50, -50, 600, 256)),
    "Ignore*": [feature(polygon(WHOLE), {"name": "Tumor"}), feature(polygon(HALF), {"name": "Ignore*"})],
    "Ignore* first, by names": [feature(polygon(HALF), {"names": ["Ignore*"]}), feature(polygon(WHOLE))],
    "a class as text": [feature(polygon(HALF), "ignore"), feature(polygon(WHOLE))],
    "a derived class": [feature(polygon(HALF), {"name": "Tumor: Ignore*"}), feature(polygon(WHOLE), {"name": "Tumor"})],
    "Region*": [feature(polygon(HALF), {"name": "Region*"})],
    "collections in collections": {
        "type": "FeatureCollection",
        "features": [
            {"type": "FeatureCollection", "features": [feature({
                "type": "GeometryCollection",
                "geometries": [{"type": "GeometryCollection", "geometries": [polygon(HALF)]}],
            })]}
        ],
    },
    "three numbers a vertex": polygon([[x, y, 0] for x, y in HALF]),
    "detections beside an annotation": [
        feature(polygon(HALF)),
        {"type": "Feature", "geometry": polygon(box(0, 400, 512, 512)), "properties": {"objectType": "detection"}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", REGIONS)
def test_regions_of_every_form(tmp_path: Path, slide: Slide, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "roi.geojson").write_text(json.dumps(REGIONS[name]))
    with caplog.at_level(logging.INFO, logger="cellslide"):
        assert share(slide, roi=tmp_path / "roi.geojson") == pytest.approx(0.5)
    assert "50.0 % of the slide is searched" in caplog.text


def test_regions_beside_the_slide_name_the_flag(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(polygon(box(600, 0, 900, 300))))
    with pytest.raises(UsageError, match="lies beside the slide: x 600 to 900, .*check --geojson-origin"):
        share(slide, roi=path)
    slide.info = replace(slide.info, bounds=(300, 0, 200, 500))
    path.write_text(json.dumps(polygon(box(300, 0, 400, 300))))
    with pytest.raises(UsageError, match="check --geojson-origin level0"):
        find_tissue(slide, TissueConfig(enabled=False, roi=path))
    path.write_text(json.dumps(polygon(box(100, 0, 300, 300))))
    find_tissue(slide, TissueConfig(enabled=False, roi=path))
    assert "44 % of it lies beside the slide" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([feature(polygon(WHOLE), {"name": "Ignore*"})], "only regions to ignore"),
        (feature({"type": "LineString", "coordinates": WHOLE}), "no polygon"),
        (polygon([[0, 0], [float("nan"), 1], [5, 5]]), "no numbers"),
        (polygon([["a", 0], ["b", 1], [5, 5]]), "not GeoJSON"),
        ({"type": "Circle", "coordinates": [1, 2]}, "type 'Circle'"),
        ([[[[1]]]], "not GeoJSON"),
    ],
)
def test_regions_of_no_use_are_refused(tmp_path: Path, slide: Slide, content: Any, words: str) -> None:
    (tmp_path / "roi.geojson").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"--roi .*{words}"):
        share(slide, roi=tmp_path / "roi.geojson")


def test_lines_beside_polygons_are_said(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    line = feature({"type": "LineString", "coordinates": [[1, 1], [5, 5]]})
    (tmp_path / "roi.geojson").write_text(json.dumps([line, line, feature(polygon(HALF))]))
    assert share(slide, roi=tmp_path / "roi.geojson") == pytest.approx(0.5)
    assert "left out: 2 LineString" in caplog.text
