"""Training of NuClass: losses against numbers worked out by hand, crops as classify cuts them, three stages, resume."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import UsageError, WeightsError
from cellslide.train.augment import crop_matrix
from cellslide.train.fit import fit
from cellslide.train.nuclass.cells import UNKNOWN_ORGAN, CellDataset, cut_exact, draw_crop, level_factor, load_cell_sets
from cellslide.train.nuclass.features import FeatureBatch, FeatureSteps, kept_features
from cellslide.train.nuclass.losses import (
    balanced_cross_entropy,
    effective_number_weights,
    gate_loss,
    gate_targets,
    global_loss,
)
from cellslide.train.nuclass.recipe import GateLossConfig, NuClassRecipe, load_nuclass_recipe
from cellslide.train.nuclass.training import build as build_stage
from cellslide.train.nuclass.training import load_path, score_cells
from cellslide.train.recipe import AugmentConfig, build, load_recipe
from cellslide.train.task import FitOptions
from cellslide.train.tasks import nuclass
from cellslide.types import CropSpec
from tests.support.train_sets import write_set

BACKBONE = {"name": "resnet10t", "args": {"channels": [4, 4, 8, 8], "stem_width": 8}, "pool": "avg"}
RECIPE: dict[str, Any] = {
    "id": "tiny", "classes": ["a", "b"], "organs": ["breast", "lung"], "unknown_organ_p": 0.3,
    "local": {"field_px": 32, "input_px": 16}, "context": {"field_px": 64, "input_px": 16},
    "batch_size": 4, "epoch_samples": 8, "epochs": 4, "precision": "fp32", "freeze_epochs": 0,
    "model": {
        "local": BACKBONE, "context": BACKBONE, "learned_unknown": True, "organ_width": 4, "film_width": 8,
        "head_width": 8, "proj_width": 4, "gate_width": 4, "gate_hidden": [8, 4],
    },
    "optim": {"lr": 1e-2, "backbone_lr": 1e-2, "context_lr": 1e-2, "schedule": "cosine", "warmup_steps": 2, "ema": 0.9},
    "context_training": {"shift_px": 8, "freeze": False, "start_from_local": True, "alpha_epochs": 1},
    "datasets": {"set": {"val": {"patients": ["C"]}}},
}  # fmt: skip
PLAIN = {"flip": False, "rotate_p": 0, "scale_p": 0, "stain_p": 0, "color_p": 0, "blur_p": 0, "sharpen_p": 0,
         "jpeg_p": 0, "noise_p": 0}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient": p, "organ": o} for p, o in zip("ABC", ("breast (x)", "spleen", "Lung"), strict=True)]
    return write_set(tmp_path_factory.mktemp("data") / "set", rows, masks=False, points=True)


def _options(dataset: Path, folder: Path, max_steps: int | None = None, **extra: Path) -> FitOptions:
    return FitOptions(folder, [dataset], "cpu", 0, max_steps=max_steps, log_every=1000, extra=extra)


def _recipe(**changes: Any) -> NuClassRecipe:
    return build(NuClassRecipe, {**RECIPE, **changes})


# Losses


def test_effective_number_weights() -> None:
    # (1 - 0.9) / (1 - 0.9^n) is 1 for n = 1, 0.1 / 0.19 for n = 2; their mean over what occurs becomes 1.
    weight = effective_number_weights(np.array([1, 2, 0]), 0.9)
    mean = (1 + 0.1 / 0.19) / 2
    np.testing.assert_allclose(weight, [1 / mean, 0.1 / 0.19 / mean, 0], rtol=1e-6)


def test_balanced_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    loss = balanced_cross_entropy(logits, torch.tensor([0]), torch.tensor([2.0, 1.0, 0.5]), 0.3)
    # q = (0.8, 0.1, 0.1): smoothing / K for every class, the rest for the true one.
    wanted = -(2 * 0.8 * math.log(0.7) + 0.1 * math.log(0.2) + 0.5 * 0.1 * math.log(0.1))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_local_aware_weighting_by_hand() -> None:
    parts = global_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.9, 0.5]), gamma=2.0, lambda_stable=0.3)
    assert float(parts.main) == pytest.approx((0.01 * 1 + 0.25 * 3) / 2)  # eqs 11, 12
    assert float(parts.stable) == pytest.approx(0.3 * 2)  # eq. 13
    assert float(parts.total) == pytest.approx(0.38 + 0.6)  # eq. 14


def test_gate_losses_by_hand() -> None:
    config = GateLossConfig(kappa=10, conflict=2, lambda_delta=1, gamma_delta=1)
    # First cell: only the global path is right. Second: both are, the local one is surer.
    local, global_ = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([[0.2, 0.8], [0.7, 0.3]])
    label, gate = torch.tensor([1, 0]), torch.tensor([0.25, 0.5])
    found = gate_targets(local, global_, label, config)
    soft = 1 / (1 + math.exp(2))
    torch.testing.assert_close(found.delta, torch.tensor([0.4, -0.2]))
    torch.testing.assert_close(found.target, torch.tensor([1.0, soft]))
    torch.testing.assert_close(found.weight, torch.tensor([1 + 2 + 0.4, 1 + 0.2]))
    loss = gate_loss(local, global_, gate, label, config)
    mixed = (0.75 * 0.4 + 0.25 * 0.8, 0.5 * 0.9 + 0.5 * 0.7)
    assert float(loss.mix) == pytest.approx((3.4 * -math.log(mixed[0]) + 1.2 * -math.log(mixed[1])) / 2)
    mean = (1 + soft) / 2
    positive = (1 - mean) / mean
    bce = (-positive * math.log(0.25), -(positive * soft * math.log(0.5) + (1 - soft) * math.log(0.5)))
    assert float(loss.gate) == pytest.approx((3.4 * bce[0] + 1.2 * bce[1]) / 2, rel=1e-5)
    kl = (
        0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5),
        0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2),
    )
    assert float(loss.align) == pytest.approx(0.1 * (3.4 * kl[0] + 1.2 * kl[1]) / 2, rel=1e-5)
    entropy = (-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), math.log(2))
    assert float(loss.entropy) == pytest.approx(0.05 * (0.4 * entropy[0] + 0.2 * entropy[1]) / 2, rel=1e-5)
    assert float(loss.aux) == 0
    assert float(loss.total) == pytest.approx(float(loss.mix + loss.gate + loss.align + loss.entropy), rel=1e-6)
    aux = gate_loss(local, global_, gate, label, config, heads_train=True).aux
    assert float(aux) == pytest.approx(0.05 * -(math.log(0.4 * 0.9) + math.log(0.8 * 0.7)) / 4, rel=1e-5)


def test_scores_of_cells() -> None:
    prob = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0]], np.float32)
    scores = score_cells(prob, np.array([0, 1, 1]))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    assert scores["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 3, rel=1e-5)


# Data


class _NoChance:
    """Draws nothing: no turn, no flip, no shift."""

    def integers(self, *_: Any) -> int:
        return 0

    def random(self, n: int | None = None) -> Any:
        return 0.5 if n is None else np.full(n, 0.9)

    def uniform(self, *_: Any) -> Any:
        return 0.0


@pytest.mark.parametrize(("field", "size", "factor"), [(32, 32, 1), (32, 16, 1), (64, 16, 2), (48, 16, 2)])
def test_a_crop_without_augmentation_is_the_one_that_classify_cuts(
    dataset: Path, field: int, size: int, factor: int
) -> None:
    spec = CropSpec(field, size)
    image = load_cell_sets([dataset], _recipe(local={"field_px": field, "input_px": size}))[0].train[0]
    assert level_factor(spec) == factor and image.plane.width_px == 128
    rng: Any = _NoChance()
    exact = cut_exact(image, image.xy, spec).permute(0, 2, 3, 1).numpy()
    drawn = np.stack([draw_crop(rng, AugmentConfig(**PLAIN), image, xy, spec) for xy in image.xy])
    away = ((image.xy > field / 2) & (image.xy < 128 - field / 2)).all(1) if factor > 1 else np.ones(len(exact), bool)
    # A third of the field is no whole block of pixels, so there the map is no mean of them.
    assert away.any() and np.abs(drawn - exact)[away].max() <= (1.01 if field != 48 else 40)
    assert np.abs(drawn - np.roll(exact, 1, axis=1)).mean() > 3


def test_the_affine_map_turns_about_the_nucleus(dataset: Path) -> None:
    image = load_cell_sets([dataset], _recipe())[0].train[0]
    spec, augment = CropSpec(33, 33), AugmentConfig(**{**PLAIN, "rotate_p": 1, "flip": True})
    for seed in range(4):
        crop = draw_crop(np.random.default_rng(seed), augment, image, image.xy[0], spec)
        corner = np.rint(image.xy[0] - 16.5)
        x, y = (corner + 16).astype(int)
        assert np.abs(crop[16, 16].astype(int) - image.pixels.read((x, y, x + 1, y + 1))[0, 0]).max() <= 12
    assert crop_matrix(np.random.default_rng(0), augment, np.zeros(2), 33).shape == (2, 3)


def test_each_cell_comes_once_before_any_comes_again_and_organs_are_hidden(dataset: Path) -> None:
    recipe = _recipe()
    sets = load_cell_sets([dataset], recipe)
    images = sets[0].train
    assert [image.organ for image in images] == [0, UNKNOWN_ORGAN] and sets[0].val[0].organ == 1
    data = CellDataset(images, recipe, context=True)
    n = sum(len(image) for image in images)
    passes = [[data.cell(turn * n + i) for i in range(n)] for turn in (0, 1)]
    assert len(set(passes[0])) == n and set(passes[0]) == set(passes[1]) and passes[0] != passes[1]
    crops = [CellDataset(images[:1], recipe, context=True)[d] for d in range(60)]
    hidden = np.mean([int(c.organ) == UNKNOWN_ORGAN for c in crops])
    assert 0.1 < hidden < 0.5 and {int(c.organ) for c in crops} == {0, UNKNOWN_ORGAN}
    again = CellDataset(images[:1], recipe, context=True)[7]
    assert torch.equal(again.local, crops[7].local) and torch.equal(again.context, crops[7].context)
    assert again.local.shape == (3, 16, 16) and again.context.shape == (3, 16, 16)
    assert CellDataset(images, recipe, context=False)[0].context.numel() == 0


def test_data_that_do_not_fit_are_named(dataset: Path) -> None:
    with pytest.raises(UsageError, match="datasets.organ: liver is none of"):
        load_cell_sets([dataset], _recipe(datasets={"set": {"organ": "liver"}}))
    with pytest.raises(UsageError, match="no such patient Q"):
        load_cell_sets([dataset], _recipe(datasets={"set": {"val": {"patients": ["Q"]}}}))
    with pytest.raises(UsageError, match="no cell of the classes x, y"):
        load_cell_sets([dataset], _recipe(classes=["x", "y"]))
    renamed = load_cell_sets([dataset], _recipe(classes=["x", "b"], datasets={"set": {"classes": {"a": "x"}}}))
    assert renamed[0].train[0].label.tolist() == [0, 1] * 4
    with pytest.raises(UsageError, match="unknown key lokal"):
        _recipe(lokal={})


def test_feature_batches_cover_all_cells(dataset: Path) -> None:
    column = torch.arange(10.0)[:, None]
    steps = FeatureSteps(FeatureBatch(column, column, torch.arange(10)), _recipe())
    seen = torch.cat([steps[step].label for step in range(5)])
    assert sorted(seen.tolist()) == sorted([*range(10)] * 2) and torch.equal(steps[3].label, steps[3].label)
    assert torch.equal(steps[2].local[:, 0].long(), steps[2].label)


# Stages


def _state(folder: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages, by the functions behind the commands."""
    root = tmp_path_factory.mktemp("runs")
    fit(nuclass.LOCAL, _recipe(), _options(dataset, root / "local", 4))
    second = load_nuclass_recipe(None, {"id": "tiny-global", "epochs": 4, "batch_size": 4, "epoch_samples": 8,
                                        "optim": RECIPE["optim"], "freeze_epochs": 1,
                                        "context_training": RECIPE["context_training"]},
                                 root / "local")  # fmt: skip
    fit(nuclass.GLOBAL, second, _options(dataset, root / "global", 2, local_run=root / "local"))
    third = load_nuclass_recipe(None, {"id": "tiny-gate", "epochs": 6, "batch_size": 8, "epoch_samples": 16,
                                       "optim": {"lr": 1e-2, "warmup_steps": 0}, "gate": {"views": 2}},
                                root / "global")  # fmt: skip
    fit(nuclass.GATE, third, _options(dataset, root / "gate", local_run=root / "local", global_run=root / "global"))
    return root


