"""Numbers of finished slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellslide.api.slides import PathLike
    from cellslide.measure.slide import SlideNumbers
    from cellslide.slides.regions import Origin


def measure(
    folder: PathLike,
    *,
    regions: PathLike | None = None,
    origin: Origin = "bounds",
    grid_um: float | None = None,
    border_um: float | None = None,
    with_artefacts: bool = False,
    seed: int = 0,
) -> SlideNumbers:
    """Measure a finished slide: counts, densities, shares, sizes, neighbours and distances by region, as lists of rows.

    folder          of one slide; nothing in it is changed.
    regions         GeoJSON of annotations; `origin` is what it is relative to.
    grid_um         also squares of this edge. border_um: also bands this wide along the tumour's border.
    with_artefacts  also count nuclei where the tissue is not clean.
    seed            of what is drawn and shuffled for the neighbours.
    Raises UsageError for regions that do not suit the slide, SlideError for a table that cannot be read.
    """
    from cellslide.measure.slide import MeasureConfig, measure_slide

    config = MeasureConfig(None if regions is None else Path(regions), origin, grid_um, border_um, with_artefacts, seed)
    return measure_slide(Path(folder), config)
