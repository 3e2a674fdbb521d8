"""MUSE's pretraining: losses on matched nuclei, the centre, the watch, and a run that resumes to the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import UsageError, WeightsError
from cellslide.models import build_model
from cellslide.models.muse_layout import fill_backbone
from cellslide.train.fit import fit
from cellslide.train.points.training import load_backbone
from cellslide.train.pretrain.distill import Center, DinoHead, cosine_between, image_loss, nucleus_loss
from cellslide.train.pretrain.muse import MuseTraining
from cellslide.train.pretrain.recipe import HeadConfig, MuseRecipe, WatchConfig
from cellslide.train.pretrain.watch import CollapseError, Reading, Watch, collapse_of, read, spread_of
from cellslide.train.recipe import build, load_recipe
from cellslide.train.task import FitOptions
from cellslide.train.tasks import pretrain
from tests.support.train_sets import write_set

ENCODER = {"name": "vit", "embed_dim": 16, "depth": 4, "heads": 2, "img_size": 32, "extract_layers": [0, 1, 2, 3]}
RECIPE: dict[str, Any] = {
    "mpp": 0.5, "min_nuclei": 2, "max_nuclei": 6, "batch_size": 2, "epochs": 4, "epoch_samples": 4, "precision": "fp32",
    "views": [{"global_px": 32, "local_px": 32, "n_local": 1, "global_mpp": [0.5, 0.8], "local_mpp": [0.5, 0.8]},
              {"from_epoch": 3, "global_px": 48, "local_px": 32, "n_local": 1}],
    "model": {"arch": "muse", "config": {"encoder": ENCODER}},
    "head": {"prototypes": 12, "hidden": 16, "bottleneck": 8},
    "distill": {"momentum": 0.9, "frozen_epochs": 0.5},
    "optim": {"lr": 1e-2, "warmup_steps": 1},
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [{"patient": p} for p in "ABC"])


def _train(
    dataset: Path, folder: Path, recipe: Mapping[str, Any] = RECIPE, stop: bool = False, **rest: Any
) -> MuseTraining:
    options = FitOptions(folder, [dataset], **{"device": "cpu", "workers": 0, "log_every": 1000, **rest},
                         extra={"stop_on_collapse": stop})  # fmt: skip
    return fit(pretrain.MUSE, build(MuseRecipe, recipe), options)


def _probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).softmax(-1)


def test_nuclei_are_compared_where_both_views_show_them() -> None:
    seen = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    teacher, student = _probabilities(2, 2, 5, 7), _probabilities(2, 4, 5, 7).log()
    loss, n = nucleus_loss(teacher[seen[:, :2]], student[seen], seen)
    expected = [
        -(teacher[b, t, m] * student[b, s, m]).sum()
        for b in range(2) for t in range(2) for s in range(4) for m in range(5)
        if s != t and seen[b, t, m] and seen[b, s, m]
    ]  # fmt: skip
    assert int(n) == len(expected) > 5
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    none = torch.zeros_like(seen)
    loss, n = nucleus_loss(teacher[none[:, :2]], student[none].requires_grad_(), none)
    assert float(loss.detach()) == 0 and int(n) == 0 and loss.requires_grad


def test_images_are_compared_with_every_other_view() -> None:
    teacher, student = _probabilities(3, 2, 7), _probabilities(3, 4, 7).log()
    pairs = [(t, s) for t in range(2) for s in range(4) if s != t]
    expected = [-(teacher[b, t] * student[b, s]).sum() for b in range(3) for t, s in pairs]
    assert float(image_loss(teacher, student)) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_the_centre_takes_away_what_all_samples_share() -> None:
    center = Center(4, 0.5)
    logits = torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0]])
    for _ in range(40):
        center.update(logits)
    assert center.value[0] == pytest.approx(0.75) and center.targets(logits, 0.1).argmax(1).tolist() == [0, 1]
    before = center.value.clone()
    center.update(logits[:0])
    assert torch.equal(center.value, before)
    head = DinoHead(6, HeadConfig(4, 8, 3, 3))
    assert head(torch.randn(5, 6)).abs().max() <= 1.0 + 1e-6, "cosines"
    assert cosine_between(0.9, 1.0, 0) == 0.9 and cosine_between(0.9, 1.0, 0.5) == pytest.approx(0.95)


def test_the_watch_tells_learning_from_both_kinds_of_collapse() -> None:
    config, features = WatchConfig(patience=2), torch.randn(50, 8)
    sure = torch.eye(20)[torch.arange(50) % 20]
    one, flat = torch.eye(20)[torch.zeros(50, dtype=torch.long)], torch.full((50, 20), 1 / 20)
    center = torch.ones(4)
    healthy = read(features, sure, center)
    assert collapse_of(healthy, config) is None
    assert healthy.spread > 0.9 and healthy.variety > 0.95 and healthy.flatness == pytest.approx(0, abs=1e-6)
    assert healthy.center == 2.0
    assert "one prototype" in str(collapse_of(read(features, one, center), config))
    assert "alike" in str(collapse_of(read(features, flat, center), config))
    same = read(features[:1].expand(50, 8) * torch.linspace(1, 3, 50)[:, None], sure, center)
    assert "same way" in str(collapse_of(same, config)) and same.spread < 1e-3
    assert math.isnan(spread_of(features[:1])) and collapse_of(read(features[:0], sure[:0], center), config) is None
    watch, bad = Watch(config, stop=True), Reading(0.0).as_dict("cell")
    assert "COLLAPSED" in watch.judge(bad, ("cell",))[0]
    assert "healthy" in watch.judge(Reading(0.5).as_dict("cell"), ("cell",))[0], "one good epoch starts anew"
    watch.judge(bad, ("cell",))
    with pytest.raises(CollapseError, match="cell: all features point the same way"):
        watch.judge(bad, ("cell",))


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in items for k, v in _tensors(item, f"{name}/{key}").items()}


def test_six_steps_resumed_to_eight_equal_eight_in_one_go(dataset: Path, tmp_path: Path) -> None:
    _train(dataset, tmp_path / "whole")
    _train(dataset, tmp_path / "parts", max_steps=6)
    half = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    assert half["global_step"] == 6
    _train(dataset, tmp_path / "parts", workers=1)
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 8
    for part in ("state_dict", "optimizer_states"):
        left, right = _tensors(whole[part]), _tensors(parts[part])
        assert left.keys() == right.keys() and left
        for name, value in left.items():
            assert torch.equal(value, right[name]), f"{part}{name}"


def test_what_a_run_writes_and_who_takes_it(dataset: Path, tmp_path: Path) -> None:
    module = _train(dataset, tmp_path / "run", max_steps=2)
    teacher, student = module.teacher.state_dict(), module.student.state_dict()
    start = build_model("muse", {"encoder": ENCODER})
    fill_backbone(start, tmp_path / "run/model.safetensors")
    for name, value in start.state_dict().items():
        assert torch.equal(value, teacher[f"backbone.{name}"]), name
    moved = [n for n in teacher if n.startswith("backbone.") and not torch.equal(teacher[n], student[n])]
    assert moved, "the teacher is the average, not the student"
    published = torch.load(tmp_path / "run/teacher.pth", weights_only=True)
    assert set(published) == {"teacher"} and "module.backbone.encoder.encoder.cls_token" in published["teacher"]
    # Both files start a point detector.
    detector = build_model("muse_points", {"encoder": ENCODER, "head": {"hidden": 8, "space_px": 8, "n_classes": 2}})
    for name in ("model.safetensors", "teacher.pth"):
        torch.nn.init.zeros_(detector.backbone.encoder.encoder.cls_token)
        load_backbone(detector, tmp_path / "run" / name)
        assert torch.equal(detector.backbone.encoder.encoder.cls_token, start.encoder.encoder.cls_token)
    entry = yaml.safe_load((tmp_path / "run/model.yaml").read_text())
    assert entry["task"] == "backbone" and entry["arch"] == "muse" and entry["config"] == {"encoder": ENCODER}
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["data"] == [{"name": "set", "weight": 1.0, "fields": 3, "nuclei": 24}]
    wanted = {
        "train/loss",
        "train/image",
        "train/nucleus",
        "train/matched",
        "watch/image_spread",
        "watch/nucleus_center",
    }
    assert wanted <= set(card["metrics"]) and card["metrics"]["train/matched"] > 0
    with pytest.raises(WeightsError, match="does not fit"):
        other = {**RECIPE, "model": {"arch": "muse", "config": {"encoder": {**ENCODER, "embed_dim": 32}}}}
        _train(dataset, tmp_path / "other", other, init=tmp_path / "run")


def test_a_run_starts_from_given_weights_and_holds_its_prototypes_at_first(dataset: Path, tmp_path: Path) -> None:
    first = _train(dataset, tmp_path / "first", max_steps=2)
    still = {**RECIPE, "optim": {"lr": 1e-12, "warmup_steps": 0}}
    second = _train(dataset, tmp_path / "second", still, init=tmp_path / "first", max_steps=1)
    name = "backbone.encoder.encoder.blocks.0.attn.qkv.weight"
    assert torch.allclose(second.teacher.state_dict()[name], first.teacher.state_dict()[name], atol=1e-6)
    frozen = {**RECIPE, "distill": {"frozen_epochs": 9.0}, "optim": {"lr": 1e-2, "warmup_steps": 0, "weight_decay": 0.0,
                                                                      "final_weight_decay": 0.0}}  # fmt: skip
    torch.manual_seed(0)
    held = _train(dataset, tmp_path / "held", frozen, max_steps=2)
    assert torch.equal(held.student.image_head.prototypes, held.teacher.image_head.prototypes)
    assert not torch.equal(held.student.image_head.mlp[0].weight, held.teacher.image_head.mlp[0].weight)


def test_a_collapse_ends_the_run_if_asked(dataset: Path, tmp_path: Path) -> None:
    blind = {**RECIPE, "watch": {"least_spread": 1.0, "patience": 2}}
    with pytest.raises(CollapseError, match=r"for 2 epochs .*optim\.lr"):
        _train(dataset, tmp_path / "stopped", blind, stop=True)
    assert torch.load(tmp_path / "stopped/last.ckpt", weights_only=True)["global_step"] == 4
    _train(dataset, tmp_path / "told", blind, max_steps=4)


def test_recipes_and_devices_that_do_not_fit(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--devices 3"):
        _train(dataset, tmp_path / "run", devices=3)
    with pytest.raises(UsageError, match=r"views\.global_px"):
        build(MuseRecipe, {"views": [{"global_px": 100}]})
    (tmp_path / "recipe.yaml").write_text("head: {prototypes: 9}\n")
    recipe = load_recipe(MuseRecipe, tmp_path / "recipe.yaml", {"epochs": 3, "seed": None})
    assert recipe.head.prototypes == 9 and recipe.epochs == 3 and recipe.views[0].local_px == 96
    with pytest.raises(UsageError, match=r"model\.arch"):
        _train(dataset, tmp_path / "run", {**RECIPE, "model": {"arch": "cellvit_256"}})