def test_each_stage_adds_to_the_one_before(runs: Path) -> None:
    local, global_, gate = (_state(runs / name) for name in ("local", "global", "gate"))
    assert {n.split(".")[0] for n in local} == {"modelA"} and {n.split(".")[0] for n in global_} == {"modelA", "modelB"}
    assert {n.split(".")[0] for n in gate} == {"modelA", "modelB", "gate_proj_A", "gate_proj_B", "gate_mlp"}
    assert all(torch.equal(value, global_[name]) for name, value in local.items())
    assert all(torch.equal(value, gate[name]) for name, value in global_.items())
    # E_freeze: for an epoch the global path's crop backbone is the local one, its norm statistics included.
    own = [n for n in global_ if n.startswith("modelB.uni_encoder.")]
    assert own and all(torch.equal(global_[n], local[n.replace("modelB", "modelA", 1)]) for n in own)
    moved = [n for n in global_ if n.startswith("modelB.dino_model.") and n.endswith("conv1.weight")]
    assert moved and any(
        not torch.equal(global_[n], local[n.replace("modelB.dino_model", "modelA.uni_encoder")]) for n in moved
    )


def test_files_of_the_complete_classifier(runs: Path) -> None:
    data = (runs / "gate/model.safetensors").read_bytes()
    entry = yaml.safe_load((runs / "gate/model.yaml").read_text())
    assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["size_bytes"] == len(data)
    assert (entry["task"], entry["arch"], entry["organs"]) == ("classify", "nuclass", ["breast", "lung"])
    assert entry["config"]["crops"]["local"] == {
        "field_px": 32,
        "input_px": 16,
        "border": "reflect",
        "resample": "area",
    }
    assert [c["name"] for c in entry["classes"]] == ["a", "b"]
    card = json.loads((runs / "gate/card.json").read_text())
    assert card["data"][0]["train"] == {"images": 2, "organ_unknown": 1, "cells": {"a": 8, "b": 8}}
    assert card["data"][0]["val_images"] == ["2"] and card["stage"] == "gate"
    wanted = {f"val/{path}{score}" for path in ("", "local_", "global_") for score in ("accuracy", "macro_f1", "nll")}
    assert wanted <= set(card["metrics"])
    assert build(NuClassRecipe, card["recipe"]).model["proj_width"] == 4
    assert yaml.safe_load((runs / "local/model.yaml").read_text())["config"]["context"] is None


