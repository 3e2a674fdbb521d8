"""Over the cells of a slide: regions are read ahead, crops cut and typed piece by piece, results come as rows.

Frames: cells come in level-0 pixels and are cut in the plane of the classifier's pixel size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from cellslide.classify.engine import Classifier, Seconds
from cellslide.inference.crops import REGION_PX, Region, crop_corners, grid_centres, plan_regions, read_ahead
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.types import Float64, Int64, PathProbs, Plane, UInt8


@dataclass(frozen=True, slots=True)
class Work:
    """Cells made ready for typing: their plane, its crops' corners (N, 2) and the regions that serve them.

    `n_contexts` counts the places where a context is cut.
    """

    plane: Plane
    local: Int64
    context: Int64
    regions: tuple[Region, ...]
    n_contexts: int

    def __len__(self) -> int:
        return len(self.local)

    def seconds(self, each: Seconds) -> tuple[float, float]:
        """Return the least and the most that the network takes (s): no global path at all, and every one."""
        n = len(self)
        return n * each.local, n * (each.local + each.fusion) + self.n_contexts * each.context


def prepare(slide: Slide, xy_level0: Float64, classifier: Classifier) -> Work:
    """Decide what is cut where for cells (N, 2) in level-0 pixels; reads nothing."""
    spec, grid = classifier.spec, classifier.config.context_grid
    plane = Plane.of(slide.info, spec.mpp)
    centre = plane.from_level0(xy_level0).reshape(-1, 2)
    shared = centre if grid is None else grid_centres(centre, grid)
    local = crop_corners(centre, spec.local.field_px)
    context = crop_corners(shared, spec.context.field_px)
    crops = [(local, spec.local.field_px)]
    if classifier.has_global:
        crops.append((context, spec.context.field_px))
    # Whole boxes of the grid, so that no two regions cut the same context.
    size = REGION_PX if grid is None else -(-REGION_PX // grid) * grid
    regions = tuple(_by_place(region, context, grid) for region in plan_regions(centre, crops, size))
    n_contexts = len(np.unique(context, axis=0)) if classifier.has_global else 0
    return Work(plane, local, context, regions, n_contexts)


def _by_place(region: Region, context: Int64, grid: int | None) -> Region:
    """Put cells that share a context next to each other."""
    if grid is None:
        return region
    place = context[region.rows]
    return Region(region.rows[np.lexsort((place[:, 0], place[:, 1]))], region.box)


def classify_cells(
    slide: Slide, xy_level0: Float64, organ: int, classifier: Classifier, work: Work | None = None
) -> Generator[tuple[Int64, PathProbs], None, None]:
    """Yield (rows, what the network says of them) until each cell (N, 2), level-0 pixels, came once; not in order.

    organ   index in the weights' organs, -1 for unknown.
    Raises TileError where the slide is damaged.
    """
    work = prepare(slide, xy_level0, classifier) if work is None else work
    waiting: tuple[Int64, Callable[[], PathProbs]] | None = None
    with closing(read_ahead(slide, work.plane, work.regions, classifier.borders)) as reads:
        for region, read in reads:
            cutter = classifier.load_region(read, work.plane)
            for first in range(0, len(region.rows), classifier.rows_at_once):
                rows = region.rows[first : first + classifier.rows_at_once]
                current = (rows, classifier.launch(cutter, work.local[rows], work.context[rows], organ))
                # The next piece is on the device before the last one is fetched, so that the device never waits.
                if waiting is not None:
                    yield waiting[0], waiting[1]()
                waiting = current
    if waiting is not None:
        yield waiting[0], waiting[1]()


def classify_array(classifier: Classifier, image: UInt8, mpp: float, xy: Float64, organ: int = -1) -> PathProbs:
    """Return what the network says of cells `xy` (N, 2) of an image uint8 (H, W, 3) RGB of `mpp` µm/px, in its pixels.

    The crops are those that a slide with these pixels would give; `organ` is an index in the weights' organs.
    """
    return gather(slide_from_array(image, mpp), np.asarray(xy, np.float64), organ, classifier)


def gather(slide: Slide, xy_level0: Float64, organ: int, classifier: Classifier) -> PathProbs:
    """Return what the network says of all cells (N, 2), level-0 pixels, in their order; raises as `classify_cells`."""
    n, k = len(xy_level0), len(classifier.spec.classes)
    probs = PathProbs(*(np.full(shape, np.nan, np.float32) for shape in ((n, k), (n, k), (n,))))
    for rows, part in classify_cells(slide, xy_level0, organ, classifier):
        probs.local[rows], probs.global_[rows], probs.gate[rows] = part.local, part.global_, part.gate
    return probs
