"""What each saving brings and what it changes: the same cells typed in each way, beside the plain one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cellslide.classify.cells import gather, prepare
from cellslide.classify.decision import mix, skipped
from cellslide.classify.engine import Classifier, open_classifier
from cellslide.config import ClassifyConfig
from cellslide.slides.slide import Slide
from cellslide.types import CropSpec, Float64, PathProbs

if TYPE_CHECKING:
    from cellslide.weights.classifier import LoadedClassifier

SURE = (0.9, 0.95, 0.99)
GRID_STEPS_PX = (32, 64, 128, 256)
RandomSize = Literal["full", "small"]


@dataclass(frozen=True, slots=True)
class Effect:
    """One way of typing N cells beside the plain one.

    max_change, mean_change  of the mixed probabilities, not calibrated.
    agreement   share of cells of which the mix names the same class.
    skipped     share of cells without a global path.
    contexts    places where a context was cut.
    """

    name: str
    cells: int
    cells_per_s: float
    max_change: float
    mean_change: float
    agreement: float
    skipped: float
    contexts: int


def variants(loaded: LoadedClassifier, config: ClassifyConfig) -> Iterator[tuple[str, ClassifyConfig]]:
    """Yield the ways of typing, the plain one first: fp32, each cell its own context, nothing skipped."""
    infer = replace(config.infer, precision="fp32", compile=False)
    plain = replace(config, paths="both", context_grid=None, adaptive=None, infer=infer)
    yield "plain: fp32", plain
    yield "one crop a pass", replace(plain, infer=replace(infer, batch_size=1))
    yield "bf16", replace(plain, infer=replace(infer, precision="bf16"))
    if config.infer.compile:
        yield "compiled", replace(plain, infer=replace(infer, compile=True))
    for sure in SURE:
        yield f"adaptive {sure}", replace(plain, adaptive=sure)
    for grid in grids(loaded, config):
        yield f"context grid {grid} px", replace(plain, context_grid=grid)
    yield "local path alone", replace(plain, paths="local")


def grids(loaded: LoadedClassifier, config: ClassifyConfig) -> list[int]:
    """Return the steps of GRID_STEPS_PX that are multiples of the context's patch in the plane."""
    context = loaded.spec.context
    step = loaded.module.context_patch_px * context.field_px / (config.context_size or context.input_px)
    return [grid for grid in GRID_STEPS_PX if (grid / step).is_integer() and grid <= context.field_px // 2]


def measure_effects(
    loaded: LoadedClassifier, slide: Slide, xy: Float64, organ: int, config: ClassifyConfig
) -> Iterator[Effect]:
    """Yield what each way gives for cells (N, 2) of a slide; the first pass of each, not counted, warms up."""
    reference: PathProbs | None = None
    for name, changed in variants(loaded, config):
        classifier = open_classifier(loaded, changed)
        classifier.measure()
        seconds, probs = _timed(classifier, slide, xy, organ)
        reference = probs if reference is None else reference
        contexts = prepare(slide, xy, classifier).n_contexts
        yield compare(name, reference, probs, seconds, contexts)


def compare(name: str, reference: PathProbs, probs: PathProbs, seconds: float, contexts: int) -> Effect:
    """Return how `probs` differ from `reference`, cell by cell."""
    before, after = mix(reference), mix(probs)
    change = np.abs(after - before)
    return Effect(
        name=name,
        cells=len(probs),
        cells_per_s=len(probs) / seconds,
        max_change=float(change.max(initial=0)),
        mean_change=float(change.mean()) if change.size else 0.0,
        agreement=float((before.argmax(axis=1) == after.argmax(axis=1)).mean()) if change.size else 1.0,
        skipped=float(skipped(probs).mean()) if change.size else 0.0,
        contexts=contexts,
    )


def _timed(classifier: Classifier, slide: Slide, xy: Float64, organ: int) -> tuple[float, PathProbs]:
    start = time.perf_counter()
    probs = gather(slide, xy, organ, classifier)
    return time.perf_counter() - start, probs


def random_classifier(size: RandomSize, seed: int = 0) -> LoadedClassifier:
    """Return a classifier of random weights, to measure time: the published architecture, or a small one like it."""
    import torch

    from cellslide.models.nuclass import NuClass
    from cellslide.models.nuclass_config import NuClassConfig
    from cellslide.types import ClassifierSpec, ClassSpec
    from cellslide.weights.classifier import LoadedClassifier
    from cellslide.weights.manifest import Source, WeightsEntry

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "local": {"name": "vit_tiny_patch16_224", "args": {"img_size": 112, "depth": 2}, "pool": "cls"},
        "context": {"name": "vit_tiny_patch16_224", "args": {"depth": 2, "dynamic_img_size": True}, "pool": "cls"},
    }
    config = NuClassConfig.of({} if size == "full" else small, num_classes=16, num_organs=8)
    module = NuClass(config).eval()
    # Heads of random weights hardly tell classes apart; wider ones make a change visible.
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("head.4.weight"):
                parameter.mul_(8)
    local = CropSpec(224, 224 if size == "full" else 112)
    spec = ClassifierSpec(
        name=f"random-{size}",
        mpp=0.25,
        local=local,
        context=CropSpec(1024, 384, "zero", "bilinear") if size == "full" else CropSpec(512, 128),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=tuple(ClassSpec(f"class {k}", (10 * k, 99, 200)) for k in range(16)),
        organs=tuple(f"organ {k}" for k in range(8)),
        weights_id=f"random-{size}",
    )
    return LoadedClassifier(spec, module, WeightsEntry(spec.name, "classify", "nuclass", source=Source()))


def painted_cells(n: int, seed: int = 0) -> tuple[Slide, Float64]:
    """Return the demonstration slide, in memory, and `n` of its painted nuclei (all where there are fewer)."""
    from cellslide.slides import painted as demo
    from cellslide.slides.slide import slide_from_array

    painting = demo.paint()
    return slide_from_array(painting.image, demo.MPP), _some(painting.centroid_xy, n, seed)


def cells_of_folder(folder: Path, n: int, seed: int = 0) -> tuple[Slide, Float64]:
    """Return the slide of a folder that `segment` wrote, and `n` of its cells; they are taken from one place.

    A sample over the whole slide would hide what neighbours share.
    """
    from cellslide.classify.slide import read_places
    from cellslide.classify.targets import expand_targets, open_target, require_cells
    from cellslide.store.cell_table import open_table
    from cellslide.store.run_record import TABLE

    (target, *_) = expand_targets([str(folder)], folder)
    require_cells(target)
    with open_table(target.folder / TABLE) as table:
        xy = read_places(table)
    if len(xy):
        middle = xy[np.random.default_rng(seed).integers(len(xy))]
        xy = xy[np.sort(np.argsort(((xy - middle) ** 2).sum(axis=1), kind="stable")[:n])]
    return open_target(target, None), xy


def _some(xy: Float64, n: int, seed: int) -> Float64:
    order = np.random.default_rng(seed).permutation(len(xy))[:n]
    return xy[np.sort(order)]
