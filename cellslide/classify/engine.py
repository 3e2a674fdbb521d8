"""The classifier on its device: batches of one size through the local path, the context, and the gate.

Every pass has the same number of rows, the last one filled up, so that what a cell gets does not hang on how many
others it came with: on the CPU cells in any order give the same bits at one batch size; another batch size, and any
choice on a GPU, moves probabilities by rounding only (about 1e-6 in fp32).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cellslide.classify.decision import temper
from cellslide.config import ClassifyConfig
from cellslide.errors import UsageError
from cellslide.inference.crops import CropCutter, RegionRead, read_region
from cellslide.inference.micro_batches import OnDevice, auto_batch_size
from cellslide.slides.slide import Slide
from cellslide.types import ClassifierSpec, CropSpec, Float32, Int64, PathProbs, Plane

if TYPE_CHECKING:
    from cellslide.weights.classifier import LoadedClassifier

# So many batches are one piece of work: little is lost when a run is killed, and the last batch fills up rarely.
BATCHES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Seconds:
    """Measured seconds a cell: its local path, its context (less where contexts are shared), fusion and gate."""

    local: float
    context: float
    fusion: float


@dataclass(frozen=True, slots=True)
class _Local:
    """The local path of n cells, on the device: features (n, D), features before FiLM (n, D), logits (n, K)."""

    features: Tensor
    raw: Tensor
    logits: Tensor


class Classifier(OnDevice):
    """A classifier on its device, used for one slide after another.

    `spec` is that of the weights with `--context-size` put in; `batch_size` counts local crops, contexts are batched by
    their share of pixels.
    """

    def __init__(self, loaded: LoadedClassifier, config: ClassifyConfig) -> None:
        self.spec = resolved_spec(loaded, config)
        self.config = config = replace(config, paths=config.paths or self.spec.calibration.paths)
        super().__init__(config.infer, self.spec.mean, self.spec.std)
        module: Any = loaded.module.eval().to(self._device)
        self.module = module if self._device.type == "mps" else module.to(memory_format=torch.channels_last)
        self.batch_size = config.infer.batch_size or auto_batch_size("crop", self.spec.local.input_px, self._device)
        self.has_global = config.paths == "both" and self.module.has_global
        self._local_path, self._context, self._fuse = self.module.local_path, self._context_vector, self._fusion
        if config.infer.compile:
            compiled = (torch.compile(f) for f in (self._local_path, self._context, self._fuse))
            self._local_path, self._context, self._fuse = compiled

    @property
    def context_batch(self) -> int:
        """Contexts in one pass."""
        return max(1, self.batch_size * self.spec.local.input_px**2 // self.spec.context.input_px**2)

    @property
    def borders(self) -> tuple[str, ...]:
        """What the crops need beyond the slide's edge."""
        return (self.spec.local.border, *((self.spec.context.border,) if self.has_global else ()))

    @property
    def rows_at_once(self) -> int:
        """Cells in one piece of work."""
        return self.batch_size * BATCHES_AT_ONCE

    def too_large(self) -> str:
        """Return what to do where one cell does not fit."""
        return (
            f"one cell with a context of {self.spec.context.input_px} px exceeds the memory of {self.device}; "
            "use a smaller --context-size, or --paths local"
        )

    def load_region(self, read: RegionRead, plane: Plane) -> CropCutter:
        """Put the pixels of a region on the device."""
        return CropCutter(read, plane, self._device)

    def launch(self, region: CropCutter, local: Int64, context: Int64, organ: int) -> Callable[[], PathProbs]:
        """Start on cells by the corners of their crops (n, 2) in `region`; the returned call waits for the result.

        Halves the batch when memory runs out; raises CellslideError when not even one cell fits.
        """
        return self.in_memory(lambda: self._launch(region, local, context, organ))

    @torch.inference_mode()
    def _launch(self, region: CropCutter, local: Int64, context: Int64, organ: int) -> Callable[[], PathProbs]:
        n = len(local)
        first = _Local(*self._in_batches(n, self.batch_size, lambda rows: self._local(region, local[rows], organ)))
        prob = first.logits.softmax(dim=1)
        broken = ~first.logits.isfinite().all(dim=1)
        global_, gate = torch.full_like(prob, torch.nan), torch.full_like(prob[:, 0], torch.nan)
        todo = self._undecided(prob) if self.has_global else np.zeros(0, np.int64)
        if len(todo):
            found = self._global(region, local[todo], context[todo], _take(first, todo))
            where = torch.from_numpy(todo).to(self._device)
            global_[where], gate[where] = found
            broken[where] |= ~(found[0].isfinite().all(dim=1) & found[1].isfinite())
        # A nucleus of which one number is none is not typed; NaN in `local` says so.
        prob, global_ = (column.masked_fill(broken[:, None], torch.nan) for column in (prob, global_))
        gate = gate.masked_fill(broken, torch.nan)
        return _fetch(self._device, prob, global_, gate)

    def _undecided(self, prob: Tensor) -> Int64:
        """Return the rows whose global path must run: all, or those of which the local path alone is not sure."""
        if self.config.adaptive is None:
            return np.arange(len(prob))
        calibrated = temper(prob.cpu().numpy(), self.spec.calibration.temperature_local)
        return np.flatnonzero(calibrated.max(axis=1) < self.config.adaptive)

    def _local(self, region: CropCutter, corners: Int64, organ: int) -> tuple[Tensor, ...]:
        with self.autocast():
            out = self._local_path(self._crops(region, corners, self.spec.local), self._organs(len(corners), organ))
        return out.features, out.raw, out.logits.float()

    def _global(self, region: CropCutter, local: Int64, context: Int64, first: _Local) -> tuple[Tensor, Tensor]:
        """Return global probabilities (n, K) and gate (n,); contexts at the same place pass the network once."""
        places, owner = np.unique(context, axis=0, return_inverse=True)
        size = self.context_batch
        (vector,) = self._in_batches(len(places), size, lambda rows: self._contexts(region, places[rows]))
        owner = owner.reshape(-1)

        def fuse(rows: Int64) -> tuple[Tensor, ...]:
            part = _take(first, rows)
            crops = None if self.module.shares_backbone else self._crops(region, local[rows], self.spec.local)
            with self.autocast():
                return self._fuse(crops, vector[_index(owner[rows], vector)], part.features, part.raw, part.logits)

        prob, gate = self._in_batches(len(local), self.batch_size, fuse)
        return prob, gate

    def _contexts(self, region: CropCutter, corners: Int64) -> tuple[Tensor]:
        with self.autocast():
            return (self._context(self._crops(region, corners, self.spec.context)),)

    def _context_vector(self, crops: Tensor) -> Tensor:
        vector: Tensor = self.module.context_vector(crops)
        return vector

    def _fusion(
        self, crops: Tensor | None, vector: Tensor, features: Tensor, raw: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        # One pass of the backbone serves both paths where they hold the same weights.
        out = self.module.global_path(crops, vector, u=raw if crops is None else None)
        gate = self.module.gate(features, out.fused, logits, out.logits)
        return out.logits.float().softmax(dim=1), gate.float().reshape(-1)

    def _crops(self, region: CropCutter, corners: Int64, spec: CropSpec) -> Tensor:
        crops = self.normalised(region.cut(corners, spec))
        return crops.contiguous() if self._device.type == "mps" else crops.contiguous(memory_format=torch.channels_last)

    def _organs(self, n: int, organ: int) -> Tensor:
        return torch.full((n,), organ, dtype=torch.int64, device=self._device)

    def _in_batches(self, n: int, size: int, run: Callable[[Int64], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run rows 0..n-1 in passes of exactly `size`, the last filled with its last row; join and cut to n."""
        passes = [run(np.minimum(np.arange(first, first + size), n - 1)) for first in range(0, n, size)]
        return tuple(torch.cat(column)[:n] for column in zip(*passes, strict=True))

    @cached_property
    def pace(self) -> Seconds:
        """What `measure` gives, measured once for all slides."""
        return self.measure()

    def measure(self) -> Seconds:
        """Return seconds a cell and a context take here: one full batch of each on a blank region, cutting included.

        Halves the batch when memory runs out, as `launch` does.
        """
        return self.in_memory(self._measure)

    @torch.inference_mode()
    def _measure(self) -> Seconds:
        region = _blank_region(self)
        corners = np.tile(np.array(region.box[:2], np.int64), (self.batch_size, 1))
        if self._device.type == "cuda" or self.config.infer.compile:
            self._stages(region, corners)  # The first pass also allocates and compiles.
        return self._stages(region, corners)

    def _stages(self, region: CropCutter, corners: Int64) -> Seconds:
        local, first = self._timed(lambda: _Local(*self._local(region, corners, 0 if self.spec.organs else -1)))
        if not self.has_global:
            return Seconds(local / self.batch_size, 0.0, 0.0)
        context, (vector,) = self._timed(lambda: self._contexts(region, corners[: self.context_batch]))
        many = vector[torch.arange(self.batch_size, device=self._device) % len(vector)]
        crops = None if self.module.shares_backbone else self._crops(region, corners, self.spec.local)

        def fuse() -> tuple[Tensor, Tensor]:
            with self.autocast():
                return self._fuse(crops, many, first.features, first.raw, first.logits)

        fusion, _ = self._timed(fuse)
        return Seconds(local / self.batch_size, context / len(vector), fusion / self.batch_size)

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = time.perf_counter()
        result = call()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def open_classifier(loaded: LoadedClassifier, config: ClassifyConfig) -> Classifier:
    """Put a classifier on its device.

    Raises UsageError for sizes that it cannot take, MissingDependencyError when the device is not there.
    """
    torch.manual_seed(config.infer.seed)
    return Classifier(loaded, config)


def resolved_spec(loaded: LoadedClassifier, config: ClassifyConfig) -> ClassifierSpec:
    """Return the spec of the weights with `--context-size`; raises UsageError where the sizes do not suit them."""
    spec, size = loaded.spec, config.context_size
    patch = loaded.module.context_patch_px
    if size is not None and size % patch:
        raise UsageError(f"--context-size {size}: must be a multiple of {patch} px for {spec.name}")
    spec = spec if size is None else replace(spec, context=replace(spec.context, input_px=size))
    step = patch * spec.context.field_px / spec.context.input_px
    if config.context_grid is not None and not (config.context_grid / step).is_integer():
        raise UsageError(
            f"--context-grid {config.context_grid}: must be a multiple of {step:g} px, the patch of {spec.name}"
        )
    return spec


def _take(first: _Local, rows: Int64) -> _Local:
    where = _index(rows, first.features)
    return _Local(first.features[where], first.raw[where], first.logits[where])


def _index(rows: Int64, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def _fetch(device: torch.device, *columns: Tensor) -> Callable[[], PathProbs]:
    """Start copying to the host; the returned call waits for these copies only, not for what is launched later."""
    if device.type != "cuda":
        ready = PathProbs(*(_numpy(column.cpu()) for column in columns))
        return lambda: ready
    host = [torch.empty(c.shape, dtype=c.dtype, pin_memory=True).copy_(c, non_blocking=True) for c in columns]
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))

    def wait() -> PathProbs:
        event.synchronize()
        return PathProbs(*(_numpy(column) for column in host))

    return wait


def _numpy(column: Tensor) -> Float32:
    return np.array(column.numpy(), np.float32)


def _blank_region(classifier: Classifier) -> CropCutter:
    from cellslide.slides.slide import slide_from_array

    spec = classifier.spec
    edge = max(spec.local.field_px, spec.context.field_px)
    slide: Slide = slide_from_array(np.full((edge, edge, 3), 200, np.uint8), spec.mpp)
    plane = Plane.of(slide.info, spec.mpp)
    return classifier.load_region(read_region(slide, plane, (0, 0, edge, edge), classifier.borders), plane)
