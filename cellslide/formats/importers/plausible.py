"""Whether imported nuclei lie on nuclei: haematoxylin at their places against places beside them.

Haematoxylin takes red light and eosin hardly any, so that the optical density of red is enough to tell. Where the
places show none, the usual mistakes are tried, and the flag that mends one is named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cellslide.errors import TileError, UsageError
from cellslide.formats.importers.records import Source
from cellslide.slides.slide import Slide
from cellslide.types import Float64, Plane, SlideInfo

SAMPLE, LEAST = 150, 20
LOOK_MPP, INNER_UM, BESIDE_UM = 1.0, 2.5, 12.0
# Optical density, and its mean over its standard error, from which a difference counts.
LEAST_OD, LEAST_T, SURE_T = 0.01, 3.0, 5.0
SCALES = (2.0, 4.0, 8.0, 16.0, 32.0, 0.5)
# Of nuclei outside the slide, or without numbers, so large a share is said.
DOUBTFUL_SHARE = 0.1
FLAGS = "--cells-unit, --cells-mpp, --geojson-origin and --alignment"

_log = logging.getLogger(__name__)


def check_haematoxylin(path: Path, slide: Slide, xy: Float64, source: Source) -> None:
    """Look at the pixels under nuclei (N, 2), level-0; warns where they show no haematoxylin.

    Raises UsageError where they do once one flag is changed.
    """
    if len(xy) < LEAST:
        return
    sample = xy[np.linspace(0, len(xy) - 1, min(SAMPLE, len(xy))).round().astype(np.int64)]
    excess = _excess(slide, sample)
    if _counts(excess, LEAST_T):
        return
    for moved, remedy in _mistakes(sample, slide.info, source):
        inside = ((moved >= 0) & (moved < (slide.info.width_px, slide.info.height_px))).all(axis=1)
        if inside.mean() > 0.9 and _counts(_excess(slide, moved[inside]), SURE_T):
            raise UsageError(f"{path}: its nuclei do not lie on nuclei of {slide.info.path.name}, but would {remedy}")
    _log.warning(
        "%s: at its nuclei %s shows no more haematoxylin than beside them; check %s, and that it is of this slide",
        path, slide.info.path.name, FLAGS,
    )  # fmt: skip


def warn_of_units(path: Path, info: SlideInfo, xy: Float64, source: Source) -> None:
    """Warn where nuclei (N, 2), level-0, fill just the corner that the slide would take if its µm were pixels."""
    if len(xy) < LEAST or source.unit != "px" or source.mpp is not None or source.alignment is not None:
        return
    size_um = np.array([info.width_px * info.mpp_x, info.height_px * info.mpp_y])
    filled = xy.max(axis=0) / size_um
    if max(info.mpp_x, info.mpp_y) < 0.8 and (filled <= 1).all() and (filled > 0.9).all():
        _log.warning(
            "%s: its nuclei fill only the upper left %.0f x %.0f px, the slide's size in µm; are they in µm "
            "(--cells-unit um)?",
            path, *size_um,
        )  # fmt: skip


def _counts(excess: Float64, least_t: float) -> bool:
    if len(excess) < LEAST:
        return False
    error = float(excess.std() / np.sqrt(len(excess)))
    return bool(excess.mean() > LEAST_OD and excess.mean() > least_t * error)


def _excess(slide: Slide, xy: Float64) -> Float64:
    """Return the optical density of red at places (N, 2), level-0, less that of a ring about them."""
    plane = Plane.of(slide.info, LOOK_MPP)
    half = int(np.ceil((BESIDE_UM + INNER_UM) / LOOK_MPP))
    row, col = np.mgrid[-half : half + 1, -half : half + 1] * LOOK_MPP
    distance = np.hypot(row, col)
    at, beside = distance <= INNER_UM, np.abs(distance - BESIDE_UM) <= INNER_UM
    found = []
    for x, y in np.floor(plane.from_level0(xy)).astype(np.int64).tolist():
        try:
            image = slide.read_plane(plane, (x - half, y - half, x + half + 1, y + half + 1))
        except TileError:
            continue
        density = -np.log((image[..., 0].astype(np.float64) + 1) / 256)
        found.append(density[at].mean() - density[beside].mean())
    return np.array(found, np.float64)


def _mistakes(xy: Float64, info: SlideInfo, source: Source) -> Iterator[tuple[Float64, str]]:
    """Yield where nuclei (N, 2), level-0, lie if a common mistake was made, and what mends it."""
    size = np.array([info.mpp_x, info.mpp_y])
    if source.alignment is None and source.mpp is None:
        if source.unit == "px":
            yield xy / size, "in µm: give --cells-unit um"
        else:
            yield xy * size, "in pixels: give --cells-unit px"
    if info.bounds is not None:
        shift = np.array(info.bounds[:2], np.float64)
        other = "level0" if source.origin == "bounds" else "bounds"
        # A table's zero point is level 0 whatever the flag says.
        yield xy - shift, f"with another zero point: give --geojson-origin {other}"
        yield xy + shift, f"with another zero point: give --geojson-origin {other}"
    if source.alignment is None:
        for scale in SCALES:
            mpp = (source.mpp or float(size.mean())) * scale
            yield xy * scale, f"with pixels of another size: give --cells-mpp {mpp:.4g}"
    yield xy[:, ::-1], "with x and y exchanged: exchange them in the file"
    yield np.stack([xy[:, 0], info.height_px - xy[:, 1]], axis=1), "with y counted from below: turn it in the file"
