"""What is called from Python, and what the commands call: an image gives cells in memory, a path a table on disk.

Everything heavy is imported inside the functions: to import this file costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, overload

from cellslide.config import (
    ClassifyConfig,
    EmbedConfig,
    InferConfig,
    OutputConfig,
    Precision,
    SegmentConfig,
    TileConfig,
    TissueConfig,
)
from cellslide.errors import PixelSizeError, UsageError
from cellslide.progress import IDLE, Progress, Watch

if TYPE_CHECKING:
    from cellslide.classify import Classifier, SlideClassifier
    from cellslide.classify.decision import GateRule
    from cellslide.classify.targets import Target
    from cellslide.embed import Embedder
    from cellslide.evaluate.dataset import Dataset
    from cellslide.evaluate.protocols import Protocol
    from cellslide.evaluate.report import EvalReport, Predictor
    from cellslide.evaluate.score import ClassSet
    from cellslide.inference.segmenter import Segmenter
    from cellslide.slides.inputs import SlideInput
    from cellslide.slides.slide import Slide
    from cellslide.store.cell_table import CellTable
    from cellslide.types import Cells, Float32, UInt8
    from cellslide.weights import LoadedClassifier, LoadedModel, WeightsEntry
    from cellslide.weights.muse import LoadedMuse

Task: TypeAlias = Literal["segment", "detect", "classify", "backbone"]
PathLike: TypeAlias = str | Path
SlideLike: TypeAlias = "PathLike | Slide"
TableLike: TypeAlias = "PathLike | CellTable"
ModelLike: TypeAlias = "str | Model | None"

FORMATS = ("zarr", "geojson")
# The name of the baseline without training.
CLASSICAL = "classical"

log = logging.getLogger(__name__)


class Model:
    """A network with its weights, used for one slide or image after another; a context manager.

    task     what it was loaded for: "segment" and "detect" find nuclei, "classify" types them, "backbone" embeds them.
    name     the id of its weights.
    classes  the names of its classes, in the order of the columns of probabilities; empty where it does not type.
    """

    def __init__(
        self,
        loaded: LoadedModel | LoadedClassifier | LoadedMuse,
        task: Task,
        infer: InferConfig,
        asked: tuple[str | None, Path | None] = (None, None),
    ) -> None:
        self.loaded: Any = loaded
        self.task, self.infer, self.asked = task, infer, asked
        spec = getattr(loaded, "spec", None)
        self.name: str = self.loaded.entry.id if spec is None else spec.weights_id or spec.name
        self.classes: tuple[str, ...] = () if spec is None else tuple(c.name for c in spec.classes)
        self._segmenters: dict[InferConfig | TileConfig, Segmenter] = {}

    def __repr__(self) -> str:
        return f"Model({self.name!r}, task={self.task!r}, device={self.infer.device!r})"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that decode; the model can be used again, they start anew then."""
        while self._segmenters:
            self._segmenters.popitem()[1].detector.close()

    def segmenter(self, config: SegmentConfig) -> Segmenter:
        """Return the network on its device for slides with these settings; the processes are those of earlier calls."""
        from cellslide.inference.segmenter import check_formats, open_segmenter

        self._require("segment", "detect")
        model, weights = self.asked
        config = replace(config, model=model, weights=weights, infer=self.infer)
        return self._ready(config.tiles, config, open_segmenter, check_formats)

    def image_segmenter(self) -> Segmenter:
        """Return the network on its device for images in memory: it decodes in this process."""
        from cellslide.inference.segmenter import check_formats, open_segmenter

        self._require("segment", "detect")
        # Few tiles: decoding them here is quicker than starting processes.
        infer = replace(self.infer, workers=self.infer.workers or 0, batch_size=self.infer.batch_size or 1)
        config = SegmentConfig(tissue=TissueConfig(enabled=False), infer=infer)
        return self._ready(infer, config, open_segmenter, check_formats)

    def _ready(
        self,
        key: InferConfig | TileConfig,
        config: SegmentConfig,
        open_: Callable[[Any, SegmentConfig], Segmenter],
        check: Callable[[Any, Sequence[str]], None],
    ) -> Segmenter:
        if key not in self._segmenters:
            self._segmenters[key] = open_(self.loaded, config)
        segmenter = self._segmenters[key]
        check(segmenter.spec, config.output.formats)
        return replace(segmenter, config=replace(config, tiles=segmenter.config.tiles))

    def classifier(self, config: ClassifyConfig) -> Classifier:
        """Return the network on its device, to type cells with these settings."""
        from cellslide.classify import open_classifier

        self._require("classify")
        model, weights = self.asked
        return open_classifier(self.loaded, replace(config, model=model, weights=weights, infer=self.infer))

    def slide_classifier(
        self, config: ClassifyConfig, rule: GateRule = "mix", abstain: float | None = None
    ) -> SlideClassifier:
        """Return the network on its device with the rule that decides; raises UsageError for one that does not fit."""
        from cellslide.batch.work import organ_finder
        from cellslide.classify import SlideClassifier
        from cellslide.classify.rule_settings import RuleSettings

        classifier = self.classifier(config)
        decided_by = RuleSettings(rule, abstain=abstain).rule(classifier.spec)
        return SlideClassifier(classifier, decided_by, organ_finder(classifier.spec, config.organ))

    def embedder(self, config: EmbedConfig) -> Embedder:
        """Return the network on its device, to embed cells with these settings."""
        from cellslide.embed import open_embedder

        self._require("backbone")
        model, weights = self.asked
        return open_embedder(self.loaded, replace(config, model=model, weights=weights, infer=self.infer))

    def _require(self, *tasks: Task) -> None:
        if self.task not in tasks:
            raise UsageError(f"model {self.name}: loaded to {self.task}; load it with task={tasks[0]!r}")


