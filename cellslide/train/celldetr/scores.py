"""Validation of a detector of boxes: whole images in tiles, each box kept by the tile that owns its centre."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellslide.evaluate.detection import RADIUS_UM, Tally, class_tallies, pair_points, tally
from cellslide.nuclei.nms import point_nms
from cellslide.slides.tiles import TileGrid
from cellslide.train.celldetr.data import MarkedImage
from cellslide.train.celldetr.recipe import CellDETRRecipe
from cellslide.types import Float64, Int64, Plane, UInt8

# Maps uint8 images (B, 3, H, W) to the detector's outputs by name.
Infer = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(slots=True)
class _Counts:
    """Counts of an epoch at one threshold: by data set, and by class over the typed images."""

    found: dict[str, Tally] = field(default_factory=dict)
    typed: list[Tally] = field(default_factory=list)

    def f1(self) -> dict[str, float]:
        """Return F1 by name: of each set, `f1` their mean, and `mean_f1` that of the classes."""
        by_set = {f"f1_{name}": counts.f1 for name, counts in sorted(self.found.items())}
        scores = {name: value for name, value in by_set.items() if value is not None}
        if scores:
            scores["f1"] = float(np.mean(list(scores.values())))
        typed = [counts.f1 or 0.0 for counts in self.typed if counts.support]
        if typed:
            scores["mean_f1"] = float(np.mean(typed))
        return scores


class BoxScores:
    """Scores of an epoch, from counts that are pooled over the images of each data set."""

    def __init__(self, recipe: CellDETRRecipe) -> None:
        self.recipe = recipe
        self._counts = {threshold: _Counts() for threshold in recipe.thresholds or (recipe.score_threshold,)}

    def add(self, item: MarkedImage, infer: Infer) -> None:
        """Find the nuclei of one image and count them; what lies where nobody annotated is left out."""
        found = find(item.image, infer, self.recipe)
        known = item.known[np.floor(found.xy[:, 1]).astype(int), np.floor(found.xy[:, 0]).astype(int)]
        for threshold, counts in self._counts.items():
            rows = known & (found.score >= threshold)
            self._count(item, found.xy[rows], found.label[rows], counts)

    def _count(self, item: MarkedImage, xy: Float64, label: Int64, counts: _Counts) -> None:
        radius_px = RADIUS_UM / self.recipe.mpp
        new = tally(pair_points(item.xy, xy, radius_px), len(item.xy), len(xy))
        counts.found[item.dataset] = counts.found.get(item.dataset, Tally()) + new
        n_classes = len(self.recipe.model.classes)
        if n_classes and len(item.label) and (item.label >= 0).all():
            typed = class_tallies(item.xy, item.label, xy, label, n_classes, radius_px)
            before = counts.typed or [Tally()] * n_classes
            counts.typed = [old + more for old, more in zip(before, typed, strict=True)]

    def take(self) -> dict[str, float]:
        """Return F1 by name at the threshold where the recipe's monitor is best, and it; the counts are forgotten."""
        wanted = self.recipe.monitor.removeprefix("val/")
        scores = [{**counts.f1(), "threshold": threshold} for threshold, counts in self._counts.items()]
        self._counts = {threshold: _Counts() for threshold in self._counts}
        return max(scores, key=lambda s: s.get(wanted, 0.0))


class FoundBoxes(NamedTuple):
    """Boxes of one image: centres float64 (N, 2) in its pixels, scores (N,), classes int64 (N,), 0..K-1."""

    xy: Float64
    score: Float64
    label: Int64


def find(image: UInt8, infer: Infer, recipe: CellDETRRecipe) -> FoundBoxes:
    """Return the boxes found in an image (H, W, 3).

    Tiles of the crops' size overlap by a quarter; beyond the image they are white, as beyond a slide. Of centres within
    `nms_um` the best stays, whatever tiles they are of; as the best comes first, a higher threshold changes none of it.
    """
    height, width = image.shape[:2]
    size = recipe.crop_px
    grid = TileGrid(Plane(recipe.mpp, 1.0, 1.0, width, height), size, size // 4)
    found = [FoundBoxes(np.zeros((0, 2)), np.zeros(0), np.zeros(0, np.int64))]
    for tile in grid.tiles():
        x, y = tile.read_xyxy[:2]
        part = image[y : y + size, x : x + size]
        padding = ((0, size - part.shape[0]), (0, size - part.shape[1]), (0, 0))
        whole = np.pad(part, padding, constant_values=255)
        boxes = _kept(infer(torch.from_numpy(whole.transpose(2, 0, 1))[None]), recipe.score_threshold)
        xy = boxes.xy + (x, y)
        own = ((xy >= tile.own_xyxy[:2]) & (xy < tile.own_xyxy[2:])).all(1)
        found.append(FoundBoxes(xy[own], boxes.score[own], boxes.label[own]))
    boxes = FoundBoxes(*(np.concatenate(column) for column in zip(*found, strict=True)))
    if recipe.nms_um == 0:
        return boxes
    rows = point_nms(boxes.xy, boxes.score, recipe.nms_um / recipe.mpp)
    return FoundBoxes(*(column[rows] for column in boxes))


def _kept(outputs: Mapping[str, Tensor], threshold: float) -> FoundBoxes:
    score, box = (outputs[name][0].double().cpu().numpy() for name in ("scores", "boxes"))
    rows = np.flatnonzero(score >= threshold)
    xy = (box[rows, :2] + box[rows, 2:]) / 2
    label = np.zeros(len(rows), np.int64)
    prob = outputs.get("class_prob")
    if prob is not None and prob.shape[-1]:
        label = prob[0].float().cpu().numpy()[rows].argmax(1).astype(np.int64)
    return FoundBoxes(xy, score[rows], label)
