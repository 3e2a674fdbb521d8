"""Tiles through the network: normalise, forward, reduce on the device, hand small maps back.

The engines (torch here, onnxruntime in `onnx_engine`) take uint8 RGB and give `HoverMaps` for models that find masks,
`Instances` for models that find boxes or points. A launch returns at once on a GPU, so that the next batch can
be put on the device before the last one is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cellslide.config import InferConfig
from cellslide.errors import CellslideError, WeightsError
from cellslide.inference.cpu_memory import keep_freed_memory
from cellslide.inference.device import (
    DTYPES,
    device_name,
    is_out_of_memory,
    peak_device_bytes,
    resolve_device,
    resolve_precision,
)
from cellslide.inference.finite import NOT_FINITE, is_finite
from cellslide.inference.micro_batches import auto_batch_size, fitting_batch_size, in_steps
from cellslide.models.folding import folded
from cellslide.nuclei.nms import point_nms
from cellslide.types import HoverMaps, Instances, ModelSpec, NoOutput, UInt8

TileOutput = HoverMaps | Instances | NoOutput
Arrays = Mapping[str, NDArray[Any]]

# A box that ends so near to the tile's edge may go on behind it.
EDGE_PX = 0.5


class Engine(Protocol):
    """Runs a network on batches of tiles of one size."""

    spec: ModelSpec
    name: str
    precision: str
    device: str
    batch_size: int

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        """Start on uint8 RGB tiles (B, H, W, 3); the returned call waits and gives one output per tile."""
        ...

    def peak_device_bytes(self) -> int:
        """Return the most device memory held so far."""
        ...


def no_room(tile_px: int, device: str) -> NoOutput:
    """Return why a tile that does not fit into the memory of a device gave nothing, and what mends it."""
    return NoOutput(f"one tile of {tile_px} px exceeds the memory of {device}; use a smaller --tile-size")


def output_names(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of what `TileNet` gives for this model, in order."""
    typed = bool(spec.classes)
    if spec.kind == "mask":
        return ("foreground", "foreground_prob", "hv", *(("type_prob",) if typed else ()))
    place = "box_xyxy" if spec.kind == "box" else "point_xy"
    embedded = ("embedding",) if spec.embedding_dim else ()
    return (place, "score", *(("class_prob",) if typed else ()), *embedded)


