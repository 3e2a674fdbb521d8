"""A training that is defined in this file alone works from the command line, and entries say what they are made of."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor, nn

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.cli.main import cli
from cellslide.models.registry import ARCHITECTURES, Architecture
from cellslide.train.data import prepare, read_sets, set_card
from cellslide.train.export import encoder_source, trained_entry
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.loaders import draw_loader, whole_loader
from cellslide.train.module import Training
from cellslide.train.recipe import AdamConfig, DatasetConfig, ModelConfig, Recipe
from cellslide.train.task import TASKS, FitOptions, Run, TrainingTask, register
from tests.support.train_sets import write_set


@dataclass(frozen=True, slots=True)
class ToyRecipe(Recipe):
    id: str = "toy"
    mpp: float = 0.5
    batch_size: int = 1
    epochs: int = 1
    epoch_samples: int = 3
    max_minutes: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    monitor: str = "val/error"
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(arch="toy"))
    optim: AdamConfig = field(default_factory=lambda: AdamConfig(lr=0.1))


class ToyTraining(Training):
    """Learns the mean grey of its images."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": self.model.parameters(), "lr_scale": 1.0}], lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.log_losses((self.model(batch) ** 2).mean(), {}, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def validation_step(self, item: Any, batch_idx: int) -> None:
        self.log("val/error", float(len(item.image)), batch_size=1)


class Greys(torch.utils.data.Dataset[Tensor]):
    def __init__(self, run: Run) -> None:
        self.images = [item for s in run.sets for item in s.train]

    def __getitem__(self, draw: int) -> Tensor:
        return torch.tensor([float(self.images[draw % len(self.images)].image.mean()) / 255])


def _read(options: FitOptions, recipe: ToyRecipe) -> list[Any]:
    crops = HoverRecipe(mpp=recipe.mpp)
    images = lambda sample, config: prepare(sample, config, crops)  # noqa: E731
    return read_sets([Path(s) for s in options.sources], recipe.datasets, images, lambda *of: [images(*of)])


TASK = TrainingTask(
    name="toy",
    help="Train nothing much.",
    recipe=ToyRecipe,
    read_sets=_read,
    set_card=set_card,
    module=lambda run, model: ToyTraining(run.recipe, model),
    loaders=lambda run, model: (draw_loader(Greys(run), run), whole_loader(run.sets)),
    card={"made": "for a test"},
    write_more=lambda folder, state: (folder / "more.txt").write_text(str(len(state))) and None,
    flags=(click.option("--mpp", type=float), click.option("--loud", is_flag=True)),
)


def test_a_toy_training_runs_and_goes_on_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "train toy", TASK)
    toy = Architecture("toy", "mask", lambda config: nn.Linear(1, 1), tile_px=320, citation="Toy, a test")
    monkeypatch.setitem(ARCHITECTURES, "toy", toy)
    data = write_set(tmp_path / "set", [{"patient": p} for p in "AB"])
    (tmp_path / "r.yaml").write_text("datasets: {set: {val: {patients: [B]}}}\n")
    given = ["train", "toy", str(data), "-o", str(tmp_path / "run"), "--recipe", str(tmp_path / "r.yaml")]
    given += ["--device", "cpu", "--workers", "0", "--loud"]
    first = CliRunner().invoke(cli, given)
    assert first.exit_code == 0, first.output
    assert "toy" in CliRunner().invoke(cli, ["train", "--help"]).output
    assert "--loud" in CliRunner().invoke(cli, ["train", "toy", "--help"]).output
    assert "toy" not in CliRunner().invoke(cli, ["pretrain", "--help"]).output
    entry = yaml.safe_load((tmp_path / "run/model.yaml").read_text())
    assert (entry["arch"], entry["task"], entry["tile_px"], entry["mpp"]) == ("toy", "segment", 320, 0.5)
    assert entry["citation"].startswith("Toy, a test")
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["made"] == "for a test" and card["data"][0]["train"] == {"images": 1, "nuclei": 8}
    assert (tmp_path / "run/more.txt").read_text() == "2" and card["metrics"]["val/error"] == 64
    second = CliRunner().invoke(cli, [*given, "--epochs", "2"])
    assert second.exit_code == 0, second.output
    stored = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert stored["global_step"] == 6
    # A checkpoint of a time before a key of the recipe goes on; with another value it does not.
    del stored["cellslide"]["recipe"]["monitor"]
    torch.save(stored, tmp_path / "run/last.ckpt")
    assert CliRunner().invoke(cli, [*given, "--epochs", "3"]).exit_code == 0
    other = CliRunner().invoke(cli, [*given, "--mpp", "0.4"])
    assert other.exit_code == 2 and "mpp" in other.stderr


def test_a_name_is_registered_once() -> None:
    from cellslide.train.tasks import tasks_of

    with pytest.raises(ValueError, match="cellvta"):
        register(tasks_of("train")["cellvta"])


def test_an_entry_cites_its_architecture_and_takes_its_tile() -> None:
    cited = {}
    for arch in ("cellvta", "hover_unet"):
        recipe = HoverRecipe(model=ModelConfig(arch=arch))
        cited[arch] = trained_entry(recipe, {}, []).citation
    assert "CellVTA" in cited["cellvta"] and "U-Net" in cited["hover_unet"] and "CellVTA" not in cited["hover_unet"]
    recipe = HoverRecipe(tile_px=768)
    assert trained_entry(recipe, {}, []).tile_px == 768


def test_the_licence_of_an_encoder_is_known_named_or_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def source(weights: str, licence: str | None = None) -> Any:
        return encoder_source(HoverRecipe(model=ModelConfig(encoder_weights=weights, encoder_licence=licence)))

    assert encoder_source(HoverRecipe()) is None
    assert source("down/efficientnet_lite0.pth").licence == "Apache-2.0"
    assert source("uni2-h").licence.startswith("CC-BY-NC-ND")
    assert source("mine.pth", "MIT").licence == "MIT"
    (tmp_path / "model.safetensors").write_bytes(b"")
    made = {"id": "mine", "task": "backbone", "arch": "muse", "file": "model.safetensors", "licence": "BSD-3-Clause"}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(made))
    assert source(str(tmp_path)).licence == source(str(tmp_path / "model.safetensors")).licence == "BSD-3-Clause"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        missing = source("found.pth")
    assert "found.pth" in missing.dataset and "not stated" in missing.licence
    assert "model.encoder_licence" in caplog.text