def test_the_trained_classifier_loads(runs: Path) -> None:
    from cellslide.weights.classifier import load_classifier

    loaded = load_classifier(None, runs / "gate/model.yaml")
    assert loaded.spec.organs == ("breast", "lung") and loaded.spec.learned_unknown
    assert (loaded.spec.local.field_px, loaded.spec.context.input_px) == (32, 16)
    assert not loaded.module.training


def test_resumed_training_gives_the_same_numbers(dataset: Path, tmp_path: Path, runs: Path) -> None:
    second = load_nuclass_recipe(None, {**{k: RECIPE[k] for k in ("batch_size", "epoch_samples", "epochs", "optim",
                                           "context_training")}, "freeze_epochs": 1.5}, runs / "local")  # fmt: skip
    for name, parts in (("whole", (8,)), ("parts", (4, 8))):
        for last in parts:
            fit(nuclass.LOCAL, _recipe(freeze_epochs=1), _options(dataset, tmp_path / f"local-{name}", last))
            beside = _options(dataset, tmp_path / f"global-{name}", last, local_run=runs / "local")
            fit(nuclass.GLOBAL, second, beside)
    for stage in ("local", "global"):
        whole, resumed = (tmp_path / f"{stage}-{name}" for name in ("whole", "parts"))
        assert torch.load(resumed / "last.ckpt", weights_only=True)["global_step"] == 8
        left, right = _state(whole / "last"), _state(resumed / "last")
        assert left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
        assert (whole / "model.yaml").read_text() == (resumed / "model.yaml").read_text()


