"""Crops around nuclei, cut on the device from regions that are read once: bit for bit what reading each crop gives.

Frames: points and corners are pixels of the classifier's plane, (x, y); the corner of a crop of `size` pixels about a
centre c is round(c - size / 2), halves to even, as published (NuClass). Beyond the slide's edge stands what
`CropSpec.border` says, wherever a region happens to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cellslide.slides.resample import axis_taps
from cellslide.slides.slide import Slide
from cellslide.types import CropSpec, Float32, Float64, Int64, Plane, UInt8

Box = tuple[int, int, int, int]
# One read of 4096 px with a halo of 512 px on each side decodes 1.6 times the pixels that it serves.
REGION_PX = 4096
# Cells of one strip of a region stand together, so that neighbours share contexts within one piece of work.
STRIP_PX = 256
READ_AHEAD = 2


def crop_corners(centre_xy: Float64, size_px: int) -> Int64:
    """Return the top left pixels (N, 2) of crops of `size_px` about centres (N, 2), both in plane pixels."""
    return np.rint(np.asarray(centre_xy, np.float64) - size_px / 2).astype(np.int64)


def grid_centres(centre_xy: Float64, step_px: int) -> Float64:
    """Return the middle of the grid box of `step_px` that each point (N, 2) lies in."""
    return (np.floor(np.asarray(centre_xy, np.float64) / step_px) + 0.5) * step_px


def mirrored(index: Int64, size: int) -> Int64:
    """Return `index` folded back into 0..size-1 at both ends as often as needed; the edge pixel is not repeated."""
    period = max(2 * (size - 1), 1)
    folded = np.mod(index, period)
    return np.asarray(np.minimum(folded, period - folded), np.int64)


def inside_span(first: int, last: int, size: int, border: str) -> tuple[int, int]:
    """Return the pixels of 0..size-1, first and one past the last, that a span first..last-1 shows; at least one."""
    if border == "reflect" and first < 0:
        last = max(last, 1 - first)
    if border == "reflect" and last > size:
        first = min(first, 2 * size - 1 - last)
    low = min(max(first, 0), size - 1)
    return low, max(min(last, size), low + 1)


@dataclass(frozen=True, slots=True)
class Region:
    """Cells that one read serves: their rows in the order of work, and the plane box that holds all their crops."""

    rows: Int64
    box: Box


def plan_regions(
    centre_xy: Float64, corners: Sequence[tuple[Int64, int]], region_px: int = REGION_PX
) -> Iterator[Region]:
    """Yield regions of the plane, row by row, that own each centre (N, 2) once; nothing where there are no cells.

    corners   for each crop its corners (N, 2) and field in plane pixels.
    The rows of a region go by strips from top to bottom, left to right in each.
    """
    own = np.floor(centre_xy / region_px).astype(np.int64)
    strip = np.floor(centre_xy[:, 1] / STRIP_PX)
    order = np.lexsort((centre_xy[:, 0], strip, own[:, 0], own[:, 1]))
    changes = (np.diff(own[order], axis=0) != 0).any(axis=1)
    for rows in np.split(order, np.flatnonzero(changes) + 1):
        if len(rows):
            yield Region(rows, _box([(corner[rows], field) for corner, field in corners]))


def _box(corners: Sequence[tuple[Int64, int]]) -> Box:
    low = np.min([corner.min(axis=0) for corner, _ in corners], axis=0)
    high = np.max([corner.max(axis=0) + field for corner, field in corners], axis=0)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


@dataclass(frozen=True, slots=True)
class RegionRead:
    """Pixels of the slide that a region's crops show: uint8 (h, w, 3), `corner` (x, y) of the first in the plane."""

    pixels: UInt8
    corner: tuple[int, int]
    box: Box


