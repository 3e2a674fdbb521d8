"""Transcripts counted by patch of the ViT's grid: one pass over a bundle, kept on disk, read tile by tile.

The grid is that of the whole plane, so that tiles that overlap by whole patches share its counts. Frame: patch (row,
column) of the plane covers [col, col + 1) x [row, row + 1) patches; every transcript is in one of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from cellslide.errors import SlideError
from cellslide.genes.samples import FusionSample
from cellslide.slides.identity import slide_sha256
from cellslide.store.atomic import Staging
from cellslide.types import Int64, Plane
from cellslide.xenium.alignment import Alignment, find_alignment, read_alignment
from cellslide.xenium.bundle import LEAST_QV, Bundle

UInt32 = NDArray[np.uint32]
FORM = 1


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The patches of a plane: `patch_px` plane pixels each, those at the right and at the bottom may leave it."""

    plane: Plane
    patch_px: int

    @property
    def n_cols(self) -> int:
        """Patches across."""
        return -(-self.plane.width_px // self.patch_px)

    @property
    def n_rows(self) -> int:
        """Patches down."""
        return -(-self.plane.height_px // self.patch_px)


def count_tokens(bundle: Bundle, alignment: Alignment, grid: TokenGrid, least_qv: float = LEAST_QV) -> Any:
    """Return the genes of a bundle counted by patch: a CSR matrix, uint32 (rows x columns of the grid, G).

    Controls, transcripts of lower quality and those beside the plane are left out. Blocks are joined by twos, so that
    memory grows with what is counted and not with the transcripts.
    """
    shape = grid.n_rows * grid.n_cols, len(bundle.genes)
    sums: list[tuple[int, Any]] = []
    for block in bundle.transcripts():
        used = block.kept(least_qv)
        xy = alignment.to_slide(np.stack([block.x_um[used], block.y_um[used]], axis=1))
        col, row = np.floor(grid.plane.from_level0(xy) / grid.patch_px).astype(np.int64).T
        inside = (col >= 0) & (row >= 0) & (col < grid.n_cols) & (row < grid.n_rows)
        place = (row * grid.n_cols + col)[inside], block.gene[used][inside]
        part = sparse.coo_matrix((np.ones(len(place[0]), np.uint32), place), shape=shape).tocsr()
        level = 0
        while sums and sums[-1][0] == level:
            part, level = part + sums.pop()[1], level + 1
        sums.append((level, part))
    total = sparse.csr_matrix(shape, dtype=np.uint32)
    while sums:
        total = total + sums.pop()[1]
    total.sort_indices()
    return total


class TokenCounts:
    """Counts of one slide on disk, read by squares of patches.

    genes   their names, columns of the counts.
    totals  uint32 (rows, columns of the grid), all genes of a patch.
    """

    def __init__(self, path: Path, grid: TokenGrid) -> None:
        self.grid = grid
        group: Any = zarr.open_group(path, mode="r")
        self.genes: tuple[str, ...] = tuple(group.attrs["genes"])
        self._start: Int64 = np.asarray(group["indptr"][:], np.int64)
        self._gene, self._count = (_mapped(path, group[name]) for name in ("indices", "data"))
        self.totals: UInt32 = np.asarray(group["totals"][:], np.uint32)

    def square(self, row: int, col: int, edge: int) -> UInt32:
        """Return the counts of the patches from (row, col), uint32 (edge², G), row by row; beside the grid none."""
        found = np.zeros((edge, edge, len(self.genes)), np.uint32)
        n_cols, last = self.grid.n_cols, min(col + edge, self.grid.n_cols)
        for k in range(min(edge, self.grid.n_rows - row)):
            first = (row + k) * n_cols + col
            start = self._start[first : first + last - col + 1]
            if start[-1] > start[0]:
                span = slice(int(start[0]), int(start[-1]))
                token = np.repeat(np.arange(last - col), np.diff(start))
                found[k, token, self._gene[span]] = self._count[span]
        return found.reshape(edge * edge, -1)

    def sums(self, edge: int, stride: int) -> Int64:
        """Return the transcripts of each square of `edge` patches, one every `stride`: int64 (rows, columns)."""
        rows, cols = (np.arange(1 + max(0, -(-(n - edge) // stride))) * stride for n in self.totals.shape)
        whole = np.zeros((rows[-1] + edge + 1, cols[-1] + edge + 1), np.int64)
        held = self.totals[: len(whole) - 1, : whole.shape[1] - 1]
        whole[1 : 1 + held.shape[0], 1 : 1 + held.shape[1]] = held
        whole = whole.cumsum(0).cumsum(1)
        down = whole[rows + edge] - whole[rows]
        return np.asarray(down[:, cols + edge] - down[:, cols], np.int64)


def _mapped(path: Path, array: Any) -> NDArray[Any]:
    """Return an array of one raw chunk without reading it."""
    if not array.shape[0]:
        return np.empty(0, array.dtype)
    return np.memmap(path / array.basename / "c" / "0", array.dtype, "r", shape=array.shape)


def open_tokens(sample: FusionSample, grid: TokenGrid, folder: Path, least_qv: float = LEAST_QV) -> TokenCounts:
    """Return the counts of a sample, made in `folder` where they are not there.

    Their name is a hash of the transcripts, the alignment, the grid and the least quality.
    """
    assert sample.bundle is not None
    bundle = Bundle(sample.bundle)
    file = find_alignment(sample.slide, sample.alignment)
    alignment = read_alignment(file, bundle.pixel_size)
    plane = grid.plane
    known = (
        FORM, slide_sha256(bundle.transcripts_file), slide_sha256(file), bundle.pixel_size, plane.scale_x,
        plane.scale_y, plane.width_px, plane.height_px, grid.patch_px, least_qv,
    )  # fmt: skip
    path = folder / f"{hashlib.sha256(repr(known).encode()).hexdigest()[:24]}.zarr"
    if not path.is_dir():
        _write(path, count_tokens(bundle, alignment, grid, least_qv), bundle.genes, grid)
    try:
        return TokenCounts(path, grid)
    except (OSError, KeyError, ValueError) as error:
        raise SlideError(f"{path}: counts cannot be read ({error}); remove the folder, they are made anew") from error


def _write(path: Path, counts: Any, genes: tuple[str, ...], grid: TokenGrid) -> None:
    staging = Staging(path)
    try:
        group = zarr.create_group(staging.folder, attributes={"genes": list(genes)})
        totals = np.asarray(counts.sum(axis=1), np.uint32).reshape(grid.n_rows, grid.n_cols)
        arrays = {
            "indptr": counts.indptr.astype(np.int64), "indices": counts.indices.astype(np.uint16),
            "data": counts.data.astype(np.uint32), "totals": totals,
        }  # fmt: skip
        for name, values in arrays.items():
            # In one chunk as it is, which is mapped: a tile reads a few rows, many times.
            group.create_array(
                name,
                data=values,
                chunks=tuple(max(n, 1) for n in values.shape),
                compressors=None,
                config={"write_empty_chunks": True},
            )
        staging.publish()
    except BaseException:
        staging.abort()
        raise
