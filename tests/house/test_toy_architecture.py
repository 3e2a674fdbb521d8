"""An architecture that is defined in this file alone works from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cellslide.cli.main import cli
from cellslide.errors import WeightsError
from cellslide.models import registry
from cellslide.models.registry import ARCHITECTURES, Architecture, architecture_of
from cellslide.types import DetectDecode
from tests.painted import grid_centres, paint_slide


class ToyNetwork(nn.Module):
    """Finds the middles of dark discs as points, at most 64 in a tile."""

    n_types = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(float(config.get("threshold", 0.0))))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        dark = functional.avg_pool2d(self.threshold - x.mean(dim=1, keepdim=True), 17, 1, 8)
        peak = dark * (dark == functional.max_pool2d(dark, 25, 1, 12))
        scores, place = peak.flatten(1).clamp(0, 1).topk(64)
        xy = torch.stack([place % x.shape[-1], place // x.shape[-1]], -1) + 0.5
        return {"points": xy, "scores": scores, "class_prob": torch.ones_like(scores)[..., None]}


TOY = Architecture(
    "toy",
    "point",
    ToyNetwork,
    matches=lambda state: set(state) == {"threshold"},
    infer_config=lambda state, config: {},
    detect=DetectDecode(0.1, 3.0),
    citation="Toy, this file",
)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_a_toy_architecture_finds_nuclei_by_its_file_and_by_the_id_that_it_was_added_with(tmp_path: Path) -> None:
    painted = paint_slide(tmp_path / "a.tif", 400, 300, 0.25, grid_centres(400, 300, 60.0), 9.0)
    save_file({"threshold": torch.tensor(0.2)}, tmp_path / "mine.safetensors")
    quick = ("--device", "cpu", "--no-progress", "--no-tissue", "--workers", "0", "--format", "zarr")
    invoke("segment", painted.path, "-o", tmp_path / "out", "--weights", tmp_path / "mine.safetensors", *quick)
    record = json.loads((tmp_path / "out/a/run.json").read_text())
    assert record["counts"]["nuclei"] == len(painted.centres_xy)
    invoke("weights", "add", tmp_path / "mine.safetensors", "--id", "toy-by-id")
    invoke("segment", painted.path, "-o", tmp_path / "again", "--model", "toy-by-id", *quick)
    assert json.loads((tmp_path / "again/a/run.json").read_text())["counts"] == record["counts"]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="toy"):
        registry.register(TOY)
    with pytest.raises(WeightsError, match="toy"):
        architecture_of("other")
