"""Genes of one slide: predicted tile by tile, as maps, at the nuclei that were found, and as a page.

tiles on tissue -> network -> maps -> genes.zarr, obsm["genes"] of cells.zarr, genes.html
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cellslide.config import TissueConfig
from cellslide.errors import UsageError
from cellslide.genes.maps import GeneMap, write_maps
from cellslide.genes.network import FusionNetwork, Reader, predict
from cellslide.genes.page import write_page
from cellslide.genes.scores import GeneScores, score_genes
from cellslide.genes.tiles import GeneTiles
from cellslide.progress import IDLE, Watch
from cellslide.slides.tiles import select_tiles
from cellslide.slides.tissue import find_tissue
from cellslide.store.anndata_columns import Columns, write_values
from cellslide.store.cell_table import BLOCK_ROWS, TableExtender, open_table
from cellslide.store.run_record import TABLE, read_record
from cellslide.store.slide_folder import close_record, held
from cellslide.types import Float32, Float64, Int64

Level = Literal["tile", "token"]
MAPS, PAGE, NAME = "genes.zarr", "genes.html", "genes"


@dataclass(frozen=True, slots=True)
class GeneCounts:
    """What was written: tiles, genes, nuclei with a vector, and scores where the genes were measured too."""

    tiles: int
    genes: int
    nuclei: int
    scores: GeneScores | None


def predict_slide(
    network: FusionNetwork, tiles: GeneTiles, folder: Path, level: Level = "tile", zero_missing: bool = False,
    batch_size: int = 32, watch: Watch = IDLE,
) -> GeneCounts:  # fmt: skip
    """Predict the genes of a slide into its folder; values are log1p counts.

    level  "token" also writes a map by patch, from weights that were trained with a token head.
    Raises UsageError for weights without such a head, contrastive ones, a slide without tissue, and as `Reader`.
    """
    config = network.config
    if config.contrast:
        raise UsageError(f"{network.entry.id}: predicts no genes; `train fusion --init` goes on from it")
    if level == "token" and not config.token_head:
        raise UsageError(f"--level token: {network.entry.id} was not trained with model.token_head")
    reader = Reader(network, tiles, zero_missing)
    mask = find_tissue(tiles.slide, TissueConfig())
    numbers = np.array([tile.index for tile in select_tiles(tiles.grid, mask)], np.int64)
    if not len(numbers):
        raise UsageError(f"{tiles.sample.slide}: no tissue was found")
    canvas = _Canvas(tiles, len(config.genes_out), config.token_head and level == "token", reader.targets is not None)
    watch.progress.begin(tiles.slide.info.slide_id, len(numbers), 0)
    for part in predict(reader, numbers, batch_size, watch):
        canvas.put(part.tiles, part.y, part.truth, part.token_y)
        for _ in part.tiles:
            watch.progress.advance(0)
    watch.progress.stage("write")
    folder.mkdir(parents=True, exist_ok=True)
    maps = canvas.maps()
    scores = canvas.scores(config.genes_out)
    write_maps(folder / MAPS, config.genes_out, maps)
    nuclei = _annotate(folder, network, maps.get("predicted_tokens", maps["predicted"]), watch)
    write_page(folder / PAGE, tiles.slide, network.entry.id, config.genes_out, maps, scores)
    return GeneCounts(len(numbers), len(config.genes_out), nuclei, scores)


class _Canvas:
    """Maps by tile, and by patch where asked: where tiles overlap, a patch is that of the nearer middle."""

    def __init__(self, tiles: GeneTiles, n_genes: int, tokens: bool, truth: bool) -> None:
        self.tiles, grid = tiles, tiles.grid
        self.pred = np.full((n_genes, grid.n_rows, grid.n_cols), np.nan, np.float32)
        self.true = np.full_like(self.pred, np.nan) if truth else None
        shape = tiles.shape
        rows, cols = (-(-n // shape.patch_px) for n in (tiles.plane.height_px, tiles.plane.width_px))
        self.tokens = np.full((n_genes, rows, cols), np.nan, np.float32) if tokens else None

    def put(self, numbers: Int64, y: Float32, truth: Float32 | None, token_y: Float32 | None) -> None:
        grid = self.tiles.grid
        rows, cols = np.divmod(numbers, grid.n_cols)
        self.pred[:, rows, cols] = y.T
        if self.true is not None and truth is not None:
            self.true[:, rows, cols] = truth.T
        if self.tokens is not None and token_y is not None:
            for row, col, values in zip(rows, cols, token_y, strict=True):
                self._put_tokens(int(row), int(col), values)

    def _put_tokens(self, row: int, col: int, values: Float32) -> None:
        assert self.tokens is not None
        shape, grid = self.tiles.shape, self.tiles.grid
        square = values.reshape(shape.edge, shape.edge, -1).transpose(2, 0, 1)
        spans = []
        for k, n, length in ((row, grid.n_rows, self.tokens.shape[1]), (col, grid.n_cols, self.tokens.shape[2])):
            margin = (shape.edge - shape.stride) // 2
            low = 0 if k == 0 else margin
            high = shape.edge if k == n - 1 else margin + shape.stride
            high = min(high, length - k * shape.stride)
            spans.append((k * shape.stride + low, k * shape.stride + high, low, high))
        (r0, r1, a0, a1), (c0, c1, b0, b1) = spans
        self.tokens[:, r0:r1, c0:c1] = square[:, a0:a1, b0:b1]

    def maps(self) -> dict[str, GeneMap]:
        plane, shape = self.tiles.plane, self.tiles.shape

        def placed(values: Float32, first_px: float, step_px: float) -> GeneMap:
            scale = (plane.scale_x, plane.scale_y)
            return GeneMap(values, (first_px * scale[0], first_px * scale[1]), (step_px * scale[0], step_px * scale[1]))

        middle, step = shape.edge_px / 2, float(shape.stride * shape.patch_px)
        found = {"predicted": placed(self.pred, middle, step)}
        if self.true is not None:
            found["true"] = placed(self.true, middle, step)
        if self.tokens is not None:
            found["predicted_tokens"] = placed(self.tokens, shape.patch_px / 2, float(shape.patch_px))
        return found

    def scores(self, genes: tuple[str, ...]) -> GeneScores | None:
        if self.true is None:
            return None
        known = ~np.isnan(self.pred[0])
        pred, true = self.pred[:, known].T, self.true[:, known].T
        return score_genes(pred, true, np.zeros(len(pred), np.int64), genes)


def _annotate(folder: Path, network: FusionNetwork, found: GeneMap, watch: Watch) -> int:
    """Give the nuclei of a table, where there is one, the values of the map at their places."""
    if not (folder / TABLE).exists():
        return 0
    began = time.perf_counter()
    with held(folder, watch), open_table(folder / TABLE) as table:
        record = read_record(folder) or table.run
        record.config = {**record.config, NAME: {"weights": network.entry.id, "sha256": network.sha256}}
        xy: Float64 = np.stack([np.asarray(table.vector(name), np.float64) for name in ("x", "y")], axis=1)
        extender = TableExtender(table)
        try:
            for start in range(0, max(len(xy), 1), BLOCK_ROWS):
                extender.append(Columns(obsm={NAME: found.at(xy[start : start + BLOCK_ROWS])}))
            write_values(extender.group, f"uns/{NAME}", network.config.genes_out)
            extender.close(record)
        except BaseException:
            extender.abort()
            raise
        close_record(record, folder, record.peak_device_bytes, began)
    return len(xy)
