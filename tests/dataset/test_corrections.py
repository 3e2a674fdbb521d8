"""Corrections of a painted slide: what was changed comes out as images, masks and points, and nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

import cellslide
from cellslide.api import make_dataset, suggest_corrections
from cellslide.cli.main import cli
from cellslide.dataset.cut import tiles_in
from cellslide.errors import UsageError
from cellslide.evaluate.dataset import read_dataset
from cellslide.store.anndata_columns import Columns
from cellslide.store.atomic import write_json
from cellslide.store.cell_table import TableExtender
from cellslide.types import Float64

SIZE_PX, MPP = 400, 0.5
CENTRES: Float64 = np.array([[60, 60], [120, 60], [60, 120], [150, 150], [300, 300], [320, 80]], np.float64)


def _square(xy: Any, half: float) -> list[list[list[float]]]:
    x, y = (float(v) for v in xy)
    return [
        [[x - half, y - half], [x + half, y - half], [x + half, y + half], [x - half, y + half], [x - half, y - half]]
    ]


def _feature(ring: Any, kind: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind, **({"classification": {"name": name}} if name else {})}
    correction = more.pop("correction", None)
    if correction:
        properties["correction"] = correction
    shape = (
        {"type": "Point", "coordinates": ring}
        if isinstance(ring[0], float)
        else {"type": "Polygon", "coordinates": ring}
    )
    return {"type": "Feature", "geometry": shape, "properties": properties, **more}


def _write(path: Path, features: list[dict[str, Any]]) -> Path:
    write_json(path, {"type": "FeatureCollection", "features": features})
    return path


REGION = _feature(_square((100, 100), 100), "annotation", "checked")


def _results(slide: Path) -> Path:
    """Write a slide with six square nuclei of two kinds, and their results, imported from another tool."""
    image = np.full((SIZE_PX, SIZE_PX, 3), 230, np.uint8)
    for x, y in CENTRES.astype(int):
        image[y - 6 : y + 6, x - 6 : x + 6] = (90, 60, 140)
    if slide.suffix == ".tif":
        tifffile.imwrite(slide, image, tile=(128, 128), photometric="rgb")
    else:
        Image.fromarray(image).save(slide)
    nuclei = _write(
        slide.parent / "nuclei.geojson",
        [_feature(_square(c, 6), "detection", "ab"[k % 2]) for k, c in enumerate(CENTRES)],
    )
    cellslide.import_cells(nuclei, slide, slide.parent / "out", mpp=MPP).close()
    return slide.parent / "out" / "s"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The results of a picture."""
    return _results(tmp_path / "s.png")


def _uuids(folder: Path) -> list[str]:
    with cellslide.read_cells(folder) as table:
        found = [
            (tuple(xy), str(u)) for c in table.iter_chunks() for xy, u in zip(c.cells.centroid_xy, c.uuid, strict=True)
        ]
    return [next(u for xy, u in found if np.allclose(xy, centre, atol=1)) for centre in CENTRES]


def _points(path: Path) -> list[tuple[float, float, str]]:
    with path.open() as file:
        return [(float(r["x"]), float(r["y"]), r["class"]) for r in csv.DictReader(file)]


def test_all_nuclei_of_a_file(folder: Path, tmp_path: Path) -> None:
    marked = [_feature(_square(CENTRES[k], 6), "detection", "c") for k in (0, 3, 4)]
    file = _write(tmp_path / "c.geojson", [REGION, *marked])
    [cut] = make_dataset({folder: file}, tmp_path / "set", mpp=MPP)
    assert (len(cut.rows), cut.nuclei, cut.without_outline, cut.left_out_share) == (1, 2, 0, 0)
    [sample] = read_dataset(tmp_path / "set", "train").samples
    assert (sample.width, sample.height, sample.mpp, sample.patient) == (200, 200, MPP, "s")
    mask = sample.load_mask()
    assert sorted(np.bincount(mask.ravel())[1:]) == [144, 144]
    assert mask[54:66, 54:66].all() and mask[144:156, 144:156].all()
    assert (sample.load_image()[60, 60] == (90, 60, 140)).all()
    assert _points(tmp_path / "set/points/s-0000.csv") == [(60, 60, "c"), (150, 150, "c")]


