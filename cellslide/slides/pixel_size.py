"""The pixel size of a slide: where a file says it, and when it is believed. It is never guessed.

Order: the flag or the list, the vendor's property, OME PhysicalSize, TIFF resolution with its unit. The first of these
that is there decides; if it cannot be right, the slide is refused rather than read at the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cellslide.errors import PixelSizeError
from cellslide.types import MppSource

SMALLEST_UM, LARGEST_UM = 0.05, 2.0
MAX_ANISOTROPY = 0.05
MAX_DISAGREEMENT = 0.05
# Scanners' objectives give 10 µm divided by their power, within less than this factor.
UM_AT_1X, MAX_POWER_RATIO = 10.0, 1.7

# OpenSlide vendors whose "mpp" is nothing but the TIFF resolution, with a missing unit read as inch.
_TIFF_VENDORS = frozenset({"generic-tiff"})
_UM_PER_UNIT = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
}
_TIFF_UNITS = {2: ("inch", 25_400.0), 3: ("cm", 10_000.0)}
_REMEDY = "give --mpp, for example --mpp 0.25 (40x is often 0.25, 20x 0.5)"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PixelSize:
    """A pixel size in µm as a source states it; `said` quotes the source, x or y is None where that is no length.

    power  magnification of the objective that the same file states, if it does.
    """

    x: float | None
    y: float | None
    source: MppSource
    said: str
    power: float | None = None

    @property
    def contradiction(self) -> str | None:
        """Say how far this is from what the objective gives, or None; 40x is about 0.25 µm, 20x about 0.5."""
        if not self.power or self.x is None or self.y is None:
            return None
        ratio = (self.x + self.y) / 2 * self.power / UM_AT_1X
        if 1 / MAX_POWER_RATIO <= ratio <= MAX_POWER_RATIO:
            return None
        return f"{self.said}, but its objective is {self.power:g}x, which is about {UM_AT_1X / self.power:.2g} µm"

    @property
    def is_scanner_default(self) -> bool:
        """True for sources that writers fill in without knowing: TIFF resolution, and 1 µm sharp."""
        return self.source == "tiff" or self.x == self.y == 1.0

    @property
    def problem(self) -> str | None:
        """Say why this cannot be the pixel size of a slide, or None."""
        if self.x is None or self.y is None:
            return f"{self.said}, which is not a length"
        if not all(SMALLEST_UM <= value <= LARGEST_UM for value in (self.x, self.y)):
            return f"{self.said}, which is {self.x:.4g} x {self.y:.4g} µm and outside {SMALLEST_UM} to {LARGEST_UM}"
        if abs(self.x / self.y - 1) > MAX_ANISOTROPY:
            return f"{self.said}, which is {self.x:.4g} x {self.y:.4g} µm: x and y differ by more than 5 %"
        return self.contradiction if self.is_scanner_default else None


def choose(
    path: Path, found: PixelSize | None, mpp: float | None, source: MppSource = "flag"
) -> tuple[float, float, MppSource]:
    """Return (mpp_x, mpp_y, source): `mpp` from the flag or the list if given, else what was found in the file.

    Warns when `mpp` differs by more than 5 % from a believable size in the file, and when the size used contradicts the
    objective; a size that writers fill in without knowing is refused there. Raises PixelSizeError, which names the
    file, the value found and the flag.
    """
    if mpp is not None:
        given = PixelSize(mpp, mpp, source, f"{'--mpp' if source == 'flag' else 'mpp in the list'} is {mpp:g}")
        if given.problem:
            raise PixelSizeError(f"{path}: {given.problem}; {_REMEDY}")
        words = replace(given, power=found.power if found else None).contradiction
        if not _warn_if_far(path, found, mpp) and words:
            _log.warning("%s: %s; check it", path, words)
        return mpp, mpp, source
    if found is None:
        raise PixelSizeError(f"{path}: no pixel size in the file; {_REMEDY}")
    if found.problem or found.x is None or found.y is None:
        raise PixelSizeError(f"{path}: no usable pixel size: {found.problem}; {_REMEDY}")
    if found.contradiction:
        _log.warning("%s: %s; it is used as it is, --mpp wins over it", path, found.contradiction)
    return found.x, found.y, found.source


def _warn_if_far(path: Path, found: PixelSize | None, mpp: float) -> bool:
    if found is None or found.problem or found.x is None or found.y is None:
        return False
    far = max(abs(mpp / found.x - 1), abs(mpp / found.y - 1)) > MAX_DISAGREEMENT
    if far:
        _log.warning("%s: %g µm per pixel is used, but the file says otherwise: %s", path, mpp, found.said)
    return far


def from_openslide(properties: Mapping[str, str]) -> PixelSize | None:
    """Return what OpenSlide read from a vendor's own field, or None; TIFF resolution is read from the file instead."""
    if properties.get("openslide.vendor") in _TIFF_VENDORS:
        return None
    texts = properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
    if texts == (None, None):
        return None
    vendor = properties.get("openslide.vendor", "vendor")
    return PixelSize(_number(texts[0]), _number(texts[1]), "vendor", f"{vendor} says {texts[0]} x {texts[1]} µm")


