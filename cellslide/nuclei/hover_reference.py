"""HoverMaps -> label map with numpy, OpenCV, SciPy and scikit-image: the form where there are no compiled kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cellslide.nuclei.hover_energy import HV_LIMIT, HV_STEPS, ceil_float32, fixed_energy, published_energy, stretch
from cellslide.types import Bool, Float32, Float64, HoverDecode, HoverMaps, Int32, UInt8

# Far below the step between two different values of the flooded map, so that it only orders equal ones.
TIE_LIFT = 2.0**-46


def hover_labels(maps: HoverMaps, config: HoverDecode) -> Int32:
    """Return the label map int32 (H, W) of one tile; see `decode.hover_instances`."""
    components, blob = _foreground(maps, config)
    if not blob.any():
        return np.zeros(blob.shape, np.int32)
    energy = _energy(maps.hv, config)
    calm: UInt8 = (energy < ceil_float32(config.energy_threshold)).view(np.uint8)
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


def _energy(hv: Float32, config: HoverDecode) -> Float32:
    """Return the energy of a whole tile, float32 (H, W)."""
    import cv2

    def sobel(image: Float32, axis: int) -> Float64:
        return np.asarray(cv2.Sobel(image, cv2.CV_64F, 1 - axis, axis, ksize=config.kernel_px), np.float64)

    if config.mode == "published":
        return published_energy(*(stretch(sobel(stretch(hv[axis]), axis)) for axis in (0, 1)))
    steps = np.rint(np.clip(hv, -HV_LIMIT, HV_LIMIT) * np.float32(HV_STEPS))
    return fixed_energy(sobel(steps[0], 0), sobel(steps[1], 1), config)


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
    return [
        (pixel, rank * TIE_LIFT) for pixels in runs.values() if len(pixels) > 1 for rank, pixel in enumerate(pixels)
    ]
