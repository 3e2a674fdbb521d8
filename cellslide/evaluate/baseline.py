"""A classical segmenter to compare with: haematoxylin channel, Otsu threshold, watershed on the distance transform.

It knows no training data. Its few lengths are in µm, so that it takes images of any pixel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cellslide.types import Bool, Float32, Int32, UInt8


@dataclass(frozen=True, slots=True)
class BaselineConfig:
    """Lengths in µm and areas in µm² of the classical segmenter.

    smooth_um         Gaussian sigma on the haematoxylin channel before the threshold.
    opening_um        radius of the opening that cuts threads between nuclei.
    min_area_um2      smallest object that is kept, also the largest hole that is filled.
    seed_smooth_um    Gaussian sigma on the distance transform.
    seed_depth_um     how far the distance must fall between two nuclei that touch (h-maxima).
    """

    smooth_um: float = 0.5
    opening_um: float = 0.5
    min_area_um2: float = 7.0
    seed_smooth_um: float = 0.5
    seed_depth_um: float = 0.2


def segment_classical(image: UInt8, mpp: float, config: BaselineConfig | None = None) -> Int32:
    """Return the nuclei of an image (H, W, 3) RGB at `mpp` µm/px as an int32 label map (H, W), 0 = background."""
    config = config or BaselineConfig()
    foreground = _foreground(haematoxylin(image), mpp, config)
    return _split(foreground, mpp, config)


def haematoxylin(image: UInt8) -> Float32:
    """Return the haematoxylin density, float32 (H, W), by colour deconvolution (Ruifrok and Johnston 2001)."""
    from skimage.color import rgb2hed

    return np.asarray(rgb2hed(image)[..., 0], np.float32)


def _foreground(density: Float32, mpp: float, config: BaselineConfig) -> Bool:
    from skimage.filters import threshold_otsu
    from skimage.morphology import disk

    smooth = ndimage.gaussian_filter(density, config.smooth_um / mpp)
    # A blank image has one grey value, which Otsu cannot part; it holds no nuclei.
    if float(np.ptp(smooth)) < 1e-6:
        return np.zeros(density.shape, np.bool_)
    mask = smooth > threshold_otsu(smooth)  # type: ignore[no-untyped-call]
    radius = round(config.opening_um / mpp)
    if radius:
        mask = ndimage.binary_opening(mask, disk(radius))  # type: ignore[no-untyped-call]
    min_area = max(round(config.min_area_um2 / mpp**2), 1)
    filled = ~_without_small(~mask, min_area)
    return _without_small(filled, min_area)


def _without_small(mask: Bool, min_area_px: int) -> Bool:
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= min_area_px
    large[0] = False
    return np.asarray(large[labels], np.bool_)


def _split(foreground: Bool, mpp: float, config: BaselineConfig) -> Int32:
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    distance = ndimage.distance_transform_edt(foreground)
    smooth = ndimage.gaussian_filter(distance, config.seed_smooth_um / mpp)
    peaks = h_maxima(smooth, config.seed_depth_um / mpp).astype(bool) & foreground  # type: ignore[no-untyped-call]
    # A blob too shallow for a peak of its own is one nucleus, not none: all of it is the seed.
    blobs, n_blobs = ndimage.label(foreground)
    seedless = np.bincount(blobs[peaks], minlength=n_blobs + 1) == 0
    seedless[0] = False
    seeds, _ = ndimage.label(peaks | seedless[blobs], np.ones((3, 3)))
    return np.asarray(watershed(-smooth, seeds, mask=foreground), np.int32)  # type: ignore[no-untyped-call]