def open_slide(path: PathLike, *, mpp: float | None = None) -> Slide:
    """Open a slide to read its pixels; a context manager.

    mpp  pixel size of level 0 in µm, over what the file says.
    Raises PixelSizeError where it is not known, UsageError without such a file, SlideError if it cannot be read.
    """
    from cellslide.slides.slide import open_slide

    return open_slide(path, mpp)


def load_model(
    name: str | None = None,
    *,
    weights: PathLike | None = None,
    task: Task = "segment",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
) -> Model:
    """Load a network by its id, from a file of weights, or the one that ships for the task.

    batch_size  tiles, crops or windows in a pass; None lets the device decide.
    workers     processes that decode outlines; None takes the cores granted, 0 decodes in this process.
    Raises UsageError for an unknown id or another task, WeightsError where the weights are missing or do not fit.
    """
    infer = InferConfig(device=device, batch_size=batch_size, precision=precision, workers=workers)
    file = None if weights is None else Path(weights)
    return Model(_load(name, file, task), task, infer, (name, file))


def _load(name: str | None, weights: Path | None, task: Task) -> LoadedModel | LoadedClassifier | LoadedMuse:
    if task == "classify":
        from cellslide.weights.classifier import load_classifier

        return load_classifier(name, weights)
    if task == "backbone":
        from cellslide.weights.muse import load_muse

        return load_muse(name, weights)
    if task not in ("segment", "detect"):
        raise UsageError(f"task {task}: must be segment, detect, classify or backbone")
    from cellslide.weights import load_model

    return load_model(name, weights, task)


@contextmanager
def _opened(model: ModelLike, task: Task) -> Iterator[Model]:
    """Yield a model; one that was named, or that ships, is loaded here and closed at the end."""
    if isinstance(model, Model):
        yield model
        return
    with load_model(model, task=task) as opened:
        yield opened


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
        raise UsageError(f"out: a folder for the results of {_words(source)} is needed")
    config = _segment_config(mpp, tissue, roi, tile_px, formats, overwrite)
    slide = _slide_input(source)  # type: ignore[arg-type]
    with _opened(model, "segment") as finder:
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
    with _opened(model, "segment") as finder:
        segmenter = finder.image_segmenter()
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
    rule: GateRule = "mix",
    mpp: float | None = None,
) -> Cells: ...