def test_kept_features_are_read_again_until_the_weights_change(dataset: Path, tmp_path: Path, runs: Path) -> None:
    recipe = load_recipe(NuClassRecipe, runs / "gate/recipe.yaml")
    images = load_cell_sets([dataset], recipe)[0].train
    both = {"local_run": runs / "local", "global_run": runs / "global"}
    model = build_stage("gate", recipe, _options(dataset, tmp_path, **both))
    load_path(model, runs / "gate")
    first = kept_features(tmp_path, "train", model, images, recipe)
    assert len(first.label) == 2 * 16 and first.fused.shape == (32, 8)
    written = (tmp_path / "train.safetensors").stat().st_mtime_ns
    again = kept_features(tmp_path, "train", model, images, recipe)
    assert torch.equal(again.local, first.local) and (tmp_path / "train.safetensors").stat().st_mtime_ns == written
    with torch.no_grad():
        model.modelA.feat_norm.bias += 1
    assert not torch.equal(kept_features(tmp_path, "train", model, images, recipe).local, first.local)


def test_heads_learn_only_when_asked(dataset: Path, tmp_path: Path, runs: Path) -> None:
    document = {"epochs": 2, "batch_size": 8, "epoch_samples": 16, "gate": {"views": 0, "heads_lr": 0.01},
                "optim": {"lr": 1e-2, "warmup_steps": 0}}  # fmt: skip
    recipe = load_nuclass_recipe(None, document, runs / "global")
    both = {"local_run": runs / "local", "global_run": runs / "global"}
    fit(nuclass.GATE, recipe, _options(dataset, tmp_path / "heads", **both))
    before, after = _state(runs / "global"), _state(tmp_path / "heads")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.startswith(("modelA.head.", "modelB.head.")) for name in changed)


