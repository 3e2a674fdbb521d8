"""A model made ready: on its device, with its tiles resolved and its decoding processes at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from cellslide.config import InferConfig, OutputFormat, SegmentConfig, TileConfig
from cellslide.detect import Detector, default_workers
from cellslide.device import available_cpus, share_freed_memory
from cellslide.errors import UsageError
from cellslide.infer import Engine, TorchEngine
from cellslide.onnx import OnnxEngine
from cellslide.record import head_sha256, plain
from cellslide.types import ModelSpec, Plane
from cellslide.weights import LoadedModel


@dataclass(frozen=True, slots=True)
class Setup:
    """What of a segmenter remains when its network has run: the model's spec and the settings, tiles resolved."""

    spec: ModelSpec
    config: SegmentConfig

    def peak_device_bytes(self) -> int:
        """Return 0: nothing runs on a device."""
        return 0


@dataclass(frozen=True, slots=True)
class Segmenter:
    """A model on its device with its decoding processes, for one slide after another; a context manager.

    `config.tiles` is resolved: it holds the tile size and overlap in plane pixels that are used.
    """

    model: LoadedModel
    config: SegmentConfig
    detector: Detector

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.model.spec

    @property
    def engine(self) -> Engine:
        """What runs the network."""
        return self.detector.engine

    @property
    def setup(self) -> Setup:
        """What another process needs to write what this one finds."""
        return Setup(self.spec, self.config)

    def peak_device_bytes(self) -> int:
        """Return the most device memory held so far."""
        return self.engine.peak_device_bytes()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detector.close()


def open_segmenter(model: LoadedModel, config: SegmentConfig) -> Segmenter:
    """Put a model on its device.

    Raises UsageError when the tiles do not suit the model, MissingDependencyError when device or engine is not there.
    """
    share_freed_memory()
    config = replace(config, tiles=resolve_tiles(model.spec, config.tiles))
    check_formats(model.spec, config.output.formats)
    torch.manual_seed(config.infer.seed)
    engine = make_engine(model, config.infer, config.tiles.size_px or model.spec.tile_px)
    workers = config.infer.workers
    return Segmenter(model, config, Detector(engine, default_workers(available_cpus()) if workers is None else workers))


def check_formats(spec: ModelSpec, formats: Sequence[OutputFormat]) -> None:
    """Raise UsageError, before any work is done, for a format that a model of this kind cannot give."""
    if "labels" in formats and spec.kind == "point":
        raise UsageError(f"--format labels: {spec.name} gives points, which have no label map; leave labels out")


def make_engine(model: LoadedModel, config: InferConfig, tile_px: int) -> Engine:
    """Return the engine that `--engine` names, for tiles of `tile_px`."""
    kind = OnnxEngine if config.engine == "onnx" else TorchEngine
    return kind(model.module, model.spec, config, tile_px)


def resolve_tiles(spec: ModelSpec, config: TileConfig) -> TileConfig:
    """Return tile size and overlap in plane pixels, from the flags where given, else from the model.

    Raises UsageError when the size is no multiple of what the model takes, or too small for the overlap.
    """
    size = spec.tile_px if config.size_px is None else config.size_px
    overlap = spec.overlap_px if config.overlap_px is None else config.overlap_px
    if size % spec.multiple_px:
        raise UsageError(f"--tile-size {size}: must be a multiple of {spec.multiple_px} px for {spec.name}")
    if overlap > size // 2:
        raise UsageError(
            f"--tile-size {size}: too small for an overlap of {overlap} px; add --overlap {size // 2} or less"
        )
    return TileConfig(size, overlap)


def tile_px_for(plane: Plane, segmenter: Segmenter | Setup) -> int:
    """Return the tile size for a plane (px): smaller than asked where one smaller tile covers the whole plane.

    An exported network takes tiles of one size only.
    """
    size = segmenter.config.tiles.size_px or segmenter.spec.tile_px
    if segmenter.config.infer.engine == "onnx":
        return size
    step = segmenter.spec.multiple_px
    needed = -(-max(plane.width_px, plane.height_px) // step) * step
    return min(size, max(needed, min(size, 2 * step)))


def resolved(config: SegmentConfig, spec: ModelSpec) -> dict[str, Any]:
    """Return the settings as `run.json` holds them: with the model's spec, and a hash of the mask and region files."""
    settings: dict[str, Any] = plain(config)
    settings["spec"] = plain(spec)
    # What the model's kind has no use for decides nothing, and the precision that is taken is told beside.
    unused = ("detect", "embedding_dim") if spec.kind == "mask" else ("decode",)
    for name in (*unused, "bf16_on_cpu"):
        del settings["spec"][name]
    for name, path in (("mask", config.tissue.mask), ("roi", config.tissue.roi)):
        settings["tissue"][f"{name}_sha256_head"] = None if path is None else head_sha256(path)
    return settings
