"""Genes predicted by fusion networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cellslide.errors import UsageError
from cellslide.progress import IDLE, Watch

if TYPE_CHECKING:
    from cellslide.api.slides import PathLike
    from cellslide.genes.evaluate import FusionReport
    from cellslide.genes.slide import GeneCounts


def predict_genes(
    slide: PathLike,
    out: PathLike,
    *,
    weights: PathLike | None = None,
    model: str | None = None,
    transcripts: PathLike | None = None,
    alignment: PathLike | None = None,
    mpp: float | None = None,
    level: Literal["tile", "token"] = "tile",
    zero_missing: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    watch: Watch = IDLE,
) -> GeneCounts:
    """Predict genes of a slide into `out/<slide_id>/genes.zarr`, a page, and `obsm["genes"]` of nuclei found before.

    weights      run of `train fusion`; transcripts  the Xenium bundle, which most variants read.
    level        "token" also writes a map by patch. zero_missing  genes that the bundle lacks count as 0.
    Raises UsageError where transcripts or genes that the weights read are missing, and as `open_slide`.
    """
    from cellslide.genes.network import open_network
    from cellslide.genes.samples import FusionSample
    from cellslide.genes.slide import predict_slide
    from cellslide.genes.tiles import GeneTiles
    from cellslide.slides.inputs import expand_slides

    network = open_network(model, None if weights is None else Path(weights), device)
    if network.config.reads_genes and transcripts is None:
        genes = network.config.genes_in
        raise UsageError(
            f"--transcripts: {network.entry.id} reads transcripts of {len(genes)} genes ({', '.join(genes[:4])}, …); "
            "give the Xenium bundle of this slide"
        )
    folder = Path(out) / expand_slides([slide])[0].slide_id
    bundle, given = (None if p is None else Path(p) for p in (transcripts, alignment))
    sample = FusionSample(Path(slide), bundle, given, mpp=mpp)
    tiles = GeneTiles(sample, network.shape, folder / "tokens", network.least_qv)
    with tiles.slide:
        return predict_slide(network, tiles, folder, level, zero_missing, batch_size, watch)


def evaluate_genes(
    samples: PathLike,
    *,
    weights: PathLike | None = None,
    model: str | None = None,
    split: str = "test",
    fold: str | None = None,
    min_transcripts: int = 1000,
    tokens: PathLike | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> FusionReport:
    """Score a fusion network and its baselines on the tiles of a split of SAMPLES.csv; `fold` K/N splits by patient."""
    from cellslide.genes.evaluate import evaluate_fusion
    from cellslide.genes.network import open_network
    from cellslide.genes.samples import fold_of, read_samples

    network = open_network(model, None if weights is None else Path(weights), device)
    found = read_samples(Path(samples))
    if fold is not None:
        first, _, second = fold.partition("/")
        if not (first.isdigit() and second.isdigit()):
            raise UsageError(f"--fold {fold}: must be K/N, such as 1/4")
        found = fold_of(found, int(first), int(second))
    place = Path(weights or ".")
    cache = Path(tokens) if tokens is not None else (place if place.is_dir() else place.parent) / "tokens"
    return evaluate_fusion(network, found, split, cache, min_transcripts, batch_size)