def test_changes_to_a_table(folder: Path, tmp_path: Path) -> None:
    ids = _uuids(folder)
    file = _write(tmp_path / "c.geojson", [
        REGION,
        _feature([60.0, 60.0], "detection", correction="deleted", id=ids[0]),
        _feature([130.0, 64.0], "detection", correction="moved", id=ids[1]),
        _feature([60.0, 120.0], "detection", "new", correction="retyped", id=ids[2]),
        _feature(_square((20, 180), 5), "detection", "extra", correction="added"),
    ])  # fmt: skip
    [cut] = make_dataset({folder: file}, tmp_path / "set", mpp=MPP)
    found = sorted(_points(tmp_path / "set/points/s-0000.csv"))
    assert found == [(20, 180, "extra"), (60, 120, "new"), (130, 64, ""), (150, 150, "")]
    mask = read_dataset(tmp_path / "set").samples[0].load_mask()
    assert not mask[54:66, 54:66].any()
    assert mask[58:70, 124:136].all(), "an outline goes where its nucleus is moved"
    assert cut.nuclei == 4


def test_a_slide_is_open_while_it_is_cut(tmp_path: Path) -> None:
    """Read as tiles, which a picture is not."""
    place = _results(tmp_path / "s.tif")
    [cut] = make_dataset({place: _write(tmp_path / "c.geojson", [REGION])}, tmp_path / "set", mpp=MPP)
    [sample] = read_dataset(tmp_path / "set").samples
    assert cut.nuclei == 4 and (sample.load_image()[60, 60] == (90, 60, 140)).all()


@pytest.mark.parametrize("as_changes", [True, False])
def test_nuclei_that_an_edge_cuts_are_no_background(folder: Path, tmp_path: Path, as_changes: bool) -> None:
    region = _feature(
        [[[63.0, 20.0], [200.0, 20.0], [200.0, 200.0], [63.0, 200.0], [63.0, 20.0]]], "annotation", "checked"
    )
    marked = [] if as_changes else [_feature(_square(c, 6), "detection") for c in CENTRES]
    [cut] = make_dataset({folder: _write(tmp_path / "c.geojson", [region, *marked])}, tmp_path / "set", mpp=MPP)
    mask = read_dataset(tmp_path / "set").samples[0].load_mask()
    assert [int((mask[:, x] > 0).sum()) for x in (0, 2, 3)] == [24, 24, 0], "3 px of two nuclei, 12 px high"
    assert cut.nuclei == 2, "their centroids lie beside the region"


def test_corrections_in_no_checked_region_are_counted(folder: Path, tmp_path: Path) -> None:
    ids = _uuids(folder)
    file = _write(tmp_path / "c.geojson", [
        REGION,
        _feature([320.0, 80.0], "detection", correction="deleted", id=ids[5]),
        _feature([350.0, 350.0], "detection", correction="added"),
        _feature([100.0, 100.0], "detection", correction="moved", id=ids[4]),
    ])  # fmt: skip
    args = ["dataset", str(folder), "--corrections", str(file), "-o", str(tmp_path / "set"), "--mpp", str(MPP)]
    found = CliRunner().invoke(cli, args)
    assert found.exit_code == 0 and "5 nuclei; 2 corrections lie in no checked region" in found.output


def test_a_slide_that_is_gone_is_a_wrong_request(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "s.png").unlink()
    with pytest.raises(UsageError, match=r"s\.png is not there any more; put it back"):
        make_dataset({folder: _write(tmp_path / "c.geojson", [REGION])}, tmp_path / "set")


def test_regions_may_touch(folder: Path, tmp_path: Path) -> None:
    beside = _feature(_square((300, 100), 100), "annotation", "checked")
    [cut] = make_dataset({folder: _write(tmp_path / "c.geojson", [REGION, beside])}, tmp_path / "set", mpp=MPP)
    assert cut.nuclei == 5


def test_two_changes_to_one_nucleus_are_refused(folder: Path, tmp_path: Path) -> None:
    one = _uuids(folder)[0]
    twice = [_feature([60.0, 60.0], "detection", correction=what, id=one) for what in ("deleted", "retyped")]
    with pytest.raises(UsageError, match=f"{one} is changed twice"):
        make_dataset({folder: _write(tmp_path / "c.geojson", [REGION, *twice])}, tmp_path / "set", mpp=MPP)


def test_an_image_without_all_outlines_has_no_mask(folder: Path, tmp_path: Path) -> None:
    region = _feature(_square((150, 150), 150), "annotation", "Checked")
    marks = [region, _feature([20.0, 20.0], "detection", "a", correction="added")]
    [cut] = make_dataset({folder: _write(tmp_path / "c.geojson", marks)}, tmp_path / "set", mpp=MPP, tile_px=150)
    assert len(cut.rows) == 4
    masks = [row["mask"] for row in cut.rows]
    assert masks[0] == "" and all(masks[1:])
    assert cut.without_outline == 1


