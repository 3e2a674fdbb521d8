"""Fields: images with the places of their nuclei, from labelled data sets and from slides with a table of cells.

Frame: pixels of the field, (x, y); pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cellslide.classify.targets import Target, check_slide, expand_targets, open_target
from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST, Sample
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import TABLE
from cellslide.store.shapes import ring_boxes
from cellslide.train.data import IGNORE_LABEL, choose_samples, pixel_size
from cellslide.train.pixels import InMemory, OnSlide, Pixels
from cellslide.train.pretrain.recipe import PretrainRecipe
from cellslide.train.recipe import DatasetConfig
from cellslide.train.task import FitOptions
from cellslide.types import Float64, Int32, Int64, Plane, SlideInfo

SLIDES = "slides"


@dataclass(frozen=True, slots=True)
class Sources:
    """What is learned from: slides, output folders of `segment` and data sets.

    nuclei  the folder that `segment` wrote for the slides; mpp the µm/px of all slides, over what they say.
    """

    paths: tuple[str, ...]
    nuclei: Path | None = None
    mpp: float | None = None

    @property
    def datasets(self) -> tuple[Path, ...]:
        """The folders that are data sets."""
        return tuple(Path(p) for p in self.paths if (Path(p) / MANIFEST).is_file())


@dataclass(frozen=True, slots=True)
class Field:
    """An image at `mpp` with its nuclei: xy float64 (N, 2), box_xyxy float64 (N, 4), NaN where not known."""

    name: str
    pixels: Pixels
    width_px: int
    height_px: int
    mpp: float
    xy: Float64
    box_xyxy: Float64 = field(repr=False)

    def __post_init__(self) -> None:
        n = len(self.xy)
        if self.xy.shape != (n, 2) or self.box_xyxy.shape != (n, 4):
            raise ValueError(f"{self.name}: points {self.xy.shape} and boxes {self.box_xyxy.shape} do not match")


@dataclass(frozen=True, slots=True)
class FieldSet:
    """The fields of one source, and its share of the samples relative to the others."""

    name: str
    weight: float
    fields: tuple[Field, ...]

    @property
    def n_nuclei(self) -> int:
        """Nuclei of all fields."""
        return sum(len(item.xy) for item in self.fields)


def read_sources(options: FitOptions, recipe: PretrainRecipe) -> list[FieldSet]:
    """Return what the sources of a run hold; see `load_fields`."""
    return load_fields(sources_of(options), recipe)


def named_datasets(options: FitOptions, sets: Sequence[FieldSet]) -> list[tuple[str, Path]]:
    """Return name and folder of each data set among the sources of a run."""
    return [(path.resolve().name, path) for path in sources_of(options).datasets]


def sources_of(options: FitOptions) -> Sources:
    """Return the sources of a run."""
    paths, extra = tuple(map(str, options.sources)), options.extra
    return Sources(paths, extra.get("nuclei"), extra.get("slide_mpp"))


def field_set_card(fields: FieldSet, recipe: PretrainRecipe) -> dict[str, Any]:
    """Return the card's entry of a source."""
    return {"name": fields.name, "weight": fields.weight, "fields": len(fields.fields), "nuclei": fields.n_nuclei}


def load_fields(sources: Sources, recipe: PretrainRecipe) -> list[FieldSet]:
    """Return the fields of data sets (folders with a manifest), and those of all slides as one set.

    Rows of a data set's test split are never read. Raises UsageError where a slide has no cells, or nothing is left.
    """
    folders = sources.datasets
    chosen = choose_samples(folders, recipe.datasets, DatasetConfig())
    sets = [
        _of_dataset(path, [s for s in part.train if isinstance(s, Sample)], recipe)
        for path, part in zip(folders, chosen, strict=True)
    ]
    rest = [path for path in sources.paths if Path(path) not in folders]
    if rest:
        targets = expand_targets(rest, sources.nuclei or Path())
        fields = [found for target in targets for found in of_slide(target, recipe, sources.mpp)]
        sets.append(FieldSet(SLIDES, recipe.slides_weight, tuple(fields)))
    sets = [s for s in sets if s.fields and s.weight > 0]
    if not sets:
        raise UsageError(f"no field with at least {recipe.min_nuclei} nuclei: lower min_nuclei in --recipe")
    return sets