def shown_box(plane: Plane, box: Box, borders: Sequence[str]) -> Box:
    """Return what crops inside `box`, which may leave the plane, show of the plane."""
    spans_x = [inside_span(box[0], box[2], plane.width_px, border) for border in borders]
    spans_y = [inside_span(box[1], box[3], plane.height_px, border) for border in borders]
    x0, x1 = min(s[0] for s in spans_x), max(s[1] for s in spans_x)
    y0, y1 = min(s[0] for s in spans_y), max(s[1] for s in spans_y)
    return x0, y0, x1, y1


def read_region(slide: Slide, plane: Plane, box: Box, borders: Sequence[str]) -> RegionRead:
    """Read what the crops inside `box` show of the slide; raises TileError where the file is damaged."""
    shown = shown_box(plane, box, borders)
    return RegionRead(slide.read_plane(plane, shown), shown[:2], box)


def read_ahead(
    slide: Slide, plane: Plane, regions: Sequence[Region], borders: Sequence[str]
) -> Generator[tuple[Region, RegionRead], None, None]:
    """Yield the regions in order with their pixels, at most READ_AHEAD of them read beforehand."""
    rest = iter(regions)
    queue: deque[tuple[Region, Future[RegionRead]]] = deque()
    pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="cellslide-read")
    try:
        while True:
            for region in rest:
                queue.append((region, pool.submit(read_region, slide, plane, region.box, borders)))
                if len(queue) >= READ_AHEAD:
                    break
            if not queue:
                return
            region, future = queue.popleft()
            yield region, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class CropCutter:
    """A region resident on a device, from which crops are cut."""

    def __init__(self, read: RegionRead, plane: Plane, device: torch.device) -> None:
        self.box, self.corner, self.plane = read.box, read.corner, plane
        host = torch.from_numpy(np.ascontiguousarray(read.pixels))
        on_gpu = device.type == "cuda"
        self.pixels = (host.pin_memory() if on_gpu else host).to(device, non_blocking=on_gpu)
        self._framed: dict[str, Tensor] = {}

    def cut(self, corners: Int64, spec: CropSpec) -> Tensor:
        """Return float32 (N, 3, input, input), 0..255, of the crops at `corners` (N, 2); ValueError outside the box."""
        return fit_crops(self.cut_field(corners, spec), spec)

    def cut_field(self, corners: Int64, spec: CropSpec) -> Tensor:
        """Return the crops at `corners` as they lie in the plane, uint8 (N, 3, field, field)."""
        field = spec.field_px
        x0, y0, x1, y1 = self.box
        corners = np.asarray(corners, np.int64)
        if len(corners) and ((corners < (x0, y0)).any() or (corners + field > (x1, y1)).any()):
            raise ValueError(f"a crop of {field} px leaves the region {self.box}")
        return _windows(self._frame(spec.border), corners - (x0, y0), field).permute(0, 3, 1, 2)

    def _frame(self, border: str) -> Tensor:
        """Return the pixels of the whole box, uint8 (h, w, 3), the border filled in."""
        if border not in self._framed:
            for axis, low, high, size in (
                (0, self.box[1], self.box[3], self.plane.height_px),
                (1, self.box[0], self.box[2], self.plane.width_px),
            ):
                before = self.pixels if axis == 0 else self._framed[border]
                start = self.corner[1 - axis]
                self._framed[border] = _fill(before, axis, np.arange(low, high), start, size, border)
        return self._framed[border]


def _windows(frame: Tensor, corners: Int64, field: int) -> Tensor:
    """Return the windows (N, field, field, 3) of `frame` (h, w, 3) at `corners` (N, 2)."""
    if frame.device.type == "cpu" and len(corners):
        return torch.stack([frame[y : y + field, x : x + field] for x, y in corners.tolist()])
    # Every window as a view (no copy), of which the wanted ones are gathered by one kernel.
    windows = frame.unfold(0, field, 1).unfold(1, field, 1).permute(0, 1, 3, 4, 2)
    where = torch.from_numpy(corners).to(frame.device)
    return windows[where[:, 1], where[:, 0]]


