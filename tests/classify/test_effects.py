"""`bench classify`: every saving is measured on the same cells, and what is exact is seen to be."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.classify import classify_array, open_classifier
from cellslide.classify.effects import Effect, compare, grids, measure_effects, random_classifier
from cellslide.cli.main import cli
from cellslide.config import ClassifyConfig, InferConfig
from cellslide.slides.slide import slide_from_array
from cellslide.types import PathProbs
from tests.support.fake_classifier import FakeNuClass, fake_loaded

CONFIG = ClassifyConfig(infer=InferConfig(device="cpu", batch_size=4))


@pytest.fixture(scope="module")
def effects() -> dict[str, Effect]:
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    xy = np.random.default_rng(1).uniform(0, (300, 200), (40, 2))
    found = measure_effects(fake_loaded(), slide_from_array(image, 0.5), xy, 0, CONFIG)
    return {effect.name: effect for effect in found}


def test_what_is_exact_changes_nothing(effects: dict[str, Effect]) -> None:
    plain = effects["plain: fp32"]
    assert plain.max_change == 0 and plain.agreement == 1 and plain.skipped == 0
    assert effects["one crop a pass"].max_change < 1e-6
    assert all(e.cells == 40 and e.cells_per_s > 0 for e in effects.values())


def test_what_is_not_exact_says_how_much(effects: dict[str, Effect]) -> None:
    shared = effects["context grid 32 px"]
    assert shared.contexts < 40 and shared.mean_change > 0
    assert effects["local path alone"].skipped == 1 and effects["local path alone"].contexts == 0
    skipped = [effects[f"adaptive {p}"].skipped for p in (0.9, 0.95, 0.99)]
    assert skipped == sorted(skipped, reverse=True)


def test_grids_suit_the_patch() -> None:
    assert grids(fake_loaded(), CONFIG) == [32]
    # A patch of 4 of 32 px stands for 8 px of the field of 64.
    assert grids(fake_loaded(), replace(CONFIG, context_size=32)) == [32]
    module = FakeNuClass()
    module.context_patch_px = 3
    assert grids(fake_loaded(module), CONFIG) == []


def test_comparison_is_of_the_mix() -> None:
    one = PathProbs(*(np.array(v, np.float32) for v in ([[0.8, 0.2]], [[0.4, 0.6]], [0.5])))
    other = replace(one, gate=np.array([1.0], np.float32))
    effect = compare("x", one, other, 2.0, 1)
    assert effect.max_change == pytest.approx(0.2) and effect.agreement == 0 and effect.cells_per_s == 0.5
    none = replace(one, gate=np.array([np.nan], np.float32), global_=np.full((1, 2), np.nan, np.float32))
    assert compare("x", one, none, 1.0, 0).skipped == 1


def test_command_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.classify.effects.random_classifier", lambda size: fake_loaded(mpp=0.25))
    monkeypatch.setattr("cellslide.slides.painted.WIDTH_PX", 700)
    monkeypatch.setattr("cellslide.slides.painted.HEIGHT_PX", 560)
    flags = ["--random", "small", "--nuclei", "12", "--device", "cpu"]
    result = CliRunner().invoke(cli, ["bench", "classify", *flags, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["stages"]["classify"]
    assert rows[0]["form"] == "plain: fp32" and rows[0]["count"] == 12 and rows[0]["ratio"] == 1
    shown = CliRunner().invoke(cli, ["bench", "classify", *flags])
    assert shown.exit_code == 0 and "same class" in shown.output and "context grid 32 px" in shown.output


def test_a_real_network_does_not_care_who_comes_along() -> None:
    """Random weights: the same bits in any order and company at one batch size, rounding only at another."""
    loaded = random_classifier("small")
    image = np.random.default_rng(2).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    xy = np.random.default_rng(3).uniform(0, 300, (7, 2))
    whole = classify_array(open_classifier(loaded, CONFIG), image, 0.25, xy, 0)
    np.testing.assert_allclose(whole.local.sum(axis=1), 1, atol=1e-5)
    assert ((whole.gate > 0) & (whole.gate < 1)).all()
    order = np.array([6, 2, 4])
    part = classify_array(open_classifier(loaded, CONFIG), image, 0.25, xy[order], 0)
    single = replace(CONFIG, infer=replace(CONFIG.infer, batch_size=1))
    alone = classify_array(open_classifier(loaded, single), image, 0.25, xy, 0)
    for name in ("local", "global_", "gate"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[order], err_msg=name)
        np.testing.assert_allclose(getattr(alone, name), getattr(whole, name), atol=1e-5, err_msg=name)