def _of_dataset(path: Path, samples: Sequence[Sample], recipe: PretrainRecipe) -> FieldSet:
    name = path.resolve().name
    config = recipe.datasets.get(name, DatasetConfig())
    fields = (of_sample(sample, config) for sample in samples)
    return FieldSet(name, config.weight, tuple(f for f in fields if len(f.xy) >= max(recipe.min_nuclei, 1)))


def of_sample(sample: Sample, config: DatasetConfig) -> Field:
    """Return an annotated image as it lies on disk, its nuclei from the mask, else from the points.

    Raises UsageError if it has neither, or its pixel size is not known.
    """
    mask = None if sample.mask_path is None else sample.load_mask()
    mpp = pixel_size(sample, config, mask)
    if mask is not None:
        xy, box = places_of(mask)
    elif sample.points_path is not None:
        xy = sample.load_points().xy
        box = np.full((len(xy), 4), np.nan)
    else:
        raise UsageError(f"{sample.image_path}: neither mask nor points tell where its nuclei are")
    image = sample.load_image()
    return Field(f"{sample.dataset}/{sample.stem}", InMemory(image), sample.width, sample.height, mpp, xy, box)


def places_of(mask: Int32) -> tuple[Float64, Float64]:
    """Return centres of mass (N, 2) and half-open boxes xyxy (N, 4) of the nuclei of a mask (H, W)."""
    labels = np.where(mask == IGNORE_LABEL, 0, mask)
    # Numbers may leave gaps; each is a nucleus of its own.
    slices = ndimage.find_objects(labels)
    present = [k for k, where in enumerate(slices, 1) if where is not None]
    box = np.array([[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in slices if s is not None], np.float64)
    centre = ndimage.center_of_mass(np.ones_like(labels), labels, present) if present else []
    xy = np.array(centre, np.float64).reshape(-1, 2)[:, ::-1] + 0.5
    return np.ascontiguousarray(xy), box.reshape(-1, 4)


def of_slide(target: Target, recipe: PretrainRecipe, mpp: float | None = None) -> Iterator[Field]:
    """Yield the fields of a slide that hold enough nuclei, row by row; no pixel is read yet.

    Raises UsageError where no nuclei were found yet.
    """
    if not target.has_cells:
        raise UsageError(
            f"{target.folder}: no {TABLE} here; run `cellslide segment` first and name its output by --nuclei"
        )
    with open_target(target, mpp) as slide:
        check_slide(target, slide)
        plane = Plane.of(slide.info, recipe.mpp)
        info = slide.info
    xy, box = _cells_of(target.folder / TABLE, plane)
    own = np.floor(xy / recipe.field_px).astype(np.int64)
    order = np.lexsort((own[:, 0], own[:, 1]))
    starts = np.flatnonzero((np.diff(own[order], axis=0) != 0).any(axis=1)) + 1
    for rows in np.split(order, starts):
        if len(rows) >= max(recipe.min_nuclei, 1):
            yield _slide_field(info, plane, own[rows[0]], recipe.field_px, xy[rows], box[rows])


def _slide_field(info: SlideInfo, plane: Plane, place: Int64, side: int, xy: Float64, box: Float64) -> Field:
    width, height = min(side, plane.width_px), min(side, plane.height_px)
    # The last field of a row is moved back rather than cut, so that it is as wide as the others where the slide is.
    x, y = min(int(place[0]) * side, plane.width_px - width), min(int(place[1]) * side, plane.height_px - height)
    name = f"{info.slide_id}/{x}_{y}"
    return Field(name, OnSlide(info, plane, (x, y)), width, height, plane.mpp, xy - (x, y), box - (x, y, x, y))


def _cells_of(path: Path, plane: Plane) -> tuple[Float64, Float64]:
    """Return centres (N, 2) and boxes (N, 4; NaN for points) of a table's cells, in plane pixels."""
    xy, box = [np.empty((0, 2))], [np.empty((0, 4))]
    with open_table(path) as table:
        for chunk in table.iter_chunks():
            cells = chunk.cells
            xy.append(plane.from_level0(cells.centroid_xy))
            if cells.contour_xy is not None and cells.contour_start is not None:
                corners = ring_boxes(cells.contour_xy, cells.contour_start).reshape(-1, 2)
                box.append(plane.from_level0(corners).reshape(-1, 4))
            else:
                box.append(np.full((len(cells), 4), np.nan))
    return np.concatenate(xy), np.concatenate(box)
