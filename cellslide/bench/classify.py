"""Classify: the same cells typed with each saving, and how it changes the mixed probabilities beside the plain way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from cellslide.bench.gpu import classify_rows
from cellslide.bench.rows import BenchOptions, Row, Target, row
from cellslide.classify.effects import Effect, cells_of_folder, measure_effects, painted_cells, random_classifier
from cellslide.config import ClassifyConfig, InferConfig
from cellslide.weights.classifier import load_classifier

STAGE = "classify"


def effects(options: BenchOptions) -> Iterator[Effect]:
    """Yield what each way of typing gives for `nuclei` (200) cells."""
    infer = InferConfig(device=options.device, batch_size=options.batch_size, compile=options.compile)
    config = ClassifyConfig(context_size=options.context_size, infer=infer)
    n = options.nuclei or 200
    drawn = options.random_size
    loaded = random_classifier(drawn) if drawn else load_classifier(options.model, options.weights)
    slide, xy = painted_cells(n) if options.cells_of is None else cells_of_folder(options.cells_of, n)
    with closing(slide):
        yield from measure_effects(loaded, slide, xy, 0 if loaded.spec.organs else -1, config)


def rows(options: BenchOptions) -> Iterator[Row]:
    """Yield each way of typing in cells a second, ratios against the plain one, then what is asked of a GPU."""
    first = None
    for effect in effects(options):
        first = first or effect.cells_per_s
        yield row(
            STAGE, effect.name, [effect.cells_per_s], "cells/s", effect.cells, first, Target(more=True), _note(effect)
        )
    yield from classify_rows(options)


def _note(effect: Effect) -> str:
    return (
        f"same class {effect.agreement:.2%}, change {effect.mean_change:.2g} (most {effect.max_change:.2g}), "
        f"contexts {effect.contexts:,}, skipped {effect.skipped:.1%}"
    )
