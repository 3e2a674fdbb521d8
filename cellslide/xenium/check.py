"""Whether a bundle, its alignment and an H&E slide belong together: counted, measured, and decided.

What decides is how far the experiment's nuclei lie from those seen on the slide: under a wrong alignment they lie no
nearer than the same nuclei moved by 20 µm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from cellslide.slides.slide import Slide
from cellslide.slides.tissue import TissueMask
from cellslide.types import Bool, Cells, Float64, Plane, SlideInfo, UInt8
from cellslide.xenium.alignment import Alignment
from cellslide.xenium.bundle import LEAST_QV, Bundle

SHIFT_UM = 20.0
SHIFTS = SHIFT_UM * np.array([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4])
FIELD_UM, FIELD_RIM_UM = 256.0, 45.0
LEAST_NUCLEI = 50
# Of the distance after a shift; a right alignment gives about a third.
MOST_OF_SHIFTED = 0.8
MOST_MPP_OFF = 0.02
LEAST_INSIDE, LEAST_IN_TISSUE = 0.5, 0.2
# As nuclei are matched.
MATCH_UM = 3.0
Finder = Callable[[UInt8, float], Cells]


@dataclass(frozen=True, slots=True)
class NucleusTest:
    """Median distance (µm) from a Xenium nucleus to the nearest on the slide, and the least after eight shifts.

    n  nuclei compared; found  nuclei seen on the slide there.
    """

    n: int
    found: int
    median_um: float | None
    shifted_um: float | None


@dataclass(frozen=True, slots=True)
class XeniumCheck:
    """All that was found. `reasons` say why the alignment cannot be right, `warnings` what to look at.

    mpp_matrix  pixel size of the slide by the alignment, mpp_slide  by its file or the flag, in µm.
    transcripts, of them `transcripts_qv` of the quality asked and `transcripts_used` genes of it; `controls` of any.
    inside_slide, inside_tissue, outside_regions  shares of the genes of that quality.
    """

    version: str
    panel: str
    genes: int
    cells: int
    nuclei: int
    nuclei_merged: int
    transcripts: int
    transcripts_qv: int
    transcripts_used: int
    controls: int
    least_qv: float
    pixel_size: float
    alignment: Literal["matrix", "landmarks", "regions"]
    residual_um: float | None
    turn_degrees: float
    mirrored: bool
    mpp_matrix: float
    mpp_slide: float
    inside_slide: float
    inside_tissue: float
    outside_regions: float
    test: NucleusTest
    warnings: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def verdict(self) -> Literal["good", "look", "wrong"]:
        """The word for it."""
        return "wrong" if self.reasons else "look" if self.warnings else "good"


@dataclass(slots=True)
class _Tally:
    rows: int = 0
    qv: int = 0
    used: int = 0
    controls: int = 0
    inside: int = 0
    tissue: int = 0
    outside_regions: int = 0


def check_bundle(
    bundle: Bundle, slide: Slide, alignment: Alignment, tissue: TissueMask, test: NucleusTest,
    least_qv: float = LEAST_QV,
) -> XeniumCheck:  # fmt: skip
    """Count a bundle in one pass and judge it with the outcome of the nucleus test; raises UsageError as the bundle."""
    tally, info = _count(bundle, slide.info, alignment, tissue, least_qv), slide.info
    nuclei, used = bundle.nuclei(), max(tally.used, 1)
    mpp = (info.mpp_x + info.mpp_y) / 2
    inside, in_tissue, outside = tally.inside / used, tally.tissue / used, tally.outside_regions / used
    return XeniumCheck(
        ".".join(map(str, bundle.version)) or "not told", str(bundle.manifest.get("panel_name") or "not told"),
        len(bundle.genes), len(bundle.cells().cell), len(nuclei.cell), nuclei.merged, tally.rows, tally.qv, tally.used,
        tally.controls, least_qv, bundle.pixel_size, alignment.kind, alignment.residual_um, alignment.turn_degrees,
        alignment.is_mirrored, alignment.mpp, mpp, inside, in_tissue, outside, test,
        tuple(_warnings(tally, alignment, mpp, test, nuclei.merged)),
        tuple(_reasons(tally, test, inside, in_tissue, least_qv)),
    )  # fmt: skip


def _count(bundle: Bundle, info: SlideInfo, alignment: Alignment, tissue: TissueMask, least_qv: float) -> _Tally:
    tally = _Tally()
    for block in bundle.transcripts():
        good = block.kept(least_qv, genes_only=False)
        used = good & (block.gene >= 0)
        placed = alignment.place(np.stack([block.x_um[used], block.y_um[used]], axis=1))
        inside = _inside(placed.xy_px, info)
        tally.rows += len(block)
        tally.qv += int(good.sum())
        tally.used += int(used.sum())
        tally.controls += int((block.gene < 0).sum())
        tally.inside += int(inside.sum())
        tally.tissue += int(_in_mask(placed.xy_px[inside], tissue).sum())
        tally.outside_regions += int(placed.outside.sum())
    return tally


def _inside(xy_px: Float64, info: SlideInfo) -> Bool:
    x, y = xy_px[:, 0], xy_px[:, 1]
    return np.asarray((x >= 0) & (y >= 0) & (x < info.width_px) & (y < info.height_px), np.bool_)


def _in_mask(xy_px: Float64, tissue: TissueMask) -> Bool:
    height, width = tissue.mask.shape
    col = np.clip(xy_px[:, 0] / tissue.scale_x, 0, width - 1).astype(np.int64)
    row = np.clip(xy_px[:, 1] / tissue.scale_y, 0, height - 1).astype(np.int64)
    return np.asarray(tissue.mask[row, col], np.bool_)


def _warnings(tally: _Tally, alignment: Alignment, mpp: float, test: NucleusTest, merged: int) -> Iterator[str]:
    off = alignment.mpp / mpp - 1
    if abs(off) > MOST_MPP_OFF:
        yield (
            f"the alignment says {alignment.mpp:.4f} µm per pixel of the slide, its file {mpp:.4f} "
            f"({off:+.1%}); one of them is not of this slide, or give --mpp"
        )
    if alignment.residual_um is not None and alignment.residual_um > MATCH_UM:
        yield f"the landmarks miss each other by {alignment.residual_um:.1f} µm; more than {MATCH_UM:g} lose matches"
    if tally.outside_regions:
        yield f"{tally.outside_regions:,} transcripts lie in no region and are placed by the nearest one"
    if merged:
        yield f"{merged:,} outlines join several nuclei of a cell and are left out"
    if test.median_um is None:
        yield f"the nucleus test compared {test.n} nuclei with {test.found}, too few to decide"
    elif test.median_um > MATCH_UM:
        yield f"nuclei lie {test.median_um:.1f} µm apart (median); fewer than half match within {MATCH_UM:g} µm"


def _reasons(tally: _Tally, test: NucleusTest, inside: float, in_tissue: float, least_qv: float) -> Iterator[str]:
    if not tally.used:
        yield f"no gene with a quality of {least_qv:g} or more in the bundle; lower --min-qv"
        return
    if inside < LEAST_INSIDE:
        yield f"only {inside:.1%} of the transcripts lie on the slide; is the matrix of another slide, or inverted?"
    elif in_tissue < LEAST_IN_TISSUE:
        yield f"only {in_tissue:.1%} of the transcripts lie on its tissue"
    if test.median_um is None or test.shifted_um is None:
        return
    if test.median_um > MOST_OF_SHIFTED * test.shifted_um:
        yield (
            f"its nuclei lie {test.median_um:.1f} µm from those on the slide, and {test.shifted_um:.1f} µm when "
            f"they are moved by {SHIFT_UM:g} µm: the alignment puts them no nearer than chance"
        )


def compare_nuclei(xenium_um: Float64, seen_um: Float64) -> NucleusTest:
    """Compare nuclei with those seen on the slide, (N, 2) and (M, 2) in µm of one frame: as they lie, and moved.

    Every row of `xenium_um` must lie where the slide was searched, `SHIFT_UM` around it included.
    """
    n, found = len(xenium_um), len(seen_um)
    if min(n, found) < LEAST_NUCLEI:
        return NucleusTest(n, found, None, None)
    tree = cKDTree(seen_um)
    there = float(np.median(tree.query(xenium_um)[0]))
    moved = min(float(np.median(tree.query(xenium_um + shift)[0])) for shift in SHIFTS)
    return NucleusTest(n, found, there, moved)


def compare_fields(
    slide: Slide, alignment: Alignment, nuclei_um: Float64, finder: Finder, n_fields: int
) -> NucleusTest:
    """Compare nuclei in some squares of the slide in which many of them lie, spread over it.

    finder  finds the nuclei of an image uint8 (H, W, 3) of so many µm per pixel.
    """
    info = slide.info
    size_um = np.array([info.mpp_x, info.mpp_y])
    placed = alignment.to_slide(nuclei_um)
    placed_um = placed[_inside(placed, info)] * size_um
    ours, seen = [np.empty((0, 2))], [np.empty((0, 2))]
    for corner in _fields(placed_um, n_fields):
        mpp = (info.mpp_x + info.mpp_y) / 2
        plane = Plane(mpp, mpp / info.mpp_x, mpp / info.mpp_y, info.width_px, info.height_px)
        x0, y0 = (int(v) for v in corner / mpp)
        edge = round(FIELD_UM / mpp)
        cells = finder(slide.read_plane(plane, (x0, y0, x0 + edge, y0 + edge)), mpp)
        # Fields lie far apart in the frame of the comparison, so that none has neighbours in another.
        apart = np.array([0.0, 4 * FIELD_UM * len(seen)])
        seen.append(cells.centroid_xy * mpp + apart)
        here = placed_um - np.array([x0, y0]) * mpp
        rim = ((here >= FIELD_RIM_UM) & (here < FIELD_UM - FIELD_RIM_UM)).all(axis=1)
        ours.append(here[rim] + apart)
    return compare_nuclei(np.concatenate(ours), np.concatenate(seen))


def _fields(places_um: Float64, n_fields: int) -> Float64:
    """Return the corners of squares with as many places as the middle one or more, spread evenly in their order."""
    if not len(places_um):
        return np.empty((0, 2))
    square, count = np.unique((places_um // FIELD_UM).astype(np.int64), axis=0, return_counts=True)
    dense = square[count >= np.median(count)]
    chosen = np.unique(np.linspace(0, len(dense) - 1, min(n_fields, len(dense))).round().astype(np.int64))
    return np.asarray(dense[chosen] * FIELD_UM, np.float64)
