"""Reliability diagrams: how often nuclei of a given confidence are right, a panel for each rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellslide.evaluate.classification import ReliabilityBins
from cellslide.store.atomic import beside

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

INK = (40, 40, 48)
PALE = (206, 206, 214)
RIGHT = (66, 120, 190)
GAP = (222, 110, 86)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a panel in pixels: the square plot, the histogram below it, margins and text."""

    plot: int = 380
    histogram: int = 80
    left: int = 84
    top: int = 64
    between: int = 36
    bottom: int = 74
    text: int = 20

    @property
    def panel(self) -> tuple[int, int]:
        """Width and height of a panel."""
        return self.left + self.plot + 30, self.top + self.plot + self.between + self.histogram + self.bottom


def draw_reliability(panels: Mapping[str, ReliabilityBins], layout: Layout | None = None) -> Image:
    """Return one picture, a panel per title: accuracy of each bin, its gap to the diagonal, and the share of nuclei.

    Raises ValueError without a panel.
    """
    from PIL import Image, ImageDraw

    if not panels:
        raise ValueError("nothing to draw")
    layout = layout or Layout()
    width, height = layout.panel
    picture = Image.new("RGB", (width * len(panels), height), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for i, (title, bins) in enumerate(panels.items()):
        _panel(draw, i * width, title, bins, layout)
    return picture


def write_reliability(path: Path, panels: Mapping[str, ReliabilityBins]) -> None:
    """Draw the panels to a PNG file, in one step; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as scratch:
        draw_reliability(panels).save(scratch, format="PNG")


def _panel(draw: ImageDraw, x0: int, title: str, bins: ReliabilityBins, layout: Layout) -> None:
    left, top, size = x0 + layout.left, layout.top, layout.plot
    total = int(bins.n.sum())
    gaps = float(np.abs(bins.n_right - bins.confidence_sum).sum())
    heading = f"{title}: ECE {gaps / total:.3f}, {total:,} nuclei" if total else f"{title}: no nuclei"
    _text(draw, (left + size / 2, top - 34), heading, layout)
    edges = np.linspace(0, size, len(bins.n) + 1)
    for k, (n, accuracy, sure) in enumerate(zip(bins.n, bins.accuracy, bins.confidence, strict=True)):
        if n:
            _bar(draw, left + edges[k], left + edges[k + 1], top + size, size, float(accuracy), float(sure))
    draw.line([(left, top + size), (left + size, top)], fill=INK, width=2)
    _axes(draw, left, top, layout)
    _shares(draw, left, top + size + layout.between, bins, layout)


def _bar(draw: ImageDraw, x0: float, x1: float, base: float, size: int, accuracy: float, sure: float) -> None:
    """Draw a bin: a bar as high as its accuracy, and from there to its mean confidence the gap."""
    draw.rectangle([x0 + 1, base - accuracy * size, x1 - 1, base], fill=RIGHT)
    low, high = sorted((accuracy, sure))
    draw.rectangle([x0 + 1, base - high * size, x1 - 1, base - low * size], outline=GAP, width=3)


def _axes(draw: ImageDraw, left: int, top: int, layout: Layout) -> None:
    size = layout.plot
    draw.rectangle([left, top, left + size, top + size], outline=INK, width=1)
    for tick in (0.0, 0.5, 1.0):
        _text(draw, (left - 26, top + size * (1 - tick)), f"{tick:g}", layout)


def _shares(draw: ImageDraw, left: int, top: int, bins: ReliabilityBins, layout: Layout) -> None:
    size, height = layout.plot, layout.histogram
    edges = np.linspace(0, size, len(bins.n) + 1)
    highest = max(int(bins.n.max()), 1)
    for k, n in enumerate(bins.n):
        bar = float(n) / highest * height
        draw.rectangle([left + edges[k] + 1, top + height - bar, left + edges[k + 1] - 1, top + height], fill=PALE)
    draw.line([(left, top + height), (left + size, top + height)], fill=INK, width=1)
    share = highest / max(int(bins.n.sum()), 1)
    _text(draw, (left - 34, top + 8), f"{share:.0%}", layout)
    for tick in (0.0, 0.5, 1.0):
        _text(draw, (left + size * tick, top + height + 16), f"{tick:g}", layout)
    _text(draw, (left + size / 2, top + height + 44), "share right against probability", layout)


def _text(draw: ImageDraw, xy: tuple[float, float], text: str, layout: Layout) -> None:
    from PIL import ImageFont

    font: Any = ImageFont.load_default(layout.text)
    width = draw.textlength(text, font)
    if width > layout.plot + layout.left:
        font = ImageFont.load_default(layout.text * (layout.plot + layout.left) / width)
    draw.text(xy, text, fill=INK, font=font, anchor="mm")
