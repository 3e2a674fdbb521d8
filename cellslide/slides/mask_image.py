"""Mask images of a whole slide, of any mode: which of their pixels are tissue.

Black is glass and everything else tissue. A palette's colours decide, not its indices; what is transparent, negative or
no number is no tissue. Grey levels, as lossy formats and resampling leave them, are parted at half of the range.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellslide.errors import UsageError
from cellslide.types import Bool, SlideInfo

MASK_ASPECT = 0.05
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# A mask has few values; more, up to the upper half of eight bits, are levels of grey.
MOST_VALUES = 8
# Exif's tag for a picture that is to be turned before it is shown.
ORIENTATION = 0x0112

_log = logging.getLogger(__name__)


def load_mask(path: Path, info: SlideInfo) -> tuple[Bool, tuple[float, float]]:
    """Return a mask (h, w) and level-0 pixels per cell (x, y) from an image of the whole slide, any size.

    Raises UsageError for what is no image, has another shape than the slide, or says in no way what is tissue.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_page(image, path)
                mask = _tissue(image, path)
    except (
        OSError, ValueError, SyntaxError, TypeError, KeyError, OverflowError, EOFError, MemoryError,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise UsageError(f"--tissue-mask {path}: cannot be read as an image: {str(error)[:200]}") from error
    height, width = mask.shape
    expected = info.height_px * width / info.width_px
    if abs(height - expected) > max(1.0, MASK_ASPECT * expected):
        raise UsageError(
            f"--tissue-mask {path}: {width} x {height} has not the shape of {info.path.name}, "
            f"{info.width_px} x {info.height_px}; it must show the whole slide"
        )
    return mask, (info.width_px / width, info.height_px / height)


def _check_page(image: Image.Image, path: Path) -> None:
    """Raise UsageError for pictures that are to be turned, and for files whose first page is not their largest."""
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        raise UsageError(f"--tissue-mask {path}: its Orientation tag asks for it to be turned; save it as it is shown")
    first = image.size
    for page in range(1, min(getattr(image, "n_frames", 1), 64)):
        image.seek(page)
        if image.size[0] * image.size[1] > first[0] * first[1]:
            raise UsageError(f"--tissue-mask {path}: page {page} is larger than the first; give one page alone")
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)


def _tissue(image: Image.Image, path: Path) -> Bool:
    lossy = image.format in LOSSY
    if image.mode in GREY_MODES:
        return _positive(np.asarray(image), lossy, path)
    indices = np.asarray(image) if image.mode in ("P", "PA") else None
    transparent = image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info
    rgba = np.asarray(image.convert("RGBA"))
    values: NDArray[Any] = rgba[..., :3].max(axis=2)
    if indices is not None and (indices.max(initial=0) != indices.min(initial=255)) and _is_one_color(rgba):
        raise UsageError(f"--tissue-mask {path}: its palette gives all values one colour; save it as grey levels")
    # Shades of colours are many in a photograph and few in a mask, however dark.
    few = len(np.unique(rgba[..., :3].reshape(-1, 3)[:: max(1, values.size // 200_000)], axis=0)) <= 64
    tissue = values > 0 if few and not lossy else _positive(values, lossy, path)
    return _opaque(tissue, rgba[..., 3], path) if transparent else tissue


def _is_one_color(rgba: NDArray[Any]) -> bool:
    return bool((rgba == rgba[0, 0]).all())


def _opaque(tissue: Bool, alpha: NDArray[Any], path: Path) -> Bool:
    """Return the tissue that is not transparent; alike everywhere, the alpha says nothing."""
    low, high = int(alpha.min(initial=255)), int(alpha.max(initial=0))
    if high == 0:
        raise UsageError(f"--tissue-mask {path}: transparent everywhere; save it in black and white")
    if low == high:
        return tissue
    visible = alpha >= 128
    if visible.any() and not tissue[visible].any():
        raise UsageError(
            f"--tissue-mask {path}: black wherever it is not transparent, so that only its transparency tells tissue "
            "from glass; save it in black and white"
        )
    kept: Bool = tissue & visible
    return kept


def _positive(values: NDArray[Any], lossy: bool, path: Path) -> Bool:
    """Return which values are tissue: those above 0, or of levels of grey those in the upper half."""
    if values.dtype == np.bool_:
        return np.asarray(values, np.bool_)
    real = np.isfinite(values)
    if not real.all():
        _log.info("--tissue-mask %s: %.3g %% of it is no number; left out", path, 100 * (1 - real.mean()))
        values = np.where(real, values, 0)
    if (values < 0).any():
        _log.info("--tissue-mask %s: %.3g %% of it is below 0; left out", path, 100 * (values < 0).mean())
    top = float(values.max(initial=0))
    distinct = np.unique(values[values > 0])
    if lossy and 0 < top < 64:
        raise UsageError(
            f"--tissue-mask {path}: values up to {top:g} in a lossy format are not told from its noise; save it as PNG"
        )
    half = _half(values.dtype, distinct, top, lossy)
    if half is not None:
        _log.info("--tissue-mask %s: levels of grey; what is at least %g is tissue", path, half)
        return np.asarray(values >= half, np.bool_)
    if len(distinct) > 1:
        few = ", ".join(f"{value:g}" for value in distinct[:6]) + (", ..." if len(distinct) > 6 else "")
        _log.warning("--tissue-mask %s: has the values %s; all of them are taken for tissue", path, few)
    return np.asarray(values > 0, np.bool_)


def _half(dtype: np.dtype[Any], distinct: NDArray[Any], top: float, lossy: bool) -> float | None:
    """Return half of the range of levels of grey, or None for values that are labels."""
    if lossy:
        return 128.0
    if len(distinct) <= MOST_VALUES:
        return None
    if not np.issubdtype(dtype, np.integer) and (distinct != np.round(distinct)).any():
        return 0.5 if top <= 1 else 128.0 if 128 <= top <= 255 else top / 2
    return 128.0 if 128 <= top <= 255 else None