def from_ome(xml: str, width_px: int, height_px: int) -> PixelSize | None:
    """Return PhysicalSizeX and Y of the OME image of this size, or None if it states none."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    for pixels in root.iter():
        size = pixels.get("SizeX"), pixels.get("SizeY")
        if pixels.tag.rpartition("}")[2] == "Pixels" and size == (str(width_px), str(height_px)):
            return from_pixels(pixels)
    return None


def from_pixels(pixels: ElementTree.Element) -> PixelSize | None:
    """Return PhysicalSizeX and Y of an OME Pixels element, or None if it states none."""
    lengths: list[float | None] = []
    said = []
    for axis in "XY":
        text, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        number, um = _number(text), _UM_PER_UNIT.get(unit)
        lengths.append(number * um if number is not None and um is not None else None)
        said.append(f"{text} {unit}")
    if pixels.get("PhysicalSizeX") is None and pixels.get("PhysicalSizeY") is None:
        return None
    return PixelSize(lengths[0], lengths[1], "ome", f"OME PhysicalSize says {' x '.join(said)}")


def from_aperio(description: str) -> tuple[PixelSize | None, float | None]:
    """Return the pixel size and the objective's power that an Aperio description states, if it does."""
    pairs = (part.partition("=") for part in description.split("|")[1:])
    said = {name.strip(): value.strip() for name, _, value in pairs}
    mpp, power = said.get("MPP"), _number(said.get("AppMag"))
    found = None if mpp is None else PixelSize(_number(mpp), _number(mpp), "vendor", f"aperio says {mpp} µm", power)
    return found, power


def from_tiff(tags: Mapping[str, Any], imagej: Mapping[str, Any] | None = None) -> PixelSize | None:
    """Return the pixel size by XResolution, YResolution and their unit, or None if there is no resolution.

    `tags` are the values of the first page by name. Resolution without a unit is no length: some readers take it for
    inches, which turns 72 dpi of an office program into 353 µm. ImageJ writes its unit elsewhere (`imagej`).
    """
    x, y = _ratio(tags.get("XResolution")), _ratio(tags.get("YResolution"))
    if x is None and y is None:
        return None
    unit, um = _TIFF_UNITS.get(int(tags.get("ResolutionUnit", 1)), (None, None))
    if unit is None and imagej:
        unit = str(imagej.get("unit", "")).replace("\\u00B5", "µ") or None
        um = _UM_PER_UNIT.get(unit or "")
    if unit is None and (x, y) == (1.0, 1.0):
        return None  # What writers put when they have nothing to say.
    said = f"TIFF resolution says {_text(x)} x {_text(y)} per {unit or 'unknown unit'}"
    return PixelSize(um / x if um and x else None, um / y if um and y else None, "tiff", said)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _ratio(value: Any) -> float | None:
    if value is None:
        return None
    try:
        top, bottom = value
    except TypeError:
        return float(value)
    return top / bottom if bottom else None


def _text(value: float | None) -> str:
    return "nothing" if value is None else f"{value:g}"
