"""Windows of a slide with the nuclei that lie in them, read when a training wants one.

Frame: pixels of the slide's plane, (x, y), of a window from its corner on; pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry.outlines import rasterise
from cellslide.inference.crops import inside_span
from cellslide.store.cell_table import open_table
from cellslide.train.pixels import Box, OnSlide
from cellslide.train.recipe import LabelConfig, ValConfig
from cellslide.train.slide_sets import SlideSample, read_nuclei, rows_of_part
from cellslide.types import Float64, Int32, Int64, Plane, UInt8, take_rings

# A nucleus whose centre lies farther than this from a window does not reach into it.
REACH_UM = 25.0
# Outlines are kept as steps of this part of a pixel from the centre of their nucleus.
STEP = 8
# Of a training that draws windows near a nucleus, how much it sees about one, in edges of a window: a quarter of the
# shift, and half the diagonal of a window that is turned and 1.4 times as wide.
SIGHT = 1.5
# Edge of the squares of a slide that validate, in pixels of the plane.
VAL_FIELD_PX = 512


@dataclass(frozen=True, slots=True)
class Outlines:
    """Flat rings: steps int16 (P, 2) from the centre of their nucleus, start int64 (N + 1,)."""

    steps: NDArray[np.int16]
    start: Int64


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a slide: image uint8 (H, W, 3), xy float64 (n, 2) and label int64 (n,) of the nuclei in it or near.

    labels  int32 (H, W), k + 1 where nucleus k is; None where only places are known.
    """

    image: UInt8
    xy: Float64
    label: Int64
    labels: Int32 | None


