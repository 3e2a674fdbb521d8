"""A model made ready: on its device, with its tiles resolved and its decoding processes at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from cellslide import __version__
from cellslide.config import InferConfig, SegmentConfig, TileConfig
from cellslide.errors import UsageError
from cellslide.formats.registry import find_formats
from cellslide.inference.cpu_memory import share_freed_memory
from cellslide.inference.device import available_cpus, require_devices, resolve_device
from cellslide.inference.flips import with_flips
from cellslide.inference.onnx_engine import OnnxEngine
from cellslide.inference.stream import Detector, default_workers, start_processes
from cellslide.inference.torch_engine import Engine, TorchEngine
from cellslide.models import layers
from cellslide.slides.identity import content_sha256
from cellslide.store.run_record import now_utc, plain
from cellslide.types import ModelSpec, RunRecord, WeightsRef
from cellslide.weights import LoadedModel, Manifest
from cellslide.weights.load import find_weights, spec_of

Load = Callable[..., LoadedModel]


@dataclass(frozen=True, slots=True)
class Setup:
    """What of a segmenter remains when its network has run: the model's spec and the settings, tiles resolved."""

    spec: ModelSpec
    config: SegmentConfig


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


def load_segmenter(load: Load, config: SegmentConfig) -> Segmenter:
    """Load the model of the settings and put it on its device; what it needs beside its weights starts meanwhile.

    Raises what `load` and `open_segmenter` raise.
    """
    # A device that is not there is told before anything starts.
    if resolve_device(config.infer.device).type == "cpu":
        threading.Thread(target=layers.prepare).start()
    pool = start_processes(worker_count(config.infer)) if may_need_decoding(config) else None
    try:
        return open_segmenter(load(config.model, config.weights), config, pool)
    except BaseException:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        raise


def check_settings(config: SegmentConfig) -> None:
    """Raise, before anything starts, for settings with which no slide could be done: weights, tiles, formats, device.

    What only the tensors of a file can tell is left to `open_segmenter`.
    """
    find_formats(config.output.formats)
    entry = find_weights(config.model, config.weights)
    if entry is not None:
        spec = spec_of(entry, entry.config, "")
        resolve_tiles(spec, config.tiles)
        check_formats(spec, config.output.formats)
    require_devices(config.infer.device)


def may_need_decoding(config: SegmentConfig) -> bool:
    """Tell whether the model may find masks, as far as one can tell before it is loaded."""
    if config.model is None or config.weights is not None:
        return True
    entry = Manifest.load().entries.get(config.model)
    return entry is not None and entry.task == "segment"


def worker_count(config: InferConfig) -> int:
    """Return how many processes decode."""
    return default_workers(available_cpus()) if config.workers is None else config.workers


def open_segmenter(model: LoadedModel, config: SegmentConfig, pool: Executor | None = None) -> Segmenter:
    """Put a model on its device; `pool` are processes that `start_processes` started for it.

    Raises UsageError when the tiles do not suit the model, MissingDependencyError when device or engine is not there.
    """
    share_freed_memory()
    config = replace(config, tiles=resolve_tiles(model.spec, config.tiles))
    check_formats(model.spec, config.output.formats)
    torch.manual_seed(config.infer.seed)
    engine = make_engine(model, config)
    if pool is not None and model.spec.kind != "mask":
        pool.shutdown(wait=False)
        pool = None
    return Segmenter(model, config, Detector(engine, worker_count(config.infer), pool))


def check_formats(spec: ModelSpec, formats: Sequence[str]) -> None:
    """Raise UsageError, before any work is done, for a format that is unknown or cannot hold what a model gives."""
    for name in (format.name for format in find_formats(formats) if spec.kind not in format.kinds):
        raise UsageError(f"--format {name}: {spec.name} gives {spec.kind}s, which it cannot hold; leave {name} out")


def make_engine(model: LoadedModel, config: SegmentConfig) -> Engine:
    """Return the engine that `--engine` names; raises UsageError where the model cannot do what `--tta` asks."""
    kind = OnnxEngine if config.infer.engine == "onnx" else TorchEngine
    module = with_flips(model.module, model.spec) if config.tta else model.module
    return kind(module, model.spec, config.infer, config.tiles.size_px or model.spec.tile_px)


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


def resolved(config: SegmentConfig, spec: ModelSpec) -> dict[str, Any]:
    """Return the settings as `run.json` holds them: with the model's spec, and a hash of the mask and region files."""
    settings: dict[str, Any] = plain(config)
    settings["spec"] = plain(spec)
    # What the model's kind has no use for decides nothing, and the precision that is taken is told beside.
    unused = ("detect", "embedding_dim") if spec.kind == "mask" else ("decode",)
    for name in (*unused, "bf16_on_cpu"):
        del settings["spec"][name]
    for name, path in (("mask", config.tissue.mask), ("roi", config.tissue.roi)):
        settings["tissue"][f"{name}_sha256"] = None if path is None else content_sha256(path)
    return settings


def begin_record(slide: dict[str, Any], segmenter: Segmenter) -> RunRecord:
    """Return the record of a run that starts now on a slide, as `describe_slide` tells of it, its settings resolved."""
    spec, engine, config = segmenter.spec, segmenter.engine, segmenter.config
    return RunRecord(
        cellslide_version=__version__,
        status="running",
        slide=slide,
        config=resolved(config, spec),
        weights=[WeightsRef(spec.weights_id, spec.weights_sha256, spec.licence)],
        device=engine.device,
        engine=engine.name,
        precision=engine.precision,
        seed=config.infer.seed,
        started=now_utc(),
    )
