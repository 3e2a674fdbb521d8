"""Tiles of a slide as the fusion networks read them: pixels, and transcripts by patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cellslide.errors import UsageError
from cellslide.genes.samples import FusionSample
from cellslide.genes.tokens import TokenCounts, TokenGrid, open_tokens
from cellslide.models.fusion_config import TilePool
from cellslide.slides.slide import Slide, open_slide
from cellslide.slides.tiles import TileGrid
from cellslide.types import Float32, Int64, Plane, UInt8
from cellslide.xenium.bundle import LEAST_QV


@dataclass(frozen=True, slots=True)
class TileShape:
    """Tiles of `edge_px` at `mpp`, cut into patches of `patch_px`, one every `stride` patches."""

    mpp: float
    edge_px: int
    patch_px: int
    stride: int

    @property
    def edge(self) -> int:
        """Patches along a tile."""
        return self.edge_px // self.patch_px


class GeneTiles:
    """One slide by tiles; pickled without its open file.

    tokens  counts, None where no transcripts are read.
    kept    int64, the tiles that have enough transcripts, by their number in the grid; all of them without counts.
    """

    def __init__(
        self,
        sample: FusionSample,
        shape: TileShape,
        cache: Path,
        least_qv: float = LEAST_QV,
        least_transcripts: int = 0,
    ) -> None:
        self.sample, self.shape = sample, shape
        self.slide: Slide = open_slide(sample.slide, mpp=sample.mpp)
        self.plane = Plane.of(self.slide.info, shape.mpp)
        tokens = TokenGrid(self.plane, shape.patch_px)
        self.tokens = None if sample.bundle is None else open_tokens(sample, tokens, cache, least_qv)
        self.kept: Int64 = np.arange(len(self.grid), dtype=np.int64)
        if self.tokens is not None:
            self.kept = np.flatnonzero(self.tokens.sums(shape.edge, shape.stride).ravel() >= least_transcripts)

    @cached_property
    def grid(self) -> TileGrid:
        """The tiles; they begin at the plane's corner."""
        edge = self.shape.edge_px
        return TileGrid(self.plane, edge, edge - self.shape.stride * self.shape.patch_px)

    def image(self, tile: int) -> UInt8:
        """Return the pixels of a tile, uint8 (S, S, 3); beside the slide its background."""
        return self.slide.read_plane(self.plane, self.grid.tile(tile).read_xyxy)

    def counts(self, tile: int, columns: Int64) -> Float32:
        """Return transcripts by patch, float32 (N, len(columns)), of `columns` of the genes; -1 has none."""
        assert self.tokens is not None
        place = self.grid.tile(tile)
        stride, edge = self.shape.stride, self.shape.edge
        found = self.tokens.square(place.row * stride, place.col * stride, edge)[:, columns].astype(np.float32)
        found[:, columns < 0] = 0
        return found


def gene_columns(tokens: TokenCounts, genes: Sequence[str], where: object, missing: Literal["error", "zero"]) -> Int64:
    """Return the columns of genes, -1 for one that was not measured; raises UsageError for it unless it is zero."""
    place = {name: k for k, name in enumerate(tokens.genes)}
    columns = np.array([place.get(name, -1) for name in genes], np.int64)
    lacking = [name for name, k in zip(genes, columns, strict=True) if k < 0]
    if lacking and missing == "error":
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise UsageError(
            f"{where}: genes that the weights read were not measured: {', '.join(lacking[:8])}{more}; "
            "--missing-genes zero takes them as 0"
        )
    return columns


def pooled(counts: Float32, pool: TilePool) -> Float32:
    """Return log1p of the mean or the sum over the patches: (N, G) -> (G,)."""
    return np.asarray(np.log1p(counts.mean(0) if pool == "mean" else counts.sum(0)), np.float32)
