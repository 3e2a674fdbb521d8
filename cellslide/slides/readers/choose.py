"""What the slide is in a TIFF: which pages are its levels, which samples its colours, and what they say of themselves.

One decision for pixels, size, pixel size and channels alike, by an allow-list: a page is read only if all that it
declares is understood. The largest image is the slide, wherever it stands in the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cellslide.errors import FluorescenceError, SlideError
from cellslide.slides.pixel_size import PixelSize, from_aperio, from_tiff
from cellslide.slides.readers.colours import (
    BLACK_IS_ZERO,
    CMYK,
    COLOUR_SAMPLES,
    PALETTE,
    RGB,
    WHITE_IS_ZERO,
    YCBCR,
    jpeg_is_rgb,
    odd_ycbcr,
)
from cellslide.slides.readers.levels import fits
from cellslide.slides.readers.ome import (
    BESIDE,
    OmeChannel,
    OmeImage,
    image_of,
    read_ome,
    rgb_order,
    why_fluorescence,
)

MOST_PAGES = 1024
MOST_STRIP_PX = 1 << 28
MOST_OPACITY_PX = 1 << 26
REDUCED, MASK = 1, 4
JPEG, OLD_JPEG, APERIO_J2K_YCBCR = 7, 6, 33003
_BESIDE_LINE = re.compile(r"^\s*(label|macro|thumbnail|overview|barcode)\b", re.IGNORECASE | re.MULTILINE)
_FIRST_BYTES = 1 << 16
STRIPS = "strips of"

Planes = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class TiffImage:
    """The slide in a TIFF.

    levels   the pages of each level, level 0 first: one page, or one for each of three channels, and of opacity.
    order    which stored channel is red, green and blue.
    unnamed  three channels of which nothing says that they are red, green and blue.
    lies     the JPEG streams are not in the colours that the tags state; the streams are believed.
    """

    levels: tuple[Planes, ...]
    found: PixelSize | None
    power: float | None
    is_ome: bool
    order: tuple[int, int, int] = (0, 1, 2)
    unnamed: bool = False
    lies: bool = False
    fluorescence: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the levels."""
        return [_size(planes[0]) for planes in self.levels]

    @property
    def is_plain(self) -> bool:
        """True where any library reads the same: levels of RGB or YCbCr as JPEG, in one page each, not turned."""
        pages = [page for planes in self.levels for page in planes]
        return (
            all(map(_is_usual, pages)) and len(pages) == len(self.levels) and self.order == (0, 1, 2) and not self.lies
        )


def choose(path: Path, tiff: Any) -> TiffImage:
    """Decide what the slide is in an open TIFF.

    Raises FluorescenceError or SlideError where nothing in it can be read as a slide stained for transmitted light.
    """
    pages = _pages(tiff.pages)
    image = _by_ome(path, tiff, pages) if tiff.is_ome else None
    image = image or _by_pages(path, tiff, pages)
    if words := _why_not(image.levels[0]) or _why_no_opacity(image):
        if image.fluorescence:
            raise FluorescenceError(f"{path}: fluorescence: {image.fluorescence}, {words}; cellslide reads H&E in RGB")
        if words.startswith(STRIPS):
            raise SlideError(f"{path}: {words}; convert it to a tiled TIFF")
        raise SlideError(f"{path}: {words}, not an 8-bit RGB image; convert it to one")
    image = _with_levels_that_fit(image)
    turned = sorted({orientation(page) for planes in image.levels for page in planes} - {1})
    if turned:
        said = ", ".join(map(str, turned))
        image = _noted(image, f"its TIFF Orientation is {said}; pixels are taken as they are stored, not turned")
    return replace(image, lies=any(_jpeg_lies(tiff, page) for planes in image.levels for page in planes))


def _is_usual(page: Any) -> bool:
    coded = page.photometric == YCBCR and page.compression in (JPEG, APERIO_J2K_YCBCR)
    layout = page.samplesperpixel, page.planarconfig, orientation(page)
    return layout == (3, 1, 1) and (page.photometric == RGB or coded)


