"""What the XML of an OME-TIFF says of each image: size, channels, pixel size, objective, and where its pages begin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from cellslide.slides.pixel_size import PixelSize, from_pixels

# Images that scanners and converters put beside the slide.
BESIDE = re.compile(r"\b(label|macro|thumbnail|overview|barcode)\b", re.IGNORECASE)
# Names that say nothing of a stain, or that it is seen in transmitted light. All others are markers.
_PLAIN_NAMES = re.compile(
    r"(|rgb.*|.*bright ?-?field.*|bf|tl.*|transmitted.*|h ?& ?e.*|he|hematoxylin.*|haematoxylin.*|camera.*|colou?r"
    r"|alpha|opacity|(channel|ch|c)?[ :_-]*\d*([:_]\d+)*)",
    re.IGNORECASE,
)
_PRIMARY = {
    "r": 0, "red": 0, "red channel": 0, "channel red": 0,
    "g": 1, "green": 1, "green channel": 1, "channel green": 1,
    "b": 2, "blue": 2, "blue channel": 2, "channel blue": 2,
}  # fmt: skip
_PRIMARY_COLOURS = {0xFF0000: 0, 0x00FF00: 1, 0x0000FF: 2}
_DYES = re.compile(
    r"\b(dapi|hoechst|fitc|tritc|gfp|yfp|cfp|rfp|mcherry|cy ?\d|alexa|af ?\d{3}|texas|rhodamine|opal|fluo\w*|"
    r"autofluorescence|cd\d+|sytox|propidium)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class OmeChannel:
    """A channel: its name, colour as 0xRRGGBB if one is stated, samples a pixel, and whether it is said to glow."""

    name: str
    colour: int | None
    samples: int
    glows: bool

    @property
    def primary(self) -> int | None:
        """0, 1 or 2 where the name is that of red, green or blue."""
        return _PRIMARY.get(self.name.strip().lower())

    @property
    def is_plain(self) -> bool:
        """True where the name says nothing of a marker."""
        return self.primary is not None or _PLAIN_NAMES.fullmatch(self.name.strip()) is not None

    @property
    def is_dye(self) -> bool:
        """True where a channel of colour is named after a dye, or said to be excited by light."""
        return self.glows or _DYES.search(self.name) is not None


@dataclass(frozen=True, slots=True)
class OmeImage:
    """An image of the file; `page` is its first page, None where that lies in another file or is not told."""

    name: str
    page: int | None
    width_px: int
    height_px: int
    channels: tuple[OmeChannel, ...]
    found: PixelSize | None
    power: float | None


def read_ome(xml: str) -> list[OmeImage]:
    """Return the images that the XML describes, in its order; none where it cannot be read."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return []
    powers = {e.get("ID"): _positive(e.get("NominalMagnification")) for e in _all(root, "Objective")}
    return [found for image in _all(root, "Image") if (found := _image(image, powers)) is not None]


def image_of(images: list[OmeImage], page: int, width_px: int, height_px: int) -> OmeImage | None:
    """Return the image whose first page this is; where no page is told, the one of this size, if they all agree."""
    of_size = [image for image in images if (image.width_px, image.height_px) == (width_px, height_px)]
    exact = [image for image in of_size if image.page == page]
    if exact or not of_size:
        return exact[0] if exact else None
    first = of_size[0]
    if all(image.found == first.found for image in of_size):
        return first
    said = "OME states several pixel sizes for images of this size"
    return replace(first, found=PixelSize(None, None, "ome", said))


def _all(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    return (e for e in root.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == name)


def _image(image: ElementTree.Element, powers: dict[str | None, float | None]) -> OmeImage | None:
    pixels = next(_all(image, "Pixels"), None)
    if pixels is None:
        return None
    try:
        width, height = int(pixels.get("SizeX", "")), int(pixels.get("SizeY", ""))
    except ValueError:
        return None
    settings = next(_all(image, "ObjectiveSettings"), None)
    power = powers.get(settings.get("ID")) if settings is not None else None
    if settings is None and len(set(powers.values())) == 1:
        power = next(iter(powers.values()))
    found = from_pixels(pixels)
    return OmeImage(
        image.get("Name") or "", _first_page(pixels), width, height,
        tuple(_channel(c) for c in _all(pixels, "Channel")), replace(found, power=power) if found else None, power,
    )  # fmt: skip


def _first_page(pixels: ElementTree.Element) -> int | None:
    data = list(_all(pixels, "TiffData"))
    if not data or any(next(_all(d, "UUID"), None) is not None for d in data):
        return None
    try:
        return min(int(d.get("IFD", "0")) for d in data)
    except ValueError:
        return None


def _channel(channel: ElementTree.Element) -> OmeChannel:
    try:
        samples = int(channel.get("SamplesPerPixel", "1"))
    except ValueError:
        samples = 1
    modes = " ".join(channel.get(name, "") for name in ("ContrastMethod", "IlluminationType", "AcquisitionMode"))
    waves = any(channel.get(name) for name in ("EmissionWavelength", "ExcitationWavelength", "Fluor"))
    glows = waves or "fluoresc" in modes.lower() or "fluorescence" in channel.get("Name", "").lower()
    return OmeChannel(channel.get("Name") or "", _colour(channel.get("Color")), samples, glows)


def _colour(text: str | None) -> int | None:
    """Return 0xRRGGBB of a signed RGBA number."""
    try:
        return (int(text or "") >> 8) & 0xFFFFFF
    except ValueError:
        return None


def _positive(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def rgb_order(channels: tuple[OmeChannel, ...]) -> tuple[int, int, int] | None:
    """Return which of three channels are red, green and blue by their names, else by their colours; None if untold."""
    named = [c.primary for c in channels]
    if sorted(n for n in named if n is not None) == [0, 1, 2]:
        return named.index(0), named.index(1), named.index(2)
    coloured = [_PRIMARY_COLOURS.get(c.colour) if c.colour is not None else None for c in channels]
    if all(c.is_plain for c in channels) and sorted(n for n in coloured if n is not None) == [0, 1, 2]:
        return coloured.index(0), coloured.index(1), coloured.index(2)
    return None


def why_fluorescence(channels: tuple[OmeChannel, ...]) -> str | None:
    """Return in words why these channels are not the colours of a stain in transmitted light, or None."""
    names = ", ".join(c.name for c in channels)
    if any(c.glows for c in channels):
        return f"its channels ({names}) are said to be fluorescence" if names.strip(", ") else "its channels fluoresce"
    if any(c.is_dye for c in channels):
        return f"its channels are {names}"
    apart = len(channels) > 1 and all(c.samples == 1 for c in channels)
    if apart and not all(c.is_plain for c in channels):
        return f"its channels are {names}"
    return None
