"""A Xenium bundle beside its H&E slide: whether they belong together, and labels of nuclei by marker genes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellslide.api.models import ModelLike, opened
from cellslide.api.slides import PathLike, open_slide, segment
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.types import Cells, UInt8
    from cellslide.xenium.check import XeniumCheck
    from cellslide.xenium.expression import LabelSettings
    from cellslide.xenium.label import LabelCounts

FIELDS = 6

log = logging.getLogger(__name__)


def xenium_check(
    bundle: PathLike,
    slide: PathLike,
    *,
    alignment: PathLike | None = None,
    mpp: float | None = None,
    least_qv: float = 20.0,
    fields: int = FIELDS,
    model: ModelLike = None,
) -> XeniumCheck:
    """Find out whether a Xenium bundle, its alignment and a slide belong together; `reasons` say why not.

    alignment  matrix or landmarks (.csv), or regions (.geojson); None takes NAMEalignment.csv beside the slide.
    mpp        pixel size of the slide in µm, over what its file says; least_qv  quality of transcripts that count.
    fields     squares of 256 µm on which `model` finds nuclei to compare with those of the bundle.
    Raises UsageError for a bundle or an alignment that cannot be used, and as `open_slide`.
    """
    from cellslide.config import TissueConfig
    from cellslide.pipeline import segment_array
    from cellslide.slides.tissue import find_tissue
    from cellslide.xenium.alignment import find_alignment, read_alignment
    from cellslide.xenium.bundle import Bundle
    from cellslide.xenium.check import check_bundle, compare_fields

    if not 1 <= fields <= 1000:
        raise UsageError(f"--fields {fields}: must be 1 to 1000")
    source = Bundle(Path(bundle))
    given = None if alignment is None else Path(alignment)
    mapped = read_alignment(find_alignment(Path(slide), given), source.pixel_size)
    with open_slide(slide, mpp=mpp) as pixels, opened(model, "segment") as finder:
        segmenter = finder.image_segmenter(batch_size=1)

        def find(image: UInt8, size: float) -> Cells:
            return segment_array(segmenter, image, size, segmenter.config)

        test = compare_fields(pixels, mapped, source.nuclei().centroid_um, find, fields)
        return check_bundle(source, pixels, mapped, find_tissue(pixels, TissueConfig()), test, least_qv)


def xenium_label(
    bundle: PathLike,
    slide: PathLike,
    out: PathLike,
    *,
    alignment: PathLike | None = None,
    markers: str = "nuclass",
    classes: Sequence[str] = (),
    clusters: PathLike | None = None,
    settings: LabelSettings | None = None,
    mpp: float | None = None,
    model: ModelLike = None,
) -> LabelCounts:
    """Label the nuclei of a slide by the marker genes of its Xenium bundle, in columns of `out/<slide_id>/cells.zarr`.

    Nuclei are found with `model` where the folder has none yet.
    markers   "nuclass", or a YAML file `class: [genes]`; classes  those of them to use, () for all.
    clusters  the table xenium_clusters.csv of an earlier run, with labels changed.
    Raises UsageError for what does not fit together, MissingDependencyError without the extra `spatial`.
    """
    from cellslide.slides.inputs import expand_slides
    from cellslide.store.run_record import TABLE
    from cellslide.xenium.alignment import find_alignment, read_alignment
    from cellslide.xenium.bundle import Bundle
    from cellslide.xenium.expression import LabelSettings, require_scanpy
    from cellslide.xenium.label import label_slide
    from cellslide.xenium.markers import read_markers

    require_scanpy()
    source, given = Bundle(Path(bundle)), None if alignment is None else Path(alignment)
    mapped = read_alignment(find_alignment(Path(slide), given), source.pixel_size)
    listed = read_markers(markers, source.genes, classes)
    for line in (*listed.coverage(), *listed.alike()):
        log.info("%s", line)
    folder = Path(out) / expand_slides([slide])[0].slide_id
    if not (folder / TABLE).exists():
        segment(slide, out, model=model, mpp=mpp).close()
    with open_slide(slide, mpp=mpp) as pixels:
        return label_slide(
            source, folder, pixels, mapped, listed, settings or LabelSettings(),
            None if clusters is None else Path(clusters),
        )  # fmt: skip