def orientation(page: Any) -> int:
    """Return the Orientation tag, 1 where it is absent or no orientation."""
    tag = page.tags.get("Orientation")
    value = int(tag.value) if tag is not None and isinstance(tag.value, int) else 1
    return value if 1 <= value <= 8 else 1


def segment_shape(page: Any) -> tuple[int, int]:
    """(height, width) of a tile, or of a strip."""
    if page.is_tiled:
        return int(page.tilelength), int(page.tilewidth)
    return min(int(page.rowsperstrip), int(page.imagelength)), int(page.imagewidth)


def is_jpeg_rgb(tiff: Any, page: Any) -> bool:
    """Return whether the JPEG streams of a page are RGB: by what the first says decisively, else by the tags."""
    said = _jpeg_says(tiff, page)
    return page.photometric == RGB if said is None else said


def _jpeg_says(tiff: Any, page: Any) -> bool | None:
    for offset, n_bytes in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset > 0 and n_bytes > 0:
            tiff.filehandle.seek(offset)
            return jpeg_is_rgb(tiff.filehandle.read(min(n_bytes, _FIRST_BYTES)))
    return None


def _jpeg_lies(tiff: Any, page: Any) -> bool:
    if page.compression != JPEG or page.photometric not in (RGB, YCBCR) or page.samplesperpixel != 3:
        return False
    said = None if page.planarconfig != 1 else _jpeg_says(tiff, page)
    return said is not None and said != (page.photometric == RGB)


def _noted(image: TiffImage, note: str) -> TiffImage:
    return replace(image, notes=(*image.notes, note))


def _whole(page: Any) -> Any:
    """Return a page with all of its tags; tifffile keeps only what differs for pages after the first."""
    return page.aspage() if isinstance(page, tifffile.TiffFrame) else page


def _pages(found: Any) -> list[Any]:
    """Return pages in their order, each once, also where they follow each other in a circle."""
    seen: dict[int, Any] = {}
    for _, page in zip(range(MOST_PAGES), found, strict=False):
        if page.offset in seen:
            break
        seen[page.offset] = _whole(page)
    return list(seen.values())


def _size(page: Any) -> tuple[int, int]:
    return int(page.imagewidth), int(page.imagelength)


def _area(page: Any) -> int:
    return int(page.imagewidth) * int(page.imagelength)


def _is(page: Any, kind: int) -> bool:
    return bool(int(page.subfiletype or 0) & kind)


def _below(planes: Sequence[Any]) -> list[Planes]:
    """Return the SubIFDs of the planes of a level, level by level."""
    subs = [_pages(page.pages or ()) for page in planes]
    return list(zip(*subs, strict=False))


# ---------------------------------------------------------------- OME-TIFF


def _by_ome(path: Path, tiff: Any, pages: Sequence[Any]) -> TiffImage | None:
    """Return the largest image that the OME metadata describes, or None where tifffile cannot follow it."""
    series = [s for s in tiff.series if s.kind == "ome" and s.pages]
    if not series:
        return None
    images = read_ome(tiff.ome_metadata or "")
    found = [(s, _described(s, images)) for s in series]
    slides = [pair for pair in found if not BESIDE.search(pair[1].name if pair[1] else pair[0].name)] or found
    chosen, about = max(slides, key=lambda pair: _area(pair[0].keyframe))
    planes = _ome_planes(path, chosen)
    notes = []
    if sum(_size(s.keyframe) == _size(planes[0]) for s, _ in slides) > 1:
        notes.append("it holds several images of this size; the first is read")
    aside = [s.keyframe.index for s, _ in found if (s, _) not in slides]
    larger = [p for p in pages if _area(p) > _area(planes[0]) and p.index not in aside and not _is(p, MASK)]
    if larger:
        size, other = _size(larger[0]), _size(planes[0])
        raise SlideError(
            f"{path}: page {larger[0].index} is {size[0]} x {size[1]} px, larger than the image that its OME metadata "
            f"describe, {other[0]} x {other[1]}; which is the slide? Convert it to one pyramid"
        )
    channels = about.channels if about else ()
    image = TiffImage(
        (planes, *_below(planes)), about.found if about else None, about.power if about else None, True,
        fluorescence=why_fluorescence(channels), notes=tuple(notes),
    )  # fmt: skip
    return _with_order(_with_resolution(image, tiff, planes[0]), channels)


