"""The model that ships: whole, small, as good as its card says on the validation patients, and blind to tile size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from cellslide.config import SegmentConfig, TileConfig
from cellslide.evaluate.dataset import read_dataset
from cellslide.evaluate.matching import overlaps, panoptic_quality
from cellslide.geometry.outlines import rasterise
from cellslide.pipeline import segment_array
from cellslide.slides.slide import open_slide
from cellslide.types import Cells
from cellslide.weights import LoadedModel, load_model

VALIDATION_PATIENTS = ("TNBC-03", "TNBC-08")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model()


def test_it_is_the_file_of_the_manifest_and_small(model: LoadedModel) -> None:
    assert model.entry.id == "cellslide-nuclei-light"
    assert model.spec.weights_sha256 == model.entry.sha256
    assert model.entry.size_bytes is not None and model.entry.size_bytes <= 40_000_000


def test_it_says_what_it_was_trained_on_and_how_good_it_is(model: LoadedModel) -> None:
    assert {"tnbc", "nuinsseg", "consep", "nucls-mini", "dsb2018-tissue", "brca-m2c"} <= {
        t.dataset for t in model.entry.trained_on
    }
    assert all(t.licence for t in model.entry.trained_on)
    assert {"tnbc-validation", "monuseg"} <= set(model.entry.metrics)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_validation_patients_reach_the_bar(shared: Path, model: LoadedModel) -> None:
    samples = [s for s in read_dataset(shared / "data" / "tnbc").samples if s.patient in VALIDATION_PATIENTS]
    scores = []
    for sample in samples:
        assert sample.mpp is not None
        cells = segment_array(model, sample.load_image(), sample.mpp, SegmentConfig())
        assert cells.contour_xy is not None and cells.contour_start is not None
        labels = rasterise(cells.contour_xy, cells.contour_start, (sample.height, sample.width))
        scores.append(panoptic_quality(overlaps(sample.load_mask(), labels)).pq)
    assert len(scores) == 9
    assert np.mean(scores) >= 0.65


def _field(shared: Path) -> np.ndarray:
    slide = open_slide(shared / "data" / "wsi" / "HE_example.tif", 0.5)
    with slide:
        return slide.reader.read_level(0, 200, 200, 1000, 1000)


def _matched(some: Cells, others: Cells, within_px: float) -> float:
    distance, _ = cKDTree(others.centroid_xy).query(some.centroid_xy)
    return float((distance <= within_px).mean())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tiles_of_512_and_1024_find_the_same_nuclei(shared: Path, model: LoadedModel) -> None:
    image = _field(shared)
    small, large = (segment_array(model, image, 0.5, SegmentConfig(tiles=TileConfig(px))) for px in (512, 1024))
    assert len(small) > 3000
    assert _matched(small, large, 4.0) >= 0.99
    assert _matched(large, small, 4.0) >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_leaves_keratin_alone(shared: Path, model: LoadedModel) -> None:
    # Loose flakes of keratin on glass, of which other models take a hundred for nuclei.
    with open_slide(shared / "data" / "wsi" / "CMU-1-Small-Region.svs") as slide:
        image, mpp = slide.reader.read_level(0, 1330, 1250, 270, 300), slide.info.mpp_x
    assert len(segment_array(model, image, mpp, SegmentConfig())) <= 3
