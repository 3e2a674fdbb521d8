"""HoVer maps of one tile -> nuclei. Work is done per object or on whole maps at once, never on a whole map per nucleus.

The steps are those of HoVer-Net (Graham et al. 2019, section 3.2), which CellViT and CellVTA share: foreground,
gradients of the horizontal and vertical distance maps, energy, markers, watershed. `HoverDecode.mode` picks the scale
of the gradients: "published" stretches them by their extremes in the tile and gives the published instances; "fixed"
uses constants, and does its arithmetic exactly, so that a nucleus comes out the same whatever else is in the tile and
wherever it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.outlines import ring_bounds, trace_outlines
from cellslide.types import Bool, Float32, Float64, HoverDecode, HoverMaps, Instances, Int32, Int64, UInt8

# Steps per unit of the distance maps and of the energy in "fixed" mode: far finer than a network's noise, and coarse
# enough that the sums of a 21 px Sobel kernel and of the blur fit 53 bits and are therefore exact.
_HV_STEPS = 2.0**12
_HV_LIMIT = 2.0
_ENERGY_STEPS = 2.0**22
_TIE_LIFT = 2.0**-46


def decode_hover(maps: HoverMaps, config: HoverDecode) -> Instances:
    """Return the nuclei of one tile, in tile pixels, in the order of their markers (row by row).

    Outlines keep the mask's area (see `outlines.trace_outlines`). `score` is the mean foreground probability and
    `class_prob` the mean class probability over the nucleus's pixels, background left out and the rest scaled to sum 1.
    """
    return measure_instances(hover_instances(maps, config), maps)


def hover_instances(maps: HoverMaps, config: HoverDecode) -> Int32:
    """Return the label map int32 (H, W); labels are those of the published form, so they rise but may skip numbers."""
    components, blob = _foreground(maps, config)
    if not blob.any():
        return np.zeros(blob.shape, np.int32)
    energy = _published_energy(maps.hv, config) if config.mode == "published" else _fixed_energy(maps.hv, config)
    calm: UInt8 = (energy < _ceil_float32(config.energy_threshold)).view(np.uint8)
    markers = _markers(blob & calm, config)
    return _flood(components, blob, markers, energy, config.mode == "fixed")


def _foreground(maps: HoverMaps, config: HoverDecode) -> tuple[Int32, UInt8]:
    """Return 4-connected components (H, W) and the foreground 0/1 without components below `min_object_px`."""
    foreground = maps.foreground
    if config.foreground_threshold != 0.5:
        foreground = (maps.foreground_prob > np.float16(config.foreground_threshold)).view(np.uint8)
    components, keep = _components(foreground, config.min_object_px)
    return components, keep.take(components).view(np.uint8)


def _components(mask: UInt8, min_px: int) -> tuple[Int32, Bool]:
    """Label 4-connected components, numbered by first pixel as scipy does, and tell which have `min_px` pixels."""
    import cv2

    n, components = cv2.connectedComponents(mask, connectivity=4, ltype=cv2.CV_32S)
    size = np.bincount(components.ravel().take(np.flatnonzero(mask != 0)), minlength=n)
    keep = size >= min_px
    keep[0] = False
    return np.asarray(components, np.int32), keep


def _ceil_float32(value: float) -> np.float32:
    """Return the least float32 not below `value`; a float32 is below it exactly when it is below `value`."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))


def _published_energy(hv: Float32, config: HoverDecode) -> Float32:
    """Return max(1 - stretched gradient) over both maps, float32 (H, W), stretched by the extremes in the tile."""
    import cv2

    def stretch(image: NDArray[Any]) -> Float32:
        out = np.empty(image.shape, np.float32)
        return np.asarray(cv2.normalize(image, out, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F), np.float32)

    horizontal, vertical = (
        1 - stretch(cv2.Sobel(stretch(hv[axis]), cv2.CV_64F, 1 - axis, axis, ksize=config.kernel_px)) for axis in (0, 1)
    )
    return np.asarray(np.maximum(cv2.max(horizontal, vertical), np.float32(0)), np.float32)


