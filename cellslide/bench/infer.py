"""Networks: the models that ship as `segment` runs them, beside the same networks run plainly in torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from cellslide.bench.fake import covered_mm2, picture
from cellslide.bench.flow import flow_rows
from cellslide.bench.gpu import segment_rows
from cellslide.bench.rows import BenchOptions, Row, Target, row, timed
from cellslide.bench.start import start_rows
from cellslide.config import InferConfig, Precision
from cellslide.inference.torch_engine import TileNet, TorchEngine
from cellslide.models import cellvta, detr_layers, hover_unet, layers
from cellslide.models.windows import Windows
from cellslide.types import ModelSpec, UInt8
from cellslide.weights import LoadedModel, Manifest, load_model
from cellslide.weights.load import FINDERS

STAGE = "infer"
# Of the slide, where what tiles overlap counts once.
UNIT = "mm2 a core-minute"
CPU_TARGET = Target(ratio=2, more=True)
FASTER = Target(more=True)


def rows(options: BenchOptions) -> Iterator[Row]:
    """Time a tile of each network on the CPU, the overlap of stages, the start, and a network of full size on a GPU."""
    named = options.model is not None or options.weights is not None
    models = [load_model(options.model, options.weights)] if named else shipped()
    # All of them before the first engine, which changes for good how this process takes memory.
    plain = [plain_row(model, options.rounds) for model in models]
    yield from plain
    for model, first in zip(models, plain, strict=True):
        yield from engine_rows(model, first, options.rounds)
    yield from flow_rows()
    yield from start_rows([] if named else [model.spec.name for model in models], options.rounds)
    yield from segment_rows(options)


def shipped() -> list[LoadedModel]:
    """Return the models that come with the package and find nuclei."""
    entries = Manifest.load().entries.values()
    return [load_model(entry.id) for entry in entries if entry.task in FINDERS and entry.in_package]


def plain_row(model: LoadedModel, rounds: int) -> Row:
    """Return the speed of a network run plainly."""
    net, tile = TileNet(model.module, model.spec).eval(), torch.from_numpy(picture(model.spec.tile_px))

    def run() -> object:
        with plainly(), torch.inference_mode():
            return net(tile)

    return speed_row(model.spec, "plain torch fp32", run, rounds)


def engine_rows(model: LoadedModel, first: Row, rounds: int) -> Iterator[Row]:
    """Yield a network as `segment` runs it, in fp32 and in the precision that it takes by itself."""
    spec, image = model.spec, picture(model.spec.tile_px)
    asked: tuple[Precision, ...] = ("fp32", "auto")
    engines = [TorchEngine(model.module, spec, on_cpu(precision), spec.tile_px) for precision in asked]
    if engines[1].precision == "fp32":
        del engines[0]
    for engine in engines:
        run, name = partial(_launched, engine, image), engine.precision
        if engine is engines[-1]:
            yield speed_row(spec, f"{name} (default)", run, rounds, first.value, CPU_TARGET)
        else:
            yield speed_row(spec, name, run, rounds, first.value)


def _launched(engine: TorchEngine, image: UInt8) -> object:
    return engine.launch(image)()


def speed_row(
    spec: ModelSpec,
    name: str,
    call: Callable[[], object],
    rounds: int,
    first: float | None = None,
    target: Target = FASTER,
) -> Row:
    """Return how much of a slide a form gets through, for one tile a call."""
    speeds = [covered_mm2(spec) * 60 / seconds for seconds in timed(call, rounds, time.process_time)]
    return row(STAGE, f"{spec.name}, {name}", speeds, UNIT, 1, first, target)


def on_cpu(precision: Precision) -> InferConfig:
    """Return settings for one tile at a time on the CPU."""
    return InferConfig(device="cpu", batch_size=1, precision=precision)


@contextmanager
def plainly() -> Iterator[None]:
    """Let networks do as their publications say: a mask over all pairs of tokens, and torch's own filters and sums."""
    with (
        patch.object(layers, "_compiled_here", lambda value: False),
        patch.object(layers, "softmax_of_few", softmax_plainly),
        patch.object(detr_layers, "softmax_of_few", softmax_plainly),
        patch.object(cellvta, "enlarged", enlarged_plainly),
        patch.object(hover_unet, "enlarged", enlarged_plainly),
        patch.object(Windows, "of", Masked),
    ):
        yield


def softmax_plainly(logits: Tensor) -> Tensor:
    """Return the softmax along the last axis as torch does it."""
    return logits.softmax(-1)


def enlarged_plainly(x: Tensor, scale: int) -> Tensor:
    """Enlarge maps (B, C, h, w) by torch's filter."""
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


class Masked:
    """Attention within a radius as a mask over all pairs of tokens."""

    def __init__(self, grid_hw: Sequence[int], radius: int, device: torch.device) -> None:
        places = torch.meshgrid(*(torch.arange(n, device=device) for n in grid_hw), indexing="ij")
        rows, cols = (place.flatten() for place in places)
        near = torch.maximum((rows[:, None] - rows).abs(), (cols[:, None] - cols).abs())
        self.mask = near <= radius

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with queries, keys and values (B, heads, N, d)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