@dataclass(frozen=True, slots=True)
class SlideFields:
    """A slide with its nuclei, xy float64 (N, 2), label int64 (N,), -1 where not known.

    own    int64 (M,), the nuclei that are of its part: windows are drawn about them.
    order  int64 (N,), the nuclei from left to right.
    """

    name: str
    dataset: str
    pixels: OnSlide
    xy: Float64
    label: Int64
    own: Int64
    order: Int64
    outlines: Outlines | None

    @property
    def plane(self) -> Plane:
        """The plane that is read."""
        return self.pixels.plane

    @property
    def n_nuclei(self) -> int:
        """Nuclei of its part."""
        return len(self.own)

    @property
    def typed(self) -> bool:
        """Whether any nucleus of its part has a class."""
        return bool((self.label[self.own] >= 0).any())

    def draw_centre(self, rng: np.random.Generator, size_px: int, balance: float = 0.0) -> Float64:
        """Draw the centre of a window of `size_px`: near a nucleus, for a share of them one of each class alike."""
        rows = self.own
        if rng.random() < balance:
            label = self.label[rows]
            rows = rows[label == rng.choice(np.unique(label))]
        return self.xy[rows[rng.integers(len(rows))]] + rng.uniform(-size_px / 4, size_px / 4, 2)

    def under(self, matrix: Float64, size_px: int) -> tuple[Window, Float64]:
        """Return the window that a crop of `size_px` shows by its affine map (2, 3) to the plane, and its map to that.

        What the crop shows beyond the slide is mirrored from the window, as from the whole plane.
        """
        edge = np.array([[0, 0], [0, size_px - 1], [size_px - 1, 0], [size_px - 1, size_px - 1]], np.float64)
        shown = edge @ matrix[:, :2].T + matrix[:, 2]
        low, high = np.floor(shown.min(axis=0)).astype(int) - 2, np.ceil(shown.max(axis=0)).astype(int) + 3
        x0, x1 = inside_span(int(low[0]), int(high[0]), self.plane.width_px, "reflect")
        y0, y1 = inside_span(int(low[1]), int(high[1]), self.plane.height_px, "reflect")
        return self.window((x0, y0, x1, y1)), np.column_stack([matrix[:, :2], matrix[:, 2] - (x0, y0)])

    def window(self, box: Box) -> Window:
        """Read a box inside the plane; raises TileError where the file is damaged."""
        reach = REACH_UM / self.plane.mpp
        x = self.xy[self.order, 0]
        first, last = np.searchsorted(x, (box[0] - reach, box[2] + reach))
        rows = np.sort(self.order[first:last])
        y = self.xy[rows, 1]
        rows = rows[(y > box[1] - reach) & (y < box[3] + reach)]
        xy = self.xy[rows] - box[:2]
        size = box[3] - box[1], box[2] - box[0]
        labels = None if self.outlines is None else _paint(self.outlines, rows, xy, size)
        inside = ((xy >= 0) & (xy < size[::-1])).all(axis=1)
        if labels is None:
            rows, xy = rows[inside], xy[inside]
        return Window(self.pixels.read(box), xy, self.label[rows], labels)

    def squares(self, side_px: int, most: int, seed: int) -> Iterator[Box]:
        """Yield boxes of at most `side_px` inside what the own nuclei span, those with nuclei, `most` of them drawn."""
        if not len(self.own):
            return
        xy = self.xy[self.own]
        low, high = np.floor(xy.min(axis=0)).astype(int), np.floor(xy.max(axis=0)).astype(int) + 1
        side = np.minimum(side_px, high - low)
        place = np.floor((xy - low) / side).astype(int)
        place = np.unique(place[(place < (high - low) // side).all(axis=1)], axis=0)
        chosen = np.sort(np.random.default_rng([seed, 5]).permutation(len(place))[:most])
        for x, y in (place[chosen] * side + low).tolist():
            yield x, y, x + int(side[0]), y + int(side[1])


def _paint(outlines: Outlines, rows: Int64, xy: Float64, size: tuple[int, int]) -> Int32:
    """Return int32 `size`: k + 1 where nucleus `rows[k]` is, whose centre is xy[k]."""
    steps, start = take_rings(outlines.steps, outlines.start, rows)
    return rasterise(steps / STEP + np.repeat(xy, np.diff(start), axis=0), start, size)


def slide_fields(
    sample: SlideSample, mpp: float, size_px: int, labels: LabelConfig, classes: Sequence[str],
    renamed: Mapping[str, str], val: ValConfig, outlined: bool,
) -> SlideFields:  # fmt: skip
    """Read the nuclei of a slide for windows of `size_px` at `mpp`, with outlines if wanted and there.

    Raises UsageError as `read_nuclei` and `rows_of_part`.
    """
    nuclei = read_nuclei(sample, labels, classes, renamed)
    own = np.flatnonzero(rows_of_part(sample, nuclei.xy, val, SIGHT * size_px * mpp))
    plane = Plane.of(sample.info, mpp)
    xy = plane.from_level0(nuclei.xy)
    outlines = _read_outlines(sample.table, nuclei.row, plane) if outlined else None
    order = np.argsort(xy[:, 0], kind="stable")
    return SlideFields(
        sample.stem, sample.dataset, OnSlide(sample.info, plane), xy, nuclei.label, own, order, outlines
    )  # fmt: skip


def _read_outlines(path: Path, rows: Int64, plane: Plane) -> Outlines | None:
    """Return the outlines of rows of a table, or None where it holds points."""
    steps, lengths = [np.empty((0, 2), np.int16)], [np.zeros(1, np.int64)]
    wanted = np.zeros(int(rows.max(initial=-1)) + 1, np.bool_)
    wanted[rows] = True
    with open_table(path) as table:
        if table.kind == "point":
            return None
        for chunk in table.iter_chunks(probabilities=False):
            xy, start = chunk.cells.contour_xy, chunk.cells.contour_start
            if xy is None or start is None:
                continue
            length = np.diff(start)
            mine = np.pad(wanted, (0, max(chunk.start + len(chunk) - len(wanted), 0)))[chunk.start :][: len(chunk)]
            offset = xy - np.repeat(chunk.cells.centroid_xy, length, axis=0)
            parts = np.rint(plane.from_level0(offset) * STEP)[np.repeat(mine, length)]
            steps.append(np.clip(parts, -32768, 32767).astype(np.int16))
            lengths.append(length[mine])
    return Outlines(np.concatenate(steps), np.cumsum(np.concatenate(lengths)))
