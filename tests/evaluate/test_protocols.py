"""Rules of published scores: each pairs by hand-made numbers as its authors do, and no two of them are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.spatial import KDTree

from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.evaluate.dataset import read_dataset, read_points, write_manifest
from cellslide.evaluate.detection import Tally, hover_type_score
from cellslide.evaluate.protocols import BRCA_M2C, OPTIMAL, PROTOCOLS, Marks, protocol_of
from tests.support.labelled import add_image, discs

SHAPE = (60, 100)


def column(*y: float, score: list[float] | None = None) -> Marks:
    """Points one below the other at x = 20."""
    xy = np.array([(20.0, value) for value in y]).reshape(-1, 2)
    return Marks(xy, None if score is None else np.array(score))


def found(name: str, true: Marks, pred: Marks, mpp: float = 0.5) -> int:
    return PROTOCOLS[name].tally(true, pred, mpp).tp


def test_the_circle_itself_is_in_or_out() -> None:
    true = column(10)
    inside = {name: found(name, true, column(10 + protocol.radius_px), protocol.mpp) for name, protocol in
              PROTOCOLS.items()}  # fmt: skip
    assert inside == {"optimal": 1, "brca-m2c": 0, "promptnucseg": 1, "ocelot": 1, "puma": 0, "pannuke": 1,
                      "consep": 1, "conic": 1, "conic-cellvta": 1, "monuseg": 1, "nuinsseg": 1,
                      "puma-10": 0}  # fmt: skip
    for name, protocol in PROTOCOLS.items():
        assert found(name, true, column(10 + protocol.radius_px - 1e-6), protocol.mpp) == 1
        assert found(name, true, column(10 + protocol.radius_px + 1e-3), protocol.mpp) == 0


def test_who_takes_first() -> None:
    # The upper true point is nearest to the prediction that the lower one needs.
    true, pred = column(10, 18), column(13, 5)
    assert found("brca-m2c", true, pred) == 1
    assert found("optimal", true, pred) == 2
    # By score: the one in the middle takes the upper true point, unless the other was there before it.
    assert found("promptnucseg", true, column(13, 5, score=[0.9, 0.2])) == 1
    assert found("promptnucseg", true, column(13, 5, score=[0.2, 0.9])) == 2
    assert found("promptnucseg", true, column(13, 5)) == 1, "without scores, in the order of the file"
    assert found("promptnucseg", true, column(5, 13)) == 2


def test_brca_takes_the_nearest_that_is_free_from_the_top_down() -> None:
    true, pred = column(12, 10), column(11, 14.5)
    pairs = BRCA_M2C.pairs(true, pred, 0.5)
    # y = 10 comes first though it stands last; y = 12 finds its nearest taken and is content with the next.
    assert pairs.true_index.tolist() == [0, 1] and pairs.pred_index.tolist() == [1, 0]
    assert pairs.distance_px.tolist() == [2.5, 1.0]


def test_brca_counts_dots() -> None:
    assert BRCA_M2C.tally(column(10, 10, 30), column(10, 10, 10), 0.5) == Tally(tp=1, fp=0, fn=1)
    assert OPTIMAL.tally(column(10, 10, 30), column(10, 10, 10), 0.5) == Tally(tp=2, fp=1, fn=1)


def test_puma_takes_the_surest_in_reach() -> None:
    true = column(10, 30)
    assert found("puma", true, column(11, 20, score=[0.1, 0.9]), 0.23) == 1
    assert found("puma", true, column(11, 20, score=[0.9, 0.1]), 0.23) == 2
    assert found("puma", true, column(11, 20), 0.23) == 2


def test_pannuke_minds_far_pairs() -> None:
    true, pred = np.array([(0.0, 0), (12, 0)]), np.array([(1.0, 0), (-5.625, 9.453)])
    assert found("pannuke", Marks(true), Marks(pred), 0.25) == 1
    assert found("optimal", Marks(true), Marks(pred), 0.25) == 2


def test_weighted_classes_are_hovers() -> None:
    rng = np.random.default_rng(1)
    true, pred = Marks(rng.uniform(0, 100, (80, 2))), Marks(rng.uniform(0, 100, (90, 2)))
    true_class, pred_class = rng.integers(0, 3, 80), rng.integers(0, 3, 90)
    rule = PROTOCOLS["pannuke"]
    tallies = rule.class_tallies(true, true_class, pred, pred_class, 3, 0.25)
    for k, tally in enumerate(tallies):
        expected = hover_type_score(rule.pairs(true, pred, 0.25), true_class, pred_class, k)
        assert expected is not None and tally.f1 == pytest.approx(expected.f1, rel=1e-12)


def dot_map(xy: np.ndarray) -> np.ndarray:
    dots = np.zeros((200, 200), bool)
    dots[xy[:, 1].astype(int), xy[:, 0].astype(int)] = True
    return dots


def pairs_on_maps(true: np.ndarray, pred: np.ndarray, radius: float) -> Tally:
    """The rule of MCSpatNet's authors on maps of dots, one true dot after the other."""
    left = pred.copy()
    tree = KDTree(np.argwhere(pred), leafsize=2048)
    tp = fn = 0
    for dot in np.argwhere(true):
        _, near = tree.query(dot, k=50, distance_upper_bound=radius)
        place = next(
            (tuple(tree.data[i].astype(int)) for i in near if i < tree.n and left[tuple(tree.data[i].astype(int))]),
            None,
        )
        tp, fn = tp + (place is not None), fn + (place is None)
        if place is not None:
            left[place] = False
    return Tally(tp, int(left.sum()), fn)


