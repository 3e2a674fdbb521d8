"""Models compared with labelled images, and classifiers calibrated on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cellslide.api.models import Model, ModelLike, opened, task_of
from cellslide.config import ClassifyConfig, TileConfig
from cellslide.errors import UsageError
from cellslide.progress import Progress

if TYPE_CHECKING:
    from cellslide.classify import SlideClassifier
    from cellslide.classify.decision import GateRule
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.evaluate.calibration import CalibrationReport
    from cellslide.evaluate.paths import PathPredictor, PathScores
    from cellslide.evaluate.report import EvalReport
    from cellslide.evaluate.scoring import Found, Scored, Scoring

# The name of the baseline without training.
CLASSICAL = "classical"


def evaluate(
    model: Path | ModelLike,
    dataset: str | Path,
    *,
    split: str | None = "val",
    protocol: str | None = None,
    mpp: float | None = None,
    limit: int | None = None,
    class_map: Mapping[str, str] | None = None,
    tiles: TileConfig | None = None,
    tta: bool = False,
    nuclei: Literal["given", "detected"] = "given",
    detector: ModelLike = None,
    organ: str | None = None,
    rule: GateRule | RuleSettings | None = None,
    per_image: str | Path | None = None,
    reliability: str | Path | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Score a model, or predictions in a folder, on labelled images; a classifier types the annotated nuclei.

    model        a model, its id, "classical" for the baseline without training, or a folder of predictions.
    dataset      folder with `manifest.csv`.
    split        only the images of this split; None takes all. `limit` takes the first N of them.
    protocol     how nuclei are paired with points; None takes what suits the data set.
    mpp          pixel size of the images in µm, over what the manifest says.
    class_map    predicted classes that count as one of the data set's.
    tiles, tta   of a network that finds nuclei.
    nuclei       what a classifier types: annotated nuclei, or those that `detector` finds.
    organ, rule  of a classifier: organ of all images, over the manifest's, and which probabilities decide.
    per_image    CSV file to write with the scores of each image.
    reliability  PNG file to draw with the reliability of a classifier on annotated nuclei.
    Raises UsageError for a data set that cannot be read, an unknown id or protocol, or images without a prediction.
    """
    from cellslide.evaluate.predictors import classical_nuclei, network_predictor, read_nuclei
    from cellslide.evaluate.report import write_per_image
    from cellslide.evaluate.scoring import Scoring

    scoring = Scoring.read(Path(dataset), split, protocol, mpp, limit, class_map, progress)
    folder = _folder_of(model)
    if model == CLASSICAL:
        report, images = scoring.score(CLASSICAL, classical_nuclei)
    elif folder is not None:
        report, images = scoring.score(str(folder), lambda sample, _: read_nuclei(folder, sample))
    else:
        with opened(model if isinstance(model, Model) or callable(model) else str(model), None) as network:
            if network.task == "classify":
                by = _classifier(network, scoring, organ, rule)
                if nuclei == "given":
                    report, images = _score_given(network, by, scoring, organ, reliability), []
                else:
                    report, images = _score_detected(network, by, scoring, organ, detector, tiles)
            else:
                segmenter = network.image_segmenter(tiles, tta)
                predict = network_predictor(segmenter, segmenter.config, network.classes)
                report, images = scoring.score(network.name, predict)
    if per_image is not None:
        write_per_image(Path(per_image), images)
    return report


def _folder_of(model: Path | ModelLike) -> Path | None:
    """Return the folder of predictions that this names, None where it is a model; raises UsageError for neither."""
    from cellslide.weights import Manifest

    if isinstance(model, Path):
        return model
    if isinstance(model, str) and model != CLASSICAL and task_of(model) is None:
        if Path(model).is_dir():
            return Path(model)
        Manifest.load().entry(model)  # It knows which names are near.
    return None


def _classifier(
    network: Model, scoring: Scoring, organ: str | None, rule: GateRule | RuleSettings | None = None
) -> SlideClassifier:
    from cellslide.weights.organs import organ_by_text

    scoring.require_classes()
    by = network.slide_classifier(ClassifyConfig(organ=organ, paths="both"), rule)
    spec = by.classifier.spec
    if organ is None and spec.organs:  # An organ for all has its own warning.
        scoring.warn_of_unknown_organs(spec.organs, organ_by_text(spec))
    return by


