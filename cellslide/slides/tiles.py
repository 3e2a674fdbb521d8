"""The grid of tiles: read boxes overlap, own boxes partition the plane. All boxes are plane pixels, xyxy, half-open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cellslide.errors import UsageError
from cellslide.types import Plane, Tile

Box = tuple[float, float, float, float]


class Mask(Protocol):
    """Anything that says whether a level-0 box meets what is to be searched."""

    def hit(self, xyxy: Box) -> bool:
        """Return True where the box meets it."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Square read boxes of `size_px` every `size_px - overlap_px` pixels; the first starts at the plane's corner.

    Own boxes are cut in the middle of overlaps. Read boxes at the right and at the bottom may leave the plane.
    """

    plane: Plane
    size_px: int
    overlap_px: int

    @property
    def stride_px(self) -> int:
        """Distance between neighbouring read boxes."""
        return self.size_px - self.overlap_px

    @property
    def n_cols(self) -> int:
        """Tiles across: as few as cover the plane."""
        return self._count(self.plane.width_px)

    @property
    def n_rows(self) -> int:
        """Tiles down."""
        return self._count(self.plane.height_px)

    def __len__(self) -> int:
        return self.n_rows * self.n_cols

    def _count(self, length: int) -> int:
        return 1 + max(0, -(-(length - self.size_px) // self.stride_px))

    def _cut(self, k: int, count: int, length: int) -> int:
        """Return where tile k - 1 ends and tile k begins to own, along an axis of `length` with `count` tiles."""
        if k == 0 or k == count:
            return 0 if k == 0 else length
        return k * self.stride_px + self.overlap_px // 2

    def tile(self, index: int) -> Tile:
        """Return tile `index`, counted row by row over the whole grid. Raises IndexError outside it."""
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        n_rows, n_cols = self.n_rows, self.n_cols
        row, col = divmod(index, n_cols)
        x, y = col * self.stride_px, row * self.stride_px
        width, height = self.plane.width_px, self.plane.height_px
        own = (
            self._cut(col, n_cols, width),
            self._cut(row, n_rows, height),
            self._cut(col + 1, n_cols, width),
            self._cut(row + 1, n_rows, height),
        )
        return Tile(index, row, col, (x, y, x + self.size_px, y + self.size_px), own)

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles in order of their index."""
        return (self.tile(index) for index in range(len(self)))


def tile_grid(plane: Plane, size_px: int, overlap_px: int) -> TileGrid:
    """Return the grid over a plane. Raises UsageError unless 0 <= overlap <= size / 2."""
    if size_px < 1 or not 0 <= overlap_px <= size_px // 2:
        raise UsageError(f"--overlap {overlap_px}: must be 0 to {size_px // 2}, half of --tile-size {size_px}")
    return TileGrid(plane, size_px, overlap_px)


def fitting_grid(plane: Plane, size_px: int, overlap_px: int, step_px: int | None) -> TileGrid:
    """Return the grid over a plane; its tiles are smaller than asked where one smaller tile covers the whole plane.

    step_px  what tile sizes are multiples of; None for an exported network, which takes tiles of one size only.
    """
    if step_px is not None:
        needed = -(-max(plane.width_px, plane.height_px) // step_px) * step_px
        size_px = min(size_px, max(needed, min(size_px, 2 * step_px)))
    return tile_grid(plane, size_px, min(overlap_px, size_px // 2))


def select_tiles(grid: TileGrid, mask: Mask | None) -> list[Tile]:
    """Return the tiles whose own box meets the mask, in order of their index; all of them without a mask."""
    if mask is None:
        return list(grid.tiles())
    return [tile for tile in grid.tiles() if mask.hit(own_level0(grid.plane, tile))]


def own_level0(plane: Plane, tile: Tile) -> Box:
    """Return the own box of a tile in level-0 pixels."""
    corners = plane.to_level0(np.array(tile.own_xyxy, np.float64).reshape(2, 2)).ravel()
    return float(corners[0]), float(corners[1]), float(corners[2]), float(corners[3])
