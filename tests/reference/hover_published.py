"""Label maps as HoVer-Net and CellViT record their nuclei, for comparison with their results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellslide.nuclei.hover_decode import compact, sums
from cellslide.types import Bool, Float64, Int32, Int64


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
    number, n = compact(labels.ravel()[pixels])
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
    inside = [sums(axis, number, n) - count * corner_xy[:, i] for i, axis in enumerate((col, row))]
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
