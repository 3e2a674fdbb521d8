"""The training loop: resume to the same numbers, schedule, averaging, freezing, validation, files, and stopping."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import Interrupted, UsageError, WeightsError
from cellslide.models import build_model
from cellslide.train.data import load_sets
from cellslide.train.export import load_start
from cellslide.train.fit import fit
from cellslide.train.framework import accelerator_of, precision_of
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.hover.training import HoverTraining, encoder_parts, load_encoder, score_image
from cellslide.train.module import learning_rate_factor
from cellslide.train.recipe import build
from cellslide.train.targets import hover_map
from cellslide.train.task import FitOptions
from cellslide.train.tasks import hover
from tests.support.published_efficientnet import LITE, published_efficientnet
from tests.support.train_sets import write_set

RECIPE = {
    "crop_px": 32, "batch_size": 2, "epoch_samples": 4, "epochs": 4, "precision": "fp32",
    "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2, "ema": 0.9},
    "datasets": {"set": {"val": {"patients": ["C"]}}},
}  # fmt: skip
TINY = {
    "embed_dim": 16, "depth": 4, "num_heads": 2, "use_pos_embed": False, "init_values": 0.1, "drop_path_rate": 0.2,
    "interaction_indexes": [[0, 0], [1, 1], [2, 2], [3, 3]], "conv_inplane": 4, "deform_num_heads": 2,
    "n_extra_extractors": 0, "num_nuclei_classes": 0, "num_tissue_classes": 0, "decoder_widths": [4, 4, 8, 8],
}  # fmt: skip


def recipe_from(document: Mapping[str, Any]) -> HoverRecipe:
    return build(HoverRecipe, document)


class Stub(nn.Module):
    """Three convolutions with batch norm and dropout, so that hidden state and chance both matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return {"nuclei_binary_map": maps[:, :2], "hv_map": maps[:, 2:]}