@pytest.mark.parametrize("seed", range(6))
def test_brca_is_the_rule_on_dot_maps_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, pred = rng.integers(0, 100, (300, 2)).astype(float), rng.integers(0, 100, (320, 2)).astype(float)
    expected = pairs_on_maps(dot_map(true), dot_map(pred), 6)
    assert BRCA_M2C.tally(Marks(true), Marks(pred), 0.5) == expected
    assert BRCA_M2C.tally(Marks(rng.permutation(true)), Marks(rng.permutation(pred)), 0.5) == expected
    assert OPTIMAL.tally(Marks(np.unique(true, axis=0)), Marks(np.unique(pred, axis=0)), 0.5) != expected


def test_published_matching_by_score(shared: Path) -> None:
    data = np.load(shared / "parity" / "point_nms_match.npz")
    true, pred = Marks(data["gt"].astype(float)), Marks(data["points"].astype(float), data["scores"].astype(float))
    rule = PROTOCOLS["promptnucseg"]
    # The radius is 12 px at 0.25 µm/px: other pixel sizes give the other radii of the fixture.
    sizes = [0.25 * 12 / radius for radius in (3, 6, 12)]
    assert [rule.tally(true, pred, mpp).tp for mpp in sizes] == data["tp_thr_3_6_12"].tolist()
    missed = sorted(set(range(len(true))) - set(rule.pairs(true, pred, sizes[1]).true_index.tolist()))
    assert missed == sorted(data["unmatched_gt_thr6"].tolist())


def test_radius_follows_the_pixel_size_but_not_its_last_digit() -> None:
    assert [BRCA_M2C.radius_at(mpp) for mpp in (0.5, 0.508, 0.4912, 0.25)] == [6, 6, 6, 12]
    assert OPTIMAL.radius_at(0.508) == pytest.approx(3 / 0.508)
    assert {p.name: p.radius_um for p in PROTOCOLS.values()} == {
        "optimal": 3, "brca-m2c": 3, "promptnucseg": 3, "ocelot": 3, "puma": 3.45, "pannuke": 3, "consep": 3,
        "conic": 3, "conic-cellvta": 3, "monuseg": 3, "nuinsseg": 3,
        "puma-10": 3.45,
    }  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_to_pair(name: str) -> None:
    rule, none, one = PROTOCOLS[name], column(), column(10)
    assert rule.tally(none, one, 0.5) == Tally(fp=1) and rule.tally(one, none, 0.5) == Tally(fn=1)
    assert rule.tally(none, none, 0.5) == Tally()
    assert found(name, one, one) == 1, "one neighbour is enough"


