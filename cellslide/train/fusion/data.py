"""Tiles of many slides as samples: pixels, transcripts of the sources, and the targets; by draw number or in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.errors import MissingDependencyError, UsageError, short
from cellslide.genes.samples import FusionSample, fold_of, read_samples
from cellslide.genes.tiles import GeneTiles, TileShape, gene_columns, pooled
from cellslide.models.backbones import create_backbone, patch_px
from cellslide.train.fusion.recipe import FusionChoice, FusionRecipe
from cellslide.train.loaders import draw_loader, start_worker
from cellslide.train.recipe import load_recipe
from cellslide.train.task import FitOptions, Run
from cellslide.types import Bool, Float32, Int64

HVG = "hvg:"


class FusionBatch(NamedTuple):
    """image uint8 (B, 3, S, S); x log1p counts of the sources (B, N, G), (B, G) by tile; y (B, T) of the targets.

    token_y (B, N, T), without rows where patches are not predicted; slide int64 (B,).
    """

    image: Tensor
    x: Tensor
    y: Tensor
    token_y: Tensor
    slide: Tensor


@dataclass(frozen=True)
class FusionSet:
    """The tiles of one split: `slides`, and of each tile the number of its slide and its own."""

    name: str
    slides: tuple[GeneTiles, ...]

    @cached_property
    def places(self) -> Int64:
        """Slide and tile of each sample, int64 (n, 2)."""
        found = [np.column_stack([np.full(len(s.kept), k), s.kept]) for k, s in enumerate(self.slides)]
        return np.concatenate(found) if found else np.empty((0, 2), np.int64)

    @property
    def patients(self) -> tuple[str, ...]:
        """The patient of each slide."""
        return tuple(s.sample.patient for s in self.slides)


def shape_of(model: FusionChoice, mpp: float, stride: int) -> TileShape:
    """Return the tiles of a ViT; raises UsageError where they are no squares of whole patches."""
    vit: Any = create_backbone(model.vit, model.vit_args, "cls")
    edge, patch = int(vit.patch_embed.img_size[0]), patch_px(vit)
    if edge % patch or stride > edge // patch:
        raise UsageError(f"recipe stride: {stride} patches of {patch} px leave gaps between tiles of {edge} px")
    return TileShape(mpp, edge, patch, stride)


def samples_of(sources: Sequence[Path | str], recipe: FusionRecipe) -> list[FusionSample]:
    """Return the samples of the tables, split by the recipe's fold where it has one; raises UsageError."""
    samples = tuple(sample for source in sources for sample in read_samples(Path(source)))
    if recipe.parts is not None:
        samples = fold_of(samples, recipe.parts.index, recipe.parts.count, recipe.seed)
    return list(samples)


def read_recipe(kind: type[FusionRecipe], path: Path | None, overrides: Any, options: FitOptions) -> FusionRecipe:
    """Read a recipe and write the genes that it leaves open into it, from the training slides alone."""
    recipe: FusionRecipe = load_recipe(kind, path, overrides)
    train = [s for s in samples_of(options.sources, recipe) if s.split == "train"]
    if not train:
        raise UsageError("SAMPLES: no sample has the split train; add a column split, or give --fold K/N")
    if recipe.source_panel and (recipe.contrast or not isinstance(recipe.target_panel, str)):
        return recipe
    shape, cache = shape_of(recipe.model, recipe.mpp, recipe.stride), cache_of(options)
    tiles = [GeneTiles(s, shape, cache, recipe.least_qv, recipe.min_transcripts) for s in train]
    common = sorted(set.intersection(*(set(t.tokens.genes) for t in tiles if t.tokens is not None)))
    targets = recipe.target_panel
    if isinstance(targets, str):
        targets = tuple(most_variable(tiles, common, targets))
    sources = recipe.source_panel or tuple(name for name in common if name not in set(targets))
    return replace(recipe, source_panel=sources, target_panel=targets)


def most_variable(tiles: Sequence[GeneTiles], genes: Sequence[str], wanted: str) -> list[str]:
    """Return the genes that vary most over tiles within slides (scanpy's seurat_v3), by "hvg:N"; sorted by name."""
    n = wanted.removeprefix(HVG)
    if not wanted.startswith(HVG) or not n.isdigit() or not 0 < int(n) < len(genes):
        raise UsageError(f"recipe target_panel: {wanted!r} must be a list of genes, or hvg:N with N below {len(genes)}")
    try:
        import anndata
        import scanpy
        import skmisc  # noqa: F401  # scanpy's seurat_v3 fits by it
    except ModuleNotFoundError as error:
        raise MissingDependencyError("target_panel hvg:N needs scanpy: pip install 'cellslide[spatial]'") from error
    rows: list[Float32] = []
    slide: list[str] = []
    for k, one in enumerate(tiles):
        assert one.tokens is not None
        columns = gene_columns(one.tokens, genes, one.sample.bundle, "error")
        rows += [one.counts(int(tile), columns).sum(0) for tile in one.kept]
        slide += [str(k)] * len(one.kept)
    table = anndata.AnnData(np.stack(rows), obs={"slide": slide})
    try:
        found = scanpy.pp.highly_variable_genes(
            table, flavor="seurat_v3", n_top_genes=int(n), batch_key="slide", inplace=False
        )
    except ValueError as error:  # of the fit
        raise UsageError(f"recipe target_panel: {wanted}: too few genes or tiles ({short(error)})") from error
    chosen: Bool = found["highly_variable"].to_numpy()
    return [name for name, ok in zip(genes, chosen, strict=True) if ok]


