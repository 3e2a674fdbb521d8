"""Tiles -> slide: the one place that turns tile pixels into level-0 pixels, and the merge of overlapping tiles.

Ownership: own boxes partition the plane, and a nucleus belongs to the tile whose own box holds its centroid. A tile
reports its own nuclei and, beyond its own box, those within a narrow band, so that two tiles that place a centroid on
either side of a seam cannot both disown it. What two tiles report twice is found along the seams only: same place, or
outlines or boxes that overlap. The owner's nucleus stays; among equals the larger, then the one from the earlier tile.
Cells of one tile never exclude each other, and touching neighbours from two tiles overlap too little to be taken for
one; boxes of touching neighbours may share much of the smaller one, so those are compared by the area of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.geometry.columns import Rings, join_light, rings_across, take_across
from cellslide.geometry.outlines import ring_areas, ring_bounds, to_polygons
from cellslide.types import Bool, Cells, Float64, Instances, Int32, Int64, ModelSpec, Plane, SlideInfo, Tile

BAND_UM = 3.0
SAME_PLACE_UM = 1.5
SAME_POINT_UM = 3.0
SAME_OVERLAP = 1 / 3
SAME_BOX_IOU = 1 / 2
_STEPS_PER_PX = 1024.0


class Grid(Protocol):
    """What the merge asks of a tile grid: tiles by index, row by row."""

    @property
    def plane(self) -> Plane:
        """The plane that the tiles lie in."""

    @property
    def n_rows(self) -> int:
        """Rows of tiles."""

    @property
    def n_cols(self) -> int:
        """Tiles of a row."""

    def tile(self, index: int) -> Tile:
        """Return a tile by its index."""


def to_cells(instances: Instances, tile: Tile, plane: Plane, info: SlideInfo, band_um: float = BAND_UM) -> Cells:
    """Convert the nuclei of a tile to level-0 pixels and keep those this tile answers for.

    Kept: centroid on the slide and in the own box or within `band_um` of it; or farther out, when the nucleus is so
    large that the owner's read box cuts it. Nuclei cut by the read box are dropped unless that edge is the plane's.
    Centroids are rounded to 1/1024 px, so that every tile gives a nucleus the same number; a point or box that a
    network puts a little beyond the slide's edge is moved onto it.
    """
    own = _level0_box(tile.own_xyxy, plane)
    centroid = _round(plane.to_level0(_round(tile.to_plane(instances.centroid_xy))))
    if instances.contour_xy is None:
        centroid = _onto_slide(centroid, info)
    bounds = _instance_bounds(instances)
    keep = ~(instances.cut & _cut_inside(bounds, tile, plane))
    keep &= _answers_for(centroid, bounds, tile, plane, own, band_um)
    keep &= ((centroid >= 0) & (centroid < (info.width_px, info.height_px))).all(axis=1)
    chosen = instances.take(keep)
    centroid = centroid[keep]
    above, below = centroid[:, 1] < own[1], centroid[:, 1] >= own[3]
    pixel_um2 = plane.scale_x * info.mpp_x * plane.scale_y * info.mpp_y
    contour = None if chosen.contour_xy is None else plane.to_level0(tile.to_plane(chosen.contour_xy))
    return Cells(
        centroid_xy=centroid,
        tile_index=np.full(len(chosen), tile.index, np.int32),
        row=(tile.row - above.astype(np.int32) + below.astype(np.int32)).astype(np.int32),
        score=chosen.score,
        area_um2=(chosen.area_px * pixel_um2).astype(np.float32),
        class_prob=chosen.class_prob,
        box_xyxy=None if chosen.box_xyxy is None else _boxes_to_level0(chosen.box_xyxy, tile, plane),
        contour_xy=contour,
        contour_start=chosen.contour_start,
        embedding=chosen.embedding,
    )


def _round(xy: Float64) -> Float64:
    return np.rint(xy * _STEPS_PER_PX) / _STEPS_PER_PX


def _onto_slide(centroid: Float64, info: SlideInfo) -> Float64:
    """Return points (N, 2) with those that lie outside by no more than a nucleus may be misplaced moved to the edge."""
    last = np.array([info.width_px, info.height_px]) - 1 / _STEPS_PER_PX
    inside = np.clip(centroid, 0, last)
    beside_um = np.abs(centroid - inside) * (info.mpp_x, info.mpp_y)
    return np.where(beside_um.max(axis=1, keepdims=True) <= SAME_PLACE_UM, inside, centroid)


def _level0_box(xyxy: tuple[int, int, int, int], plane: Plane) -> Float64:
    return plane.to_level0(np.array(xyxy).reshape(2, 2)).ravel()


def _boxes_to_level0(box_xyxy: NDArray[Any], tile: Tile, plane: Plane) -> Float64:
    return plane.to_level0(tile.to_plane(np.asarray(box_xyxy, np.float64).reshape(-1, 2))).reshape(-1, 4)


def _instance_bounds(instances: Instances) -> Float64:
    """Return boxes xyxy (N, 4) in tile pixels, from outlines, boxes or points."""
    points = np.tile(instances.centroid_xy, 2)
    if instances.contour_xy is not None and instances.contour_start is not None:
        bounds = ring_bounds(instances.contour_xy, instances.contour_start)
        return np.where(np.isnan(bounds), points, bounds)
    return points if instances.box_xyxy is None else instances.box_xyxy.astype(np.float64)


def _cut_inside(bounds: Float64, tile: Tile, plane: Plane) -> Bool:
    """Whether a nucleus touches an edge of the read box that lies inside the plane, where more of it may follow."""
    x0, y0, x1, y1 = tile.read_xyxy
    inside = (x0 > 0, y0 > 0, x1 < plane.width_px, y1 < plane.height_px)
    touches = np.stack([bounds[:, 0], bounds[:, 1], x1 - x0 - bounds[:, 2], y1 - y0 - bounds[:, 3]], axis=1) < 0.5
    return np.asarray((touches & inside).any(axis=1))


def _answers_for(centroid: Float64, bounds: Float64, tile: Tile, plane: Plane, own: Float64, band_um: float) -> Bool:
    """Whether the centroid is in the own box or its band, or the nucleus reaches out of the read box of its owner."""
    band = band_um / plane.mpp * np.array([plane.scale_x, plane.scale_y])
    outside = np.concatenate([own[:2] - centroid, centroid - own[2:]], axis=1)
    near = (outside <= np.tile(band, 2)).all(axis=1)
    # Read boxes of neighbours overlap evenly about the seam: as far as this one reaches out of its own box, theirs
    # reach in.
    read, ours = np.array(tile.read_xyxy), np.array(tile.own_xyxy)
    reach_in = np.abs(ours - read)
    inner = bounds + np.tile(read[:2], 2)
    cut_there = np.stack(
        [
            (outside[:, 0] > 0) & (inner[:, 2] > ours[0] + reach_in[0] - 0.5),
            (outside[:, 1] > 0) & (inner[:, 3] > ours[1] + reach_in[1] - 0.5),
            (outside[:, 2] >= 0) & (inner[:, 0] < ours[2] - reach_in[2] + 0.5),
            (outside[:, 3] >= 0) & (inner[:, 1] < ours[3] - reach_in[3] + 0.5),
        ]
    ).any(axis=0)
    return np.asarray(near | cut_there)


def same_point_um(spec: ModelSpec) -> float:
    """Return how near (µm) points of two tiles are one nucleus: as near as the model's own suppression has it."""
    return spec.detect.nms_um or SAME_POINT_UM