def evaluate(*arguments: object) -> dict[str, Any]:
    folder = Path(str(arguments[0])).parent
    result = CliRunner().invoke(
        cli, ["evaluate", *map(str, arguments), "--json", str(folder / "s.json"), "--no-progress"]
    )
    assert result.exit_code == 0, result.output
    return json.loads((folder / "s.json").read_text())


@pytest.fixture
def typed(tmp_path: Path) -> tuple[Path, Path]:
    """Two images at 0.5 µm/px with points of two classes, and predictions of which the rules think differently."""
    labels = discs(SHAPE, [], 1)
    points = {"a": [(20, 10, "x"), (20, 18, "x"), (60, 30, "y")], "b": [(50, 20, "y")]}
    rows = [add_image(tmp_path / "set", k, labels, mask=False, points=p, mpp="0.5") for k, p in points.items()]
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y,class,score\n20,13,x,0.2\n20,5,x,0.9\n60,36,y,0.5\n")
    (folder / "b.csv").write_text("x,y,class,score\n50,20,x,0.7\n50,22,y,0.6\n")
    return write_manifest(tmp_path / "set", rows), folder


def test_typed_points_are_scored_by_brca_unless_told(typed: tuple[Path, Path]) -> None:
    root, folder = typed
    scores = evaluate(root, "--predictions", folder)
    assert scores["protocol"] == "brca-m2c" and scores["detection"]["radius_um"] == 3
    # x: 1 of 2, and 2 invented. y: 1 of 2 (the one at 6 px is too far), 1 invented.
    assert scores["classes"]["x"] == {"precision": 1 / 3, "recall": 0.5, "f1": pytest.approx(0.4), "support": 2}
    assert scores["classes"]["y"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert scores["mean_f1"] == pytest.approx(0.45)
    # Without classes: 1 of 2 and none of 1 in a, 1 of 1 in b with one too many.
    assert (scores["detection"]["precision"], scores["detection"]["recall"]) == (2 / 5, 2 / 4)
    by_score = evaluate(root, "--predictions", folder, "--protocol", "promptnucseg")
    assert by_score["classes"]["x"]["recall"] == 1 and by_score["classes"]["y"]["recall"] == 1
    assert by_score["detection"]["recall"] == 1


def test_means_over_images_are_pumas(typed: tuple[Path, Path]) -> None:
    root, folder = typed
    scores = evaluate(root, "--predictions", folder, "--protocol", "puma", "--mpp", "0.23")
    # At 0.23 µm/px the radius is 15 px, so all is found: x is 1 in a and 0 (invented) in b, y is 1 in both.
    assert {name: c["f1"] for name, c in scores["classes"].items()} == {"x": 0.5, "y": 1.0}
    assert scores["mean_f1"] == 0.75 and scores["detection"]["radius_um"] == 3.45


def test_masks_keep_the_optimum_and_unknown_names_are_refused(typed: tuple[Path, Path], tmp_path: Path) -> None:
    labels = discs(SHAPE, [(20, 20)], 5)
    row = add_image(tmp_path / "masks", "a", labels, points=[(20, 20, "x")])
    masks = read_dataset(write_manifest(tmp_path / "masks", [row]))
    assert protocol_of(None, masks) is OPTIMAL and protocol_of("ocelot", masks).name == "ocelot"
    assert protocol_of(None, read_dataset(typed[0])) is BRCA_M2C
    with pytest.raises(UsageError, match="--protocol nearest: must be among optimal, brca-m2c"):
        protocol_of("nearest", masks)


def test_scores_are_read_where_all_have_one(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("x,y,score\n1,2,0.5\n3,4,0.25\n")
    score = read_points(file).score
    assert score is not None and score.tolist() == [0.5, 0.25]
    file.write_text("x,y,score\n1,2,0.5\n3,4,\n")
    assert read_points(file).score is None
    file.write_text("x,y,score\n1,2,high\n")
    with pytest.raises(UsageError, match="score must be numbers"):
        read_points(file)