def _described(series: Any, images: list[OmeImage]) -> OmeImage | None:
    page = series.keyframe
    return image_of(images, int(page.index), *_size(page))


def _ome_planes(path: Path, series: Any) -> Planes:
    shape = {n: axis for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 and axis not in "YXSC"}
    pages = list(series.levels[0].pages)
    if shape or any(page is None for page in pages):
        raise SlideError(
            f"{path}: axes {series.axes} {series.shape} are not an 8-bit RGB image, but a stack, or parts of it are "
            "missing; convert it to one"
        )
    return tuple(_whole(page) for page in pages)


# ---------------------------------------------------------------- other TIFF


def _by_pages(path: Path, tiff: Any, pages: Sequence[Any]) -> TiffImage:
    """Return the largest image among the pages, whatever its place, and those that are its smaller copies."""
    imagej = tiff.imagej_metadata or {}
    usable = [page for page in pages if not _is(page, MASK)] or list(pages)
    usable = [page for page in usable if not _BESIDE_LINE.search(page.description or "")] or usable
    if not usable or int(imagej.get("images", 1)) > len(pages):
        raise SlideError(
            f"{path}: no image in it, a stack, or it is damaged, not an 8-bit RGB image; convert it to one"
        )
    largest = max(usable, key=_area)
    same = [page for page in usable if _size(page) == _size(largest)]
    notes = []
    planes: Planes = tuple(same)
    if len(same) > 1 and not all(page.samplesperpixel == 1 for page in same):
        planes = (next((page for page in same if not _is(page, REDUCED)), same[0]),)
        notes.append(f"it holds {len(same)} images of {_size(largest)[0]} x {_size(largest)[1]} px; the first is read")
    found, power = _stated(planes[0], imagej)
    levels = (planes, *_below(planes), *_smaller(planes, usable))
    about = (
        image_of(read_ome(tiff.ome_metadata or ""), int(planes[0].index), *_size(planes[0])) if tiff.is_ome else None
    )
    if about is not None:
        # What tifffile cannot follow as OME still names its channels.
        image = TiffImage(levels, about.found or found, about.power, True, notes=tuple(notes))
        channels = about.channels
    else:
        image = TiffImage(levels, found, power, bool(tiff.is_ome), notes=tuple(notes))
        labels = tuple(OmeChannel(str(name), None, 1, False) for name in imagej.get("Labels") or ())
        channels = labels if len(labels) == len(planes) > 1 else ()
    return _with_order(replace(image, fluorescence=why_fluorescence(channels)), channels)


def _smaller(planes: Planes, pages: Sequence[Any]) -> list[Planes]:
    """Return what may be levels of the planes: as many pages of a size, cut into tiles if these are."""
    sizes = sorted({_size(page) for page in pages if _area(page) < _area(planes[0])}, reverse=True)
    found = []
    for size in sizes:
        alike = [page for page in pages if _size(page) == size and page.is_tiled == planes[0].is_tiled]
        if len(planes) == 1 and alike:
            found.append((alike[0],))
        elif len(alike) == len(planes):
            found.append(tuple(alike))
    return found


def _stated(page: Any, imagej: dict[str, Any]) -> tuple[PixelSize | None, float | None]:
    """Return the pixel size and objective that the tags of a page state."""
    text = page.description or ""
    vendor, power = from_aperio(text) if text.startswith("Aperio") else (None, None)
    found = vendor or from_tiff({tag.name: tag.value for tag in page.tags.values()}, imagej)
    return (replace(found, power=power) if found else None), power


def _with_resolution(image: TiffImage, tiff: Any, page: Any) -> TiffImage:
    if image.found is not None:
        return image
    found, _ = _stated(page, tiff.imagej_metadata or {})
    return replace(image, found=replace(found, power=image.power) if found else None)


# ---------------------------------------------------------------- what is understood


