"""Decisions from two paths: parity with the published safe gate, and each rule by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cellslide.classify.decision import (
    GLOBAL,
    LOCAL,
    MIX,
    NOT_NUCLEUS,
    PATHS,
    DecisionConfig,
    baseline_paths,
    calibrated,
    decide,
    mix,
    read_prior,
    read_thresholds,
    reliability,
    safe_paths,
    temper,
)
from cellslide.errors import UsageError
from cellslide.types import Calibration, Float32, PathProbs

CLASSES = ("lymphocyte", "tumour", "stroma")


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "parity" / "nuclass_safe_gate.npz") as arrays:
        return dict(arrays)


def paths_of(arrays: dict[str, np.ndarray]) -> PathProbs:
    return PathProbs(arrays["p_local"], arrays["p_global"], arrays["gate"])


def test_reliability_is_the_published_one(published: dict[str, np.ndarray]) -> None:
    for path in ("local", "global"):
        found = reliability(published[f"p_{path}"], published["labels"])
        np.testing.assert_array_equal(found, published[f"rel_{path}"])


@pytest.mark.parametrize(
    ("key", "config", "accepts"),
    [
        ("baseline_probs", DecisionConfig("safe"), False),
        ("safe_tau0_5_gamma0_05", DecisionConfig("safe", tau=0.5, gamma=0.05), True),
        ("safe_tau0_35_gamma0", DecisionConfig("safe", tau=0.35, gamma=0.0), True),
        ("safe_calibrated", DecisionConfig("safe"), True),
    ],
)
def test_safe_gate_is_the_published_one(
    published: dict[str, np.ndarray], shared: Path, key: str, config: DecisionConfig, accepts: bool
) -> None:
    policy = json.loads((shared / "parity" / "nuclass_safe_gate.json").read_text())["config"]["calibration"]
    calibration = Calibration(
        reliability_local=tuple(published["rel_local"].tolist()),
        reliability_global=tuple(published["rel_global"].tolist()),
        tau=policy["tau"],
        gamma=policy["gamma"],
        safe_accepts=accepts,
    )
    decision = decide(paths_of(published), config, calibration)
    np.testing.assert_array_equal(decision.prob, published[key])
    assert set(decision.path.tolist()) == {LOCAL, GLOBAL}


def test_accuracies_of_the_rules_are_the_published_ones(published: dict[str, np.ndarray], shared: Path) -> None:
    expected = json.loads((shared / "parity" / "nuclass_safe_gate.json").read_text())["accuracies"]
    rel = (published["rel_local"], published["rel_global"])
    probs = paths_of(published)
    paths = {
        "baseline": baseline_paths(probs, *rel),
        "safe_05_005": safe_paths(probs, *rel, 0.5, 0.05),
        "safe_035_0": safe_paths(probs, *rel, 0.35, 0.0),
    } | {name: np.full(len(probs), code, np.uint8) for name, code in (("local", LOCAL), ("global_", GLOBAL))}
    paths["mix"] = np.full(len(probs), MIX, np.uint8)
    for name, path in paths.items():
        named = calibrated(probs, path, Calibration()).argmax(axis=1)
        assert np.mean(named == published["labels"]) == expected[name], name


def probs_of(local: list[list[float]], global_: list[list[float]], gate: list[float]) -> PathProbs:
    return PathProbs(*(np.array(v, np.float32) for v in (local, global_, gate)))


TWO = probs_of([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[0.1, 0.8, 0.1], [0.1, 0.2, 0.7]], [0.25, 0.5])
RELIABLE = {"reliability_local": (0.9, 0.9, 0.9), "reliability_global": (0.5, 0.5, 0.5)}


def test_each_rule_uses_its_vector() -> None:
    mixed = decide(TWO)
    np.testing.assert_allclose(mixed.prob, [[0.475, 0.425, 0.1], [0.15, 0.35, 0.5]], rtol=1e-6)
    assert mixed.class_index.tolist() == [0, 2] and mixed.path.tolist() == [MIX, MIX]
    np.testing.assert_allclose(mixed.class_prob, [0.475, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(decide(TWO, DecisionConfig("local")).prob, TWO.local)
    np.testing.assert_array_equal(decide(TWO, DecisionConfig("global")).prob, TWO.global_)
    assert PATHS[decide(TWO, DecisionConfig("global")).path[0]] == "global"


def test_safe_gate_follows_the_gate_only_where_it_is_sure() -> None:
    # Baseline: .6 * .9 > .8 * .5 and .5 * .9 > .7 * .5, local both; the second is given to the global path by g > tau.
    calibration = Calibration(tau=0.4, gamma=0.1, **RELIABLE)
    assert decide(TWO, DecisionConfig("safe"), calibration).path.tolist() == [LOCAL, GLOBAL]
    assert decide(TWO, DecisionConfig("safe", tau=0.5), calibration).path.tolist() == [LOCAL, LOCAL]
    assert decide(TWO, DecisionConfig("safe", gamma=0.3), calibration).path.tolist() == [LOCAL, LOCAL]
    refuses = Calibration(tau=0.4, gamma=0.1, safe_accepts=False, **RELIABLE)
    assert decide(TWO, DecisionConfig("safe"), refuses).path.tolist() == [LOCAL, LOCAL]
    assert decide(TWO, DecisionConfig("safe", tau=0.4), refuses).path.tolist() == [LOCAL, GLOBAL], "asked for by hand"
    # The signed, symmetric half: the baseline is global, a low g with a surer local path takes it back.
    other = probs_of([[0.7, 0.2, 0.1]], [[0.1, 0.5, 0.4]], [0.1])
    favour = {"reliability_local": (0.1, 0.1, 0.1), "reliability_global": (1.0, 1.0, 1.0)}
    assert decide(other, DecisionConfig("safe"), Calibration(safe_accepts=False, **favour)).path.tolist() == [GLOBAL]
    assert decide(other, DecisionConfig("safe"), Calibration(**favour)).path.tolist() == [LOCAL]


def test_skipped_global_path_leaves_the_local_one() -> None:
    nan = float("nan")
    probs = probs_of([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[nan] * 3, [0.1, 0.2, 0.7]], [nan, 1.0])
    calibration = Calibration(temperature_mix=0.5, reliability_local=(0.1,) * 3, reliability_global=(1.0,) * 3)
    for rule, second in (("mix", MIX), ("safe", GLOBAL), ("local", LOCAL), ("global", GLOBAL)):
        decision = decide(probs, DecisionConfig(rule), calibration)  # type: ignore[arg-type]
        assert decision.path.tolist() == [LOCAL, second], rule
        np.testing.assert_array_equal(decision.prob[0], probs.local[0])
        assert np.isfinite(decision.prob).all()
    np.testing.assert_array_equal(mix(probs)[0], probs.local[0])


def test_temperature_is_that_of_the_vector_used() -> None:
    calibration = Calibration(temperature_local=2.0, temperature_global=0.5, temperature_mix=3.0, **RELIABLE)
    for rule, raw, t in (("local", TWO.local, 2.0), ("global", TWO.global_, 0.5), ("mix", mix(TWO), 3.0)):
        power = raw.astype(np.float64) ** (1 / t)
        found = decide(TWO, DecisionConfig(rule), calibration)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.prob, power / power.sum(axis=1, keepdims=True), rtol=1e-6)
    # Thresholds of the safe gate are about the network's own probabilities: temperatures do not move its choice.
    plain = decide(TWO, DecisionConfig("safe", tau=0.4, gamma=0.1), Calibration(**RELIABLE))
    assert decide(TWO, DecisionConfig("safe", tau=0.4, gamma=0.1), calibration).path.tolist() == plain.path.tolist()


def test_temper_is_softmax_of_scaled_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5)) * 4

    def softmax(z: np.ndarray) -> Float32:
        return (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)).astype(np.float32)

    prob = softmax(logits)
    np.testing.assert_allclose(temper(prob, 1.7), softmax(logits / 1.7), rtol=1e-4)
    assert temper(prob, 1.0) is prob
    sure = temper(np.array([[1.0, 0.0, 0.0]], np.float32), 2.0)
    assert np.isfinite(sure).all() and sure.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="above 0"):
        temper(prob, 0.0)


def test_abstains_below_the_floor_of_the_class() -> None:
    assert not decide(TWO).abstained.any()
    assert decide(TWO, DecisionConfig(abstain=0.49)).abstained.tolist() == [True, False]
    assert decide(TWO, DecisionConfig(abstain=0.49)).class_index.tolist() == [0, 2]
    assert decide(TWO, DecisionConfig(thresholds=(0.0, 0.0, 0.9))).abstained.tolist() == [False, True]
    both = DecisionConfig(thresholds=(0.0, 0.0, 0.9), abstain=0.49)
    assert decide(TWO, both).abstained.tolist() == [True, True]
    exact = probs_of([[0.5, 0.25, 0.25]], [[0.5, 0.25, 0.25]], [0.5])
    assert not decide(exact, DecisionConfig(abstain=0.5)).abstained.any(), "the threshold itself is accepted"


def test_calibrated_thresholds_hold_until_others_are_given() -> None:
    calibration = Calibration(thresholds=(0.0, 0.0, 0.9), abstain=0.49)
    assert decide(TWO, None, calibration).abstained.tolist() == [True, True]
    assert decide(TWO, DecisionConfig(abstain=0.0), calibration).abstained.tolist() == [False, False]
    assert decide(TWO, DecisionConfig(thresholds=(0.48, 0, 0)), calibration).abstained.tolist() == [True, False]


def test_a_prior_replaces_the_frequencies_that_were_calibrated() -> None:
    calibration = Calibration(class_prior=(0.5, 0.25, 0.25))
    prob = decide(TWO, DecisionConfig(prior=(0.1, 0.8, 0.1)), calibration).prob
    wanted = decide(TWO).prob * np.array([0.1 / 0.5, 0.8 / 0.25, 0.1 / 0.25])
    np.testing.assert_allclose(prob, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-6)
    same = decide(TWO, DecisionConfig(prior=(0.5, 0.25, 0.25)), calibration).prob
    np.testing.assert_allclose(same, decide(TWO).prob, rtol=1e-6)
    with pytest.raises(UsageError, match="cellslide calibrate"):
        decide(TWO, DecisionConfig(prior=(0.1, 0.8, 0.1)))
    with pytest.raises(UsageError, match="--prior"):
        decide(TWO, DecisionConfig(prior=(0.2, 0.8)), calibration)


def test_a_prior_is_read_by_class() -> None:
    names, calibration = ("a", "b", NOT_NUCLEUS), Calibration(class_prior=(0.5, 0.3, 0.2))
    assert read_prior("B=0.6, a=0.2", names[:2], calibration) == pytest.approx((0.25, 0.75))
    # What is no nucleus keeps its share unless it is named.
    assert read_prior("a=0.5,b=0.5", names, calibration) == pytest.approx((0.4, 0.4, 0.2))
    assert read_prior("a=0.3,b=0.3,not_nucleus=0.4", names, calibration) == pytest.approx((0.3, 0.3, 0.4))
    for text in ("a=0.5", "a=0.5,b=0", "a=0.5,b=x", "a=0.5,c=0.5", "a"):
        with pytest.raises(UsageError, match="--prior"):
            read_prior(text, names, calibration)


def test_no_cells() -> None:
    none = PathProbs(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros(0, np.float32))
    decision = decide(none, DecisionConfig("safe"), Calibration(**RELIABLE))
    assert decision.prob.shape == (0, 3) and len(decision.abstained) == 0


def test_wrong_settings_name_the_flag() -> None:
    with pytest.raises(UsageError, match="--tau 1.5"):
        DecisionConfig(tau=1.5)
    with pytest.raises(UsageError, match="--abstain -1"):
        DecisionConfig(abstain=-1)
    with pytest.raises(UsageError, match="--gate both"):
        DecisionConfig("both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cellslide calibrate"):
        decide(TWO, DecisionConfig("safe"))
    with pytest.raises(UsageError, match="2 values for 3 classes"):
        decide(TWO, DecisionConfig(thresholds=(0.1, 0.2)))
    with pytest.raises(UsageError, match="cells of 3"):
        decide(TWO, DecisionConfig("safe"), Calibration(reliability_local=(1.0,), reliability_global=(1.0,)))


def test_thresholds_file(tmp_path: Path) -> None:
    table, mapping = tmp_path / "t.csv", tmp_path / "t.yaml"
    table.write_text("class,threshold\nStroma, 0.7\nlymphocyte,0.25\n")
    mapping.write_text("stroma: 0.7\nlymphocyte: 0.25\n")
    assert read_thresholds(table, CLASSES) == read_thresholds(mapping, CLASSES) == (0.25, 0.0, 0.7)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "class,threshold\ntumor,0.5\n", "did you mean tumour"),
        ("t.csv", "name,value\ntumour,0.5\n", "header class,threshold"),
        ("t.csv", "class,threshold\ntumour,1.5\n", "0 to 1"),
        ("t.csv", "class,threshold\ntumour,\n", "0 to 1"),
        ("t.yaml", "- 0.5\n", "must map"),
        ("t.yaml", "tumour: nan\n", "0 to 1"),
        ("t.yaml", "a: [", "YAML"),
        ("missing.yaml", None, "cannot be read"),
    ],
)
def test_wrong_thresholds_file_says_what(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_thresholds(tmp_path / name, CLASSES)
