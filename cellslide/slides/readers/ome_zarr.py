"""OME-Zarr images (NGFF 0.4 and 0.5): a folder of chunks, its axes and pixel size in the metadata of its group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellslide.errors import SlideError
from cellslide.slides.pixel_size import PixelSize
from cellslide.slides.readers.base import MOST_PX, MOST_TILE_PX, WHITE, SlideHeader, SlideReader, paste
from cellslide.slides.readers.look import looked_at
from cellslide.slides.readers.ome import OmeChannel, rgb_order, why_fluorescence
from cellslide.types import Level, UInt8

MOST_LEVELS = 32
_UM = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


class OmeZarrReader:
    """An OME-Zarr image of three channels of 8 bits; `order` says which of them are red, green and blue."""

    background = WHITE

    def __init__(
        self, header: SlideHeader, arrays: Sequence[zarr.Array[Any]], axes: Sequence[str], order: tuple[int, int, int]
    ) -> None:
        self.header, self._arrays, self._axes, self._order = header, arrays, axes, order

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB; position and size in pixels of that level, outside is background."""
        out = np.empty((height_px, width_px, 3), np.uint8)
        out[:] = self.background
        size = self.header.levels[level]
        x0, y0 = max(x_px, 0), max(y_px, 0)
        x1, y1 = min(x_px + width_px, size.width_px), min(y_px + height_px, size.height_px)
        if x1 > x0 and y1 > y0:
            paste(out, self._part(level, slice(x0, x1), slice(y0, y1)), x0 - x_px, y0 - y_px)
        return out

    def _part(self, level: int, xs: slice, ys: slice) -> UInt8:
        places = {"x": xs, "y": ys, "c": slice(None)}
        index = tuple(places.get(axis, 0) for axis in self._axes)
        left = [axis for axis in self._axes if axis in places]
        try:
            part = np.asarray(self._arrays[level][index])
        except Exception as error:  # Codecs raise what they like on a damaged chunk.
            raise SlideError(f"{self.header.path}: a chunk of level {level} cannot be decoded: {error}") from error
        return np.asarray(part.transpose([left.index(axis) for axis in "yxc"])[..., self._order], np.uint8)

    def close(self) -> None:
        """Nothing is open between reads."""


def open_ome_zarr(path: Path) -> SlideReader:
    """Open an OME-Zarr image and look at a sample of it; of several images of one folder the first.

    Raises SlideError for what is no image of three channels of 8 bits, or whose sizes no slide has.
    """
    try:
        reader, unnamed = _described(path)
    except SlideError:
        raise
    except Exception as error:  # The metadata is anybody's: what it lacks or has of another type.
        raise SlideError(f"{path}: not an OME-Zarr image that can be read: {error}") from error
    return looked_at(reader, unnamed)


def _described(path: Path) -> tuple[OmeZarrReader, bool]:
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    said = _ome(group)
    if "bioformats2raw.layout" in said and "multiscales" not in said:
        group = group["0"]  # type: ignore[assignment]
        said = _ome(group)
    scales = said["multiscales"][0]
    axes = [axis["name"] for axis in scales["axes"]]
    if not {"c", "y", "x"} <= set(axes) or len(set(axes)) < len(axes):
        raise SlideError(f"{path}: its axes are {', '.join(axes)}; c, y and x are needed for colour")
    arrays = [_array(path, group, str(dataset["path"]), axes) for dataset in scales["datasets"][:MOST_LEVELS]]
    sizes = [(a.shape[axes.index("x")], a.shape[axes.index("y")]) for a in arrays]
    width, height = sizes[0]
    levels = tuple(Level(w, h, (width / w + height / h) / 2) for w, h in sizes)
    channels = _channels(said)
    order = rgb_order(channels) if len(channels) == 3 else None
    header = SlideHeader(
        path, "ome-zarr", width, height, levels, _pixel_size(scales, axes), read_by="zarr",
        fluorescence=why_fluorescence(channels) if channels else None,
    )  # fmt: skip
    return OmeZarrReader(header, arrays, axes, order or (0, 1, 2)), order is None


def _ome(group: zarr.Group) -> Mapping[str, Any]:
    """Return the OME part of a group's attributes, of NGFF 0.4 or 0.5."""
    attributes: Mapping[str, Any] = group.attrs.asdict()
    return attributes.get("ome", attributes)  # type: ignore[no-any-return]


def _array(path: Path, group: zarr.Group, name: str, axes: Sequence[str]) -> zarr.Array[Any]:
    """Return the array of a level; raises SlideError for one that leads elsewhere or is no 8-bit colour."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise SlideError(f"{path}: the level {name!r} leads out of the folder")
    array = group[name]
    if not isinstance(array, zarr.Array) or len(array.shape) != len(axes):
        raise SlideError(f"{path}: the level {name!r} is no array of the axes {', '.join(axes)}")
    size = dict(zip(axes, array.shape, strict=True))
    others = [axis for axis in axes if axis not in "cyx" and size[axis] != 1]
    if array.dtype != np.uint8 or size["c"] != 3 or others:
        raise SlideError(
            f"{path}: the level {name!r} is {array.dtype} of shape {array.shape}; three channels of 8 bits, of one "
            "plane and time, are read; convert it"
        )
    if not 0 < size["x"] * size["y"] <= MOST_PX:
        raise SlideError(f"{path}: {size['x']} x {size['y']} px is no slide; is it damaged?")
    if math.prod(array.shards or array.chunks) > 3 * MOST_TILE_PX:
        raise SlideError(f"{path}: chunks of {array.shards or array.chunks} do not fit into memory; write smaller ones")
    return array


def _channels(said: Mapping[str, Any]) -> tuple[OmeChannel, ...]:
    return tuple(
        OmeChannel(str(c.get("label", "")), int(c["color"], 16) if c.get("color") else None, 1, False)
        for c in said.get("omero", {}).get("channels", [])
    )


def _pixel_size(scales: Mapping[str, Any], axes: Sequence[str]) -> PixelSize | None:
    """Return the pixel size of level 0, None where an axis has no unit."""
    units = {axis["name"]: axis.get("unit") for axis in scales["axes"]}
    if units["x"] is None or units["y"] is None:
        return None
    steps = [*scales["datasets"][0].get("coordinateTransformations", []), *scales.get("coordinateTransformations", [])]
    factors = [step["scale"] for step in steps if step["type"] == "scale"]
    values = [math.prod(float(f[axes.index(axis)]) for f in factors) for axis in "xy"]
    said = f"OME-Zarr states {values[0]:g} {units['x']} x {values[1]:g} {units['y']}"
    if not {units["x"], units["y"]} <= set(_UM) or not factors:
        return PixelSize(None, None, "ome", said)
    return PixelSize(values[0] * _UM[units["x"]], values[1] * _UM[units["y"]], "ome", said)
