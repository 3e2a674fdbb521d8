"""Two results of one slide compared: the numbers are those that the tables were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.report.compare import compare_slide, pair_folders
from cellslide.slides.identity import slide_sha256
from cellslide.slides.painted import write_pyramid
from cellslide.slides.slide import open_slide
from cellslide.types import Cells, RunRecord, SlideInfo
from tests.support.random_cells import CLASSES, ellipses, model_spec, run_record, slide_info, write_table

N, GONE, NEW, RETYPED = 600, 40, 25, 30


def lattice(n: int) -> Cells:
    """Return ellipses so far apart that each has one nearest, all surely of the first class."""
    cells = ellipses(n, seed=3)
    place = np.stack([np.arange(n) % 30, np.arange(n) // 30], axis=1) * 100.0 + 200
    moved = np.repeat(place - cells.centroid_xy, np.diff(cells.contour_start), axis=0)
    prob = np.tile(np.array([0.9, 0.06, 0.04], np.float32), (n, 1))
    return replace(cells, centroid_xy=place, contour_xy=cells.contour_xy + moved, class_prob=prob)


def twice(folder: Path, slide: SlideInfo | None = None, run: RunRecord | None = None) -> tuple[Path, Path]:
    """Write two tables: the second lacks GONE nuclei, has NEW ones, and calls RETYPED of the shared ones otherwise."""
    every = lattice(N + NEW)
    prob = every.class_prob.copy()
    prob[GONE : GONE + RETYPED] = (0.05, 0.9, 0.05)
    shifted = replace(every, class_prob=prob, centroid_xy=every.centroid_xy + (2.0, 0.0))
    for name, cells, rows in (("a", every, np.arange(N)), ("b", shifted, np.arange(GONE, N + NEW))):
        (folder / name / "s1").mkdir(parents=True)
        write_table(folder / name / "s1", cells.take(rows), slide=slide, run=run)
    return folder / "a", folder / "b"


def test_counts_are_those_that_were_made(tmp_path: Path) -> None:
    first, second = twice(tmp_path)
    pairs, *alone = pair_folders(first, second)
    assert [pair.slide_id for pair in pairs] == ["s1"] and alone == [[], []]
    found = compare_slide(pairs[0], 3.0).agreement
    shared = N - GONE
    assert (found.first, found.second, found.both) == (N, shared + NEW, shared)
    assert found.f1 == pytest.approx(2 * shared / (N + shared + NEW))
    assert found.same_class == pytest.approx(1 - RETYPED / shared)
    assert found.confusion[0, 1] == RETYPED and found.confusion.sum() == shared
    assert found.distance_um == pytest.approx(2 * 0.255) and found.area_ratio == pytest.approx(1)
    assert found.regions.first.sum() == N and found.regions.both.sum() == shared
    assert found.regions.alike.sum() == shared - RETYPED


def test_a_radius_below_the_shift_finds_none(tmp_path: Path) -> None:
    pairs, *_ = pair_folders(*twice(tmp_path))
    found = compare_slide(pairs[0], 0.4).agreement
    assert found.both == 0 and found.f1 == 0 and found.same_class is None and found.kappa is None


def test_kappa_is_cohens(tmp_path: Path) -> None:
    first, second = twice(tmp_path)
    pairs, *_ = pair_folders(first, second)
    # The first calls all of one class, so that chance alone agrees as often as they do.
    assert compare_slide(pairs[0], 3.0).agreement.kappa == pytest.approx(0)
    (itself, *_), *_ = pair_folders(second, second)
    assert compare_slide(itself, 3.0).agreement.kappa == pytest.approx(1)


def test_another_slide_is_refused_and_named(tmp_path: Path) -> None:
    first, _ = twice(tmp_path)
    other = tmp_path / "c" / "s1"
    other.mkdir(parents=True)
    write_table(other, lattice(5), slide=slide_info(width=4100))
    pairs, *_ = pair_folders(first, tmp_path / "c")
    with pytest.raises(UsageError, match=str(other)):
        compare_slide(pairs[0], 3.0)
    result = CliRunner().invoke(cli, ["compare", str(first), str(tmp_path / "c"), "--json"])
    assert result.exit_code == 2 and result.stdout == ""


def test_no_common_slide_is_refused(tmp_path: Path) -> None:
    first, _ = twice(tmp_path)
    other = tmp_path / "c" / "another"
    other.mkdir(parents=True)
    write_table(other, lattice(5))
    with pytest.raises(UsageError, match="no slide in common"):
        pair_folders(first, tmp_path / "c")


def test_json_is_one_object_a_slide(tmp_path: Path) -> None:
    first, second = twice(tmp_path)
    result = CliRunner().invoke(cli, ["compare", str(first), str(second), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["slide"] == "s1" and facts["nuclei"] == [N, N - GONE + NEW] and facts["only"] == [GONE, NEW]
    assert facts["classes"][: len(CLASSES)] == [c.name for c in CLASSES]


def test_the_page_names_what_differs_and_shows_it(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s1.tif", np.full((3000, 4000, 3), 200, np.uint8), 0.25)
    with open_slide(tmp_path / "s1.tif") as slide:
        info = slide.info
    first, second = twice(tmp_path, info, run_record(slide_sha256(tmp_path / "s1.tif")))
    page = tmp_path / "pages" / "c.html"
    page.parent.mkdir()
    result = CliRunner().invoke(cli, ["compare", str(first / "s1"), str(second / "s1"), "-o", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 0 and "http" not in text.split("</style>")[1]
    assert "Outlines of the first result" in text and "Only the second has it" in text
    assert f"{CLASSES[0].name} → " in text


def test_the_page_needs_no_slide(tmp_path: Path) -> None:
    first, second = twice(tmp_path)
    page = tmp_path / "c.html"
    result = CliRunner().invoke(cli, ["compare", str(first), str(second), "-o", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "No pictures:" in text and "s1.svs" in text


def test_one_class_alone_is_no_agreement_on_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "s1").mkdir(parents=True)
        write_table(tmp_path / name / "s1", replace(lattice(9), class_prob=None), model_spec(classes=()))
    pairs, *_ = pair_folders(tmp_path / "a", tmp_path / "b")
    found = compare_slide(pairs[0], 3.0).agreement
    assert found.f1 == 1 and found.same_class is None and found.kappa is None
