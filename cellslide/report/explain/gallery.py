"""Cells as one self-contained HTML page: their pictures with outline, scale bar and heat, and both paths' answers.

Nothing here knows a network: pictures, heat maps and probabilities come as arrays. The page loads nothing from
elsewhere and runs no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellslide.report.rendering import part, template
from cellslide.store.atomic import beside
from cellslide.types import ClassSpec, Float32, Float64, UInt8, hex_color

JPEG_QUALITY = 88
# Heat covers the tissue by at most this share, so that what lies below stays visible.
HEAT_ALPHA = 0.6
TOP_CLASSES = 3
# A scale bar is the longest of these that takes at most this share of the picture.
SCALE_BARS_UM = (100, 50, 20, 10, 5, 2, 1)
SCALE_BAR_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Picture:
    """A square crop to look at.

    image       uint8 (H, H, 3) RGB.
    um_per_px   size of its pixels in µm.
    centre_xy   the nucleus's centre in pixels of the picture.
    outline_xy  its outline (P, 2) in pixels of the picture, or None for a point.
    heat        float32 (h, h) of any size over the same square, 0..1, or None for the plain picture.
    frame_px    edge of a square about the centre that is drawn as well (the other crop's field), or None.
    """

    caption: str
    image: UInt8
    um_per_px: float
    centre_xy: tuple[float, float]
    outline_xy: Float64 | None = None
    heat: Float32 | None = None
    frame_px: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Probabilities (K,) of one source, drawn as the bars of its most probable classes."""

    title: str
    prob: Float32
    classes: tuple[ClassSpec, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One cell: what was decided, what each path said, and where it looked.

    xy is the centre in level-0 pixels; class_name what was decided, class_top the most probable class; gate the weight
    of the global path, NaN where that path did not run. `pictures` are rows; a shorter row ends where the longest does.
    """

    cell_id: int
    uuid: str
    xy: tuple[float, float]
    class_name: str
    class_top: str
    class_prob: float
    gate: float
    path: str
    organ: str
    bars: tuple[Bars, ...]
    pictures: tuple[tuple[Picture, ...], ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands above the cells: title, how they were chosen, what the pictures show, and warnings."""

    title: str
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def write_gallery(path: Path, heading: Heading, cards: Iterable[Card]) -> Path:
    """Write the page; it is renamed into place when it is whole. Cards are written as they come, one in memory."""
    with beside(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write(template("explain.html").render(heading=heading, style=part("explain.css")))
        for card in cards:
            file.write(_card(card))
        file.write("</body></html>\n")
    return path


def _card(card: Card) -> str:
    return template("explain_cell.html").render(
        card=card,
        prob=f"{card.class_prob:.3f}" if np.isfinite(card.class_prob) else "(no probability)",
        gate=card.gate if np.isfinite(card.gate) else None,
        bars=[(bars.title, _bars(bars)) for bars in card.bars],
        rows=[[_figure(picture) for picture in row] for row in card.pictures],
    )


def _bars(bars: Bars) -> list[tuple[str, str, float]] | None:
    """Return name, colour and probability of the most probable classes, None where the path did not run."""
    if not np.isfinite(bars.prob).all():
        return None
    # By probability, then by the order of the classes.
    order = np.argsort(-bars.prob, kind="stable")[:TOP_CLASSES]
    return [(bars.classes[k].name, hex_color(bars.classes[k].color), float(bars.prob[k])) for k in order]


def _figure(picture: Picture) -> dict[str, str | int]:
    size = picture.image.shape[0]
    shown = picture.image if picture.heat is None else overlay_heat(picture.image, picture.heat)
    marks = f'<g class="mark">{_marks(picture, size)}</g>{_scale_bar(size, picture.um_per_px)}'
    return {"caption": picture.caption, "image": data_uri(shown), "size": size, "marks": marks}


def _marks(picture: Picture, size: int) -> str:
    """Return the outline, or a cross where there is none, dark below bright so that it shows on any tissue."""
    x, y = picture.centre_xy
    if picture.outline_xy is None:
        arm = size / 40
        shape = f"M{x - arm:.2f},{y:.2f}H{x + arm:.2f}M{x:.2f},{y - arm:.2f}V{y + arm:.2f}"
    else:
        shape = "M" + "L".join(f"{px:.2f},{py:.2f}" for px, py in picture.outline_xy) + "Z"
    if picture.frame_px is not None:
        half = picture.frame_px / 2
        shape += f"M{x - half:.2f},{y - half:.2f}h{2 * half:.2f}v{2 * half:.2f}h{-2 * half:.2f}Z"
    return "".join(
        f'<path d="{shape}" fill="none" stroke="{color}" stroke-width="{width * size / 188:.2f}"/>'
        for color, width in (("#000", 2.2), ("#ffe600", 1.1))
    )


def _scale_bar(size: int, um_per_px: float) -> str:
    um = scale_bar_um(size * um_per_px)
    length, unit = um / um_per_px, size / 188
    left, top = 7 * unit, size - 11 * unit
    return (
        f'<g font-size="{11 * unit:.2f}" font-family="sans-serif"><rect x="{left - 3 * unit:.2f}" '
        f'y="{top - 14 * unit:.2f}" width="{max(length, 30 * unit) + 6 * unit:.2f}" height="{21 * unit:.2f}" '
        f'fill="#fff" opacity=".75"/><rect x="{left:.2f}" y="{top:.2f}" width="{length:.2f}" height="{3 * unit:.2f}"/>'
        f'<text x="{left:.2f}" y="{top - 3 * unit:.2f}">{um} µm</text></g>'
    )


def scale_bar_um(width_um: float) -> int:
    """Return the length (µm) of the scale bar of a picture `width_um` wide."""
    fits = (um for um in SCALE_BARS_UM if um <= SCALE_BAR_SHARE * width_um)
    return next(fits, SCALE_BARS_UM[-1])


def overlay_heat(image: UInt8, heat: Float32) -> UInt8:
    """Return the picture with heat (h, w), 0..1, over it: the warmer, the less tissue shows; cold is untouched."""
    height, width = image.shape[:2]
    full = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    bgr = cv2.applyColorMap(np.rint(full * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    alpha = (HEAT_ALPHA * full)[..., None]
    return np.rint(image * (1 - alpha) + bgr[..., ::-1] * alpha).astype(np.uint8)


def data_uri(image: UInt8) -> str:
    """Return an image uint8 (H, W, 3) as the data URI of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shrink(image: UInt8, most_px: int) -> UInt8:
    """Return a square picture with edges of at most `most_px`, by area means; never enlarged."""
    if image.shape[0] <= most_px:
        return np.ascontiguousarray(image)
    small: NDArray[np.uint8] = np.asarray(cv2.resize(image, (most_px, most_px), interpolation=cv2.INTER_AREA), np.uint8)
    return small
