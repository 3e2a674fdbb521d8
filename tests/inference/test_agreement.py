"""The comparison of runs: counts, pairs, areas, and which slides are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.agreement import agree, compare, read_run, tissue_mm2
from cellslide.config import InferConfig, SegmentConfig, TissueConfig
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from tests.painted import paint_slide
from tests.support.fakes import fake_model


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Outlines of one slide and points of the same and another one."""
    root = tmp_path_factory.mktemp("agree")
    centres = [(x, y) for y in range(40, 260, 40) for x in range(40, 360, 40)]
    config = SegmentConfig(tissue=TissueConfig(enabled=False), infer=InferConfig(device="cpu", workers=0))
    for name in ("one", "two"):
        paint_slide(root / f"{name}.tif", 400, 300, 0.5, centres, 7.0)
    for kind, slides in (("mask", ["one"]), ("point", ["one", "two"])):
        with open_segmenter(fake_model(kind), config) as segmenter:
            for name in slides:
                segment_slide(SlideInput(root / f"{name}.tif", slide_id=name), segmenter, root / kind)
    return root / "mask", root / "point"


def test_equal_nuclei_agree(outputs: tuple[Path, Path]) -> None:
    found = compare(list(outputs))
    assert list(found) == ["one"], "the other slide has one run only"
    (agreement,) = found["one"]["agreement"]
    assert (agreement["pairs"], agreement["f1"], agreement["share_of_first"]) == (48, 1.0, 1.0)
    assert agreement["median_um"] < 0.3
    first, second = found["one"]["runs"]
    assert first["nuclei"] == second["nuclei"] == 48 and first["model"] == "fake"
    assert first["tissue_mm2"] == 0.03 and first["nuclei_per_mm2"] == 1600


def test_what_one_run_lacks_counts(outputs: tuple[Path, Path]) -> None:
    run = read_run(outputs[0] / "one")
    few = type(run)(run.folder, "few", run.xy_um[:12] + (2.0, 0), run.tissue_mm2, run.seconds)
    result = agree(run, few)
    assert (result.pairs, result.share_of_first, result.share_of_second) == (12, 0.25, 1.0)
    assert result.f1 == 0.4 and result.median_um == pytest.approx(2.0)
    assert agree(run, type(run)(run.folder, "far", run.xy_um[:12] + (4.0, 0), 1.0, 1.0)).f1 == 0
    none = type(run)(run.folder, "none", np.zeros((0, 2)), 0.0, 1.0)
    assert agree(none, none).f1 is None and none.row["seconds_per_mm2"] is None


def test_no_tissue_file_is_no_area(tmp_path: Path) -> None:
    assert tissue_mm2(tmp_path / "tissue.geojson", (0.5, 0.5)) == 0