def _typing(by: SlideClassifier, organ: str | None) -> PathPredictor:
    from cellslide.evaluate.predictors import path_predictor
    from cellslide.weights.organs import organ_by_text

    return path_predictor(by.classifier, organ_by_text(by.classifier.spec, organ))


def _score_given(
    network: Model, by: SlideClassifier, scoring: Scoring, organ: str | None, reliability: str | Path | None
) -> EvalReport:
    from cellslide.evaluate.predictors import score_given

    report, scores = score_given(network.name, scoring, _typing(by, organ), by.rule, network.infer.seed)
    if reliability is not None:
        _draw({name: found for name, found in scores.items() if found is not None}, Path(reliability))
    return report


def _draw(scores: Mapping[GateRule, PathScores], picture: Path) -> None:
    from cellslide.evaluate.diagram import write_reliability

    write_reliability(picture, {name: found.bins for name, found in scores.items()})


def _score_detected(
    network: Model,
    by: SlideClassifier,
    scoring: Scoring,
    organ: str | None,
    detector: ModelLike,
    tiles: TileConfig | None,
) -> Scored:
    from cellslide.evaluate.report import pixel_size
    from cellslide.pipeline import segment_array

    predict, found = _typing(by, organ), dict[Path, "Found"]()
    scoring.progress.begin(scoring.data.name, len(scoring.data), 0)
    with opened(detector, "segment") as finder:
        segmenter = finder.image_segmenter(tiles)
        for sample in scoring.data.samples:
            size = pixel_size(sample, scoring.mpp)
            xy = segment_array(segmenter, sample.load_image(), size, segmenter.config).centroid_xy
            found[sample.image_path] = (xy, predict(sample, size, xy))
            scoring.progress.advance(len(xy))
    return scoring.score_detected(network.name, found, by.rule)


def calibrate(
    model: ModelLike,
    dataset: str | Path,
    *,
    split: str = "val",
    organ: str | None = None,
    mpp: float | None = None,
    class_map: Mapping[str, str] | None = None,
    target: float = 0.9,
    unseen: bool = False,
    out: str | Path | None = None,
    reliability: str | Path | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit on typed nuclei how far the probabilities of a classifier can be believed; write it into a manifest entry.

    dataset      folder with `manifest.csv`; take a `split` that trained nothing.
    target       share of the accepted nuclei that shall be right.
    unseen       the data set is of an organ that trained nothing: fit only how much more to abstain on such organs.
    out          the entry to write; None is `model.yaml` beside the weights.
    reliability  PNG file to draw, before and after.
    The other settings are those of `evaluate`, and so are the errors.
    """
    from cellslide.evaluate.calibration import CalibrationReport, FitConfig, draw_gain, fit, fit_unseen, measure
    from cellslide.evaluate.scoring import Scoring, known_cells
    from cellslide.weights.classifier import entry_to_write, write_calibration

    config = FitConfig(target)
    if unseen and organ is not None:
        raise UsageError("--organ: an unseen organ has no row in the weights; leave it out with --unseen")
    organ = "unknown" if unseen else organ
    scoring = Scoring.read(Path(dataset), split, None, mpp, None, class_map, progress)
    scoring.require_classes()
    with opened(model, "classify") as network:
        path = entry_to_write(network.loaded.entry, None if out is None else Path(out))
        by = _classifier(network, scoring, organ)
        cells = known_cells(scoring.typed_cells(_typing(by, organ)), scoring.classes, network.classes)
        if unseen:
            found = fit_unseen(by.classifier.spec.calibration, cells.probs, cells.true_class, config)
        else:
            found = fit(cells.probs, cells.true_class, len(network.classes), config)
        write_calibration(path, network.loaded.entry, found)
    if reliability is not None:
        draw_gain(Path(reliability), cells.probs, cells.true_class, found)
    gain = measure(cells.probs, cells.true_class, cells.image, found)
    return CalibrationReport(path, network.classes, len(cells.image), found, gain)
