"""Where a Xenium experiment lies on its H&E slide: between level-0 pixels of the slide and µm of the experiment.

A matrix of Xenium Explorer goes from H&E pixels to pixels of the morphology image; µm = those x `pixel_size`.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import shapely

from cellslide.errors import UsageError, short
from cellslide.formats.importers import load_alignment
from cellslide.store.foreign_files import read_json
from cellslide.types import Bool, Float64

LANDMARK_COLUMNS = ("fixedX", "fixedY", "alignmentX", "alignmentY")
MOST_REGIONS = 1000
AlignmentKind = Literal["matrix", "landmarks", "regions"]


class Placed(NamedTuple):
    """Level-0 places (N, 2), and which of them lie outside all regions, bool (N,), placed by the nearest."""

    xy_px: Float64
    outside: Bool


@dataclass(frozen=True, slots=True)
class Alignment:
    """An affine map, or one for each region of the slide.

    matrices     float64 (R, 3, 3), level-0 pixels of the slide to pixels of the morphology image.
    pixel_size   µm per pixel of the morphology image.
    regions      polygons in level-0 pixels, one for each matrix; () is one matrix for the whole slide.
    residual_um  root mean square distance of the landmarks after the fit, None for a matrix that is given.
    """

    matrices: Float64
    pixel_size: float
    kind: AlignmentKind = "matrix"
    regions: tuple[shapely.Polygon, ...] = ()
    residual_um: float | None = None

    @property
    def mpp(self) -> float:
        """Pixel size of the slide in µm: `pixel_size` x sqrt|det|, the first region's where there are several."""
        return self.pixel_size * float(np.sqrt(abs(np.linalg.det(self.matrices[0, :2, :2]))))

    @property
    def is_mirrored(self) -> bool:
        """True where the slide shows the tissue from its other side."""
        return bool(np.linalg.det(self.matrices[0, :2, :2]) < 0)

    @property
    def turn_degrees(self) -> float:
        """Angle of the slide's x axis in the experiment, -180 to 180."""
        return float(np.degrees(np.arctan2(self.matrices[0, 1, 0], self.matrices[0, 0, 0])))

    def to_um(self, xy_px: Float64) -> Float64:
        """Return the places in µm of level-0 places, (N, 2) each; outside all regions by the nearest."""
        every = np.stack([_apply(matrix, xy_px) for matrix in self.matrices]) * self.pixel_size
        same = np.broadcast_to(np.asarray(xy_px, np.float64), every.shape)
        return np.asarray(self._choose(same, every)[0], np.float64)

    def place(self, xy_um: Float64) -> Placed:
        """Return the level-0 places of places in µm: by the first region that holds its answer, else the nearest."""
        at = np.asarray(xy_um, np.float64) / self.pixel_size
        every = np.stack([_apply(np.linalg.inv(matrix), at) for matrix in self.matrices])
        return self._choose(every, every)

    def to_slide(self, xy_um: Float64) -> Float64:
        """Return the level-0 places of places in µm, (N, 2) each."""
        return self.place(xy_um).xy_px

    def _choose(self, on_slide: Float64, answers: Float64) -> Placed:
        """Of the answers (R, N, 2) take for each row that of the region in which its place on the slide lies."""
        n = answers.shape[1]
        if not self.regions:
            return Placed(answers[0], np.zeros(n, np.bool_))
        held = np.stack([
            shapely.intersects_xy(region, xy[:, 0], xy[:, 1])
            for region, xy in zip(self.regions, on_slide, strict=True)
        ])  # fmt: skip
        outside = np.asarray(~held.any(axis=0), np.bool_)
        which = held.argmax(axis=0)
        if outside.any():
            far = [
                shapely.distance(region, shapely.points(xy[outside]))
                for region, xy in zip(self.regions, on_slide, strict=True)
            ]
            which[outside] = np.argmin(far, axis=0)
        return Placed(answers[which, np.arange(n)], outside)


def _apply(matrix: Float64, xy: Float64) -> Float64:
    return np.asarray(xy @ matrix[:2, :2].T + matrix[:2, 2], np.float64)


def read_alignment(path: Path, pixel_size: float) -> Alignment:
    """Read an alignment: a matrix or landmarks (.csv), or regions with a matrix each (.geojson, .json).

    Raises UsageError for anything else, and where it cannot be inverted.
    """
    if path.suffix.lower() in (".geojson", ".json"):
        return _read_regions(path, pixel_size)
    if path.is_file() and (pairs := _landmarks(path)) is not None:
        return fit_landmarks(*pairs, pixel_size, path)
    return Alignment(load_alignment(path)[None], pixel_size)


