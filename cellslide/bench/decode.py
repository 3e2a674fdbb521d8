"""HoVer decode: maps of a drawn tile to nuclei, ours beside the published steps done plainly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.bench.rows import BenchOptions, Form, Row, Target, row
from cellslide.inference.cpu_memory import keep_freed_blocks
from cellslide.types import Bool, Float32, HoverDecode, HoverMaps, Int32

STAGE = "decode"
OURS = "published, cellslide"


@dataclass(frozen=True, slots=True)
class RawMaps:
    """Probabilities as a network gives them: foreground (2, H, W), hv (2, H, W), types (K + 1, H, W), all float32.

    `truth` int32 (H, W) holds the nuclei that were drawn.
    """

    foreground: Float32
    hv: Float32
    types: Float32
    truth: Int32

    def hover_maps(self) -> HoverMaps:
        """Return the maps as the engines hand them to the decoder."""
        wins = (self.foreground[1] > self.foreground[0]).astype(np.uint8)
        return HoverMaps(wins, self.foreground[1].astype(np.float16), self.hv, self.types.astype(np.float16))


def synthetic_maps(
    n: int = 800, size_px: int = 1024, seed: int = 0, radius_px: tuple[float, float] = (7.5, 13.5), noise: float = 0.05
) -> RawMaps:
    """Draw about `n` ellipses, some of them touching, and the maps a good network would give for them, plus noise."""
    rng = np.random.default_rng(seed)
    truth = _draw_ellipses(rng, n, size_px, radius_px)
    hv = _distance_maps(truth) + rng.normal(0, noise, (2, size_px, size_px))
    inside = np.clip(np.where(truth > 0, 0.93, 0.06) + rng.normal(0, noise, truth.shape), 0, 1)
    kind = np.concatenate([[0], rng.integers(1, 6, int(truth.max()))])[truth]
    types = np.full((6, size_px, size_px), 0.04) + 0.05 * rng.random((6, size_px, size_px))
    np.put_along_axis(types, kind[None], 0.7, axis=0)
    types /= types.sum(axis=0)
    foreground = np.stack([1 - inside, inside])
    return RawMaps(foreground.astype(np.float32), hv.astype(np.float32), types.astype(np.float32), truth)


def _draw_ellipses(rng: np.random.Generator, n: int, size_px: int, radius_px: tuple[float, float]) -> Int32:
    """Return a label map of ellipses on a shaken grid; a later one takes only free pixels, so neighbours touch."""
    side = int(np.ceil(np.sqrt(n)))
    pitch = size_px / side
    places = rng.permutation(side * side)[:n]
    centres = (np.stack(np.divmod(places, side), axis=1) + 0.5 + rng.uniform(-0.3, 0.3, (n, 2))) * pitch
    labels = np.zeros((size_px, size_px), np.int32)
    reach = int(np.ceil(radius_px[1]))
    for label, (y0, x0) in enumerate(centres, start=1):
        a, b = rng.uniform(*radius_px, 2)
        turn = rng.uniform(0, np.pi)
        top, left = max(int(y0) - reach, 0), max(int(x0) - reach, 0)
        crop = labels[top : int(y0) + reach + 1, left : int(x0) + reach + 1]
        rows, cols = np.indices(crop.shape)
        y, x = rows + top + 0.5 - y0, cols + left + 0.5 - x0
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        crop[((u / a) ** 2 + (v / b) ** 2 <= 1) & (crop == 0)] = label
    return labels


def _distance_maps(labels: Int32) -> NDArray[Any]:
    """Return horizontal and vertical distances to each nucleus's centre, scaled to -1..1 on either side of it."""
    maps = np.zeros((2, *labels.shape))
    pixels = np.flatnonzero(labels)
    number = labels.ravel()[pixels]
    n = int(labels.max()) + 1
    count = np.maximum(np.bincount(number, minlength=n), 1)
    for axis, index in enumerate(np.divmod(pixels, labels.shape[1])[::-1]):
        offset = index - (np.bincount(number, weights=index, minlength=n) / count)[number]
        far = np.full((2, n), 1e-6)
        np.maximum.at(far[0], number, -offset)
        np.maximum.at(far[1], number, offset)
        maps[axis].ravel()[pixels] = offset / np.where(offset < 0, far[0][number], far[1][number])
    return maps


