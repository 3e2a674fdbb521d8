"""Artefacts of slides, drawn onto crops: places out of focus, ink, folds, bubbles.

A nucleus that nobody could outline any more becomes background, one that is in doubt is not known.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cellslide.train.recipe import AugmentConfig
from cellslide.train.targets import IGNORE
from cellslide.types import Float32, Int32, UInt8

# Blue, black, green and red pens.
INKS = np.array([[30, 40, 120], [25, 25, 30], [20, 90, 60], [150, 30, 40]], np.float32)

Made = tuple[UInt8, Int32]


def add_artefact(rng: np.random.Generator, config: AugmentConfig, image: UInt8, labels: Int32) -> Made:
    """Return image (H, W, 3) and labels (H, W) with an artefact, in a share `artefact_p` of the draws."""
    if config.artefact_p == 0 or rng.random() >= config.artefact_p:
        return image, labels
    changed, left = ARTEFACTS[int(rng.integers(len(ARTEFACTS)))](rng, image, labels)
    return changed, without_remnants(labels, left)


def out_of_focus(rng: np.random.Generator, image: UInt8, labels: Int32) -> Made:
    """Blur a region until nuclei lose their outline; the transition around it is not known."""
    weight = _region(rng, labels.shape)
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(4, 10))
    return _mixed(image, blurred, weight), _hidden(labels, weight)


def ink(rng: np.random.Generator, image: UInt8, labels: Int32) -> Made:
    """Draw pen strokes: an opaque pen hides nuclei, a thin one colours them and they stay."""
    height, width = labels.shape
    stroke = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        points = rng.uniform(-0.2, 1.2, (4, 2)) * (width, height)
        cv2.polylines(
            stroke, [points.astype(np.int32)], False, 1, int(rng.integers(4, max(width // 5, 6))), cv2.LINE_AA
        )
    weight = cv2.GaussianBlur(stroke.astype(np.float32), (0, 0), rng.uniform(0.5, 2.5))
    colour = INKS[int(rng.integers(len(INKS)))] * rng.uniform(0.6, 1.6)
    if rng.random() < 0.5:
        grain = 1 + 0.08 * rng.standard_normal((height, width, 1), np.float32)
        return _mixed(image, np.clip(colour * grain, 0, 255), weight), _hidden(labels, weight)
    tinted = image.astype(np.float32) * np.clip(colour / 255 * 1.6 + 0.15, 0, 1)
    return _mixed(image, tinted, weight), labels


def fold(rng: np.random.Generator, image: UInt8, labels: Int32) -> Made:
    """Lay the tissue double along a band: darker, and what lies in it is not known."""
    height, width = labels.shape
    band = np.zeros((height, width), np.uint8)
    points = rng.uniform(-0.2, 1.2, (3, 2)) * (width, height)
    cv2.polylines(band, [points.astype(np.int32)], False, 1, int(rng.integers(8, max(width // 6, 10))), cv2.LINE_AA)
    weight = cv2.GaussianBlur(band.astype(np.float32), (0, 0), rng.uniform(1, 3))
    other = image[:, ::-1] if rng.random() < 0.5 else image[::-1]
    double = image.astype(np.float32) * cv2.GaussianBlur(other, (0, 0), 2.0) / 255
    return _mixed(image, double, weight), np.where(weight > 0.2, IGNORE, labels).astype(np.int32)


def bubble(rng: np.random.Generator, image: UInt8, labels: Int32) -> Made:
    """Draw the dark rim of an air bubble or of a cover slip; what lies under the rim is not known."""
    height, width = labels.shape
    ring = np.zeros((height, width), np.uint8)
    centre = rng.uniform(-0.5, 1.5, 2) * (width, height)
    radius = int(rng.uniform(0.2, 1.0) * width)
    cv2.circle(ring, (int(centre[0]), int(centre[1])), radius, 1, int(rng.integers(2, 9)), cv2.LINE_AA)
    weight = cv2.GaussianBlur(ring.astype(np.float32), (0, 0), rng.uniform(0.6, 2))
    rim = image.astype(np.float32) * rng.uniform(0.1, 0.6)
    return _mixed(image, rim, weight), np.where(weight > 0.3, IGNORE, labels).astype(np.int32)


ARTEFACTS: tuple[Callable[[np.random.Generator, UInt8, Int32], Made], ...] = (out_of_focus, ink, fold, bubble)


def without_remnants(before: Int32, after: Int32) -> Int32:
    """Return labels in which a nucleus that lost over a third of its pixels is not known: its centre has moved."""
    n = int(before.max(initial=0)) + 1
    whole, left = (np.bincount(labels[labels > 0], minlength=n) for labels in (before, after))
    remnant = left * 3 < whole * 2
    return np.where((after > 0) & remnant[np.maximum(after, 0)], IGNORE, after).astype(np.int32)


def _region(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32:
    """Return a soft half plane or blob as weights (H, W) from 0 to 1."""
    height, width = shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    soft = rng.uniform(6, 25)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        distance = (x - rng.uniform(0, width)) * np.cos(angle) + (y - rng.uniform(0, height)) * np.sin(angle)
    else:
        radius = rng.uniform(0.2, 0.6) * width
        distance = radius - np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height))
    return np.asarray(np.clip(distance / soft + 0.5, 0, 1), np.float32)


def _mixed(image: UInt8, other: UInt8 | Float32, weight: Float32) -> UInt8:
    mixed = image * (1 - weight[..., None]) + np.asarray(other, np.float32) * weight[..., None]
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _hidden(labels: Int32, weight: Float32) -> Int32:
    """Return labels with background where the weight is full, and not known on the way there."""
    return np.where(weight > 0.9, np.minimum(labels, 0), np.where(weight > 0.1, IGNORE, labels)).astype(np.int32)
