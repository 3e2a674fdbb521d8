"""Nuclei of other tools in the forms that spreadsheets, projects and other habits give them: right, or refused."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cellslide.errors import UsageError
from cellslide.formats.importers import ForeignNuclei, Source, import_nuclei, read_nuclei
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.types import Float64, SlideInfo, UInt8

MPP = 0.25
PLACES = [(100.25, 400.5), (300.0, 80.0), (1700.5, 1090.25), (150.0, 1500.0), (12.125, 1200.75)]


@functools.cache
def painted() -> tuple[UInt8, Float64]:
    """Return a field of violet nuclei on pink, uint8 (1600, 2000, 3), and their places (N, 2)."""
    rng = np.random.default_rng(11)
    image = np.full((1600, 2000, 3), (226, 168, 200), np.uint8)
    tried = rng.uniform((20, 20), (1980, 1580), (6000, 2)).round(3)
    kept = [tried[0]]
    for place in tried[1:]:
        if (np.hypot(*(np.array(kept) - place).T) > 44).all():
            kept.append(place)
    places = np.array(kept)
    for px, py in places:
        cv2.circle(image, (round(px), round(py)), 12, (96, 62, 142), -1)
    return image, places


@pytest.fixture
def slide() -> Slide:
    return slide_from_array(painted()[0], MPP, "slide")


def info(slide: Slide, name: str = "slide.svs") -> SlideInfo:
    return replace(slide.info, path=Path("/data") / name, slide_id=name.split(".")[0])


def read(tmp_path: Path, text: str, info: SlideInfo, name: str = "cells.csv", **source: Any) -> ForeignNuclei:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_nuclei(tmp_path / name, info, source=Source(**source))


def places_of(nuclei: ForeignNuclei) -> set[tuple[float, float]]:
    return {(round(x, 3), round(y, 3)) for x, y in nuclei.cells.centroid_xy.tolist()}


def german(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".").replace(".", ",")


WRITTEN = {
    "a point": (",", str, PLACES),
    "decimal commas": (";", german, PLACES),
    "decimal commas, tabs": ("\t", german, PLACES),
    "three decimals": (";", lambda v: f"{v:.3f}".replace(".", ","), PLACES),
    "points for thousands": (";", lambda v: f"{v:,.2f}".translate(str.maketrans(",.", ".,")), PLACES[:3]),
    "commas for thousands": ("\t", lambda v: f"{v:,.2f}", PLACES[:3]),
    "spaces for thousands": (";", lambda v: f"{v:,.2f}".replace(",", "\u202f").replace(".", ","), PLACES[:3]),
    "apostrophes for thousands": (",", lambda v: f"{v:,.2f}".replace(",", "'"), PLACES[:3]),
    "powers": (",", lambda v: f"{v:.6e}", PLACES),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_numbers_of_every_country(tmp_path: Path, slide: Slide, way: str) -> None:
    separator, write, places = WRITTEN[way]
    rows = [separator.join(("id", "x", "y"))]
    rows += [separator.join((str(k), write(x), write(y))) for k, (x, y) in enumerate(places)]
    assert places_of(read(tmp_path, "\n".join(rows), slide.info)) == {(round(x, 3), round(y, 3)) for x, y in places}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x\ty\n123,456\t200,125\n", "'123,456' may be two numbers"),
        ('x,y\n"1,234","200"\n', "may be two numbers"),
        ("x;y\n12,5;3.25\n", "in two ways, '12,5' and '3.25'"),
        ("x;y\n1.234;200\n1.500;300\n", "'1.234' may be two numbers"),
        ("x\ty\n1,234,567\t2000,5\n", "in two ways"),
    ],
)
def test_doubtful_numbers_are_refused(tmp_path: Path, slide: Slide, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read(tmp_path, text, slide.info)


def project(*names: str, column: str = "Image") -> str:
    rows = [f"{column}\tObject ID\tCentroid X px\tCentroid Y px"]
    return "\n".join([*rows, *(f"{name}\t{k}\t{100 + k}\t{50 + k}" for k, name in enumerate(names))])


@pytest.mark.parametrize(
    ("mine", "column"),
    [
        ("slide.svs", "Image"),
        ("slide", "slide_id"),
        ("slide.svs - Series 1", "Image"),
        ("D:\\x\\slide.svs", "filename"),
    ],
)
def test_rows_of_other_images_are_left_out(tmp_path: Path, slide: Slide, mine: str, column: str) -> None:
    text = project(mine, "other.svs", mine, "third.svs", column=column)
    report = read(tmp_path, text, info(slide), "cells.tsv").report
    assert (report.read, report.kept, report.other_image) == (4, 2, 2)
    assert "2 of other images" in report.in_words()


@pytest.mark.parametrize("names", [("a.svs", "b.svs"), ("x/slide.svs", "y/slide.svs"), ("a.svs", "")])
def test_images_that_do_not_say_which_are_refused(tmp_path: Path, slide: Slide, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="several images by its column Image"):
        read(tmp_path, project(*names), info(slide), "cells.tsv")


def test_one_image_of_another_name_is_said(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read(tmp_path, project("other.svs", "other.svs"), info(slide), "cells.tsv")) == 2
    assert "its Image is other.svs, the slide is slide.svs" in caplog.text


@pytest.mark.parametrize(
    "header", ["x_min,y_min,x_max,y_max", "xmin,ymin,xmax,ymax", "left,top,right,bottom", "x1,y1,x2,y2"]
)
def test_boxes_by_their_corners(tmp_path: Path, slide: Slide, header: str) -> None:
    assert places_of(read(tmp_path, f"{header}\n100,200,110,230\n", slide.info)) == {(105, 215)}


def test_boxes_by_a_size_are_refused(tmp_path: Path, slide: Slide) -> None:
    with pytest.raises(UsageError, match="a corner or the middle"):
        read(tmp_path, "x,y,width,height\n100,200,10,30\n", slide.info)
    assert places_of(read(tmp_path, "cx,cy,w,h\n100,200,10,30\n", slide.info)) == {(100, 200)}


def feature(geometry: Any, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


SQUARE = [[100, 100], [120, 100], [120, 130], [100, 130], [100, 100]]


def test_closed_lines_are_outlines_and_open_ones_are_counted(tmp_path: Path, slide: Slide) -> None:
    features = [
        feature({"type": "LineString", "coordinates": SQUARE}),
        feature({"type": "MultiLineString", "coordinates": [[[x + 300, y] for x, y in SQUARE]]}),
        feature({"type": "LineString", "coordinates": SQUARE[:3]}),
    ]
    nuclei = read(tmp_path, json.dumps(features), slide.info, "cells.geojson")
    assert places_of(nuclei) == {(110, 115), (410, 115)} and nuclei.report.not_finite == 1


@pytest.mark.parametrize(
    "properties",
    [
        {"classification": {"name": "Tumor", "color": [1, 2, 3]}},
        {"classification": {"names": ["Tumor"]}},
        {"classification": "Tumor"},
        {"class": "Tumor"},
        {"class_name": "Tumor"},
        {"cell_type": "Tumor", "label": 17},
        {"predicted_class": "Tumor"},
        {"label": "Tumor"},
        {"category": "Tumor"},
        {"Classification": "Tumor"},
        {"type": "Tumor"},
    ],
)
def test_classes_by_every_key(tmp_path: Path, slide: Slide, properties: dict[str, Any]) -> None:
    content = [feature({"type": "Polygon", "coordinates": [SQUARE]}, objectType="detection", **properties)]
    nuclei = read(tmp_path, json.dumps(content), slide.info, "cells.geojson")
    assert nuclei.class_name is not None and nuclei.class_name.names == ("Tumor",)


def test_a_class_outside_the_properties(tmp_path: Path, slide: Slide) -> None:
    content = [feature({"type": "Polygon", "coordinates": [SQUARE]}) | {"classification": {"name": "Tumor"}}]
    nuclei = read(tmp_path, json.dumps(content), slide.info, "cells.geojson")
    assert nuclei.class_name is not None and nuclei.class_name.names == ("Tumor",)


@pytest.mark.parametrize("ending", ["csv", "geojson"])
def test_ids_taken_for_classes_are_refused(tmp_path: Path, slide: Slide, ending: str) -> None:
    n = range(2500)
    text = "x,y,class\n" + "".join(f"{k % 50},{k // 50},c{k}\n" for k in n)
    if ending == "geojson":
        text = json.dumps([feature({"type": "Point", "coordinates": [k % 50, k // 50]}, label=f"c{k}") for k in n])
    with pytest.raises(UsageError, match="more than 2,000 classes"):
        read(tmp_path, text, slide.info, f"cells.{ending}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cells.csv", "x,y\n12 px,13 px\nNA,NA\n"),
        ("cells.geojson", json.dumps([feature({"type": "LineString", "coordinates": SQUARE[:3]})])),
        ("cells.geojson", json.dumps([feature(None)])),
    ],
)
def test_nothing_of_use_is_refused(tmp_path: Path, slide: Slide, name: str, text: str) -> None:
    with pytest.raises(UsageError, match="0 of . nuclei taken"):
        read(tmp_path, text, slide.info, name)


def test_many_lost_are_warned_about(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    text = "x,y\n" + "".join(f"{10 + k},10\n" for k in range(20)) + "".join(f"{5000 + k},10\n" for k in range(10))
    assert len(read(tmp_path, text, slide.info)) == 20
    assert "10 outside the slide); check --cells-unit" in caplog.text


def test_micrometres_taken_for_pixels_are_said(tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"{x * MPP},{y * MPP}\n" for x, y in painted()[1])
    read(tmp_path, "x,y\n" + rows, slide.info)
    assert "are they in µm (--cells-unit um)" in caplog.text


def brought(tmp_path: Path, slide: Slide, xy: Float64, **source: Any) -> Any:
    rows = "".join(f"{x:.4f},{y:.4f}\n" for x, y in xy)
    (tmp_path / "cells.csv").write_text("x,y\n" + rows)
    return import_nuclei(tmp_path / "cells.csv", slide, tmp_path / "out", **source)


def test_nuclei_on_haematoxylin_are_taken_without_a_word(
    tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture
) -> None:
    places = painted()[1]
    assert brought(tmp_path, slide, places).kept == len(places)
    assert brought(tmp_path, slide, places * MPP, unit="um").kept == len(places)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("move", "words", "source"),
    [
        (lambda xy: xy * MPP, "in µm: give --cells-unit um", {}),
        (lambda xy: xy / 2, r"pixels of another size: give --cells-mpp 0\.5", {}),
        (lambda xy: xy / 4, "give --cells-unit um", {}),
        (lambda xy: xy[(xy * 4 < (1990, 1590)).all(axis=1)], "in pixels: give --cells-unit px", {"unit": "um"}),
        (lambda xy: np.stack([xy[:, 0], 1600 - xy[:, 1]], axis=1), "y counted from below", {}),
        (lambda xy: xy[xy[:, 0] < 1590][:, ::-1], "x and y exchanged", {}),
    ],
)
def test_the_flag_that_mends_is_named(tmp_path: Path, slide: Slide, move: Any, words: str, source: Any) -> None:
    xy = move(painted()[1])
    if "unit" in source:
        xy = xy[(xy / MPP < (2000, 1600)).all(axis=1)]
    with pytest.raises(UsageError, match=words):
        brought(tmp_path, slide, xy, **source)
    assert not (tmp_path / "out" / "cells.zarr").exists()


def test_places_of_another_slide_are_warned_about(
    tmp_path: Path, slide: Slide, caplog: pytest.LogCaptureFixture
) -> None:
    brought(tmp_path, slide, np.random.default_rng(3).uniform(20, 1500, (200, 2)))
    assert "no more haematoxylin than beside them; check --cells-unit" in caplog.text