class Oracle(nn.Module):
    """Gives the maps of fixed labels, whatever the image."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__()
        self.foreground, self.hv = torch.from_numpy(labels > 0).float(), torch.from_numpy(hover_map(labels))

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        logits = torch.stack([1 - self.foreground, self.foreground])[None] * 8
        return {"nuclei_binary_map": logits, "hv_map": self.hv[None]}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [{"patient": p} for p in "ABC"])


def _train(
    dataset: Path, folder: Path, recipe: Mapping[str, Any] = RECIPE, model: nn.Module | None = None, **rest: Any
) -> HoverTraining:
    torch.manual_seed(0)
    options = FitOptions(folder, [dataset], **{"device": "cpu", "workers": 0, "log_every": 1000, **rest})
    return fit(hover.TASK, recipe_from(recipe), options, Stub() if model is None else model)


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in items for k, v in _tensors(item, f"{name}/{key}").items()}


def test_six_steps_resumed_to_eight_equal_eight_in_one_go(dataset: Path, tmp_path: Path) -> None:
    _train(dataset, tmp_path / "whole", max_steps=8)
    _train(dataset, tmp_path / "parts", max_steps=6)
    half = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    assert half["global_step"] == 6
    # Another start must be overwritten by the checkpoint; a worker, which starts early, must draw the same crops.
    resumed = Stub()
    nn.init.ones_(resumed.body[0].weight)
    _train(dataset, tmp_path / "parts", model=resumed, max_steps=8, workers=1)
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 8
    for part in ("state_dict", "optimizer_states", "callbacks"):
        left, right = _tensors(whole[part]), _tensors(parts[part])
        assert left.keys() == right.keys() and left
        for name, value in left.items():
            assert torch.equal(value, right[name]), f"{part}{name}"
    assert not torch.equal(half["state_dict"]["model.body.0.weight"], parts["state_dict"]["model.body.0.weight"])
    assert len(list((tmp_path / "parts/logs").rglob("metrics.csv"))) == 2
    files = [(tmp_path / name / "last/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_files_of_a_run_and_a_second_recipe_in_the_same_folder(dataset: Path, tmp_path: Path) -> None:
    module = _train(dataset, tmp_path / "run", max_steps=2)
    entry = yaml.safe_load((tmp_path / "run/model.yaml").read_text())
    data = (tmp_path / "run/model.safetensors").read_bytes()
    assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["size_bytes"] == len(data)
    assert entry["task"] == "segment" and entry["mpp"] == 0.5 and entry["decode"]["kernel_px"] == 11
    assert entry["trained_on"] == [{"dataset": "set", "licence": "CC0 1.0"}]
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["data"][0]["train"] == {"images": 2, "nuclei": 16} and card["data"][0]["val_images"] == ["2"]
    assert {"val/bpq", "val/f1_instances", "val/dice", "train/loss"} <= set(card["metrics"])
    assert (
        recipe_from(card["recipe"])
        == module.recipe
        == recipe_from(yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()))
    )
    assert "train/loss" in next((tmp_path / "run/logs").rglob("metrics.csv")).read_text()
    # The shipped weights are the average, not the live ones.
    started = Stub()
    load_start(started, tmp_path / "run/model.safetensors")
    assert not torch.equal(started.body[0].weight, module.model.body[0].weight)
    with pytest.raises(UsageError, match=r"another recipe \(batch_size"):
        _train(dataset, tmp_path / "run", {**RECIPE, "batch_size": 4})


def test_sigterm_ends_with_143_and_the_last_epoch_is_kept(dataset: Path, tmp_path: Path) -> None:
    class Killed(Stub):
        calls = 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if self.training:
                self.calls += 1
                if self.calls == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        _train(dataset, tmp_path / "run", model=Killed())
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 2


def test_time_limit_ends_the_run_with_a_model(dataset: Path, tmp_path: Path) -> None:
    _train(dataset, tmp_path / "run", {**RECIPE, "epochs": 500, "max_minutes": 1e-6})
    assert json.loads((tmp_path / "run/card.json").read_text())["step"] == 1


def test_learning_rate_schedules() -> None:
    recipe = recipe_from({"epoch_samples": 80, "batch_size": 8, "epochs": 10, "optim": {"gamma": 0.85}})
    assert [learning_rate_factor(recipe, step) for step in (0, 9, 10, 25)] == [1, 1, 0.85, 0.85**2]
    cosine = recipe_from({"epoch_samples": 80, "batch_size": 8, "epochs": 10, "max_minutes": 10,
                          "optim": {"schedule": "cosine", "warmup_steps": 20, "final_lr": 0.1}})  # fmt: skip
    assert [learning_rate_factor(cosine, step) for step in (0, 9, 20)] == [0.05, 0.5, 1.0]
    assert learning_rate_factor(cosine, 60) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 100) == pytest.approx(0.1)
    # The clock counts where it is further than the steps.
    assert learning_rate_factor(cosine, 21, minutes=10) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 60, minutes=1) == pytest.approx(0.55)


def test_a_frozen_encoder_stays_as_it_is(dataset: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "model": {"config": TINY, "freeze_encoder": True}}
    torch.manual_seed(0)
    model = build_model("cellvta", TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = _train(dataset, tmp_path / "run", recipe, model, max_steps=2)
    module.train()
    assert not module.model.encoder.blocks.training and module.model.encoder.spm.training
    after = module.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not any(name.startswith(("encoder.blocks.", "encoder.patch_embed.")) for name in changed)
    assert any(name.startswith("encoder.spm.") for name in changed) and any(
        "hv_map_decoder" in name for name in changed
    )


def test_frozen_norms_keep_their_statistics(dataset: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "model": {"config": TINY, "freeze_norms": True}}
    torch.manual_seed(0)
    model = build_model("cellvta", TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = _train(dataset, tmp_path / "run", recipe, model, max_steps=2)
    norms = [part for part in module.train().model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    after = module.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "running_" in name)
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "running_" not in name)


def test_a_perfect_model_scores_one(dataset: Path) -> None:
    recipe = recipe_from(RECIPE)
    item = load_sets([dataset], recipe)[0].val[0]
    scores = score_image(HoverTraining(recipe, Oracle(item.labels)), item)
    assert scores["bpq"] > 0.97 and scores["f1_instances"] == 1 and scores["dice"] == 1
    blank = replace(item, labels=np.zeros_like(item.labels))
    assert "bpq" not in score_image(HoverTraining(recipe, Oracle(blank.labels)), blank)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save({"body.0.weight": torch.zeros(8, 3, 3, 3), "other": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"8 missing: body\.0\.bias.*1 unexpected: other"):
        load_start(Stub(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="no such file"):
        load_start(Stub(), tmp_path / "absent.pt")


def test_encoder_weights_fill_the_vit_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, model = build_model("cellvta", TINY), build_model("cellvta", TINY)
    vit = {k.removeprefix("encoder."): v for k, v in source.state_dict().items() if k.startswith("encoder.")}
    torch.save(vit, tmp_path / "vit.pt")
    decoder = model.state_dict()["decoder0.0.block.0.weight"].clone()
    load_encoder(model, str(tmp_path / "vit.pt"))
    assert torch.equal(model.encoder.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)
    assert torch.equal(model.state_dict()["decoder0.0.block.0.weight"], decoder)


@pytest.mark.parametrize(
    ("arch", "config", "where"),
    [("hover_unet", {"widths": [8, 8, 8, 8]}, "encoder"), ("cellvta", TINY | {"prior": LITE}, "encoder.spm.net")],
)
def test_encoder_weights_of_an_efficientnet_lite_fill_its_network(
    arch: str, config: dict[str, object], where: str, tmp_path: Path
) -> None:
    published = published_efficientnet(seed=3)
    torch.save(published, tmp_path / "lite.pth")
    model = build_model(arch, config)
    rest = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(f"{where}.")}
    load_encoder(model, str(tmp_path / "lite.pth"))
    assert encoder_parts(model) == (f"{where}.",)
    network = model.get_submodule(where).state_dict()
    assert torch.equal(network["conv_stem.weight"], published["_conv_stem.weight"])
    # The first block has no expansion; the last that is kept is the only one of its stage.
    assert torch.equal(network["blocks.0.0.conv_pw.weight"], published["_blocks.0._project_conv.weight"])
    assert torch.equal(network["blocks.2.1.bn3.bias"], published["_blocks.4._bn2.bias"])
    assert torch.equal(network["blocks.6.0.conv_dw.weight"], published["_blocks.15._depthwise_conv.weight"])
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())
    damaged = {k: v for k, v in published.items() if k != "_blocks.4._bn2.bias"}
    torch.save(damaged, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"blocks\.2\.1\.bn3\.bias"):
        load_encoder(model, str(tmp_path / "short.pth"))


def test_device_and_precision() -> None:
    assert accelerator_of("cpu") == ("cpu", 1)
    with pytest.raises(UsageError, match="--device tpu"):
        accelerator_of("tpu")
    assert precision_of(HoverRecipe(precision="fp32"), "cpu") == "32-true"
    assert precision_of(HoverRecipe(precision="bf16"), "cpu") == "bf16-mixed"


def test_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cellslide.cli.main import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "cellvta", str(tmp_path), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2 and "manifest.csv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
