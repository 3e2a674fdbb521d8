"""A generated slide of any number of nuclei, and a fake engine that finds them, for what the rest of the work takes.

The slide is one tile of discs on a square lattice, repeated; the file holds the encoded tile as often as it is needed.
The engine labels the discs and gives octagons, so that nothing but the network and its decoding is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from scipy import ndimage

from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.inference.segmenter import open_segmenter
from cellslide.inference.stream import Detector
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from cellslide.types import HoverMaps, Instances, ModelSpec, NoOutput, RunRecord, UInt8
from tests.support.fakes import fake_model

STEP_PX, RADIUS_PX, EDGE_PX, MPP = 12, 3.5, 1008, 0.5
A_TILE = (EDGE_PX // STEP_PX) ** 2
GLASS, DISC, DARK = (243, 243, 243), (95, 55, 140), 140
TURN = np.arange(8) * np.pi / 4
OCTAGON = RADIUS_PX * np.stack([np.cos(TURN), np.sin(TURN)], axis=1)


def paint_lattice(path: Path, nuclei: int) -> int:
    """Write a square slide of at least `nuclei` discs; returns how many it has."""
    side = int(np.ceil(np.sqrt(nuclei / A_TILE)))
    offset = np.arange(EDGE_PX) % STEP_PX + 0.5 - STEP_PX / 2
    tile = np.where((offset[:, None] ** 2 + offset[None] ** 2 <= RADIUS_PX**2)[..., None], DISC, GLASS).astype(np.uint8)
    encoded = imagecodecs.zlib_encode(tile.tobytes(), level=6)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            (encoded for _ in range(side * side)),
            shape=(side * EDGE_PX, side * EDGE_PX, 3), dtype=np.uint8, tile=(EDGE_PX, EDGE_PX), compression="zlib",
            photometric="rgb", resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER", metadata=None,
        )  # fmt: skip
    return side * side * A_TILE


@dataclass
class LatticeEngine:
    """Finds the discs of a lattice in tiles, as octagons about their centres."""

    spec: ModelSpec
    batch_size: int = 4
    name: str = "lattice"
    precision: str = "fp32"
    device: str = "cpu"

    def launch(self, images: UInt8) -> Callable[[], list[HoverMaps | Instances | NoOutput]]:
        """Return the discs of uint8 RGB tiles (B, H, W, 3)."""
        found: list[HoverMaps | Instances | NoOutput] = [find_discs(image) for image in images]
        return lambda: found

    def peak_device_bytes(self) -> int:
        """Return 0: there is no device."""
        return 0


def find_discs(image: UInt8) -> Instances:
    """Return the dark discs of a tile uint8 (H, W, 3); those that touch its edge count as cut."""
    labels, count = ndimage.label(image[..., 1] < DARK)
    rows, cols = np.nonzero(labels)
    which = labels[rows, cols] - 1
    area = np.bincount(which, minlength=count).astype(np.float32)
    xy = np.stack([np.bincount(which, v, count) for v in (cols, rows)], axis=1) / np.maximum(area, 1)[:, None] + 0.5
    edge = image.shape[0] - 1
    cut = np.zeros(count, np.bool_)
    cut[which[(rows == 0) | (cols == 0) | (rows == edge) | (cols == edge)]] = True
    return Instances(
        xy, np.full(count, 0.9, np.float32), area, cut,
        contour_xy=(xy[:, None] + OCTAGON).reshape(-1, 2).astype(np.float32),
        contour_start=np.arange(0, 8 * count + 1, 8, dtype=np.int64),
    )  # fmt: skip


def segment_lattice(path: Path, out: Path, formats: tuple[str, ...], tile_px: int = 1024) -> RunRecord:
    """Segment a generated slide with the fake engine and return the record of the run."""
    config = SegmentConfig(
        tissue=TissueConfig(enabled=False),
        infer=InferConfig(device="cpu", workers=0, batch_size=1),
        output=OutputConfig(formats=formats),
    )
    with open_segmenter(fake_model(tile_px=tile_px), config) as segmenter:
        engine = LatticeEngine(segmenter.spec)
        with Detector(engine, 0) as detector:
            return segment_slide(SlideInput(path, slide_id=path.stem), replace(segmenter, detector=detector), out)[0]
