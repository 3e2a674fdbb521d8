"""Numbers of a made-up slide that are known exactly, from counts to bands along the border."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from click.testing import CliRunner

from cellslide.api import measure
from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.measure.counts import measure_counts, til_percent, wilson
from cellslide.measure.errors import errors_of, known_errors
from cellslide.measure.neighbours import measure_neighbours
from cellslide.measure.nuclei import Nuclei
from cellslide.measure.regions import Region, bands, grid, pieces
from tests.viewed import CLASSES, HEIGHT, MPP, WIDTH, Viewed, write_viewed

NAMES = ("epithelial", "lymphocyte", "stromal")


def nuclei(um: object, code: object, area: object = None) -> Nuclei:
    code = np.asarray(code, np.int64)
    area = np.full(len(code), 30.0) if area is None else area
    top = np.where(code < len(NAMES), code, -1)
    return Nuclei(np.asarray(um, np.float64).reshape(-1, 2), code, np.asarray(area, np.float32), NAMES, top)


def lattice(width: float, height: float, step: float) -> np.ndarray:
    x, y = np.meshgrid(np.arange(step / 2, width, step), np.arange(step / 2, height, step))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def test_counts_densities_and_shares() -> None:
    region = Region("r", "annotation", shapely.box(0, 0, 1000, 500))
    found = measure_counts(nuclei(np.zeros((10, 2)), [0] * 4 + [1] * 3 + [2] + [3] * 1 + [-1]), region)
    assert (found["nuclei"], found["mm2"], found["per_mm2"]) == (10, 0.5, 20.0)
    assert (found["abstained"], found["untyped"]) == (1, 1)
    assert [found[f"n_{name}"] for name in NAMES] == [4, 3, 1] and found["per_mm2_lymphocyte"] == 6.0
    assert found["share_epithelial"] == 0.5
    # At each end: none, or all, of what abstained is of the class.
    assert found["share_epithelial_low"] == wilson(4, 9)[0] and found["share_epithelial_high"] == wilson(5, 9)[1]
    found = measure_counts(nuclei(np.zeros((4, 2)), [0, 0, 1, 2]), region, errors_of(np.diag([9, 9, 9]), 0))
    assert [found[f"share_{name}_corrected"] for name in NAMES] == [0.5, 0.25, 0.25]
    nothing = measure_counts(nuclei(np.zeros((0, 2)), []), region)
    assert nothing["nuclei"] == 0 and nothing["share_stromal"] is None and nothing["median_area_um2"] is None


def test_wilson_is_the_published_interval() -> None:
    # Newcombe 1998, table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=2e-4)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0


def test_errors_are_undone_as_published() -> None:
    """Rogan and Gladen 1978: (named + specificity - 1) / (sensitivity + specificity - 1)."""
    errors = errors_of(np.array([[90, 10], [20, 80]]), 0)
    share, low, high = errors.undone(np.array([500, 500]))[0]
    assert share == pytest.approx((0.5 + 0.8 - 1) / 0.7) and low < share < high
    assert errors.undone(np.array([100, 900]))[:, 0].tolist() == [0.0, 1.0], "no share lies below 0"
    assert errors_of(np.array([[90, 10], [20, 80]]) * 100, 0).undone(np.array([500, 500]))[0, 1] > low
    assert np.isnan(errors.undone(np.array([0, 0]))).all()
    right = errors_of(np.diag([5, 6, 7]), 0).undone(np.array([1, 1, 2]))
    assert right[:, 0].tolist() == [0.25, 0.25, 0.5]


def test_the_corrected_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, rates, truth = np.random.default_rng(0), np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]]), 0.5
    held = 0
    for _ in range(100):
        labelled = np.stack([rng.multinomial(200, row) for row in rates])
        named = rng.multinomial(400, np.array([0.2, 0.3, truth]) @ rates)
        _, low, high = errors_of(labelled, 0).undone(named)[2]
        held += low <= truth <= high
    assert 89 <= held <= 99


def test_the_confusion_is_used_only_where_it_was_counted_so() -> None:
    counts, names = [[8, 2, 0], [1, 9, 0], [0, 1, 9]], ("a", "b", "not_nucleus")
    calibration = {"confusion": counts, "paths": "local"}

    def typing(**changes: object) -> dict[str, object]:
        rule = {"calibration": calibration, "decision": {"gate": "local", "prior": None}}
        return {"spec": {"weights_id": "w"}, "rule": rule, "organ_trained": True, **changes}

    errors, words = known_errors(typing(), names, 0)
    assert errors is not None and errors.n == 20 and "20 labelled nuclei on which w" in words
    assert errors.undone(np.array([5, 5]))[0, 0] == pytest.approx((0.5 + 0.9 - 1) / 0.7)
    other = {"calibration": calibration, "decision": {"gate": "mix", "prior": None}}
    for told in (
        None,
        typing(organ_trained=False),
        typing(rule=other),
        typing(rule={**other, "calibration": {}}),
        typing(rule={**typing()["rule"], "calibration": {**calibration, "confusion": [[0, 0], [1, 1]]}}),
        typing(rule={**typing()["rule"], "calibration": {**calibration, "confusion": [[1, 1, 0]] * 3}}),
    ):
        assert known_errors(told, names, 0)[0] is None  # fmt: skip


def test_a_checkerboard_and_two_halves_have_the_neighbours_that_they_must() -> None:
    xy = lattice(600, 600, 12)
    board = (np.round(xy / 12 - 0.5).sum(axis=1) % 2).astype(int) * 2
    rows, curves = measure_neighbours(nuclei(xy, board), "all", "slide", 0)
    by = {(row["of"], row["near"]): row for row in rows}
    assert by["epithelial", "stromal"]["median_nearest_um"] == pytest.approx(12)
    assert by["epithelial", "epithelial"]["median_nearest_um"] == pytest.approx(12 * np.sqrt(2))
    near = {r["radius_um"]: r["times_chance"] for r in curves if (r["of"], r["near"]) == ("epithelial", "stromal")}
    assert near[20.0] == pytest.approx(1.0, abs=0.06), "four beside and four across"
    halves = np.where(xy[:, 0] < 300, 0, 1)
    apart = {(row["of"], row["near"]): row for row in measure_neighbours(nuclei(xy, halves), "all", "slide", 0)[0]}
    assert apart["epithelial", "lymphocyte"]["times_chance"] < 0.15 and apart["epithelial", "lymphocyte"]["z"] < -20
    assert apart["epithelial", "epithelial"]["share_within_30_um"] > 0.9
    shuffled = np.random.default_rng(1).permutation(halves)
    for row in measure_neighbours(nuclei(xy, shuffled), "all", "slide", 0)[0]:
        assert abs(row["z"]) < 4 and row["times_chance"] == pytest.approx(1, abs=0.05)
    assert measure_neighbours(nuclei(xy[:10], halves[:10]), "all", "slide", 0) == ([], [])


def test_bands_follow_the_border_of_the_tumour() -> None:
    """A tumour of 1000 x 1000 µm in a field of 2000 x 1000: its border is a line."""
    xy = lattice(2000, 1000, 20)
    tissue = shapely.box(0, 0, 2000, 1000)
    found = {r.name: r for r in bands(nuclei(xy, np.where(xy[:, 0] < 1000, 0, 2)), tissue, 200.0)}
    assert set(found) == {"tumour core", "inside the border", "outside the border", "beyond"}
    assert sum(r.mm2 for r in found.values()) == pytest.approx(2.0)
    assert found["outside the border"].mm2 == pytest.approx(0.2, abs=0.03)
    assert found["inside the border"].contains(np.array([[900.0, 500.0], [700.0, 500.0]])).tolist() == [True, False]
    with pytest.raises(UsageError, match="--border"):
        none = np.zeros(len(xy), np.int64)
        list(bands(Nuclei(xy, none, np.zeros(len(xy), np.float32), ("a",), none), tissue, 200.0))


def test_til_score_of_known_squares() -> None:
    """Two squares of stroma with 10 and 20 lymphocytes of 50 µm² on 2500 µm² each, one of tumour."""
    xy = np.concatenate([np.full((12, 2), 25.0), np.full((22, 2), (75.0, 25.0)), np.full((30, 2), (125.0, 25.0))])
    code = [1] * 10 + [2] * 2 + [1] * 20 + [2] * 2 + [0] * 28 + [1] * 2
    assert til_percent(nuclei(xy, code)) == pytest.approx(100 * 30 * 50 / 5000)
    assert til_percent(nuclei(xy[:1], [0])) is None


def test_pieces_and_squares_cover_what_was_searched() -> None:
    tissue = shapely.union_all([shapely.box(0, 0, 250, 100), shapely.box(500, 500, 600, 600)])
    assert [(r.name, r.mm2) for r in pieces(tissue)] == [("piece 1", 0.025), ("piece 2", 0.01)]
    squares = list(grid(tissue, 100.0))
    assert sum(r.mm2 for r in squares) == pytest.approx(tissue.area / 1e6) and squares[0].name == "0,0"
    assert min(r.mm2 for r in squares) > 0, "none that only touches the tissue"
    with pytest.raises(UsageError, match="--grid"):
        list(grid(shapely.box(0, 0, 1e6, 1e6), 20.0))


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    return write_viewed(tmp_path_factory.mktemp("measured") / "out")


def annotation(path: Path, box: tuple[float, ...], name: str, **more: object) -> Path:
    feature = {"type": "Feature", "geometry": shapely.geometry.mapping(shapely.box(*box)),
               "properties": {"objectType": "annotation", "name": name, **more}}  # fmt: skip
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def test_the_command_writes_tables_and_a_page(viewed: Viewed, tmp_path: Path) -> None:
    regions = annotation(tmp_path / "r.geojson", (0, 0, WIDTH / 2, HEIGHT), "left half")
    output = tmp_path / "numbers"
    arguments = ["measure", viewed.folder, "--regions", regions, "--grid", "100", "-o", output]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    with (output / "regions.csv").open(newline="") as file:
        rows = {(row["kind"], row["region"]): row for row in csv.DictReader(file)}
    whole, half = rows["slide", "all"], rows["annotation", "left half"]
    assert (int(whole["nuclei"]), int(half["nuclei"])) == (300, 150)
    assert float(whole["mm2"]) == pytest.approx(WIDTH * HEIGHT * MPP**2 / 1e6)
    assert float(half["per_mm2"]) == pytest.approx(150 / (float(whole["mm2"]) / 2))
    squares = [row for (kind, _), row in rows.items() if kind == "grid"]
    assert sum(int(row["nuclei"]) for row in squares) == 300
    parquet = pd.read_parquet(output / "regions.parquet").set_index(["kind", "region"])
    assert parquet.loc[("slide", "all"), "nuclei"] == 300
    # Counts are those of the table.
    table = measure(viewed.folder).regions[0]
    said = sum(table[f"n_{c.name}"] for c in CLASSES)
    assert said + table["abstained"] + table["untyped"] == 300
    page = (output / "measure.html").read_text()
    assert "holds no confusion" in page and "holds no confusion" in result.output
    assert "left half" in page and "http" not in page.split("</style>")[1]
    assert {p.name for p in output.iterdir()} == {"measure.html"} | {
        f"{name}.{kind}" for name in ("regions", "classes", "neighbours", "curves") for kind in ("csv", "parquet")
    }


def test_the_same_seed_gives_the_same_numbers(viewed: Viewed) -> None:
    assert measure(viewed.folder).neighbours == measure(viewed.folder).neighbours != []
    assert measure(viewed.folder, seed=1).neighbours != measure(viewed.folder).neighbours


def test_wrong_requests_are_refused(viewed: Viewed, tmp_path: Path) -> None:
    points = tmp_path / "points.geojson"
    points.write_text(json.dumps({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}}))
    for arguments in (["--regions", points], ["--grid", "5"], ["--border", "5"]):
        words = ["measure", viewed.folder, "-o", tmp_path / "n", *arguments]
        result = CliRunner().invoke(cli, list(map(str, words)))
        assert result.exit_code == 2 and arguments[0] in result.output, result.output
    assert not (tmp_path / "n").exists()