def cache_of(options: FitOptions) -> Path:
    """Return the folder of the counts by patch: `--tokens`, else in the run's folder."""
    return Path(options.extra.get("tokens") or options.folder / "tokens")


def read_sets(options: FitOptions, recipe: FusionRecipe) -> list[FusionSet]:
    """Count transcripts where that is not done, and return the tiles that train and those that validate."""
    if not recipe.contrast and not recipe.target_panel:
        raise UsageError("recipe target_panel: name the genes to predict, or hvg:N for the N most variable")
    both = sorted(set(recipe.source_panel) & set(recipe.target_panel))
    if both:
        raise UsageError(f"recipe: {', '.join(both[:8])} stand in source_panel and in target_panel")
    shape, samples = shape_of(recipe.model, recipe.mpp, recipe.stride), samples_of(options.sources, recipe)
    sets = []
    for split in ("train", "val"):
        chosen = [s for s in samples if s.split == split]
        tiles = [GeneTiles(s, shape, cache_of(options), recipe.least_qv, recipe.min_transcripts) for s in chosen]
        sets.append(FusionSet(split, tuple(tiles)))
    for one in sets:
        if not len(one.places):
            raise UsageError(
                f"SAMPLES: no tile of split {one.name} has {recipe.min_transcripts} transcripts "
                "(min_transcripts in --recipe)"
            )
    return sets


def set_card(one: FusionSet, recipe: FusionRecipe) -> dict[str, Any]:
    """Return what a card says of a split."""
    return {"name": one.name, "slides": len(one.slides), "patients": len(set(one.patients)), "tiles": len(one.places)}


class FusionTiles(Dataset[FusionBatch]):
    """Tiles as they are, by their number, and augmented ones by draw number where `drawn`."""

    def __init__(self, tiles: FusionSet, recipe: FusionRecipe, drawn: bool) -> None:
        self.tiles, self.recipe, self.drawn = tiles, recipe, drawn
        self.by_tile = recipe.model.variant.endswith("tile")
        wanted = (*recipe.source_panel, *(() if recipe.contrast else recipe.target_panel))
        self.columns = [
            gene_columns(s.tokens, wanted, s.sample.bundle, recipe.missing_genes)
            for s in tiles.slides
            if s.tokens is not None
        ]

    def __len__(self) -> int:
        return len(self.tiles.places)

    def __getitem__(self, number: int) -> FusionBatch:
        """Return one sample, unbatched."""
        rng = np.random.default_rng([self.recipe.seed, 0, number])
        place = int(rng.integers(len(self))) if self.drawn else number
        slide, tile = (int(v) for v in self.tiles.places[place])
        one, n = self.tiles.slides[slide], len(self.recipe.source_panel)
        image, counts = one.image(tile), one.counts(tile, self.columns[slide])
        if self.drawn and self.recipe.flips:
            image, counts = flipped(image, counts, int(rng.integers(8)))
        x, y = counts[:, :n], counts[:, n:]
        token_y = np.log1p(y) if self.recipe.model.token_head else y[:0]
        return FusionBatch(
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(pooled(x, self.recipe.tile_pool) if self.by_tile else np.log1p(x)),
            torch.from_numpy(np.log1p(y.sum(0))), torch.from_numpy(token_y), torch.tensor(slide),
        )  # fmt: skip


def flipped(image: Any, counts: Float32, which: int) -> tuple[Any, Float32]:
    """Return a tile and its patches turned by a quarter `which` % 4 times, mirrored first from 4 on."""
    edge = round(len(counts) ** 0.5)
    squares = [image, counts.reshape(edge, edge, -1)]
    if which >= 4:
        squares = [s[:, ::-1] for s in squares]
    image, counts = (np.ascontiguousarray(np.rot90(s, which % 4)) for s in squares)
    return image, counts.reshape(edge * edge, -1)


def loaders(run: Run, model: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the loaders of drawn training tiles, and of the validation tiles in order."""
    train, val = run.sets
    exact: DataLoader[Any] = DataLoader(
        FusionTiles(val, run.recipe, drawn=False), batch_size=run.recipe.batch_size,
        num_workers=run.options.workers, worker_init_fn=start_worker, persistent_workers=run.options.workers > 0,
    )  # fmt: skip
    return draw_loader(FusionTiles(train, run.recipe, drawn=True), run), exact
