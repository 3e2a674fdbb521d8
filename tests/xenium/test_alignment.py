"""Alignments: matrices that turn and mirror, landmarks, regions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cellslide.errors import UsageError
from cellslide.types import Float64
from cellslide.xenium.alignment import find_alignment, read_alignment
from cellslide.xenium.painted import turned_matrix

SIZE = 0.2125


def write_matrix(path: Path, matrix: Float64) -> Path:
    np.savetxt(path, matrix, delimiter=",")
    return path


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turn", [0.0, 90.0, -137.0])
def test_there_and_back(tmp_path: Path, turn: float, mirrored: bool) -> None:
    matrix = turned_matrix((900, 500), 0.274, SIZE, turn, mirrored)
    found = read_alignment(write_matrix(tmp_path / "m.csv", matrix), SIZE)
    xy = np.array([[0.0, 0.0], [900.0, 0.0], [123.0, 456.0]])
    um = found.to_um(xy)
    assert (um > 0).all()
    np.testing.assert_allclose(found.to_slide(um), xy, atol=1e-9)
    np.testing.assert_allclose(np.hypot(*(um[1] - um[0])), 900 * 0.274)
    assert found.mpp == pytest.approx(0.274)
    assert found.is_mirrored == mirrored


def test_pixel_size_of_a_public_matrix(tmp_path: Path) -> None:
    """A breast sample that is turned by 90 degrees: the first column alone would give 1e-2 of it."""
    matrix = np.array([[0.00989, 1.28957, 0], [-1.28957, 0.00989, 0], [0, 0, 1]])
    found = read_alignment(write_matrix(tmp_path / "m.csv", matrix), SIZE)
    assert found.mpp == pytest.approx(0.2740, abs=1e-4)
    assert abs(found.turn_degrees) == pytest.approx(90, abs=1)


def landmarks(path: Path, slide: Float64, fixed: Float64) -> Path:
    rows = [",".join(map(str, [*f, *s])) for f, s in zip(fixed, slide, strict=True)]
    path.write_text("fixedX,fixedY,alignmentX,alignmentY\n" + "\n".join(rows) + "\n")
    return path


def test_landmarks_are_fitted_by_all_of_them(tmp_path: Path) -> None:
    matrix = turned_matrix((20_000, 30_000), 0.274, SIZE, 90)
    rng = np.random.default_rng(0)
    slide = rng.uniform(0, 20_000, (12, 2))
    exact = slide @ matrix[:2, :2].T + matrix[:2, 2]
    found = read_alignment(landmarks(tmp_path / "l.csv", slide, exact), SIZE)
    np.testing.assert_allclose(found.matrices[0], matrix, atol=1e-6)
    assert found.residual_um == pytest.approx(0, abs=1e-6)
    noisy = read_alignment(landmarks(tmp_path / "n.csv", slide, exact + rng.normal(0, 10, exact.shape)), SIZE)
    assert noisy.residual_um is not None
    assert 1.5 < noisy.residual_um < 4  # 10 px on each axis are 3 µm, of which the fit takes a part
    assert noisy.kind == "landmarks"


@pytest.mark.parametrize("slide", [np.zeros((2, 2)), np.arange(10.0).repeat(2).reshape(10, 2)])
def test_landmarks_that_decide_nothing_are_refused(tmp_path: Path, slide: Float64) -> None:
    with pytest.raises(UsageError, match=r"l\.csv.*3"):
        read_alignment(landmarks(tmp_path / "l.csv", slide, slide * 2), SIZE)


def feature(x0: float, x1: float, matrix: Float64) -> dict[str, object]:
    ring = [[x0, 0], [x1, 0], [x1, 100], [x0, 100], [x0, 0]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": shape, "properties": {"matrix": matrix.tolist()}}


def test_each_region_has_its_own_matrix(tmp_path: Path) -> None:
    left, right = np.diag([2.0, 2.0, 1.0]), np.diag([2.0, 2.0, 1.0])
    right[0, 2] = 60.0
    path = tmp_path / "regions.geojson"
    content = {"type": "FeatureCollection", "features": [feature(0, 100, left), feature(110, 200, right)]}
    path.write_text(json.dumps(content))
    found = read_alignment(path, 1.0)
    xy = np.array([[50.0, 50.0], [150.0, 50.0], [103.0, 50.0]])
    um = found.to_um(xy)
    np.testing.assert_allclose(um, [[100, 100], [360, 100], [206, 100]])
    placed = found.place(um)
    np.testing.assert_allclose(placed.xy_px, xy)
    assert placed.outside.tolist() == [False, False, True]


@pytest.mark.parametrize("text", ["", "{}", '{"features": []}', '{"features": [{"geometry": null, "properties": {}}]}'])
def test_regions_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "regions.geojson"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"regions\.geojson"):
        read_alignment(path, SIZE)


def test_the_alignment_beside_the_slide(tmp_path: Path) -> None:
    slide = tmp_path / "x_he_image.ome.tif"
    beside = write_matrix(tmp_path / "x_he_imagealignment.csv", np.eye(3))
    assert find_alignment(slide, None) == beside
    assert find_alignment(slide, Path("other.csv")) == Path("other.csv")
    with pytest.raises(UsageError, match="--alignment"):
        find_alignment(tmp_path / "y.ome.tif", None)
