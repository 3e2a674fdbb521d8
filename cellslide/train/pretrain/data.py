"""Samples of a pretraining: views cut at a physical size, with the nuclei that each shows by one index for all.

Every sample is a function of (seed, draw number) alone, so neither workers, devices nor resuming change what is seen.
Frame: a view's nuclei are in its own pixels, (x, y); pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cellslide.train.augment import recolor
from cellslide.train.loaders import Draws, DrawSampler
from cellslide.train.pixels import Box
from cellslide.train.pretrain.fields import Field, FieldSet
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe, MuseRecipe, ViewConfig
from cellslide.train.recipe import AugmentConfig, Range
from cellslide.types import Bool, Float64, Int64, UInt8

# A nucleus of which the crop's edge leaves less than this is not there.
MIN_BOX_PX = 3.0


class Views(NamedTuple):
    """Views of B samples, and where they show their nuclei.

    global_ uint8 (B, 2, 3, G, G), local uint8 (B, L, 3, S, S), global ones first in what follows: xy float32
    (B, 2 + L, M, 2) in pixels of each view, seen bool (B, 2 + L, M). Nucleus m of a sample is the same in all views.
    """

    global_: Tensor
    local: Tensor
    xy: Tensor
    seen: Tensor


class BoxedCrops(NamedTuple):
    """Crops uint8 (B, 3, S, S) and their boxes float32 (B, M, 4), cxcywh as shares of the crop; `valid` bool (B, M)."""

    image: Tensor
    boxes: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class View:
    """One view: image uint8 (S, S, 3), xy float64 (n, 2) in its pixels, index int64 (n,) in the field's nuclei."""

    image: UInt8
    xy: Float64
    index: Int64


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight flips and right-angle turns of a square view of `size` px."""

    size: int
    transposed: bool
    flip_x: bool
    flip_y: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int, allowed: bool) -> Turn:
        """Draw one; none at all unless `allowed`."""
        transposed, flip_x, flip_y = (bool(v) and allowed for v in rng.random(3) < 0.5)
        return cls(size, transposed, flip_x, flip_y)

    def image(self, image: UInt8) -> UInt8:
        """Turn pixels (S, S, 3)."""
        image = image.transpose(1, 0, 2) if self.transposed else image
        return np.ascontiguousarray(image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])

    def points(self, xy: Float64) -> Float64:
        """Turn points (N, 2)."""
        xy = xy[:, ::-1] if self.transposed else xy
        return np.where((self.flip_x, self.flip_y), self.size - xy, xy)


def crop_to(pixels: UInt8, xy: Float64, side_px: int, corner: tuple[int, int], size: int) -> View:
    """Cut a square of `side_px` at `corner` and resize it to `size` (MUSE, eqs 4-5); xy (N, 2) as `pixels` (H, W, 3).

    side_px is MPP_o / MPP_e * R_o. Areas are averaged when shrinking, linear when enlarging.
    """
    x, y = corner
    cut = pixels[y : y + side_px, x : x + side_px]
    how = cv2.INTER_AREA if side_px > size else cv2.INTER_LINEAR
    image = cut if side_px == size else np.asarray(cv2.resize(cut, (size, size), interpolation=how), np.uint8)
    moved = (xy - corner) * (size / side_px)
    inside = ((moved >= 0) & (moved < size)).all(axis=1)
    return View(image, moved[inside], np.flatnonzero(inside))


def side_of(mpp: float, size: int, field: Field) -> int:
    """Return the edge in field pixels of a view of `size` px at `mpp`, at most what the field has."""
    return max(1, min(round(mpp / field.mpp * size), field.width_px, field.height_px))


def choose_nuclei(rng: np.random.Generator, seen: Bool, most: int) -> Int64:
    """Return at most `most` nuclei that some global view shows, in rising order; seen bool (2 + L, N), global first."""
    rows = np.flatnonzero(seen[:2].any(axis=0))
    return np.sort(rng.choice(rows, most, replace=False)) if len(rows) > most else rows


class MuseViews(Dataset[Views]):
    """Samples by draw number: a field by the weight of its set, a window about one of its nuclei, views inside it."""

    def __init__(self, sets: Sequence[FieldSet], recipe: MuseRecipe) -> None:
        self.fields = Draws((s.weight, s.fields) for s in sets)
        self.recipe = recipe

    def __getitem__(self, draw: int) -> Views:
        """Return sample `draw`, unbatched."""
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, draw])
        config = recipe.views_at(draw // (recipe.epoch_steps * recipe.batch_size))
        field = self.fields.draw(rng)
        views = sample_views(rng, field, config, recipe.augment)
        xy, seen = table_of(views, len(field.xy))
        rows = choose_nuclei(rng, seen, recipe.max_nuclei)
        shape = (len(views), recipe.max_nuclei)
        padded, shown = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.bool_)
        padded[:, : len(rows)], shown[:, : len(rows)] = xy[:, rows], seen[:, rows]
        images = [to_tensor(view.image) for view in views]
        none = torch.empty((0, 3, config.local_px, config.local_px), dtype=torch.uint8)
        local = torch.stack(images[2:]) if config.n_local else none
        return Views(torch.stack(images[:2]), local, torch.from_numpy(padded), torch.from_numpy(shown))


def sample_views(rng: np.random.Generator, field: Field, config: ViewConfig, augment: AugmentConfig) -> list[View]:
    """Return two global and `n_local` local views of a window of a field, each flipped and recoloured by its own."""
    wanted: list[tuple[Range, int]] = [
        *[(config.global_mpp, config.global_px)] * 2,
        *[(config.local_mpp, config.local_px)] * config.n_local,
    ]
    sides = [side_of(float(rng.uniform(*mpp)), size, field) for mpp, size in wanted]
    box = window(rng, field, config.reach * max(sides[:2]), max(sides))
    pixels = field.pixels.read(box)
    xy = field.xy - box[:2]
    views = []
    for side, (_, size) in zip(sides, wanted, strict=True):
        corner = (int(rng.integers(box[2] - box[0] - side + 1)), int(rng.integers(box[3] - box[1] - side + 1)))
        view = crop_to(pixels, xy, side, corner, size)
        turn = Turn.draw(rng, size, augment.flip)
        views.append(View(recolor(rng, augment, turn.image(view.image)), turn.points(view.xy), view.index))
    return views


def window(rng: np.random.Generator, field: Field, side: float, least: int) -> Box:
    """Return a box of the field of about `side` px about one of its nuclei, at least `least` wide and high."""
    width, height = (max(min(round(side), size), least) for size in (field.width_px, field.height_px))
    centre = field.xy[rng.integers(len(field.xy))] + rng.uniform(-0.25, 0.25, 2) * (width, height)
    x = int(np.clip(round(centre[0] - width / 2), 0, field.width_px - width))
    y = int(np.clip(round(centre[1] - height / 2), 0, field.height_px - height))
    return x, y, x + width, y + height


def table_of(views: Sequence[View], n: int) -> tuple[Float64, Bool]:
    """Return where each view shows each of a field's `n` nuclei: xy (V, n, 2), 0 where not seen, and seen (V, n)."""
    xy, seen = np.zeros((len(views), n, 2)), np.zeros((len(views), n), np.bool_)
    for k, view in enumerate(views):
        xy[k, view.index], seen[k, view.index] = view.xy, True
    return xy, seen