def _fill(pixels: Tensor, axis: int, index: Int64, start: int, size: int, border: str) -> Tensor:
    """Return `pixels`, whose first along `axis` is plane pixel `start`, at the plane pixels `index`."""
    outside = (index < 0) | (index >= size)
    if len(index) == pixels.shape[axis] and not outside.any():
        return pixels
    shape = list(pixels.shape)
    shape[axis] = len(index)
    filled = pixels.new_zeros(shape)
    inside, beyond = np.flatnonzero(~outside), np.flatnonzero(outside)
    if len(inside):
        # One copy of what is there, a gather for the rim only: it takes several times as long.
        first = int(inside[0])
        filled.narrow(axis, first, len(inside)).copy_(pixels.narrow(axis, int(index[first]) - start, len(inside)))
    if border == "reflect" and len(beyond):
        source = np.clip(mirrored(index[beyond], size) - start, 0, pixels.shape[axis] - 1)
        rim = pixels.index_select(axis, torch.from_numpy(source).to(pixels.device))
        filled.index_copy_(axis, torch.from_numpy(beyond).to(pixels.device), rim)
    return filled


def fit_crops(crops: Tensor, spec: CropSpec) -> Tensor:
    """Return crops (N, 3, field, field), 0..255, resampled to float32 (N, 3, input, input); not rounded.

    "bilinear" is torch's, corners not aligned, no antialias, as published; "area" takes means over what a pixel covers.
    """
    image = crops.float()
    field, size = spec.field_px, spec.input_px
    if field == size:
        return image
    if spec.resample == "bilinear":
        return functional.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)
    if field % size == 0:
        return functional.avg_pool2d(image, field // size)
    weight = torch.from_numpy(_area_matrix(field, size)).to(image.device)
    return weight @ image @ weight.T


def _area_matrix(field: int, size: int) -> Float32:
    """Return (size, field): each output pixel's weights over what it covers; cubic where the crop is enlarged."""
    taps = axis_taps(0, size, field / size)
    matrix = np.zeros((size, field), np.float32)
    np.add.at(matrix, (np.arange(size)[:, None], np.clip(taps.index, 0, field - 1)), taps.weight.astype(np.float32))
    return matrix


def cut_naive(slide: Slide, plane: Plane, centre_xy: Float64, spec: CropSpec) -> Tensor:
    """Return what `CropCutter.cut` gives for centres (N, 2), by a read of its own for every crop (the reference)."""
    corners = crop_corners(centre_xy, spec.field_px)
    crops = [_read_crop(slide, plane, (int(x), int(y)), spec) for x, y in corners]
    empty = np.empty((0, spec.field_px, spec.field_px, 3), np.uint8)
    stacked = np.stack(crops) if crops else empty
    return fit_crops(torch.from_numpy(stacked).permute(0, 3, 1, 2), spec)


def _read_crop(slide: Slide, plane: Plane, corner: tuple[int, int], spec: CropSpec) -> UInt8:
    """Return one crop uint8 (field, field, 3), read with its own margin and framed by numpy's padding."""
    field = spec.field_px
    low, high = zip(
        *(
            inside_span(first, first + field, size, spec.border)
            for first, size in zip(corner, (plane.width_px, plane.height_px), strict=True)
        ),
        strict=True,
    )
    image = slide.read_plane(plane, (low[0], low[1], high[0], high[1]))
    cols, rows = (np.arange(first, first + field) for first in corner)
    if spec.border == "reflect":
        rows, cols = mirrored(rows, plane.height_px), mirrored(cols, plane.width_px)
        return np.ascontiguousarray(image[rows - low[1]][:, cols - low[0]])
    out = np.zeros((field, field, 3), np.uint8)
    y, x = _within(rows, plane.height_px), _within(cols, plane.width_px)
    out[np.ix_(y, x)] = image[np.ix_(rows[y] - low[1], cols[x] - low[0])]
    return out


def _within(index: Int64, size: int) -> NDArray[np.bool_]:
    return (index >= 0) & (index < size)
