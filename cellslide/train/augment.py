"""Augmentation in numpy and OpenCV; every function draws from the generator it is given and from nothing else."""

from __future__ import annotations

import cv2
import numpy as np

from cellslide.train.recipe import AugmentConfig
from cellslide.train.targets import IGNORE
from cellslide.types import Float32, Float64, Int32, UInt8

# Optical densities of haematoxylin, eosin and a residual, one a row (Ruifrok & Johnston 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
UNMIX = np.linalg.inv(STAINS)
DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)


def crop_matrix(rng: np.random.Generator, config: AugmentConfig, centre_xy: Float64, crop_px: int) -> Float64:
    """Draw flips, rotation, scale and shear as one affine map (2, 3) from crop pixels to source pixels.

    The crop's centre falls on `centre_xy`; only right angles and flips leave the pixels as they are.
    """
    angle = rng.integers(4) * np.pi / 2
    if rng.random() < config.rotate_p:
        angle += rng.uniform(-np.pi / 4, np.pi / 4)
    scale = np.exp(rng.uniform(*np.log(config.scale))) if rng.random() < config.scale_p else 1.0
    shear = rng.uniform(-config.shear, config.shear, 2) if rng.random() < config.rotate_p else np.zeros(2)
    flip = np.where(rng.random(2) < 0.5, -1.0, 1.0) if config.flip else np.ones(2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.array([[1, shear[0]], [shear[1], 1]]) @ np.diag(flip) / scale
    # In centre-of-pixel indices, which warpAffine uses, the middle of the crop is (crop - 1) / 2.
    middle = np.full(2, (crop_px - 1) / 2)
    return np.column_stack([linear, np.round(centre_xy - 0.5 - linear @ middle, 6)])


def warp(image: UInt8, labels: Int32, matrix: Float64, crop_px: int) -> tuple[UInt8, Int32]:
    """Cut a crop by an affine map from crop to source pixels.

    The image is sampled linearly and mirrored outside, labels are nearest and IGNORE outside.
    """
    size = (crop_px, crop_px)
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    linear = cv2.warpAffine(image, matrix, size, flags=how, borderMode=cv2.BORDER_REFLECT_101)
    # Float32 holds every label below 2**24 exactly, and warpAffine takes no int32.
    nearest = cv2.warpAffine(
        labels.astype(np.float32), matrix, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT, borderValue=float(IGNORE),
    )  # fmt: skip
    return linear, nearest.astype(np.int32)


def pale_nuclei(rng: np.random.Generator, config: AugmentConfig, image: UInt8, labels: Int32) -> UInt8:
    """Bleach the inside of some nuclei towards their surroundings, leaving a rim and clumps.

    Vesicular nuclei are rare in small training sets and common in prostate and kidney.

    `image` is uint8 (H, W, 3), `labels` int32 (H, W); nothing is drawn where `pale_p` is 0.
    """
    if config.pale_p == 0 or rng.random() >= config.pale_p:
        return image
    nuclei = np.maximum(labels, 0)
    strength = rng.uniform(0.2, 0.9, int(nuclei.max()) + 1) * (
        rng.random(int(nuclei.max()) + 1) < rng.uniform(0.2, 0.9)
    )
    strength[0] = 0
    rim = np.zeros(nuclei.shape, np.bool_)
    rim[:-1] |= nuclei[:-1] != nuclei[1:]
    rim[:, :-1] |= nuclei[:, :-1] != nuclei[:, 1:]
    depth = cv2.distanceTransform(((nuclei > 0) & ~rim).astype(np.uint8), cv2.DIST_L2, 3)
    clumps = cv2.GaussianBlur(rng.random(nuclei.shape, np.float32), (0, 0), 1.2)
    clumps = np.clip((clumps - 0.5) / (2 * clumps.std()) + 0.8, 0, 1)
    weight = (strength[nuclei] * np.clip(depth / rng.uniform(1.5, 3.5), 0, 1) * clumps).astype(np.float32)[..., None]
    outside = image[nuclei == 0]
    around = outside.mean(0) if len(outside) else np.full(3, 220.0)
    target = around + rng.uniform(0, 0.7) * (245 - around)
    return _to_uint8(image * (1 - weight) + target.astype(np.float32) * weight)


def jitter_stain(rng: np.random.Generator, config: AugmentConfig, image: UInt8) -> UInt8:
    """Scale and shift the amounts of haematoxylin, eosin and residual (Tellez et al. 2018)."""
    scale = np.exp(rng.uniform(-config.he_scale, config.he_scale, 3))
    shift = rng.uniform(-config.he_shift, config.he_shift, 3)
    mix = (UNMIX @ np.diag(scale) @ STAINS).astype(np.float32)
    density = DENSITY[image].reshape(-1, 3) @ mix + (shift @ STAINS).astype(np.float32)
    return _to_uint8((np.exp(-density) * 256 - 1).reshape(image.shape))


def jitter_color(rng: np.random.Generator, config: AugmentConfig, image: UInt8) -> UInt8:
    """Change gamma, contrast and brightness by a table, then saturation and hue."""
    gamma = np.exp(rng.uniform(-config.gamma, config.gamma))
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    brightness = rng.uniform(-config.brightness, config.brightness)
    table = (np.arange(256) / 255) ** gamma
    table = (table - 0.6) * contrast + 0.6 + brightness * 0.5
    image = _to_uint8(table * 255)[image]
    saturation, hue = 1 + rng.uniform(-config.saturation, config.saturation), rng.uniform(-config.hue, config.hue)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(hue * 256) % 256)
    hsv[..., 1] = _to_uint8(np.arange(256) * saturation)[hsv[..., 1]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def degrade(rng: np.random.Generator, config: AugmentConfig, image: UInt8) -> UInt8:
    """Blur or sharpen, add noise, and compress as JPEG, each by chance."""
    if rng.random() < config.blur_p:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(*config.blur_sigma))
    elif rng.random() < config.sharpen_p:
        soft = cv2.GaussianBlur(image, (0, 0), 1.0)
        amount = rng.uniform(0.3, 1.2)
        image = cv2.addWeighted(image, 1 + amount, soft, -amount, 0)
    if rng.random() < config.noise_p:
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, config.noise_sigma))
        image = _to_uint8(image + noise)
    if rng.random() < config.jpeg_p:
        quality = int(rng.uniform(*config.jpeg_quality))
        _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = np.ascontiguousarray(np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
    return image


def recolor(rng: np.random.Generator, config: AugmentConfig, image: UInt8) -> UInt8:
    """Apply stain, colour and degradation steps to uint8 (H, W, 3) RGB; geometry stays."""
    if rng.random() < config.stain_p:
        image = jitter_stain(rng, config, image)
    if rng.random() < config.color_p:
        image = jitter_color(rng, config, image)
    return degrade(rng, config, image)


def _to_uint8(values: Float32 | Float64) -> UInt8:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