def gradient_range(kernel_px: int) -> tuple[float, float]:
    """Return the default (low, high) of `hv_gradient_range`, in units of the distance maps per pixel.

    The maps rise from -1 to 1 across a nucleus and fall by 2 between two that touch. With p the greatest answer of the
    unit-gain Sobel kernel to a step of 1, a nucleus answers up to about p and a touching border -2p: those are the
    ends.
    """
    derive, _ = _sobel_kernels(kernel_px)
    # The answer to a step is the running sum of the derivative kernel, divided by the answer to a ramp of 1 per pixel.
    peak = float(np.cumsum(-derive).max()) / float(derive @ np.arange(kernel_px))
    return -2 * peak, peak


@cache
def _sobel_kernels(kernel_px: int) -> tuple[Float64, Float64]:
    """Return OpenCV's derivative and smoothing kernels (kernel_px,)."""
    import cv2

    derive, smooth = cv2.getDerivKernels(1, 0, kernel_px, ktype=cv2.CV_64F)
    return np.asarray(derive, np.float64).ravel(), np.asarray(smooth, np.float64).ravel()


def _fixed_energy(hv: Float32, config: HoverDecode) -> Float32:
    """Return max((high - gradient) / (high - low)) over both maps, float32 (H, W), 1 where two nuclei touch.

    Nothing is clipped, so that the flood meets no plateaus. The Sobel sums are exact (integers), hence independent of
    where in the tile a nucleus lies and of how OpenCV vectorises.
    """
    import cv2

    low, high = config.hv_gradient_range or gradient_range(config.kernel_px)
    derive, smooth = _sobel_kernels(config.kernel_px)
    gain = float(derive @ np.arange(config.kernel_px)) * float(smooth.sum()) * _HV_STEPS
    steps = np.rint(np.clip(hv, -_HV_LIMIT, _HV_LIMIT) * np.float32(_HV_STEPS))
    across = cv2.Sobel(steps[0], cv2.CV_64F, 1, 0, ksize=config.kernel_px)
    down = cv2.Sobel(steps[1], cv2.CV_64F, 0, 1, ksize=config.kernel_px)
    scale = _ENERGY_STEPS / (high - low)
    energy = np.rint(high * scale - np.minimum(across, down) * (scale / gain))
    return np.asarray(energy / _ENERGY_STEPS, np.float32)


