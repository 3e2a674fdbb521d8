"""HoVer maps of one tile -> nuclei. Work is done per object or on whole maps at once, never on a whole map per nucleus.

The steps are those of HoVer-Net (Graham et al. 2019, section 3.2), which CellViT and CellVTA share: foreground,
gradients of the horizontal and vertical distance maps, energy (`energy`), markers, watershed. They stand twice,
with the same results: `compiled` where there are compiled kernels, else `plain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.geometry.outlines import ring_bounds, trace_outlines
from cellslide.types import Float32, Float64, HoverDecode, HoverMaps, Instances, Int32, Int64


def decode_hover(maps: HoverMaps, config: HoverDecode) -> Instances:
    """Return the nuclei of one tile, in tile pixels, in the order of their markers (row by row).

    Outlines keep the mask's area (see `outlines.trace_outlines`). `score` is the mean foreground probability and
    `class_prob` the mean class probability over the nucleus's pixels, background left out and the rest scaled to sum 1.
    """
    return measure_instances(hover_instances(maps, config), maps)


@cache
def prepare() -> None:
    """Make ready what decoding compiles or loads the first time, on a small tile of two nuclei."""
    if not kernels.available():
        return
    columns = np.abs(np.arange(64) - 31.5)
    foreground = np.zeros((32, 64), np.uint8)
    foreground[6:26, 8:56] = 1
    hv = np.zeros((2, 32, 64), np.float32)
    hv[0] = 1 - np.minimum(columns, 24) / 12
    halves = foreground.astype(np.float16)
    decode_hover(HoverMaps(foreground, halves, hv, np.stack([1 - halves, halves])), HoverDecode("fixed"))


def hover_instances(maps: HoverMaps, config: HoverDecode) -> Int32:
    """Return the label map int32 (H, W); labels are those of the published form, so they rise but may skip numbers.

    Raises ValueError where the maps differ in shape.
    """
    _check_shapes(maps, maps.foreground.shape)
    if kernels.available():
        from cellslide.nuclei import hover_labels as compiled

        return compiled.hover_labels(maps, config)
    from cellslide.nuclei import hover_reference as plain

    return plain.hover_labels(maps, config)


def measure_instances(labels: Int32, maps: HoverMaps) -> Instances:
    """Return the nuclei of a label map with outlines, scores and class probabilities, in the order of the labels."""
    _check_shapes(maps, labels.shape)
    under = (_add_up_compiled if kernels.available() else _add_up)(labels, maps)
    area = under.area.astype(np.float64)
    contour_xy, start = trace_outlines(labels, int(under.label[-1]) if len(area) else 0)
    # Labels that do not occur have no vertices, so leaving them out leaves the rest where it is.
    contour_start = np.append(0, start[under.label])
    bounds = ring_bounds(contour_xy, contour_start)
    height, width = labels.shape
    return Instances(
        centroid_xy=np.stack([under.columns / area, under.rows / area], axis=1) + 0.5,
        score=(under.score / area).astype(np.float32),
        area_px=area.astype(np.float32),
        cut=(bounds[:, :2] <= 0).any(axis=1) | (bounds[:, 2] >= width) | (bounds[:, 3] >= height),
        class_prob=None if under.classes is None else _class_prob(under.classes),
        contour_xy=contour_xy,
        contour_start=contour_start,
    )


def _check_shapes(maps: HoverMaps, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless all maps are (..., H, W) = `shape`; compiled code would read beyond their ends."""
    found = [maps.foreground.shape, maps.foreground_prob.shape, maps.hv.shape[1:]]
    found += [] if maps.type_prob is None else [maps.type_prob.shape[1:]]
    if len(maps.hv) != 2 or any(other != shape for other in found):
        raise ValueError(f"maps of {', '.join(map(str, found))} for a tile of {shape}")


@dataclass(frozen=True, slots=True)
class _Under:
    """What lies under each of the N labels that occur, all of it exact.

    label    int64 (N,), rising.
    area, columns, rows  (N,): pixels, sums of their columns and of their rows.
    score    float64 (N,), sum of the foreground probability.
    classes  float64 (N, K), sums of the class probabilities without background, or None.
    """

    label: Int64
    area: Int64
    columns: NDArray[Any]
    rows: NDArray[Any]
    score: Float64
    classes: Float64 | None


def _add_up(labels: Int32, maps: HoverMaps) -> _Under:
    pixels = np.flatnonzero(labels != 0)
    label = labels.ravel().take(pixels)
    number, n = compact(label)
    row, col = np.divmod(pixels, labels.shape[1])
    planes = None if maps.type_prob is None else maps.type_prob.reshape(len(maps.type_prob), -1)[1:]
    return _Under(
        np.flatnonzero(np.bincount(label)),
        np.bincount(number, minlength=n + 1)[1:],
        sums(col, number, n),
        sums(row, number, n),
        sums(maps.foreground_prob.ravel().take(pixels), number, n),
        None if planes is None else np.stack([sums(prob.take(pixels), number, n) for prob in planes], axis=1),
    )


def _add_up_compiled(labels: Int32, maps: HoverMaps) -> _Under:
    from cellslide.geometry.label_kernels import measure

    def bits(halves: NDArray[Any]) -> NDArray[np.uint16]:
        return np.require(halves, np.float16, ("C", "W")).view(np.uint16)

    nothing = np.empty((0, *labels.shape), np.float16)
    classes = bits(nothing if maps.type_prob is None else maps.type_prob[1:])
    table, score, totals = measure(
        np.require(labels, np.int32, ("C", "W")), bits(maps.foreground_prob), classes, _half_values()
    )
    label, area, columns, rows = np.asarray(table, np.int64).T
    return _Under(label, area, columns, rows, score, None if maps.type_prob is None else totals)


@cache
def _half_values() -> Float32:
    """Return the value of each of the 65,536 numbers in half precision, which kernels do not know."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def compact(numbers: Int32) -> tuple[Int64, int]:
    """Renumber labels to 1..n in their order."""
    present = np.bincount(numbers) > 0 if len(numbers) else np.zeros(1, np.bool_)
    lookup = np.cumsum(present, dtype=np.int64)
    return lookup.take(numbers), int(lookup[-1])


def sums(values: NDArray[Any], number: Int64, n: int) -> Float64:
    """Return the sum of values over each number 1..n, float64 (n,)."""
    # Without a single pixel bincount answers in whole numbers.
    return np.bincount(number, weights=values, minlength=n + 1)[1:].astype(np.float64, copy=False)


def _class_prob(totals: Float64) -> Float32:
    """Scale rows (N, K) to sum 1; even where all is background."""
    whole = totals.sum(axis=1, keepdims=True)
    even = np.full_like(totals, 1 / max(totals.shape[1], 1))
    return np.asarray(np.divide(totals, whole, out=even, where=whole > 0), np.float32)
