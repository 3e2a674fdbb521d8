"""Training targets made from instance labels: HoVer maps, and labels from points."""

from __future__ import annotations

import cv2
import numpy as np

from cellslide.types import Bool, Float32, Float64, Int32, UInt8

IGNORE = -1


def hover_map(labels: Int32) -> Float32:
    """Return the horizontal and vertical distance of each nuclear pixel to its nucleus's centre of mass.

    `labels` is int32 (H, W), above 0 = nucleus; the result is float32 (2, H, W), each side of the centre scaled by its
    own extreme to [-1, 1], background 0, the centre rounded to a pixel (HoVer-Net, Graham et al. 2019, section 3.1).
    """
    out = np.zeros((2, *labels.shape), np.float32)
    rows, cols = np.nonzero(labels > 0)
    if not len(rows):
        return out
    ids = labels[rows, cols]
    count = np.maximum(np.bincount(ids), 1)
    for channel, index in enumerate((cols, rows)):
        centre = np.floor(np.bincount(ids, index) / count + 0.5)
        offset = index - centre[ids]
        low, high = np.zeros(len(count)), np.zeros(len(count))
        np.minimum.at(low, ids, offset)
        np.maximum.at(high, ids, offset)
        reach = np.where(offset < 0, -low[ids], high[ids])
        out[channel, rows, cols] = offset / np.maximum(reach, 1)
    return out


def point_labels(image: UInt8, xy: Float64, radius_px: float, background_px: float) -> Int32:
    """Return labels of what points make sure: k + 1 around point k, 0 where far and bright, IGNORE elsewhere.

    `image` is uint8 (H, W, 3), `xy` float64 (N, 2) in its pixels. Far is beyond `background_px` of every point; bright
    is above the image's Otsu threshold, since a far dark pixel may be a nucleus that nobody marked.
    """
    height, width = image.shape[:2]
    labels = np.full((height, width), IGNORE, np.int32)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
    seeds = np.ones((height, width), np.uint8)
    inside = np.floor(xy).astype(int)
    inside = inside[((inside >= 0) & (inside < (width, height))).all(1)]
    seeds[inside[:, 1], inside[:, 0]] = 0
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 5) if len(inside) else np.full((height, width), np.inf)
    labels[(distance > background_px) & (grey > threshold)] = 0
    ys, xs = np.mgrid[0:height, 0:width]
    for k, (x, y) in enumerate(xy):
        box = np.s_[
            max(int(y - radius_px - 1), 0) : int(y + radius_px + 2),
            max(int(x - radius_px - 1), 0) : int(x + radius_px + 2),
        ]
        near = (xs[box] + 0.5 - x) ** 2 + (ys[box] + 0.5 - y) ** 2 <= radius_px**2
        labels[box][near] = k + 1
    return labels


def single_nuclei(labels: Int32) -> Bool:
    """Return bool (n + 1,): label k is alone in its blob and the blob is convex, so its outline needs no cut.

    Blobs are 8-connected components of `labels > 0`; row 0, the background, is True.
    """
    n = int(labels.max(initial=0))
    _, blobs = cv2.connectedComponents((labels > 0).astype(np.uint8), connectivity=8)
    pairs = np.unique(np.stack([blobs[labels > 0], labels[labels > 0]]), axis=1)
    per_blob = np.bincount(pairs[0], minlength=int(blobs.max()) + 1)
    single = np.zeros(n + 1, np.bool_)
    single[0] = True
    for blob, label in pairs.T[per_blob[pairs[0]] == 1]:
        single[label] = _solidity(blobs == blob) >= 0.9
    return single


def _solidity(mask: Bool) -> float:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(contours, key=len)
    hull = cv2.contourArea(cv2.convexHull(outline))
    return cv2.contourArea(outline) / hull if hull > 0 else 1.0
