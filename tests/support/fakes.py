"""Fake networks that find painted discs: exact, tiny, and blind to where in the tile a disc lies.

They take what every network takes, normalised float32 (B, 3, H, W), and tell disc from background by colour: a disc is
darker in green than `DARK`. With mean 0 and std 1 the input is the pixel's value / 255.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from cellslide.types import Bool, ClassSpec, Float32, HoverDecode, ModelKind, ModelSpec
from cellslide.weights import LoadedModel

DARK = 0.55
EMBEDDED = 4
CLASSES = (ClassSpec("pink", (255, 100, 100)), ClassSpec("blue", (60, 60, 220)))
FAKE_SPEC = ModelSpec(
    name="fake",
    kind="mask",
    mpp=0.5,
    tile_px=256,
    overlap_px=64,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    decode=HoverDecode(mode="fixed", kernel_px=11, min_marker_px=3),
    weights_id="fake",
    weights_sha256="0" * 64,
    licence="Apache-2.0",
)


def fake_spec(kind: ModelKind = "mask", **changes: object) -> ModelSpec:
    """Return the spec of a fake network, with some fields changed."""
    return replace(FAKE_SPEC, kind=kind, **changes)


def fake_model(kind: ModelKind = "mask", **changes: object) -> LoadedModel:
    """Return a fake network as `load_model` would; it types discs when the spec has classes."""
    spec = fake_spec(kind, **changes)
    modules = {"mask": lambda: FakeMask(len(spec.classes)), "box": FakeBox, "point": FakePoint}
    return LoadedModel(spec, modules[kind]().eval(), entry=None)


def _objects(image: Float32) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Label the discs of one normalised image (3, H, W); 4-connected."""
    labels, _ = ndimage.label(image[1] < DARK)
    return labels, ndimage.find_objects(labels)


def _hover(labels: np.ndarray, boxes: list[tuple[slice, slice]]) -> Float32:
    """Return the distance maps (2, H, W) as HoVer-Net defines them: offsets from the centroid, -1..1 by side."""
    hv = np.zeros((2, *labels.shape), np.float32)
    for number, box in enumerate(boxes, 1):
        rows, cols = np.nonzero(labels[box] == number)
        for axis, place in ((0, cols), (1, rows)):
            offset = place - place.mean()
            offset[offset < 0] /= max(-offset.min(), 1e-6)
            offset[offset > 0] /= max(offset.max(), 1e-6)
            hv[axis][box][rows, cols] = offset
    return hv


class FakeMask(nn.Module):
    """Gives HoVer logits of the painted discs; with `n_classes` 2 also types, by whether red or blue is stronger."""

    def __init__(self, n_classes: int = 0) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        images = x.float().cpu().numpy()
        found = [_objects(image) for image in images]
        mask = np.stack([labels > 0 for labels, _ in found])
        out = {
            "nuclei_binary_map": _logits(np.stack([~mask, mask], axis=1)),
            "hv_map": torch.from_numpy(np.stack([_hover(*f) for f in found])),
        }
        if self.n_classes:
            red = mask & (images[:, 0] >= images[:, 2])
            out["nuclei_type_map"] = _logits(np.stack([~mask, red, mask & ~red], axis=1))
        return {name: tensor.to(x.device) for name, tensor in out.items()}


def _logits(chosen: Bool) -> Tensor:
    return torch.from_numpy(np.where(chosen, np.float32(6), np.float32(-6)))


class FakeBox(nn.Module):
    """Gives the bounding box of each painted disc, on a fixed number of queries; unused ones score 0.

    Also types as `FakeMask` does, and an embedding of EMBEDDED numbers: the mean colour of the disc, 1 for a nucleus.
    """

    n_queries = 400

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shapes = {"boxes": 4, "class_prob": 2, "embedding": EMBEDDED}
        out = {name: np.zeros((len(x), self.n_queries, n), np.float32) for name, n in shapes.items()}
        scores = np.zeros((len(x), self.n_queries), np.float32)
        for i, image in enumerate(x.float().cpu().numpy()):
            labels, places = _objects(image)
            for q, (rows, cols) in enumerate(places):
                color = image[:, rows, cols][:, labels[rows, cols] == q + 1].mean(axis=1)
                out["boxes"][i, q] = cols.start, rows.start, cols.stop, rows.stop
                out["class_prob"][i, q] = (0.75, 0.25) if color[0] >= color[2] else (0.25, 0.75)
                out["embedding"][i, q] = *color, 1
                scores[i, q] = 0.9
        return {name: torch.from_numpy(column) for name, column in {**out, "scores": scores}.items()}


class FakePoint(FakeBox):
    """Gives the centre of each painted disc's bounding box."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = super().forward(x)
        boxes = out.pop("boxes")
        return {"points": (boxes[..., :2] + boxes[..., 2:]) / 2, **out}


class HungryMask(FakeMask):
    """A fake network that runs out of memory on more than `fits` tiles at a time, and notes what it was asked."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits = fits
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.asked.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().forward(x)