class TileNet(nn.Module):
    """The network between uint8 tiles and reduced maps, all of it on the device; also what is exported to ONNX.

    forward: images uint8 (B, H, W, 3) RGB -> tensors in the order of `output_names`.
    A mask model gives logits under their published names. A box or point model gives `boxes` (B, Q, 4) xyxy or
    `points` (B, Q, 2) in tile pixels, `scores` (B, Q) with 0 for an unused query, `class_prob` (B, Q, K) when it has
    classes and `embedding` (B, Q, D) when the spec names its length.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.module = module
        self.kind, self.typed, self.model_name = spec.kind, bool(spec.classes), spec.name
        self.embedded = spec.embedding_dim > 0
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise uint8 (B, H, W, 3), forward, and keep what decoding needs."""
        # (B, H, W, 3) seen as (B, 3, H, W) lies in memory as channels_last already.
        x = images.permute(0, 3, 1, 2).float() / 255.0
        out = self.module((x - self.mean) / self.std)
        return self._maps(out) if self.kind == "mask" else self._places(out)

    def _maps(self, out: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        logits = out["nuclei_binary_map"].float()
        margin = logits[:, 1] - logits[:, 0]
        maps = ((margin > 0).to(torch.uint8), torch.sigmoid(margin).half(), out["hv_map"].float())
        if not self.typed:
            return maps
        if "nuclei_type_map" not in out:
            raise WeightsError(f"{self.model_name}: the weights name classes but the model has no type branch")
        return (*maps, torch.softmax(out["nuclei_type_map"].float(), dim=1).half())

    def _places(self, out: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        wanted = ["boxes" if self.kind == "box" else "points", "scores"]
        wanted += ["class_prob"] if self.typed else []
        wanted += ["embedding"] if self.embedded else []
        if missing := [name for name in wanted if name not in out]:
            raise WeightsError(f"{self.model_name}: the model gives no {', '.join(missing)}, which its entry promises")
        return tuple(out[name].float() for name in wanted)


def unpack(arrays: Arrays, spec: ModelSpec, row: int, size_px: int) -> TileOutput:
    """Return the output of one tile of a batch; of boxes and points what `spec.detect` lets through."""
    if spec.kind == "mask":
        types = arrays["type_prob"][row] if "type_prob" in arrays else None
        return HoverMaps(arrays["foreground"][row], arrays["foreground_prob"][row], arrays["hv"][row], types)
    tile = {name: column[row] for name, column in arrays.items()}
    score = tile["score"]
    if not is_finite(score):
        return NoOutput(NOT_FINITE)  # a score that is no number is below every threshold
    # A query scored 0 is unused, whatever the threshold.
    keep = np.flatnonzero((score > 0) & (score >= np.float32(spec.detect.score_threshold)))
    found = {name: column[keep].astype(np.float32) for name, column in tile.items()}
    nuclei = _points(found) if spec.kind == "point" else _boxes(found, size_px)
    radius_px = spec.detect.nms_um / spec.mpp
    return nuclei.take(point_nms(nuclei.centroid_xy, nuclei.score, radius_px)) if radius_px > 0 else nuclei


def _points(found: Arrays) -> Instances:
    xy, score = found["point_xy"].astype(np.float64), found["score"]
    none = np.zeros(len(xy), np.float32)
    return Instances(xy, score, none, none > 0, found.get("class_prob"), embedding=found.get("embedding"))


def _boxes(found: Arrays, size_px: int) -> Instances:
    box = found["box_xyxy"]
    low, high = box[:, :2], box[:, 2:]
    return Instances(
        centroid_xy=(low + high).astype(np.float64) / 2,
        score=found["score"],
        area_px=np.prod(high - low, axis=1),
        cut=(low < EDGE_PX).any(axis=1) | (high > size_px - EDGE_PX).any(axis=1),
        class_prob=found.get("class_prob"),
        box_xyxy=box,
        embedding=found.get("embedding"),
    )


@dataclass(slots=True)
class _Fetched:
    """Outputs on their way to the host; `source` keeps what the device still reads alive."""

    outputs: tuple[Tensor, ...]
    ready: Any
    source: Tensor

    def numpy(self) -> list[NDArray[Any]]:
        if self.ready is not None:
            self.ready.synchronize()
        return [t.numpy() for t in self.outputs]


class TorchEngine:
    """The network in torch: autocast, channels_last, optional compile; out of memory halves the micro-batch."""

    name = "torch"

    def __init__(self, module: nn.Module, spec: ModelSpec, config: InferConfig, tile_px: int) -> None:
        self.spec, self.tile_px = spec, tile_px
        self._device = resolve_device(config.device)
        self.device = device_name(self._device)
        self.precision = resolve_precision(config.precision, self._device, spec.bf16_on_cpu)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        net = TileNet(folded(module) if on_cpu else module, spec).eval().to(self._device)
        if self._device.type != "mps":
            net = net.to(memory_format=torch.channels_last)
        self._net: Callable[[Tensor], tuple[Tensor, ...]] = net
        self.batch_size = config.batch_size or self._auto_batch()
        if config.compile:
            self._net = torch.compile(net)

    def _auto_batch(self) -> int:
        """Try one tile on a GPU: what it takes depends on the model, its size and the number format."""

        def run_one() -> None:
            self.batch_size = 1
            (tried,) = self.launch(np.zeros((1, self.tile_px, self.tile_px, 3), np.uint8))()
            if isinstance(tried, NoOutput):
                raise CellslideError(tried.error)

        return fitting_batch_size(auto_batch_size("tile", self.tile_px, self._device), self._device, run_one)

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        """Start on uint8 RGB tiles (B, H, W, 3), in micro-batches of at most `batch_size`."""
        started = in_steps(self, images, self._try, self._free)
        return lambda: [tile for step in started for tile in self._collect(step)]

    def _collect(self, step: _Fetched | None) -> list[TileOutput]:
        if step is None:
            return [no_room(self.tile_px, self.device)]
        arrays = dict(zip(output_names(self.spec), step.numpy(), strict=True))
        return [unpack(arrays, self.spec, row, self.tile_px) for row in range(len(step.source))]

    def _try(self, images: UInt8) -> _Fetched | None:
        try:
            return self._forward(images)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error holds the tensors of the failed pass.
        return None

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, images: UInt8) -> _Fetched:
        host = torch.from_numpy(images)
        on_gpu = self._device.type == "cuda"
        host = host.pin_memory() if on_gpu else host
        out = self._passed(host.to(self._device, non_blocking=on_gpu))
        if not on_gpu:
            return _Fetched(tuple(t.cpu() for t in out), None, host)
        fetched = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in out)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return _Fetched(fetched, ready, host)

    def _passed(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the network; in half precision a CPU takes tiles one by one.

        Rounding to half precision would make something of the last bit, in which a batch differs from its tiles.
        """
        dtype = DTYPES[self.precision]
        one_by_one = self._device.type == "cpu" and dtype != torch.float32
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32):
            alone = [self._net(part) for part in (images.split(1) if one_by_one else [images])]
        return alone[0] if len(alone) == 1 else tuple(torch.cat(column) for column in zip(*alone, strict=True))

    def peak_device_bytes(self) -> int:
        """Return the most device memory torch has held (bytes)."""
        return peak_device_bytes(self._device)