def test_runs_that_do_not_belong_together_are_refused(dataset: Path, tmp_path: Path, runs: Path) -> None:
    fit(nuclass.LOCAL, _recipe(seed=5), _options(dataset, tmp_path / "other", 2))
    recipe = load_nuclass_recipe(None, {}, runs / "global")
    beside = _options(dataset, tmp_path / "gate", local_run=tmp_path / "other", global_run=runs / "global")
    with pytest.raises(UsageError, match="beside another local path"):
        fit(nuclass.GATE, recipe, beside)
    with pytest.raises(UsageError, match="local, classes must be as in the stage before"):
        load_nuclass_recipe(None, {"classes": ["a", "c"], "local": {"field_px": 30, "input_px": 15}}, runs / "global")
    with pytest.raises(UsageError, match="not the folder of a training run"):
        load_nuclass_recipe(None, {}, tmp_path)
    with pytest.raises(WeightsError, match="missing"):
        load_path(build_stage("global", recipe, beside), runs / "local")


def test_command_line(dataset: Path, tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cellslide.cli.main import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "nuclass-global", str(dataset), "-o", str(tmp_path / "g")])
    assert ended.value.code == 2 and "--local" in capsys.readouterr().err
    gate = ["train", "nuclass-gate", str(dataset), "-o", str(tmp_path / "gate"), "--epochs", "1", "--workers", "0"]
    gate += [
        "--batch-size",
        "8",
        "--epoch-samples",
        "8",
        "--local",
        str(runs / "local"),
        "--global",
        str(runs / "global"),
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main([*gate, "--device", "cpu"])
    assert ended.value.code in (0, None) and (tmp_path / "gate/model.safetensors").is_file()