def _with_order(image: TiffImage, channels: Sequence[OmeChannel]) -> TiffImage:
    """Return the image with the places of red, green and blue among three channels."""
    page, planes = image.levels[0][0], image.levels[0]
    apart = len(planes) >= 3 or (page.samplesperpixel == 3 and page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO))
    order = rgb_order(tuple(channels[:3])) if len(channels) in (3, len(planes)) else None
    if order is not None:
        return replace(image, order=order)
    if apart and image.fluorescence is None:
        return replace(image, unnamed=True)
    return image


def _why_not(planes: Planes) -> str | None:
    """Say why the pages of a level are not read, or None."""
    first = planes[0]
    if len(planes) not in (1, 3, 4) or (len(planes) > 1 and any(page.samplesperpixel != 1 for page in planes)):
        return f"{len(planes)} pages of {first.samplesperpixel} channels"
    if any(_size(page) != _size(first) or segment_shape(page) != segment_shape(first) for page in planes):
        return "pages of several layouts"
    return next((words for page in planes if (words := _why_not_page(page, len(planes)))), None)


def _why_no_opacity(image: TiffImage) -> str | None:
    """Say why the fourth page is not taken for opacity, or None: it must be all or nothing in the smallest level."""
    smallest = min(image.levels, key=lambda planes: _area(planes[0]))
    if len(smallest) != 4:
        return None
    if _area(smallest[3]) <= MOST_OPACITY_PX and set(np.unique(smallest[3].asarray()).tolist()) <= {0, 255}:
        return None
    return "4 pages of 1 channels, the fourth of which is no opacity"


def _why_not_page(page: Any, n_planes: int) -> str | None:
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    if page.dtype != np.uint8 or bits != 8 or int(page.sampleformat or 1) != 1:
        return f"{bits}-bit samples of {page.dtype}"
    if (page.imagedepth, page.tiledepth if page.is_tiled else 1) != (1, 1):
        return f"{page.imagedepth} planes in depth"
    height, width = segment_shape(page)
    if min(height, width, page.imagelength, page.imagewidth) < 1 or height * width > MOST_STRIP_PX:
        return f"{STRIPS} {(height, width)} px cannot be read"
    if page.compression == OLD_JPEG:
        return "JPEG as before TIFF 6.0"
    return _why_not_colours(page, n_planes)


def _why_not_colours(page: Any, n_planes: int) -> str | None:
    kind, samples = page.photometric, page.samplesperpixel
    if kind not in COLOUR_SAMPLES:
        return f"colours of kind {_name(kind)}"
    if n_planes > 1:
        return None if kind in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) else f"three pages of kind {_name(kind)}"
    apart = kind in (WHITE_IS_ZERO, BLACK_IS_ZERO) and samples == 3
    if not apart and not 0 <= samples - COLOUR_SAMPLES[kind] <= 1:
        return f"{samples} channels of kind {_name(kind)}"
    if kind == CMYK and (page.compression == JPEG or _ink_set(page) != 1):
        return "CMYK in JPEG, or of other inks"
    if odd_ycbcr(page):
        return "YCbCr that is subsampled or on a scale of its own"
    if kind == PALETTE and page.colormap is None:
        return "a palette without colours"
    return None


def _ink_set(page: Any) -> int:
    tag = page.tags.get("InkSet")
    return 1 if tag is None else int(tag.value)


def _name(kind: Any) -> str:
    return str(getattr(kind, "name", kind))


def _with_levels_that_fit(image: TiffImage) -> TiffImage:
    """Return the image without levels whose size or samples do not fit level 0; says so of those meant as levels."""
    base = image.levels[0]
    kept, notes, sizes = [base], [], {_size(base[0])}
    for planes in sorted(image.levels[1:], key=lambda p: -_area(p[0])):
        size = _size(planes[0])
        if size in sizes:
            continue
        why = None if fits(_size(base[0]), size) else "does not have the shape of level 0"
        why = why or (_why_not(planes) if len(planes) == len(base) else "has other channels")
        if why is None:
            kept.append(planes)
            sizes.add(size)
        elif image.is_ome or _is(planes[0], REDUCED):
            notes.append(f"its level of {size[0]} x {size[1]} px {why}; it is not read")
    return replace(image, levels=tuple(kept), notes=(*image.notes, *notes))
