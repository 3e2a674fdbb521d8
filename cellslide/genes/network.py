"""A fusion network with its weights, run over the tiles of a slide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from cellslide.errors import UsageError, WeightsError
from cellslide.genes.tiles import GeneTiles, TileShape, gene_columns, pooled
from cellslide.inference.device import resolve_device
from cellslide.models.backbones import create_backbone, patch_px
from cellslide.models.checkpoint import build_empty, load_strict, read_checkpoint
from cellslide.models.fusion_config import FusionConfig, TilePool
from cellslide.models.morpho_fusion import MorphoFusion
from cellslide.progress import IDLE, Watch
from cellslide.types import Float32, Int64
from cellslide.weights.cache import WeightsBytes, require_file
from cellslide.weights.load import entry_beside, resolve_path
from cellslide.weights.manifest import Manifest, WeightsEntry

ARCH = "morpho_fusion"


@dataclass(frozen=True, slots=True)
class FusionNetwork:
    """A network in eval mode on its device, and how it reads slides."""

    module: MorphoFusion
    entry: WeightsEntry
    sha256: str
    shape: TileShape
    device: torch.device

    @property
    def config(self) -> FusionConfig:
        """What the network is."""
        return self.module.config

    @property
    def pool(self) -> TilePool:
        """How a tile's vector is made of its patches."""
        return cast(TilePool, self.config.tiles.get("pool", "mean"))

    @property
    def least_qv(self) -> float:
        """Transcripts of lower quality do not count."""
        return float(self.config.tiles.get("least_qv", 20.0))


def open_network(model: str | None, weights: Path | None, device: str = "auto") -> FusionNetwork:
    """Load a fusion network by id, or from a file or the folder of a run.

    Raises UsageError for weights of another kind, WeightsError where they are missing, changed or do not fit.
    """
    if model is None and weights is None:
        raise UsageError("--weights: name the run of `cellslide train fusion` (or --model ID)")
    entry = Manifest.load().entry(str(model)) if weights is None else entry_beside(resolve_path(weights))
    if entry is None or entry.arch != ARCH:
        raise UsageError(f"{weights or model}: no weights of `cellslide train fusion` or `pretrain clip`")
    file = WeightsBytes.read(require_file(entry), entry)
    checkpoint = read_checkpoint(file.path, entry.arch, file.data)
    module = load_strict(build_empty(entry.arch, dict(entry.config)), checkpoint.state, str(file.path))
    if not isinstance(module, MorphoFusion) or entry.mpp is None:
        raise WeightsError(f"{file.path}: its entry says no mpp")
    where = resolve_device(device)
    return FusionNetwork(module.eval().to(where), entry, file.sha256, _shape(module, entry.mpp), where)


def _shape(module: MorphoFusion, mpp: float) -> TileShape:
    config = module.config
    # A network that looks at no image counts on the grid of the ViT that its recipe names.
    vit: Any = module.backbone.morph_encoder if config.reads_image else create_backbone(config.vit, config.vit_args)
    edge, patch = int(vit.patch_embed.img_size[0]), patch_px(vit)
    return TileShape(mpp, edge, patch, int(module.config.tiles.get("stride", edge // patch // 2)))


class Predicted(NamedTuple):
    """A batch of tiles: their numbers (b,); y (b, T) and token_y (b, N, T) or None, predicted log1p counts; x (b, G)
    log1p sums of the genes that are read, truth (b, T) of the targets, or None where they were not measured.
    """

    tiles: Int64
    y: Float32
    token_y: Float32 | None
    x: Float32 | None
    truth: Float32 | None


class Reader:
    """What a network reads of the tiles of one slide; raises UsageError for a modality or genes that are not there."""

    def __init__(self, network: FusionNetwork, tiles: GeneTiles, zero_missing: bool = False) -> None:
        config, sample = network.config, tiles.sample
        self.network, self.tiles, self.columns, self.targets = network, tiles, None, None
        if tiles.tokens is None and config.reads_genes:
            raise UsageError(
                f"{sample.slide}: {network.entry.id} reads transcripts of {len(config.genes_in)} genes "
                f"({', '.join(config.genes_in[:4])}, …); give their bundle with --transcripts"
            )
        if tiles.tokens is not None:
            missing: Literal["error", "zero"] = "zero" if zero_missing else "error"
            if config.reads_genes:
                self.columns = gene_columns(tiles.tokens, config.genes_in, sample.bundle, missing)
            targets = gene_columns(tiles.tokens, config.genes_out, sample.bundle, "zero")
            self.targets = targets if len(targets) and (targets >= 0).all() else None

    def batch(self, numbers: Int64) -> tuple[torch.Tensor | None, torch.Tensor | None, Float32 | None, Float32 | None]:
        """Return image and expression as the network takes them, then log1p sums of what is read and of the truth."""
        network, config = self.network, self.network.config
        image = expression = x = truth = None
        if config.reads_image:
            pixels = np.stack([self.tiles.image(int(k)) for k in numbers]).transpose(0, 3, 1, 2)
            mean, std = (
                255 * np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (network.entry.mean, network.entry.std)
            )
            image = torch.from_numpy((pixels.astype(np.float32) - mean) / std).to(network.device)
        if self.columns is not None:
            counts = [self.tiles.counts(int(k), self.columns) for k in numbers]
            rows = [pooled(c, network.pool) if config.by_tile else np.log1p(c) for c in counts]
            expression = torch.from_numpy(np.stack(rows)).to(network.device)
            x = np.stack([pooled(c, "sum") for c in counts])
        if self.targets is not None:
            truth = np.stack([pooled(self.tiles.counts(int(k), self.targets), "sum") for k in numbers])
        return image, expression, x, truth


@torch.inference_mode()
def predict(reader: Reader, numbers: Int64, batch_size: int = 32, watch: Watch = IDLE) -> Iterator[Predicted]:
    """Yield predictions of tiles, in their order; what a tile gets does not depend on the batch it is in."""
    for start in range(0, len(numbers), batch_size):
        watch.check()
        chosen = numbers[start : start + batch_size]
        image, expression, x, truth = reader.batch(chosen)
        found = reader.network.module(image, expression)
        tokens = None if found.token_y is None else found.token_y.float().cpu().numpy()
        yield Predicted(chosen, found.y.float().cpu().numpy(), tokens, x, truth)


@torch.inference_mode()
def contrast(reader: Reader, numbers: Int64, batch_size: int = 32) -> tuple[Float32, Float32]:
    """Return the vectors of image and transcripts of tiles, (n, d) each, of length 1, of a contrastive network."""
    parts = []
    for start in range(0, len(numbers), batch_size):
        image, expression, _, _ = reader.batch(numbers[start : start + batch_size])
        assert image is not None and expression is not None
        parts.append([v.cpu().numpy() for v in reader.network.module.contrast(image, expression)[:2]])
    image_z, expression_z = (np.concatenate(v) for v in zip(*parts, strict=True))
    return image_z, expression_z