def _markers(calm: UInt8, config: HoverDecode) -> Int32:
    """Return markers int32 (H, W): calm foreground, holes filled, opened by a 5 px disc, small ones dropped."""
    import cv2

    padded = np.pad(calm, 1)
    cv2.floodFill(padded, None, (0, 0), (2,))
    filled = (padded[1:-1, 1:-1] != 2).view(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = np.asarray(cv2.morphologyEx(filled, cv2.MORPH_OPEN, disc), np.uint8)
    labels, keep = _components(opened, config.min_marker_px)
    if keep[1:].all():
        return labels
    return np.where(keep, np.arange(len(keep)), 0).astype(np.int32).take(labels)


def _flood(components: Int32, blob: UInt8, markers: Int32, energy: Float32, break_ties: bool) -> Int32:
    """Give each component the label of its marker; only those with several markers need a watershed."""
    marked = np.flatnonzero((markers != 0) & blob.view(np.bool_))  # filled holes may lie outside the foreground
    component, number = components.ravel().take(marked), markers.ravel().take(marked)
    label_of = np.zeros(int(components.max()) + 1, np.int32)
    label_of[component] = number
    shared = np.unique(component[label_of[component] != number])
    labels = label_of.take(components)
    if len(shared):
        _flood_shared(labels, components, blob, markers, energy, shared, break_ties)
    return np.asarray(labels, np.int32)


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Crops of some components packed side by side; all images are (h, w).

    dist     float64, what the watershed floods.
    markers  int32.
    inside   bool, pixels of the crop's own component.
    crops    for each component its place in the map and in the sheet.
    """

    dist: Float64
    markers: Int32
    inside: Bool
    crops: list[tuple[tuple[slice, slice], tuple[slice, slice]]]


def _flood_shared(
    labels: Int32, components: Int32, blob: UInt8, markers: Int32, energy: Float32, shared: Int32, break_ties: bool
) -> None:
    """Write the watershed of the components `shared` into `labels`.

    Components do not touch, so flooding them on a small sheet equals flooding the tile: the order of flooding inside a
    component is by value, then age, and both keep their order. Marker pixels all have age 0, so the order of two of
    equal value is up to the heap, that is to the rest of the tile: then "fixed" mode lifts the later one, and
    "published" mode floods the whole tile as the published form does.
    """
    from skimage.segmentation import watershed

    sheet = _pack(components, blob, markers, energy, shared)
    ties = _tied_rims(sheet)
    if len(ties) and not break_ties:
        whole = watershed(_distance(energy, blob), markers=markers, mask=blob)
        chosen = np.isin(components, shared)
        labels[chosen] = whole[chosen]
        return
    dist = sheet.dist
    for pixel, lift in ties:
        dist.ravel()[pixel] += lift
    flooded = watershed(dist, markers=sheet.markers, mask=sheet.inside)
    for source, target in sheet.crops:
        np.copyto(labels[source], flooded[target], where=sheet.inside[target])


def _distance(energy: Float32, blob: UInt8) -> Float64:
    """Return the published distance map: low in the middle of nuclei, 0 outside, smoothed by a 3 x 3 Gaussian."""
    import cv2

    height = (1.0 - energy.astype(np.float64)) * blob
    return np.asarray(-cv2.GaussianBlur(height, (3, 3), 0), np.float64)


def _pack(components: Int32, blob: UInt8, markers: Int32, energy: Float32, shared: Int32) -> _Sheet:
    """Cut the components `shared` out with a margin of one pixel and lay them in rows on a sheet, smoothed."""
    import cv2
    from scipy import ndimage

    numbering = np.zeros(int(components.max()) + 1, np.int32)
    numbering[shared] = np.arange(1, len(shared) + 1)
    boxes = [box for box in ndimage.find_objects(numbering.take(components)) if box is not None]
    places, (height, width) = _shelves([(b[0].stop - b[0].start + 2, b[1].stop - b[1].start + 2) for b in boxes])
    # The published blur mirrors at the tile's edge, so the margin there is the mirrored pixel.
    level = cv2.copyMakeBorder(energy, 1, 1, 1, 1, cv2.BORDER_REFLECT_101)
    solid = cv2.copyMakeBorder(blob, 1, 1, 1, 1, cv2.BORDER_REFLECT_101)
    sheet_level, sheet_solid = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint8)
    inside, sheet_markers = np.zeros((height, width), np.bool_), np.zeros((height, width), np.int32)
    crops = []
    for number, (source, (top, left)) in enumerate(zip(boxes, places, strict=True)):
        rows, cols = source
        h, w = rows.stop - rows.start, cols.stop - cols.start
        wide = (slice(top, top + h + 2), slice(left, left + w + 2))
        target = (slice(top + 1, top + 1 + h), slice(left + 1, left + 1 + w))
        margin = (slice(rows.start, rows.stop + 2), slice(cols.start, cols.stop + 2))
        sheet_level[wide], sheet_solid[wide] = level[margin], solid[margin]
        inside[target] = components[source] == shared[number]
        sheet_markers[target] = markers[source]
        crops.append((source, target))
    sheet_markers *= inside
    return _Sheet(_distance(sheet_level, sheet_solid), sheet_markers, inside, crops)


def _shelves(sizes: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Place boxes (height, width) on a roughly square sheet; returns their corners (top, left) and its size."""
    limit = max(max(w for _, w in sizes), math.isqrt(2 * sum(h * w for h, w in sizes)) + 1)
    corners = [(0, 0)] * len(sizes)
    top = left = shelf = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        height, width = sizes[i]
        if left + width > limit:
            top, left, shelf = top + shelf, 0, 0
        corners[i] = (top, left)
        left, shelf = left + width, max(shelf, height)
    return corners, (top + shelf, limit)


def _tied_rims(sheet: _Sheet) -> list[tuple[int, float]]:
    """Return (pixel of the sheet, lift) for outer marker pixels that share their value within a component."""
    free = sheet.inside & (sheet.markers == 0)
    near = np.zeros_like(free)
    near[1:] |= free[:-1]
    near[:-1] |= free[1:]
    near[:, 1:] |= free[:, :-1]
    near[:, :-1] |= free[:, 1:]
    rim = np.flatnonzero(near & (sheet.markers > 0))
    value = sheet.dist.ravel()[rim]
    order = np.argsort(value, kind="stable")
    rim, value = rim[order], value[order]
    equal = np.flatnonzero(value[1:] == value[:-1])
    if len(equal) == 0:
        return []
    crop = np.zeros(free.shape, np.int32)
    for number, (_, target) in enumerate(sheet.crops):
        crop[target] = number
    runs: dict[tuple[float, int], list[int]] = {}
    for i in np.union1d(equal, equal + 1):
        runs.setdefault((float(value[i]), int(crop.ravel()[rim[i]])), []).append(int(rim[i]))
    # The lift is far below the step between two different values, so it only orders equals, by place.
    return [
        (pixel, rank * _TIE_LIFT) for pixels in runs.values() if len(pixels) > 1 for rank, pixel in enumerate(pixels)
    ]


def measure_instances(labels: Int32, maps: HoverMaps) -> Instances:
    """Return the nuclei of a label map with outlines, scores and class probabilities, in the order of the labels."""
    pixels = np.flatnonzero(labels != 0)
    number, n = _compact(labels.ravel().take(pixels))
    dense = np.zeros(labels.shape, np.int32)
    dense.ravel()[pixels] = number
    contour_xy, contour_start = trace_outlines(dense, n)
    area, centroid = _area_and_centroid(pixels, number, n, labels.shape[1])
    score = _sums(maps.foreground_prob.ravel().take(pixels), number, n) / area
    bounds = ring_bounds(contour_xy, contour_start)
    height, width = labels.shape
    return Instances(
        centroid_xy=centroid + 0.5,
        score=score.astype(np.float32),
        area_px=area.astype(np.float32),
        cut=(bounds[:, :2] <= 0).any(axis=1) | (bounds[:, 2] >= width) | (bounds[:, 3] >= height),
        class_prob=None if maps.type_prob is None else _class_prob(maps.type_prob, pixels, number, n),
        contour_xy=contour_xy,
        contour_start=contour_start,
    )


def _compact(numbers: Int32) -> tuple[Int64, int]:
    """Renumber labels to 1..n in their order."""
    present = np.bincount(numbers) > 0 if len(numbers) else np.zeros(1, np.bool_)
    lookup = np.cumsum(present, dtype=np.int64)
    return lookup.take(numbers), int(lookup[-1])


def _sums(values: NDArray[Any], number: Int64, n: int) -> Float64:
    # Without a single pixel bincount answers in whole numbers.
    return np.bincount(number, weights=values, minlength=n + 1)[1:].astype(np.float64, copy=False)


def _area_and_centroid(pixels: Int64, number: Int64, n: int, width: int) -> tuple[Float64, Float64]:
    """Return pixel counts (N,) and mean pixel indices (x, y) (N, 2); the sums are whole numbers, so the means are
    exact."""
    row, col = np.divmod(pixels, width)
    area = np.bincount(number, minlength=n + 1)[1:].astype(np.float64)
    return area, np.stack([_sums(col, number, n) / area, _sums(row, number, n) / area], axis=1)


def _class_prob(type_prob: NDArray[np.float16], pixels: Int64, number: Int64, n: int) -> Float32:
    """Return (N, K): the mean over the nucleus's pixels, without background, scaled to sum 1 (even where all is
    background)."""
    classes = type_prob.reshape(len(type_prob), -1)[1:]
    totals = np.stack([_sums(prob.take(pixels), number, n) for prob in classes], axis=1)
    whole = totals.sum(axis=1, keepdims=True)
    even = np.full_like(totals, 1 / max(len(classes), 1))
    return np.asarray(np.divide(totals, whole, out=even, where=whole > 0), np.float32)


@dataclass(frozen=True, slots=True)
class PublishedInstances:
    """Nuclei as HoVer-Net and CellViT record them, for comparison with their results; all in pixel indices, not
    centres.

    ids          int32 (N,), labels of the map.
    bbox         int32 (N, 2, 2), [[row min, column min], [row max, column max]], half-open.
    centroid_xy  float64 (N, 2), mean pixel index: half a pixel less than `Instances.centroid_xy`.
    type_id, type_prob
                 int32 and float64 (N,): the most frequent class (the second where that is background) and its pixel
                 share.
    contour_xy, contour_start
                 int32 (P, 2), int64 (N + 1,): outlines through pixel centres.
    """

    ids: Int32
    bbox: Int32
    centroid_xy: Float64
    type_id: Int32
    type_prob: Float64
    contour_xy: Int32
    contour_start: Int64


def published_instances(labels: Int32, type_map: Int32) -> PublishedInstances:
    """Return the published record of a label map; `type_map` is the class of each pixel, 0 = background.

    As in the published form a nucleus whose contour has fewer than three points is left out.
    """
    from scipy import ndimage

    found = [(i + 1, box) for i, box in enumerate(ndimage.find_objects(labels)) if box is not None]
    contours = [_pixel_contour(labels[box] == i, box) for i, box in found]
    keep = np.array([len(contour) >= 3 for contour in contours], np.bool_)
    ids = np.array([i for i, _ in found], np.int32)
    bbox = np.array([[(b[0].start, b[1].start), (b[0].stop, b[1].stop)] for _, b in found], np.int32).reshape(-1, 2, 2)
    pixels = np.flatnonzero(labels)
    number, n = _compact(labels.ravel()[pixels])
    corner = bbox[:, 0, ::-1].astype(np.float64)
    centroid = _published_centroid(pixels, number, corner, labels.shape[1])
    type_id, type_prob = _published_type(type_map.ravel()[pixels], number, n)
    kept = [contour for contour, ok in zip(contours, keep, strict=True) if ok]
    start = np.concatenate([[0], np.cumsum([len(c) for c in kept])]).astype(np.int64)
    contour_xy = np.concatenate([np.zeros((0, 2), np.int32), *kept])
    return PublishedInstances(ids[keep], bbox[keep], centroid[keep], type_id[keep], type_prob[keep], contour_xy, start)


def _pixel_contour(mask: Bool, box: tuple[slice, slice]) -> Int32:
    import cv2

    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    return np.asarray(contours[0].reshape(-1, 2) + (box[1].start, box[0].start), np.int32)


def _published_centroid(pixels: Int64, number: Int64, corner_xy: Float64, width: int) -> Float64:
    """Return mean pixel indices, added up inside the bounding box first, as image moments of a crop are."""
    row, col = np.divmod(pixels, width)
    n = len(corner_xy)
    count = np.bincount(number, minlength=n + 1)[1:]
    inside = [_sums(axis, number, n) - count * corner_xy[:, i] for i, axis in enumerate((col, row))]
    return np.stack(inside, axis=1) / np.maximum(count, 1)[:, None] + corner_xy


def _published_type(types: Int32, number: Int64, n: int) -> tuple[Int32, Float64]:
    """Return class and pixel share by the published rule; ties go to the smaller class, background only if there is no
    other."""
    n_types = int(types.max(initial=0)) + 1
    votes = np.bincount((number - 1) * n_types + types, minlength=n * n_types).reshape(n, n_types)
    type_id = votes[:, 1:].argmax(axis=1) + 1 if n_types > 1 else np.zeros(n, np.int64)
    share = votes[np.arange(n), type_id]
    type_id = np.where(share > 0, type_id, 0)
    area = votes.sum(axis=1)
    return type_id.astype(np.int32), votes[np.arange(n), type_id] / (area + 1.0e-6)
