"""CellDETR's contrastive pretraining: a run, what it writes, and that `train celldetr` starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.train.celldetr.training import load_init
from cellslide.train.fit import fit
from cellslide.train.pretrain.celldetr import CellDETRPretraining
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe
from cellslide.train.recipe import build
from cellslide.train.task import FitOptions
from cellslide.train.tasks import pretrain
from tests.support.train_sets import write_set

NETWORK = {
    "backbone": "test_resnet", "strides": [8, 16], "norm": "own", "n_levels": 2, "hidden_dim": 32, "n_heads": 2,
    "n_points": 2, "enc_layers": 1, "dec_layers": 1, "ffn_dim": 32, "num_queries": 12, "repr_layers": 2,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "mpp": 0.5, "crop_px": 64, "min_nuclei": 2, "max_nuclei": 6, "batch_size": 2, "epochs": 2, "epoch_samples": 4,
    "precision": "fp32", "model": {"arch": "celldetr", "config": NETWORK}, "optim": {"lr": 1e-3, "warmup_steps": 0},
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [{"patient": p} for p in "AB"])


def _train(dataset: Path, folder: Path, recipe: Mapping[str, Any] = RECIPE, **rest: Any) -> CellDETRPretraining:
    options = FitOptions(folder, [dataset], **{"device": "cpu", "workers": 0, "log_every": 1000, **rest})
    return fit(pretrain.CELLDETR, build(CellDETRPretrainRecipe, recipe), options)


def test_a_run_resumes_to_the_same_numbers_and_starts_a_detector(dataset: Path, tmp_path: Path) -> None:
    module = _train(dataset, tmp_path / "whole")
    _train(dataset, tmp_path / "parts", max_steps=2)
    _train(dataset, tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 4
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(v, parts["state_dict"][k]) for k, v in whole["state_dict"].items())
    # A detector with classes starts from it; only the heads of the classes stay as they were drawn.
    detector = build_model("celldetr", {**NETWORK, "num_classes": 3})
    load_init(detector, tmp_path / "whole/model.safetensors")
    theirs = module.model.state_dict()
    for name, value in detector.state_dict().items():
        if not name.startswith("decouple_class_embed."):
            assert torch.equal(value, theirs[name]), name
    entry = yaml.safe_load((tmp_path / "whole/model.yaml").read_text())
    assert entry["config"]["projection"] and entry["config"]["num_classes"] == 0 and entry["task"] == "backbone"
    logged = next((tmp_path / "whole/logs").rglob("metrics.csv")).read_text()
    assert all(name in logged for name in ("train/contrast", "train/chance", "train/detection", "watch/cell_spread"))


def test_the_contrast_is_learned(dataset: Path, tmp_path: Path) -> None:
    longer = {
        **RECIPE,
        "epochs": 25,
        "detection": 0.0,
        "optim": {"lr": 3e-3, "backbone_lr_scale": 1.0, "warmup_steps": 0},
    }
    module = _train(dataset, tmp_path / "run", longer)
    last = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert last["train/detection"] == 0
    assert last["train/contrast"] < 0.8 * last["train/chance"]


def test_a_network_without_representation_decoder_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="repr_layers"):
        _train(dataset, tmp_path / "run", {**RECIPE, "model": {"config": {**NETWORK, "repr_layers": 0}}})