class BoxCrops(Dataset[BoxedCrops]):
    """Crops by draw number with the boxes that they show."""

    def __init__(self, sets: Sequence[FieldSet], recipe: CellDETRPretrainRecipe) -> None:
        self.fields = Draws((s.weight, s.fields) for s in sets)
        self.recipe = recipe

    def __getitem__(self, draw: int) -> BoxedCrops:
        """Return crop `draw`, unbatched."""
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, draw])
        field, size, most = self.fields.draw(rng), recipe.crop_px, recipe.max_nuclei
        side = side_of(recipe.mpp, size, field)
        box = window(rng, field, side, side)
        turn = Turn.draw(rng, size, recipe.augment.flip)
        view = crop_to(field.pixels.read(box), field.xy - box[:2], side, (0, 0), size)
        image = recolor(rng, recipe.augment, turn.image(view.image))
        corners = (known_boxes(field, recipe.box_um).reshape(-1, 2) - box[:2]) * (size / side)
        shown = shown_boxes(turn.points(corners).reshape(-1, 2, 2), size)
        rows = np.sort(rng.choice(len(shown), min(len(shown), most), replace=False))
        boxes, valid = np.zeros((most, 4), np.float32), np.zeros(most, np.bool_)
        boxes[: len(rows)], valid[: len(rows)] = shown[rows], True
        return BoxedCrops(to_tensor(image), torch.from_numpy(boxes), torch.from_numpy(valid))


def to_tensor(image: UInt8) -> Tensor:
    """Return pixels (H, W, 3) as a tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def known_boxes(field: Field, box_um: float) -> Float64:
    """Return the boxes xyxy (N, 4) of a field's nuclei; squares of `box_um` where only the centre is known."""
    half = box_um / field.mpp / 2
    around = np.concatenate([field.xy - half, field.xy + half], axis=1)
    return np.where(np.isnan(field.box_xyxy), around, field.box_xyxy)


def shown_boxes(corners: Float64, size: int) -> Float64:
    """Return the boxes of which a crop of `size` px shows enough, cut at its edge, as cxcywh shares of it.

    corners  two opposite ones of each (N, 2, 2), in pixels of the crop.
    """
    low, high = np.clip(corners.min(axis=1), 0, size), np.clip(corners.max(axis=1), 0, size)
    kept = (high - low >= MIN_BOX_PX).all(axis=1)
    low, high = low[kept] / size, high[kept] / size
    return np.concatenate([(low + high) / 2, high - low], axis=1)


class ShardedDraws(DrawSampler):
    """The draw numbers of an epoch that one of several devices takes: each step's draws are one run, cut among them."""

    def __init__(self, steps: int, batch: int, rank: int, world: int) -> None:
        super().__init__(steps * (batch // world))
        self.steps, self.batch, self.rank, self.world = steps, batch, rank, world

    def __iter__(self) -> Iterator[int]:
        own = self.batch // self.world
        first = self.epoch * self.steps
        for step in range(first, first + self.steps):
            start = step * self.batch + self.rank * own
            yield from range(start, start + own)
