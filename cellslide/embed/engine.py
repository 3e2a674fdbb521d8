"""The backbone over windows of a slide: each nucleus is read from the one window that owns its place.

Windows stand on a grid of the plane that begins at the slide's corner, whatever nuclei are asked for, and are passed in
batches of one size, so a nucleus gets the same vector however many others come with it. Another batch size, and any
choice on a GPU, moves it by rounding only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cellslide.config import EmbedConfig
from cellslide.inference.crops import CropCutter, Region, crop_corners, plan_regions, read_ahead
from cellslide.inference.micro_batches import OnDevice, auto_batch_size
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.types import CropSpec, Float32, Float64, Int64, Plane, UInt8

if TYPE_CHECKING:
    from cellslide.weights.muse import LoadedMuse

DEFAULT_FIELD_PX = 512
# Backbones take edges that are multiples of this.
MULTIPLE_PX = 32


@dataclass(frozen=True, slots=True)
class Windows:
    """Where nuclei are read: the window of each, and the regions of the slide that serve the windows.

    centre   float64 (N, 2), the nuclei in plane pixels.
    corner   int64 (W, 2), the top left pixels of the windows.
    rows     W arrays: the nuclei of each window.
    """

    plane: Plane
    centre: Float64
    corner: Int64
    rows: tuple[Int64, ...]
    regions: tuple[Region, ...]

    def __len__(self) -> int:
        return len(self.corner)


class Embedder(OnDevice):
    """A MUSE backbone on its device; `dim` is the length of a vector, `mpp` the pixel size of its plane (µm)."""

    def __init__(self, loaded: LoadedMuse, config: EmbedConfig) -> None:
        super().__init__(config.infer, loaded.mean, loaded.std)
        self.loaded, self.config = loaded, config
        self.module: Any = loaded.module.eval().to(self._device)
        self.dim = int(loaded.module.dim)
        self.mpp = config.read_mpp or loaded.mpp
        self.field_px = config.field_px or _own_field(loaded.entry.tile_px)
        # Half a window on each axis is its own; the other half is what surrounds the nuclei there.
        self.stride_px = self.field_px // 2
        self.crop = CropSpec(self.field_px, self.field_px, "reflect")
        self.batch_size = config.infer.batch_size or auto_batch_size("window", self.field_px, self._device)

    @property
    def weights_id(self) -> str:
        """Id of the weights."""
        return self.loaded.entry.id

    def too_large(self) -> str:
        """Return what to do where one window does not fit."""
        return f"one window of {self.field_px} px exceeds the memory of {self.device}; use a smaller --field-px"

    def lay_windows(self, slide: Slide, xy_level0: Float64) -> Windows:
        """Return the windows of nuclei (N, 2) in level-0 pixels; reads nothing."""
        plane = Plane.of(slide.info, self.mpp)
        centre = plane.from_level0(xy_level0).reshape(-1, 2)
        place, owner = np.unique(np.floor(centre / self.stride_px), axis=0, return_inverse=True)
        middle = (place + 0.5) * self.stride_px
        corner = crop_corners(middle, self.field_px)
        order = np.argsort(owner.ravel(), kind="stable").astype(np.int64)
        ends = np.cumsum(np.bincount(owner.ravel(), minlength=len(place)))[:-1]
        regions = tuple(plan_regions(middle, [(corner, self.field_px)]))
        return Windows(plane, centre, corner, tuple(np.split(order, ends)) if len(place) else (), regions)

    def read_region(self, cutter: CropCutter, windows: Windows, chosen: Int64) -> Iterator[tuple[Int64, Float32]]:
        """Yield (rows, vectors) of the windows `chosen`; halves the batch when memory runs out."""
        first = 0
        while first < len(chosen):
            found = self.in_memory(partial(self._pass, cutter, windows, chosen[first:]))
            yield from found
            first += len(found)

    @torch.inference_mode()
    def _pass(self, cutter: CropCutter, windows: Windows, left: Int64) -> list[tuple[Int64, Float32]]:
        """Return (rows, vectors) of as many of the windows `left` as one batch takes."""
        chosen = left[: self.batch_size]
        filled = chosen[np.minimum(np.arange(self.batch_size), len(chosen) - 1)]
        images = self.normalised(cutter.cut(windows.corner[filled], self.crop))
        with self.autocast():
            maps = self.module(images).map
        return [(windows.rows[w], self._vectors(maps[i : i + 1], windows, w)) for i, w in enumerate(chosen.tolist())]

    def _vectors(self, feature_map: Tensor, windows: Windows, window: int) -> Float32:
        points = (windows.centre[windows.rows[window]] - windows.corner[window]).astype(np.float32)
        at = torch.from_numpy(points).to(self._device)[None]
        return np.array(self.module.nucleus_features(feature_map.float(), at)[0].float().cpu().numpy(), np.float32)

    def cutter(self, read: Any, plane: Plane) -> CropCutter:
        """Put the pixels of a region on the device."""
        return CropCutter(read, plane, self._device)


def open_embedder(loaded: LoadedMuse, config: EmbedConfig) -> Embedder:
    """Put a backbone on its device; raises MissingDependencyError when the device is not there."""
    torch.manual_seed(config.infer.seed)
    return Embedder(loaded, config)


def embed_cells(slide: Slide, windows: Windows, embedder: Embedder) -> Generator[tuple[Int64, Float32], None, None]:
    """Yield (rows, vectors (n, D)) until each nucleus of `windows` came once; not in their order.

    Raises TileError where the slide is damaged.
    """
    with closing(read_ahead(slide, windows.plane, windows.regions, (embedder.crop.border,))) as reads:
        for region, read in reads:
            yield from embedder.read_region(embedder.cutter(read, windows.plane), windows, region.rows)


def embed_array(embedder: Embedder, image: UInt8, mpp: float, xy: Float64) -> Float32:
    """Return the vectors (N, D) of nuclei `xy` (N, 2) of an image uint8 (H, W, 3) RGB of `mpp` µm/px, in its pixels."""
    return embed_places(embedder, slide_from_array(image, mpp), np.asarray(xy, np.float64))


def embed_places(embedder: Embedder, slide: Slide, xy_level0: Float64) -> Float32:
    """Return the vectors (N, D) of nuclei (N, 2) in level-0 pixels; raises TileError where the slide is damaged."""
    windows = embedder.lay_windows(slide, xy_level0)
    vectors = np.empty((len(xy_level0), embedder.dim), np.float32)
    for rows, part in embed_cells(slide, windows, embedder):
        vectors[rows] = part
    return vectors


def _own_field(tile_px: int | None) -> int:
    return max(MULTIPLE_PX, (tile_px or DEFAULT_FIELD_PX) // MULTIPLE_PX * MULTIPLE_PX)