def fit_landmarks(fixed_px: Float64, slide_px: Float64, pixel_size: float, path: Path) -> Alignment:
    """Fit an affine map to pairs of places, (N, 2) each, by least squares over all of them.

    fixed_px  pixels of the morphology image; slide_px  level-0 pixels of the slide.
    Raises UsageError for fewer than 3 pairs, and for places on one line.
    """
    if len(slide_px) < 3:
        raise UsageError(f"{path}: {len(slide_px)} landmarks; an alignment needs 3 or more")
    for places in (fixed_px, slide_px):
        spread = np.linalg.svd(places - places.mean(axis=0), compute_uv=False)
        if spread[1] <= 1e-3 * spread[0]:
            raise UsageError(f"{path}: its landmarks lie on one line; an alignment needs 3 that do not")
    centre = slide_px.mean(axis=0)
    known = np.column_stack([slide_px - centre, np.ones(len(slide_px))])
    affine = np.linalg.lstsq(known, fixed_px, rcond=None)[0].T
    matrix = np.vstack([affine, [0, 0, 1]])
    matrix[:2, 2] -= matrix[:2, :2] @ centre
    missed = np.hypot(*(_apply(matrix, slide_px) - fixed_px).T) * pixel_size
    return Alignment(matrix[None], pixel_size, "landmarks", residual_um=float(np.sqrt(np.mean(missed**2))))


def _landmarks(path: Path) -> tuple[Float64, Float64] | None:
    """Return the pairs of a CSV of landmarks, None where its header is not that of one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not set(LANDMARK_COLUMNS) <= {name.strip() for name in reader.fieldnames or ()}:
                return None
            rows = [{(name or "").strip(): value for name, value in row.items()} for row in reader]
            values = np.array([[float(row[name]) for name in LANDMARK_COLUMNS] for row in rows], np.float64)
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(
            f"{path}: no landmarks ({short(error)}); expected columns {', '.join(LANDMARK_COLUMNS)}"
        ) from error
    values = values.reshape(-1, 4)
    if not np.isfinite(values).all():
        raise UsageError(f"{path}: landmarks that are no numbers")
    return values[:, :2], values[:, 2:]


def _read_regions(path: Path, pixel_size: float) -> Alignment:
    expected = "expected GeoJSON polygons in level-0 pixels, each with a property `matrix` of 3 rows of 3 numbers"
    try:
        features = read_json(path, UsageError)["features"]
        shapes = [shapely.from_geojson(_geometry(feature)) for feature in features[: MOST_REGIONS + 1]]
        matrices = np.array([feature["properties"]["matrix"] for feature in features], np.float64)
    except (KeyError, TypeError, ValueError, shapely.errors.GEOSException, OSError) as error:
        raise UsageError(f"{path}: no regions ({short(error)}); {expected}") from error
    polygons = all(shape.geom_type in ("Polygon", "MultiPolygon") and shape.is_valid for shape in shapes)
    if not 0 < len(shapes) <= MOST_REGIONS or not polygons or matrices.shape != (len(shapes), 3, 3):
        raise UsageError(f"{path}: no regions; {expected}")
    flat = np.abs(np.linalg.det(matrices)) < 1e-12
    if not np.isfinite(matrices).all() or flat.any() or not np.allclose(matrices[:, 2], (0, 0, 1)):
        raise UsageError(f"{path}: a matrix that is not affine or cannot be inverted; {expected}")
    return Alignment(matrices, pixel_size, "regions", tuple(shapes))


def _geometry(feature: dict[str, object]) -> str:
    return json.dumps(feature["geometry"])


def find_alignment(slide: Path, given: Path | None) -> Path:
    """Return the alignment that is given, else the one beside the slide: NAMEalignment.csv beside NAME.ome.tif.

    Raises UsageError where there is none.
    """
    if given is not None:
        return given
    stem = slide.name
    for ending in (".ome.tif", ".ome.tiff", ".tif", ".tiff"):
        stem = stem.removesuffix(ending)
    beside = [slide.with_name(f"{stem}{word}alignment.csv") for word in ("", "_", "_image", "image")]
    found = next((path for path in beside if path.is_file()), None)
    if found is None:
        raise UsageError(f"{slide}: no {beside[0].name} beside it; give --alignment FILE")
    return found