@dataclass(frozen=True, slots=True)
class PlainNucleus:
    """One nucleus of the plain form: bbox, centroid and contour in pixel indices, class and its pixel share."""

    bbox: tuple[int, int, int, int]
    centroid: tuple[float, float]
    contour: NDArray[Any]
    type_id: int
    type_prob: float


def plain_hover(raw: RawMaps, kernel_px: int = 21, min_marker_px: int = 10) -> tuple[Int32, list[PlainNucleus]]:
    """Run the published post-processing step by step, with a mask of the whole tile for every nucleus (the
    baseline)."""
    labels = _plain_labels(raw, kernel_px, min_marker_px)
    type_map = np.argmax(raw.types, axis=0)
    return labels, [_plain_nucleus(labels == i, type_map) for i in np.unique(labels)[1:]]


def _plain_labels(raw: RawMaps, kernel_px: int, min_marker_px: int) -> Int32:
    import cv2
    from scipy import ndimage
    from skimage.segmentation import watershed

    def stretch(image: NDArray[Any]) -> NDArray[Any]:
        out = np.empty(image.shape, np.float32)
        return np.asarray(cv2.normalize(image, out, alpha=0, beta=1, norm_type=cv2.NORM_MINMAX, dtype=cv2.CV_32F))

    blob = (_without_small(ndimage.label(np.argmax(raw.foreground, axis=0))[0], 10) > 0).astype(np.int32)
    across = 1 - stretch(cv2.Sobel(stretch(raw.hv[0]), cv2.CV_64F, 1, 0, ksize=kernel_px))
    down = 1 - stretch(cv2.Sobel(stretch(raw.hv[1]), cv2.CV_64F, 0, 1, ksize=kernel_px))
    energy = np.maximum(np.maximum(across, down) - (1 - blob), 0)
    dist = -cv2.GaussianBlur((1.0 - energy) * blob, (3, 3), 0)
    calm = np.maximum(blob - (energy >= 0.4), 0)
    filled = ndimage.binary_fill_holes(calm).astype(np.uint8)
    opened = cv2.morphologyEx(filled, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    markers = _without_small(ndimage.label(opened)[0], min_marker_px)
    return np.asarray(watershed(dist, markers=markers, mask=blob), np.int32)


def _without_small(labels: NDArray[Any], min_px: int) -> NDArray[Any]:
    size = np.bincount(labels.ravel())
    return np.where((size < min_px)[labels], 0, labels)


def _plain_nucleus(mask: Bool, type_map: NDArray[Any]) -> PlainNucleus:
    import cv2

    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
    crop = mask[top:bottom, left:right].astype(np.uint8)
    moments = cv2.moments(crop)
    contours, _ = cv2.findContours(crop, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    kinds, votes = np.unique(type_map[top:bottom, left:right][crop > 0], return_counts=True)
    order = np.argsort(-votes, kind="stable")
    best = order[1] if kinds[order[0]] == 0 and len(order) > 1 else order[0]
    return PlainNucleus(
        bbox=(top, left, bottom, right),
        centroid=(moments["m10"] / moments["m00"] + left, moments["m01"] / moments["m00"] + top),
        contour=contours[0].reshape(-1, 2) + (left, top),
        type_id=int(kinds[best]),
        type_prob=float(votes[best] / (crop.sum() + 1.0e-6)),
    )


@dataclass(frozen=True, slots=True)
class LibraryNuclei:
    """Nuclei as scikit-image measures them: its table, a contour and the class shares of each."""

    table: dict[str, NDArray[Any]]
    contours: list[NDArray[Any]]
    shares: NDArray[Any]


def library_hover(raw: RawMaps, kernel_px: int = 21, min_marker_px: int = 10) -> LibraryNuclei:
    """Do the published steps and measure each nucleus in its box with scikit-image and OpenCV."""
    import cv2
    from skimage.measure import regionprops, regionprops_table

    labels = _plain_labels(raw, kernel_px, min_marker_px)
    type_map = np.argmax(raw.types, axis=0)
    measured = ("label", "area", "centroid", "perimeter", "axis_major_length", "axis_minor_length", "eccentricity")
    contours, shares = [], []
    for region in regionprops(labels):
        mask = region.image.astype(np.uint8)
        found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        contours.append(found[0].reshape(-1, 2) + region.bbox[1::-1])
        shares.append(np.bincount(type_map[region.slice][region.image], minlength=len(raw.types)) / region.area)
    return LibraryNuclei(regionprops_table(labels, properties=measured), contours, np.array(shares))


def rows(options: BenchOptions) -> Iterator[Row]:
    """Time the plain published form, one of libraries, then ours with outlines, classes and shape features.

    A round runs each form once, so that what else the machine does slows all of them.
    """
    import cv2

    cv2.setNumThreads(1)
    keep_freed_blocks()  # as decoding processes do; the plain forms gain as much from it
    raw = synthetic_maps(options.nuclei or 800)
    forms = _forms(raw, options.nuclei in (None, 800))
    counts = [form.call() for form in forms]  # not timed: it loads what they need
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(options.rounds):
        for form, taken in zip(forms, times, strict=True):
            begin = time.process_time()
            form.call()
            taken.append((time.process_time() - begin) * 1e3)
    first, libraries = median(times[0]), median(times[1])
    for form, taken, count in zip(forms, times, counts, strict=True):
        note = f"{libraries / median(taken):.1f} × scikit-image and OpenCV" if form.target.ratio else ""
        if form.name == OURS:
            note += f", {_identical_share(raw):.2%} of the plain form's nuclei identical"
        yield row(STAGE, form.name, taken, "CPU ms", count, first, form.target, note.removeprefix(", "))


def _forms(raw: RawMaps, usual: bool) -> list[Form]:
    from cellslide.geometry import kernels

    maps = raw.hover_maps()
    published, fixed = HoverDecode(mode="published"), HoverDecode(mode="fixed")
    target = Target(30, 15) if usual else Target()

    def without_kernels() -> int:
        with kernels.left_out():
            return _decode_and_measure(maps, fixed)

    return [
        Form("published, plain form", lambda: len(plain_hover(raw)[1])),
        Form("published, scikit-image and OpenCV", lambda: len(library_hover(raw).contours)),
        Form(OURS, lambda: _decode_and_measure(maps, published), target),
        Form("fixed, cellslide", lambda: _decode_and_measure(maps, fixed), target),
        Form("fixed, cellslide without numba", without_kernels, Target(150) if usual else Target()),
    ]


def _identical_share(raw: RawMaps) -> float:
    from cellslide.nuclei.hover_decode import hover_instances

    return identical(plain_hover(raw)[0], hover_instances(raw.hover_maps(), HoverDecode(mode="published")))


def _decode_and_measure(maps: HoverMaps, config: HoverDecode) -> int:
    from cellslide.geometry.outlines import ring_features
    from cellslide.nuclei.hover_decode import decode_hover

    found = decode_hover(maps, config)
    assert found.contour_xy is not None and found.contour_start is not None
    return len(ring_features(found.contour_xy, found.contour_start, 0.25, 0.25))


def identical(want: Int32, got: Int32) -> float:
    """Return the share of the nuclei of a label map that another has pixel for pixel, under whatever number."""
    number = np.zeros(int(want.max()) + 1, np.int64)
    number[want] = got  # of a nucleus any pixel will do: if it is the same, all of them have one number
    area, other = np.bincount(want.ravel()), np.bincount(got.ravel())
    agree = np.bincount(want[number[want] == got], minlength=len(area))
    ids = np.flatnonzero(area[1:]) + 1
    same = (agree[ids] == area[ids]) & (number[ids] > 0) & (other[number[ids]] == area[ids])
    return float(same.mean()) if len(ids) else 1.0