def merge_stream(parts: Iterable[Cells], grid: Grid, same_point_um: float = SAME_POINT_UM) -> Iterator[Cells]:
    """Merge the cells of tiles, given in order of tile index, and yield them in blocks in final order.

    Points of two tiles no farther apart than `same_point_um` are one nucleus. Final order: tile row that holds the
    centroid, then x, then y; equal places keep tile order. About three tile rows are in memory at a time. How tiles are
    grouped into parts does not matter. Raises ValueError when parts come out of order.
    """
    merger = SeamMerger(grid, same_point_um)
    current, waiting = -1, list[Cells]()
    for part in parts:
        for row, cells in _by_row(part, grid.n_cols):
            if row < current or (waiting and row == current and cells.tile_index[0] < waiting[-1].tile_index[-1]):
                raise ValueError(f"tile {cells.tile_index[0]} comes after a later one")
            if row > current and waiting:
                yield from merger.add_row(current, *waiting)
                waiting = []
            current = row
            waiting.append(cells)
    if waiting:
        yield from merger.add_row(current, *waiting)
    yield from merger.finish()


def _by_row(part: Cells, n_cols: int) -> Iterator[tuple[int, Cells]]:
    if len(part) and part.tile_index[0] // n_cols == part.tile_index[-1] // n_cols:
        yield int(part.tile_index[0] // n_cols), part
        return
    rows = part.tile_index // n_cols
    for row in np.unique(rows):
        yield int(row), part.take(rows == row)


@dataclass(slots=True)
class _Block:
    """Cells of one tile row with what the merge knows of them, N over all the parts that they came in.

    cells  all columns but the outlines.
    rings  the outlines, left where they are until they are handed out; None for boxes and points.
    box    float64 (N, 4), bounds in level-0 px.
    open   bool (N,), not yet decided.
    kept   bool (N,), decided, stays, and not yet handed out.
    """

    cells: Cells
    rings: Rings | None
    box: Float64
    open: Bool
    kept: Bool

    @classmethod
    def of(cls, parts: Sequence[Cells]) -> _Block:
        """Join the light columns of parts."""
        light = join_light(parts)
        rings = None if parts[0].contour_start is None else Rings.of(parts)
        count = len(light)
        return cls(light, rings, _bounds(light, rings), np.ones(count, np.bool_), np.zeros(count, np.bool_))

    @property
    def has_extent(self) -> bool:
        return self.rings is not None or self.cells.box_xyxy is not None


class SeamMerger:
    """Takes tile rows from top to bottom and hands out finished rows of cells, sorted.

    A nucleus is decided once everything that could exclude it is known, so the result is that of one merge over the
    whole slide; groups that reach into the next tile row's read boxes wait for it.
    """

    def __init__(self, grid: Grid, same_point_um: float = SAME_POINT_UM) -> None:
        self._grid, self._same_point_um = grid, same_point_um
        plane = grid.plane
        columns = [grid.tile(col).own_xyxy[2] for col in range(grid.n_cols - 1)]
        rows = [grid.tile(row * grid.n_cols).own_xyxy[3] for row in range(grid.n_rows - 1)]
        # Beyond the outermost tiles nothing is seen twice, so those cells need not be looked at.
        self._x_cuts = np.concatenate([[-np.inf], np.array(columns) * plane.scale_x, [np.inf]])
        self._y_cuts = np.concatenate([[-np.inf], np.array(rows) * plane.scale_y, [np.inf]])
        self._um = np.array([plane.mpp / plane.scale_x, plane.mpp / plane.scale_y])
        self._blocks: list[_Block] = []

    def add_row(self, row: int, *parts: Cells) -> list[Cells]:
        """Take all cells found by tile row `row`, in tile order, and return the rows that are final, one block each."""
        self._blocks.append(_Block.of(parts))
        next_row = row + 1
        top = np.inf
        if next_row < self._grid.n_rows:
            below = self._grid.tile(next_row * self._grid.n_cols)
            top = below.read_xyxy[1] * self._grid.plane.scale_y - self._same_point_um / self._um[1]
        open_rows = self._decide(top)
        return self._hand_out(min([row, *open_rows]))

    def finish(self) -> list[Cells]:
        """Return what is left."""
        self._decide(np.inf)
        return self._hand_out(self._grid.n_rows)

    def _decide(self, top: float) -> list[int]:
        """Decide the open cells that nothing below `top` can touch; returns the final rows of those that stay open."""
        handles = [np.flatnonzero(block.open) for block in self._blocks]
        if not sum(map(len, handles)):
            return []
        pool = _Pool.gather(self._blocks, handles)
        pairs = self._same(pool)
        waits = _spread(pool.box[:, 3] > top, pairs)
        kept = ~waits & _best(self._rank(pool, pairs), pairs)
        begin = 0
        for block, handle in zip(self._blocks, handles, strict=True):
            part = slice(begin, begin + len(handle))
            block.open[handle], block.kept[handle] = waits[part], kept[part]
            begin += len(handle)
        return [int(pool.row[waits].min())] if waits.any() else []

    def _hand_out(self, below: int) -> list[Cells]:
        """Return the kept cells whose final row is less than `below`, sorted, and forget blocks that are used up."""
        blocks, rows, begin = list[_Block](), list[Int64](), 0
        for block in self._blocks:
            final = np.flatnonzero(block.kept & (block.cells.row < below))
            block.kept[final] = False
            if len(final):
                blocks.append(block)
                rows.append(final + begin)
                begin += len(block.cells)
        self._blocks = [block for block in self._blocks if block.open.any() or block.kept.any()]
        return list(_in_order(blocks, np.concatenate(rows))) if blocks else []

    def _own_boxes(self, tile: Int32) -> Float64:
        row, col = np.divmod(tile, self._grid.n_cols)
        return np.stack([self._x_cuts[col], self._y_cuts[row], self._x_cuts[col + 1], self._y_cuts[row + 1]], axis=1)

    def _near_seams(self, box: Float64, tile: Int32) -> Int64:
        """Return the rows of boxes (N, 4; µm) that may have a rival.

        Whatever lies in a tile's own box farther from its edge than any foreign cell intrudes has none.
        """
        if kernels.available():
            from cellslide.geometry.ring_kernels import seam_rows

            return np.asarray(seam_rows(box, tile, self._x_cuts * self._um[0], self._y_cuts * self._um[1]))
        own = self._own_boxes(tile) * np.tile(self._um, 2)
        intrusion = np.concatenate([own[:, :2] - box[:, :2], box[:, 2:] - own[:, 2:]], axis=1)
        return np.flatnonzero((intrusion >= -max(0.0, float(intrusion.max()))).any(axis=1))

    def _rank(self, pool: _Pool, pairs: Int64) -> Int64:
        """Return (N,) places of the cells in `pairs` when the best comes first: owned, larger, earlier tile, left,
        upper."""
        rivals = np.unique(pairs)
        tile, x, y = pool.tile[rivals], pool.centroid[rivals, 0], pool.centroid[rivals, 1]
        own = self._own_boxes(tile)
        owned = (x >= own[:, 0]) & (y >= own[:, 1]) & (x < own[:, 2]) & (y < own[:, 3])
        rank = np.zeros(len(pool.tile), np.int64)
        rank[rivals[np.lexsort((y, x, tile, -pool.area[rivals], ~owned))]] = np.arange(len(rivals))
        return rank

    def _same(self, pool: _Pool) -> Int64:
        """Return pairs (M, 2) of cells that two tiles report and that are one nucleus."""
        margin = 0.0 if pool.has_extent else self._same_point_um / 2
        box = pool.box * np.tile(self._um, 2) + np.array([-1, -1, 1, 1]) * margin
        seam = self._near_seams(box, pool.tile)
        first, second = seam[_meeting(box[seam], pool.tile[seam])].T
        gap = np.hypot(*((pool.centroid[first] - pool.centroid[second]) * self._um).T)
        same = gap <= (SAME_PLACE_UM if pool.has_extent else self._same_point_um)
        if pool.has_extent:
            rest = np.flatnonzero(~same)
            same[rest] = pool.overlaps(first[rest], second[rest])
        return np.stack([first[same], second[same]], axis=1)


@dataclass(frozen=True, slots=True)
class _Pool:
    """The open cells of all blocks, light columns only; `source` (block, row in it) finds the outlines when needed."""

    blocks: list[_Block]
    source: Int64
    centroid: Float64
    box: Float64
    tile: Int32
    row: Int32
    area: NDArray[Any]

    @classmethod
    def gather(cls, blocks: list[_Block], handles: list[NDArray[Any]]) -> _Pool:
        """Collect the rows `handles` of each block."""
        source = [np.stack([np.full(len(h), i), h], axis=1) for i, h in enumerate(handles)]

        def column(pick: Callable[[_Block], NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate([pick(block)[h] for block, h in zip(blocks, handles, strict=True)])

        return cls(
            blocks,
            np.concatenate(source),
            centroid=column(lambda block: block.cells.centroid_xy),
            box=column(lambda block: block.box),
            tile=column(lambda block: block.cells.tile_index),
            row=column(lambda block: block.cells.row),
            area=column(lambda block: block.cells.area_um2),
        )

    @property
    def has_extent(self) -> bool:
        return self.blocks[0].has_extent

    def overlaps(self, first: Int64, second: Int64) -> Bool:
        """Return (M,) whether two cells share so much of their area that they are one nucleus."""
        low = np.maximum(self.box[first, :2], self.box[second, :2])
        high = np.minimum(self.box[first, 2:], self.box[second, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        if self.blocks[0].rings is not None:
            return self._share(first, second, shared) >= SAME_OVERLAP
        both = _box_area(self.box[first]) + _box_area(self.box[second]) - shared
        return _ratio(shared, both) >= SAME_BOX_IOU

    def _share(self, first: Int64, second: Int64, shared: Float64) -> Float64:
        """Return (M,) the area two outlines share over that of the smaller one; `shared` (M,) is that of their boxes,
        which is enough where it is small."""
        import shapely

        cells, place = np.unique(np.concatenate([first, second]), return_inverse=True)
        xy, start = self._rings(cells)
        area = ring_areas(xy, start)
        smaller = np.minimum(area[place[: len(first)]], area[place[len(first) :]])
        share = _ratio(shared, smaller)
        doubt = np.flatnonzero(share >= SAME_OVERLAP)
        if len(doubt):
            polygons = to_polygons(xy, start)
            one, other = (shapely.make_valid(polygons[place[part]]) for part in (doubt, doubt + len(first)))
            share[doubt] = shapely.area(shapely.intersection(one, other)) / smaller[doubt]
        return share

    def _rings(self, cells: Int64) -> tuple[Float64, Int64]:
        """Return the outlines of pool rows `cells` (sorted, so block by block)."""
        sizes = [len(block.cells) for block in self.blocks]
        block, row = self.source[cells].T
        return rings_across(_rings_of(self.blocks), np.cumsum([0, *sizes[:-1]])[block] + row)


def _rings_of(blocks: list[_Block]) -> list[Rings]:
    return [block.rings for block in blocks if block.rings is not None]


def _in_order(blocks: list[_Block], rows: Int64) -> Iterator[Cells]:
    """Yield `rows`, counted over all blocks, in the final order, a block of cells for each tile row."""
    light = take_across([block.cells for block in blocks], rows)
    rings = _rings_of(blocks)
    for order in _by_place(light.row, light.centroid_xy):
        cells = light.take(order)
        if rings:
            xy, start = rings_across(rings, rows[order])
            cells = replace(cells, contour_xy=xy, contour_start=start)
        yield cells


def _by_place(row: Int32, centroid: Float64) -> Iterator[Int64]:
    """Yield the rows of each tile row in the order of x, then y; equal places keep their order."""
    first = int(row.min())
    for value in np.flatnonzero(np.bincount(row - first)):
        rows = np.flatnonzero(row == first + value)
        x, y = centroid[:, 0][rows], centroid[:, 1][rows]
        order = np.argsort(x)
        # Few share their x, and sorting by one number is several times faster.
        same = np.diff(x[order]) == 0
        ties = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))
        some = order[ties]
        order[ties] = some[np.lexsort((some, y[some], x[some]))]
        yield rows[order]


def _meeting(box: Float64, tile: Int32) -> Int64:
    """Return pairs (M, 2) of boxes xyxy (N, 4) of different tiles that meet."""
    if kernels.available():
        from cellslide.geometry.ring_kernels import meeting_boxes

        return np.asarray(meeting_boxes(box, tile))
    import shapely

    shapes = shapely.box(*box.T)
    pairs = shapely.STRtree(shapes).query(shapes).T
    return np.asarray(pairs[(pairs[:, 0] < pairs[:, 1]) & (tile[pairs[:, 0]] != tile[pairs[:, 1]])])


def _bounds(cells: Cells, rings: Rings | None) -> Float64:
    """Return boxes xyxy (N, 4) in level-0 pixels, from outlines, boxes or points."""
    if rings is None:
        return np.tile(cells.centroid_xy, 2) if cells.box_xyxy is None else cells.box_xyxy
    bounds = np.concatenate([ring_bounds(xy, start) for xy, start in rings.parts])
    without = np.flatnonzero(np.isnan(bounds[:, 0]))
    bounds[without] = np.tile(cells.centroid_xy[without], 2)
    return bounds


def _ratio(part: Float64, whole: Float64) -> Float64:
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


def _box_area(box: Float64) -> Float64:
    return np.asarray((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))


def _spread(marked: Bool, pairs: Int64) -> Bool:
    """Mark every cell that is linked, over any number of pairs, to a marked one."""
    marked = marked.copy()
    while True:
        touched = pairs[marked[pairs].any(axis=1)]
        if marked[touched].all():
            return marked
        marked[touched] = True


def _best(rank: Int64, pairs: Int64) -> Bool:
    """Keep cells from the best down, each unless a kept one excludes it (in rounds: all that beat their undecided
    rivals)."""
    kept, undecided = np.zeros(len(rank), np.bool_), np.ones(len(rank), np.bool_)
    while undecided.any():
        beaten = np.zeros(len(rank), np.bool_)
        beaten[np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], pairs[:, 1], pairs[:, 0])] = True
        winners = undecided & ~beaten
        kept |= winners
        excluded = pairs[winners[pairs].any(axis=1)].ravel()
        undecided &= ~winners
        undecided[excluded] = False
        pairs = pairs[undecided[pairs].all(axis=1)]
    return kept