@overload
def classify(
    cells: TableLike,
    slide: SlideLike | None = None,
    *,
    model: ModelLike = None,
    organ: str | None = None,
    rule: GateRule = "mix",
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
    rule: GateRule = "mix",
    abstain: float | None = None,
    mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable | Cells:
    """Type nuclei: those of a table, which gains the columns, or cells in memory, returned with `class_prob` (N, K).

    cells    a table or its folder, or cells in pixels of `slide`.
    slide    the slide or image that they lie on; None takes the slide that the table names.
    organ    organ of the slide, None where it is not known.
    rule     which probabilities decide: "mix", "safe", "local" or "global".
    abstain  least probability of a class, below which none is said; None takes the weights'. Only for a table.
    mpp      pixel size in µm: needed with an image; of a slide, over what its file says.
    A table that is given open is closed: go on with the one returned. Other files of its folder are written anew.
    Raises UsageError for settings that do not fit, SlideError where the slide is not that of the cells, WeightsError.
    """
    from cellslide.pipeline import classify_slide
    from cellslide.types import Cells

    if isinstance(cells, Cells):
        if abstain is not None:
            raise UsageError("abstain: marks rows of a table; cells in memory keep all probabilities")
        with _opened(model, "classify") as typing:
            return _classify_cells(cells, typing, _open_pixels(slide, mpp), organ, rule)
    target = _target(cells, slide)
    config = ClassifyConfig(mpp=mpp, organ=organ, output=_kept_output(target.folder, overwrite))
    with _opened(model, "classify") as typing:
        classify_slide(target, typing.slide_classifier(config, rule, abstain), _watch(progress))
    return _finished(target.folder, target.source)


def _classify_cells(cells: Cells, model: Model, pixels: Any, organ: str | None, rule: GateRule) -> Cells:
    from cellslide.classify.cells import gather
    from cellslide.classify.decision import decide

    with pixels as slide:
        by = model.slide_classifier(ClassifyConfig(organ=organ), rule)
        found = gather(slide, cells.centroid_xy, by.find_organ(None).index, by.classifier)
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
    rule: GateRule = "mix",
    abstain: float | None = None,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CellTable:
    """Find and type every nucleus of a slide, written to `out/<slide_id>`.

    model, classifier  what finds nuclei and what types them; None takes those that ship.
    The other settings are those of `segment` and `classify`, and so are the errors.
    """
    if _is_image(source):
        raise UsageError("run: takes a slide; for an image in memory call segment, then classify")
    config, slide = _segment_config(mpp, tissue, roi, tile_px, formats, overwrite), _slide_input(source)
    typing = ClassifyConfig(mpp=mpp, organ=organ, roi=config.tissue.roi, output=config.output)
    with _opened(model, "segment") as finder, _opened(classifier, "classify") as typist:
        by = typist.slide_classifier(typing, rule, abstain)
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
        with _opened(model, "backbone") as network, _open_pixels(slide, mpp) as pixels:
            return embed_places(network.embedder(EmbedConfig()), pixels, cells.centroid_xy)
    target = _target(cells, slide)
    with _opened(model, "backbone") as network:
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

    source = _slide_input(slide)
    target = _target_of(source, Path(out))
    config = ClassifyConfig(mpp=mpp, cells=Path(path), cells_unit=unit, output=OutputConfig(overwrite=overwrite))
    log.info("%s", import_cells(target, config))
    return read_cells(target.folder)


def evaluate(
    model: str | Path | Model, dataset: PathLike, *, split: str | None = "val", protocol: str | None = None
) -> EvalReport:
    """Score a model, or predictions in a folder, on labelled images; a classifier types the annotated nuclei.

    model     a model, its id, "classical" for the baseline without training, or a folder of predictions.
    dataset   folder with `manifest.csv`.
    split     only the images of this split; None takes all.
    protocol  how nuclei are paired with points; None takes what suits the data set.
    Raises UsageError for a data set that cannot be read, an unknown id or protocol, or images without a prediction.
    """
    from cellslide.evaluate.dataset import read_dataset
    from cellslide.evaluate.predictors import classical_nuclei, network_predictor, read_nuclei
    from cellslide.evaluate.protocols import protocol_of
    from cellslide.evaluate.report import pixel_size
    from cellslide.evaluate.score import scored_classes

    data = read_dataset(Path(dataset), split)
    pairing = protocol_of(protocol, data)
    classes = scored_classes(data, pairing)
    for sample in data.samples:  # Before a network is loaded for nothing.
        pixel_size(sample, None)
    if model == CLASSICAL:
        return _scores(CLASSICAL, data, split, classes, pairing, classical_nuclei)
    task = model.task if isinstance(model, Model) else _task_of(model)
    if task is None:
        folder = Path(str(model))
        return _scores(str(folder), data, split, classes, pairing, lambda sample, _: read_nuclei(folder, sample))
    with _opened(model if isinstance(model, Model) else str(model), task) as network:
        if task == "classify":
            return _scores_of_classes(network, data, split, classes)
        segmenter = network.image_segmenter()
        predict = network_predictor(segmenter, segmenter.config, network.classes)
        return _scores(network.name, data, split, classes, pairing, predict)


def _task_of(model: str | Path) -> Task | None:
    """Return the task of the model that an id names, None for a folder of predictions."""
    from cellslide.weights import Manifest

    manifest = Manifest.load()
    if str(model) not in manifest.entries and Path(model).is_dir():
        return None
    return manifest.entry(str(model)).task


def _scores(
    name: str, data: Dataset, split: str | None, classes: ClassSet, pairing: Protocol, predict: Predictor
) -> EvalReport:
    from cellslide.evaluate.report import evaluate_dataset, summarise

    return summarise(name, data, split, classes, evaluate_dataset(data, predict, classes, protocol=pairing), pairing)


def _scores_of_classes(model: Model, data: Dataset, split: str | None, classes: ClassSet) -> EvalReport:
    from cellslide.evaluate.predictors import path_predictor, score_given
    from cellslide.weights.organs import organ_by_text

    if not classes.names:
        raise UsageError(f"{data.root}: its points have no classes, which a classifier is compared with")
    by = model.slide_classifier(ClassifyConfig())
    predict = path_predictor(by.classifier, organ_by_text(by.classifier.spec))
    return score_given(model.name, data, split, classes, predict, by.rule)[0]


def list_models(task: Task | None = None) -> tuple[WeightsEntry, ...]:
    """Return what is known of all models, or of those for a task: id, licence, classes, pixel size and scores."""
    from cellslide.weights import Manifest

    return tuple(entry for entry in Manifest.load().entries.values() if task in (None, entry.task))


def fetch_model(name: str, accept_licence: str | None = None) -> Path:
    """Download the weights of a model after its licence is accepted by its name; return the file.

    Weights that are here already are only checked. Raises UsageError without consent, WeightsError where they may not
    or cannot be fetched.
    """
    from cellslide.weights import Manifest, fetch

    return fetch(Manifest.load().entry(name), accept_licence, lambda licence: False)


def _watch(progress: Progress | None) -> Watch:
    return IDLE if progress is None else Watch(progress)


def _words(source: object) -> str:
    return str(source) if isinstance(source, (str, Path)) else "a slide"


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


def _open_pixels(slide: UInt8 | SlideLike | None, mpp: float | None) -> Any:
    """Return a slide to enter: a path is opened, an image becomes a slide, an open slide stays open."""
    from contextlib import nullcontext

    from cellslide.slides.slide import Slide, slide_from_array

    if slide is None:
        raise UsageError("slide: cells in memory do not say where they lie; give the slide or image")
    if isinstance(slide, Slide):
        return nullcontext(slide)
    return (
        open_slide(slide, mpp=mpp) if isinstance(slide, (str, Path)) else slide_from_array(*_checked_image(slide, mpp))
    )


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


def _target_of(slide: SlideInput, out: Path) -> Target:
    from cellslide.classify.targets import Target

    return Target(slide, out / slide.slide_id)


def _target(table: TableLike, slide: UInt8 | SlideLike | None) -> Target:
    """Return the folder of a table and its slide: the one given, else the one that the table names."""
    from cellslide.classify.targets import Target, expand_targets

    with read_cells(table) if isinstance(table, (str, Path)) else table as opened:
        folder = opened.path.parent
    if slide is None:
        return expand_targets([str(folder / opened.path.name)], folder.parent)[0]
    if _is_image(slide):
        raise UsageError("slide: the cells of a table lie on a slide; give its path")
    return Target(_slide_input(slide), folder)  # type: ignore[arg-type]


def _kept_output(folder: Path, overwrite: bool) -> OutputConfig:
    """Return how the files of a folder are written anew: as they were, and no others."""
    from cellslide.store.run_record import read_record

    record = read_record(folder)
    earlier = {} if record is None else record.config.get("output", {})
    shaped = {name: earlier[name] for name in ("geojson_origin", "profile") if name in earlier}
    return OutputConfig(("zarr",), overwrite=overwrite, **shaped)
