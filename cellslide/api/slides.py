"""Slides and images: their nuclei found, typed, embedded, brought in from other tools and explained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard, overload

from cellslide.api.models import ModelLike, load_model, opened
from cellslide.config import ClassifyConfig, EmbedConfig, OutputConfig, SegmentConfig, TileConfig, TissueConfig
from cellslide.errors import PixelSizeError, UsageError
from cellslide.progress import IDLE, Progress, Watch

if TYPE_CHECKING:
    from cellslide.classify import SlideClassifier
    from cellslide.classify.decision import GateRule
    from cellslide.classify.targets import Target
    from cellslide.inference.segmenter import Segmenter
    from cellslide.slides.inputs import SlideInput
    from cellslide.slides.slide import Slide
    from cellslide.store.cell_table import CellTable
    from cellslide.types import Cells, Float32, UInt8

PathLike: TypeAlias = str | Path
SlideLike: TypeAlias = "PathLike | Slide"
TableLike: TypeAlias = "PathLike | CellTable"

FORMATS = ("zarr", "geojson")

log = logging.getLogger(__name__)


def open_slide(path: PathLike, *, mpp: float | None = None) -> Slide:
    """Open a slide to read its pixels; a context manager.

    mpp  pixel size of level 0 in µm, over what the file says.
    Raises PixelSizeError where it is not known, UsageError without such a file, SlideError if it cannot be read.
    """
    from cellslide.slides.slide import open_slide

    return open_slide(path, mpp)


@overload
def segment(source: UInt8, out: None = None, *, model: ModelLike = None, mpp: float | None = None) -> Cells: ...


@overload
def segment(
    source: SlideLike,
    out: PathLike,
    *,
    model: ModelLike = None,
    mpp: float | None = None,
    tissue: bool | PathLike = True,
    roi: PathLike | None = None,
    tile_px: int | None = None,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable: ...


def segment(
    source: UInt8 | SlideLike,
    out: PathLike | None = None,
    *,
    model: ModelLike = None,
    mpp: float | None = None,
    tissue: bool | PathLike = True,
    roi: PathLike | None = None,
    tile_px: int | None = None,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable | Cells:
    """Find every nucleus: of a slide, written to `out/<slide_id>`, or of an image in memory.

    source   path of a slide, an open slide, or an image uint8 (H, W, 3) RGB, which is searched everywhere.
    out      folder for results, needed for a slide.
    mpp      pixel size in µm: needed for an image; of a slide, over what its file says.
    tissue   True finds the tissue, False searches everywhere, a path is a mask image of the whole slide.
    roi      GeoJSON with polygons to search, zero point as QuPath writes it.
    tile_px  tile edge in pixels at the model's pixel size; None takes the model's.
    A slide that is done already is not done again. Coordinates are level-0 pixels of the slide, or pixels of the image.
    Raises UsageError for settings that do not fit, PixelSizeError, SlideError, WeightsError.
    """
    if _is_image(source):
        asked = (out, roi, tile_px, None if tissue is True or tissue is False else tissue)
        return _segment_image(source, mpp, model, asked)
    if out is None:
        raise UsageError("out: a slide needs a folder for its results")
    config = _segment_config(mpp, tissue, roi, tile_px, formats, overwrite)
    slide = _slide_input(source)  # type: ignore[arg-type]
    with opened(model, "segment") as finder:
        return _run(slide, finder.segmenter(config), None, Path(out), progress)


def _run(
    slide: SlideInput, segmenter: Segmenter, by: SlideClassifier | None, out: Path, progress: Progress | None
) -> CellTable:
    """Find the nuclei of one slide, type them where there is a classifier, and log which tiles failed, if some did."""
    from cellslide.pipeline import run_slide

    record, _ = run_slide(slide, segmenter, by, out, _watch(progress))
    if record.failed_tiles:
        first, counts = record.failed_tiles[0], record.counts
        log.warning("%s: %d of %d tiles failed: %s", slide.path, counts.tiles_failed, counts.tiles, first.error)
    return _finished(out / slide.slide_id, slide)


def _segment_image(image: UInt8, mpp: float | None, model: ModelLike, asked: Sequence[object]) -> Cells:
    from cellslide.pipeline import segment_array

    if any(value is not None for value in asked):
        raise UsageError("out, roi, tile_px and a tissue mask are for slides; an image gives cells in memory")
    checked, size = _checked_image(image, mpp)
    with opened(model, "segment") as finder:
        segmenter = finder.image_segmenter(batch_size=1)
        return segment_array(segmenter, checked, size, segmenter.config)


def _segment_config(
    mpp: float | None, tissue: bool | PathLike, roi: PathLike | None, tile_px: int | None, formats: Sequence[str],
    overwrite: bool,
) -> SegmentConfig:  # fmt: skip
    mask = None if isinstance(tissue, bool) else Path(tissue)
    return SegmentConfig(
        mpp=mpp,
        tissue=TissueConfig(tissue is not False, mask, None if roi is None else Path(roi)),
        tiles=TileConfig(tile_px),
        output=OutputConfig(tuple(formats), overwrite=overwrite),
    )


def _finished(folder: Path, slide: SlideInput) -> CellTable:
    """Write the page of a slide that is done, and open its table."""
    from cellslide.report import keep_report

    keep_report(folder, slide.path)
    return read_cells(folder)


@overload
def classify(
    cells: Cells,
    slide: UInt8 | SlideLike,
    *,
    model: ModelLike = None,
    organ: str | None = None,
    rule: GateRule | None = None,
    mpp: float | None = None,
) -> Cells: ...


@overload
def classify(
    cells: TableLike,
    slide: SlideLike | None = None,
    *,
    model: ModelLike = None,
    organ: str | None = None,
    rule: GateRule | None = None,
    abstain: float | None = None,
    mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable: ...


def classify(
    cells: Cells | TableLike,
    slide: UInt8 | SlideLike | None = None,
    *,
    model: ModelLike = None,
    organ: str | None = None,
    rule: GateRule | None = None,
    abstain: float | None = None,
    mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable | Cells:
    """Type nuclei: those of a table, which gains the columns, or cells in memory, returned with `class_prob` (N, K).

    cells    a table or its folder, or cells in pixels of `slide`.
    slide    the slide or image that they lie on; None takes the slide that the table names.
    organ    organ of the slide, None where it is not known.
    rule     which probabilities decide: "mix", "safe", "local" or "global"; None is what suits the weights.
    abstain  least probability of a class, below which none is said; None takes the weights'. Only for a table.
    mpp      pixel size in µm: needed with an image; of a slide, over what its file says.
    A table that is given open is closed: go on with the one returned. Other files of its folder are written anew.
    Raises UsageError for settings that do not fit, SlideError where the slide is not that of the cells, WeightsError.
    """
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.pipeline import classify_slide
    from cellslide.types import Cells

    if isinstance(cells, Cells):
        if abstain is not None:
            raise UsageError("abstain: marks rows of a table; cells in memory keep all probabilities")
        with opened(model, "classify") as typing, _open_pixels(slide, mpp) as pixels:
            return _classify_cells(cells, pixels, typing.slide_classifier(ClassifyConfig(organ=organ), rule))
    target = _target(cells, slide)
    config = ClassifyConfig(mpp=mpp, organ=organ, output=_kept_output(target.folder, overwrite))
    with opened(model, "classify") as typing:
        classify_slide(target, typing.slide_classifier(config, RuleSettings(rule, abstain=abstain)), _watch(progress))
    return _finished(target.folder, target.source)


def _classify_cells(cells: Cells, pixels: Slide, by: SlideClassifier) -> Cells:
    from cellslide.classify.cells import gather
    from cellslide.classify.decision import decide

    found = gather(pixels, cells.centroid_xy, by.find_organ(None).index, by.classifier)
    return replace(cells, class_prob=decide(found, by.rule.decision, by.rule.calibration).prob)


def run(
    source: SlideLike,
    out: PathLike,
    *,
    model: ModelLike = None,
    classifier: ModelLike = None,
    organ: str | None = None,
    mpp: float | None = None,
    tissue: bool | PathLike = True,
    roi: PathLike | None = None,
    tile_px: int | None = None,
    rule: GateRule | None = None,
    abstain: float | None = None,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable:
    """Find and type every nucleus of a slide, written to `out/<slide_id>`.

    model, classifier  what finds nuclei and what types them; None takes those that ship.
    The other settings are those of `segment` and `classify`, and so are the errors.
    """
    from cellslide.classify.rule_settings import RuleSettings

    if _is_image(source):
        raise UsageError("run: takes a slide; for an image in memory call segment, then classify")
    config, slide = _segment_config(mpp, tissue, roi, tile_px, formats, overwrite), _slide_input(source)
    typing = ClassifyConfig(mpp=mpp, organ=organ, roi=config.tissue.roi, output=config.output)
    with opened(model, "segment") as finder, opened(classifier, "classify") as typist:
        by = typist.slide_classifier(typing, RuleSettings(rule, abstain=abstain))
        return _run(slide, finder.segmenter(config), by, Path(out), progress)


@overload
def embed(cells: Cells, slide: UInt8 | SlideLike, *, model: ModelLike = None, mpp: float | None = None) -> Float32: ...


@overload
def embed(
    cells: TableLike,
    slide: SlideLike | None = None,
    *,
    model: ModelLike = None,
    mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Float32: ...


def embed(
    cells: Cells | TableLike,
    slide: UInt8 | SlideLike | None = None,
    *,
    model: ModelLike = None,
    mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Float32:
    """Return a feature vector of each nucleus, float32 (N, D); of a table they are also kept in `obsm["embedding"]`.

    The arguments are those of `classify`, and so are the errors; a table that is given open is closed.
    """
    from cellslide.embed import embed_places, embed_target
    from cellslide.types import Cells

    if isinstance(cells, Cells):
        with opened(model, "backbone") as network, _open_pixels(slide, mpp) as pixels:
            return embed_places(network.embedder(EmbedConfig()), pixels, cells.centroid_xy)
    target = _target(cells, slide)
    with opened(model, "backbone") as network:
        embed_target(target, network.embedder(EmbedConfig(mpp=mpp, overwrite=overwrite)), _watch(progress))
    with _finished(target.folder, target.source) as table:
        vectors: Float32 = table.matrix("embedding")
        return vectors


def read_cells(path: PathLike) -> CellTable:
    """Open the table of a slide: `cells.zarr`, or the folder that holds it.

    Raises TableError where there is none, UsageError where a folder holds those of several slides.
    """
    from cellslide.store.cell_table import open_table
    from cellslide.store.recovery import tables_below
    from cellslide.store.run_record import TABLE

    folder = Path(path)
    tables = tables_below(folder)
    if len(tables) > 1:
        raise UsageError(f"{folder}: holds the cells of {len(tables)} slides; name one of its folders")
    return open_table(tables[0] if tables else folder if folder.suffix == ".zarr" else folder / TABLE)


def import_cells(
    path: PathLike,
    slide: SlideLike,
    out: PathLike,
    *,
    unit: Literal["px", "um"] = "px",
    mpp: float | None = None,
    overwrite: bool = False,
) -> CellTable:
    """Make the table of a slide, in `out/<slide_id>`, from nuclei that another tool found.

    path  a file of another tool: GeoJSON, JSON, CSV, parquet and others.
    unit  of its coordinates: level-0 pixels or µm.
    mpp   pixel size of the slide in µm, over what its file says.
    Raises UsageError where the file cannot be used or the folder holds other cells, and as `open_slide`.
    """
    from cellslide.classify.foreign import import_cells
    from cellslide.classify.targets import Target

    source = _slide_input(slide)
    target = Target(source, Path(out) / source.slide_id)
    config = ClassifyConfig(mpp=mpp, cells=Path(path), cells_unit=unit, output=OutputConfig(overwrite=overwrite))
    log.info("%s", import_cells(target, config))
    return read_cells(target.folder)


def explain(
    folder: PathLike,
    *,
    cells: Sequence[str | int] = (),
    uncertain: int | None = None,
    disagree: int | None = None,
    slide: PathLike | None = None,
    out: PathLike | None = None,
    model: ModelLike = None,
    device: str = "auto",
    runner_up: bool = False,
) -> tuple[Path, int]:
    """Write a page that shows where the classifier looked, on chosen cells; return where it is and how many it shows.

    folder     of one slide whose cells are typed.
    cells      ids of cells, their `cell_id` or `uuid`; else give `uncertain` or `disagree`, how many cells of lowest
               probability, or of paths that are surest of different classes.
    slide      where the slide is now, where it has moved since.
    out        the page; None is `explain.html` in the folder.
    model      None takes the classifier that typed the cells, on `device`.
    runner_up  show the second class too, as `disagree` always does.
    Raises UsageError unless one choice is given, or where the cells are not typed, or by another model.
    """
    from cellslide.report.explain import Selection, explain_slide
    from cellslide.report.explain.slide import weights_used

    if bool(cells) + (uncertain is not None) + (disagree is not None) != 1:
        raise UsageError("give one of --cells IDS, --uncertain N and --disagree N")
    if cells:
        chosen = Selection("cells", ids=tuple(map(str, cells)))
    else:
        chosen = Selection("disagree", disagree or 0) if uncertain is None else Selection("uncertain", uncertain)
    if model is None:
        name, weights = weights_used(Path(folder))
        model = partial(load_model, name, weights=weights, task="classify", device=device)
    with opened(model, "classify") as network:
        return explain_slide(
            Path(folder), chosen, network.loaded, None if out is None else Path(out),
            moved_to=None if slide is None else Path(slide),
            runner_up=runner_up or disagree is not None, device=network.infer.device,
        )  # fmt: skip


def _watch(progress: Progress | None) -> Watch:
    return IDLE if progress is None else Watch(progress)


def _is_image(source: object) -> TypeGuard[UInt8]:
    """Tell whether this is an array, without importing numpy for what is a path."""
    return hasattr(source, "__array__")


def _checked_image(image: UInt8, mpp: float | None) -> tuple[UInt8, float]:
    """Return an image and its pixel size (µm); raises UsageError for another kind of array, PixelSizeError without."""
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"image {image.dtype} {image.shape}: must be uint8 (height, width, 3), RGB")
    if mpp is None:
        raise PixelSizeError("mpp: an image in memory does not say its pixel size; give it in µm")
    return image, SegmentConfig(mpp=mpp).mpp or mpp


def _open_pixels(slide: UInt8 | SlideLike | None, mpp: float | None) -> AbstractContextManager[Slide]:
    """Return a slide to enter: a path is opened, an image becomes a slide, an open slide stays open."""
    from cellslide.slides.slide import Slide, slide_from_array

    if slide is None:
        raise UsageError("slide: cells in memory do not say where they lie; give the slide or image")
    if isinstance(slide, Slide):
        return nullcontext(slide)
    if isinstance(slide, (str, Path)):
        return open_slide(slide, mpp=mpp)
    return slide_from_array(*_checked_image(slide, mpp))


def _slide_input(source: SlideLike) -> SlideInput:
    """Return the one slide that a path names, or an open slide again; raises UsageError for more than one."""
    from cellslide.slides.inputs import expand_slides
    from cellslide.slides.slide import Slide

    info = source.info if isinstance(source, Slide) else None
    path = source if isinstance(source, (str, Path)) else source.info.path
    found = expand_slides([path])
    if len(found) != 1:
        raise UsageError(f"{path}: names {len(found)} slides; call this once for each")
    # A pixel size that was given when the slide was opened still counts.
    given = info is not None and info.mpp_source in ("flag", "list")
    return replace(found[0], mpp=info.mpp_x) if info is not None and given else found[0]


def _target(table: TableLike, slide: UInt8 | SlideLike | None) -> Target:
    """Return the folder of a table and its slide: the one given, else the one that the table names."""
    from cellslide.classify.targets import Target, expand_targets

    with read_cells(table) if isinstance(table, (str, Path)) else table as found:
        path = found.path
    if slide is None:
        return expand_targets([str(path)], path.parent.parent)[0]
    if _is_image(slide):
        raise UsageError("slide: the cells of a table lie on a slide; give its path")
    return Target(_slide_input(slide), path.parent)  # type: ignore[arg-type]


def _kept_output(folder: Path, overwrite: bool) -> OutputConfig:
    """Return how the files of a folder are written anew: as they were, and no others."""
    from cellslide.store.run_record import read_record

    record = read_record(folder)
    earlier = {} if record is None else record.config.get("output", {})
    shaped = {name: earlier[name] for name in ("geojson_origin", "profile") if name in earlier}
    return OutputConfig(("zarr",), overwrite=overwrite, **shaped)