def test_the_pixel_size_is_that_asked(folder: Path, tmp_path: Path) -> None:
    file = _write(tmp_path / "c.geojson", [REGION, _feature(_square(CENTRES[0], 6), "detection")])
    make_dataset({folder: file}, tmp_path / "set", mpp=1.0)
    [sample] = read_dataset(tmp_path / "set").samples
    assert sample.load_mask().shape == (100, 100)
    assert (sample.load_mask() > 0).sum() == 36
    assert _points(tmp_path / "set/points/s-0000.csv") == [(30, 30, "")]


def test_regions_that_are_no_rectangle_give_squares_inside() -> None:
    import shapely

    circle = shapely.Point(300, 300).buffer(300)
    boxes = list(tiles_in(circle, 256))
    shapes = [shapely.box(*box) for box in boxes]
    assert all(circle.covers(shape) for shape in shapes)
    assert shapely.union_all(shapes).area == pytest.approx(sum(s.area for s in shapes))
    assert sum(s.area for s in shapes) > 0.7 * circle.area


@pytest.mark.parametrize(
    ("features", "word"),
    [
        ([_feature(_square((60, 60), 6), "detection")], "no annotation of the class 'checked'"),
        ([_feature(_square((900, 900), 50), "annotation", "checked")], "x 850 to 950, y 850 to 950 px"),
        ([REGION, _feature(_square((900, 900), 50), "annotation", "checked")], "beside the slide"),
        ([REGION, _feature(_square((150, 150), 100), "annotation", "checked")], "overlap at x 50 to 200"),
        ([_feature(_square((60, 60), 10), "annotation", "checked")], "draw larger ones"),
        ([REGION, _feature([60.0, 60.0], "detection", correction="deleted", id="nobody")], "nobody"),
        ([REGION, _feature([60.0, 60.0], "detection", correction="eaten", id="x")], "eaten"),
        ([REGION, _feature([60.0, 60.0], "detection", correction="moved")], "has no id"),
        ([REGION, _feature([6.0, 6.0], "detection", correction="added"), _feature([9.0, 9.0], "cell")], "changes"),
    ],
)  # fmt: skip
def test_corrections_that_cannot_be(folder: Path, tmp_path: Path, features: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make_dataset({folder: _write(tmp_path / "c.geojson", features)}, tmp_path / "set", mpp=MPP)
    assert not (tmp_path / "set").exists()


def test_slides_are_in_one_split_each(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fix").mkdir()
    _write(tmp_path / "fix" / "s.geojson", [REGION])
    run: Callable[..., Any] = lambda *args: CliRunner().invoke(cli, ["dataset", *map(str, args)])  # noqa: E731
    found = run(folder.parent, "--corrections", tmp_path / "fix", "-o", tmp_path / "set", "--mpp", MPP)
    assert found.exit_code == 0, found.output
    assert "1 images, 4 nuclei" in found.output
    again = run(folder.parent, "--corrections", tmp_path / "fix", "-o", tmp_path / "set")
    assert again.exit_code == 2 and "is there already" in again.output
    val = run(folder.parent, "--corrections", tmp_path / "fix", "-o", tmp_path / "set2", "--val", 1)
    assert val.exit_code == 2 and "--val 1" in val.output
    _write(tmp_path / "fix" / "other.geojson", [REGION])
    lost = run(folder.parent, "--corrections", tmp_path / "fix", "-o", tmp_path / "set3")
    assert lost.exit_code == 2 and "no slide other" in lost.output
    assert run(folder.parent, "-o", tmp_path / "set4").exit_code == 2


def test_suggestions_are_doubtful_and_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classify"):
        suggest_corrections(folder, tmp_path / "s.geojson", 3)
    prob = dict(zip(_uuids(folder), (0.9, 0.5, 0.6, 0.7, 0.99, 0.4), strict=True))
    with cellslide.read_cells(folder) as table:
        extender = TableExtender(table)
        column = [prob[str(u)] for u in table.vector("uuid")]
        extender.append(Columns({"class_prob": np.array(column, np.float32)}))
        extender.close(table.run)
    found = suggest_corrections(folder, tmp_path / "s.geojson", 3)
    assert [one.xy for one in found] == [(320, 80), (120, 60), (300, 300)], "squares of 64 µm beside those are left out"
    written = json.loads((tmp_path / "s.geojson").read_text())["features"]
    assert [f["properties"]["name"] for f in written] == ["1: best class 40%", "2: best class 50%", "3: best class 99%"]
    assert written[1]["geometry"]["coordinates"][0][0] == [56, 0]
