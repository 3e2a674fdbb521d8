"""What gives the nuclei of a labelled image to score: a network, the baseline, files on disk, or a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample
from cellslide.evaluate.paths import PathPredictor, PathScores, paths_report, projection, score_paths
from cellslide.evaluate.predictions import find_prediction, read_prediction
from cellslide.evaluate.report import EvalReport, Predictor
from cellslide.evaluate.score import Nuclei
from cellslide.geometry.outlines import rasterise
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import TABLE
from cellslide.store.table_writer import NUCLEUS
from cellslide.types import Cells, Float64, PathProbs, concat

if TYPE_CHECKING:
    from cellslide.classify import Classifier
    from cellslide.classify.columns import Rule
    from cellslide.classify.decision import GateRule
    from cellslide.config import SegmentConfig
    from cellslide.evaluate.scoring import Scoring
    from cellslide.inference.segmenter import Segmenter


def classical_nuclei(sample: Sample, mpp: float) -> Nuclei:
    """Return the nuclei of an image by the baseline without training."""
    from cellslide.evaluate.baseline import segment_classical

    return Nuclei.from_labels(segment_classical(sample.load_image(), mpp))


def network_predictor(segmenter: Segmenter, config: SegmentConfig, names: tuple[str, ...]) -> Predictor:
    """Return what finds the nuclei of an image with a network that is ready; `names` are its classes."""
    from cellslide.pipeline import segment_array

    def predict(sample: Sample, mpp: float) -> Nuclei:
        cells = segment_array(segmenter, sample.load_image(), mpp, config)
        return nuclei_of(cells, (sample.height, sample.width), names)

    return predict


def path_predictor(classifier: Classifier, organ_of: Callable[[str], int]) -> PathPredictor:
    """Return what types cells (N, 2) of an image, in its pixels.

    organ_of  gives the index of the organ for what the manifest says of it, -1 for unknown.
    """
    from cellslide.classify import classify_array

    def predict(sample: Sample, mpp: float, xy: Float64) -> PathProbs:
        return classify_array(classifier, sample.load_image(), mpp, xy, organ_of(sample.organ))

    return predict


def score_given(
    model: str, scoring: Scoring, predict: PathPredictor, rule: Rule, seed: int = 0
) -> tuple[EvalReport, dict[GateRule, PathScores | None]]:
    """Score a classifier at the annotated nuclei: the report by `rule`, and the scores of every rule.

    Raises UsageError where the points have no classes, or none that the classifier knows.
    """
    # Before the network runs for nothing.
    onto, data = projection(rule.classes, scoring.classes, rule.taxonomy), scoring.data
    cells = scoring.typed_cells(predict)
    scores = score_paths(cells, onto, rule.decision, rule.calibration, seed)
    sizes = {scoring.mpp or sample.mpp for sample in data.samples}
    size = sizes.pop() if len(sizes) == 1 else None
    return paths_report(model, data, scoring.split, size, scores, rule.decision.gate), scores


def read_nuclei(folder: Path, sample: Sample) -> Nuclei:
    """Return the nuclei of an image that lie in a folder of predictions; raises UsageError where there are none."""
    path = find_prediction(folder, sample.stem)
    return _read_table(path, sample) if path.name == TABLE else read_prediction(path)


def _read_table(path: Path, sample: Sample) -> Nuclei:
    """Read the nuclei of an image from a table, with the classes that were decided; its level-0 pixels are the image's.

    What was rejected is no nucleus; a nucleus that abstained or was not typed has the class "".
    """
    with open_table(path) as table:
        size = (table.slide.width_px, table.slide.height_px)
        if size != (sample.width, sample.height):
            raise UsageError(
                f"{path}: made from an image of {size[0]} x {size[1]} px, not {sample.width} x {sample.height}"
            )
        names = () if table.class_names == (NUCLEUS.name,) else table.class_names
        parts, decided = list[Cells](), list[str]()
        # A box is no outline: only where it lies is compared.
        for chunk in table.iter_chunks(obs=("is_nucleus",), outlines=table.kind == "mask"):
            kept = np.asarray(chunk.columns.obs["is_nucleus"], np.bool_)
            parts.append(chunk.cells.take(kept))
            # The last of these is for what abstained, and for what was not typed (-1).
            decided += [(*names, "")[k] for k in chunk.class_index[kept].tolist()] if names else []
        if parts:
            return nuclei_of(concat(parts), (sample.height, sample.width), names, decided)
        return Nuclei.none((sample.height, sample.width) if table.kind == "mask" else None, names)


def nuclei_of(
    cells: Cells, shape: tuple[int, int], names: tuple[str, ...], decided: Sequence[str] | None = None
) -> Nuclei:
    """Turn cells in image pixels into nuclei to score; outlines are filled into a label map of `shape` (H, W).

    names    the classes of `cells.class_prob`, empty for a model that does not type nuclei.
    decided  the class of each cell, "" for none; where it is None the most probable one.
    """
    labels = label_id = None
    score = cells.score.astype(np.float64)
    if cells.contour_xy is not None and cells.contour_start is not None:
        labels = rasterise(cells.contour_xy, cells.contour_start, shape)
        label_id = np.arange(1, len(cells) + 1, dtype=np.int64)
    if not names or cells.class_prob is None:
        return Nuclei(cells.centroid_xy, labels, label_id, score=score)
    prob = cells.class_prob.astype(np.float64)
    if decided is None:
        decided = [names[i] for i in prob.argmax(axis=1)] if len(prob) else []
    return Nuclei(cells.centroid_xy, labels, label_id, tuple(decided), prob, names, score)
