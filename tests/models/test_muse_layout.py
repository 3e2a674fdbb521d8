"""Checkpoints of MUSE: published ones, ours, and detectors; sizes read from tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cellslide.errors import UsageError, WeightsError
from cellslide.models import build_model
from cellslide.models.checkpoint import guess_arch, infer_config, load_strict, read_checkpoint
from cellslide.models.muse import resample_positions
from cellslide.models.muse_layout import POSITIONS, backbone_state, fill_backbone, read_backbone
from cellslide.models.registry import IMAGENET_MEAN
from cellslide.weights.muse import load_muse
from tests.support.published_muse import TINY_CONV, TINY_HEAD, TINY_VIT, build, write_teacher


@pytest.fixture(scope="module")
def vit() -> Any:
    return build("muse", TINY_VIT)


def test_published_file_loads_strictly_with_its_positions_moved(vit: Any, tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "teacher.pth", vit)
    other = build_model("muse", TINY_VIT)
    fill_backbone(other, path)
    want = vit.state_dict()
    moved = resample_positions(want[POSITIONS], (4, 4))
    assert torch.equal(other.state_dict()[POSITIONS], moved)
    assert not torch.allclose(moved, want[POSITIONS])
    assert all(torch.equal(t, want[name]) for name, t in other.state_dict().items() if name != POSITIONS)


def test_published_file_for_another_size(vit: Any, tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "teacher.pth", vit)
    larger = build_model("muse", {**TINY_VIT, "img_size": 128})
    fill_backbone(larger, path)
    assert torch.equal(larger.state_dict()[POSITIONS], resample_positions(vit.state_dict()[POSITIONS], (8, 8)))


def test_own_file_is_taken_as_it_is(vit: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model_state_dict": vit.state_dict(), "arch": "muse"}, path)
    assert torch.equal(read_backbone(path, 64)[POSITIONS], vit.state_dict()[POSITIONS])


def test_backbone_of_a_detector(tmp_path: Path) -> None:
    detector = build("muse_points", {**TINY_CONV, "head": TINY_HEAD})
    path = tmp_path / "model.pth"
    torch.save({"model_state_dict": detector.state_dict(), "arch": "muse_points"}, path)
    backbone = build_model("muse", TINY_CONV)
    fill_backbone(backbone, path)
    want = detector.backbone.state_dict()
    assert all(torch.equal(t, want[name]) for name, t in backbone.state_dict().items())


def test_what_is_missing_is_named(vit: Any, tmp_path: Path) -> None:
    state = vit.state_dict()
    del state["encoder.encoder.norm.bias"]
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state | {"encoder.extra": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match=r"1 missing: encoder.encoder.norm.bias; 1 unexpected: encoder.extra"):
        fill_backbone(build_model("muse", TINY_VIT), path)


def test_another_model_is_no_backbone() -> None:
    with pytest.raises(WeightsError, match=r"x.pth: no MUSE backbone"):
        backbone_state({"encoder.pos_embed": torch.zeros(1)}, "x.pth")


def test_only_a_backbone_is_filled(vit: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        fill_backbone(torch.nn.Linear(1, 1), write_teacher(tmp_path / "teacher.pth", vit))


@pytest.mark.parametrize(
    ("arch", "config", "told"),
    [
        ("muse", TINY_VIT, {"heads": 2}),
        ("muse", {"encoder": "resnet18", "widths": [8, 16, 32, 64]}, {}),
        ("muse_points", {**TINY_CONV, "head": {**TINY_HEAD, "aux_mask": True}}, {"head.space_px": 4}),
        ("dpa_p2pnet", {"encoder": "convnext_atto", "hidden": 32, "n_classes": 2, "n_levels": 2}, {}),
    ],
)
def test_sizes_are_read_from_the_tensors(
    arch: str, config: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    module = build(arch, config)
    path = tmp_path / "model.pth"
    torch.save({"model_state_dict": module.state_dict(), "config": told}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.arch == arch
    again = build_model(arch, infer_config(checkpoint))
    load_strict(again, checkpoint.state, str(path))
    assert again.config == module.config


def test_an_unknown_encoder_is_asked_for(tmp_path: Path) -> None:
    module = build("muse", TINY_CONV)
    state = {
        name.replace("encoder.encoder.layer4", "encoder.encoder.last"): t for name, t in module.state_dict().items()
    }
    torch.save({"model_state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="encoder"):
        infer_config(read_checkpoint(tmp_path / "model.pth"))


def test_other_models_keep_their_names() -> None:
    assert guess_arch({"encoder.pos_embed": torch.zeros(1)}) == "cellvit_256"


@torch.no_grad()
def test_published_file_by_its_path(tmp_path: Path) -> None:
    # Heads of 64 channels, since a published file does not tell how many there are.
    wide = {"encoder": {"name": "vit", "embed_dim": 64, "depth": 4, "heads": 1}, "extract_layers": [0, 1, 2, 3]}
    path = write_teacher(tmp_path / "mine.pth", build("muse", {**wide, "img_size": 64}))
    loaded = load_muse(weights=path)
    assert (loaded.mpp, loaded.mean) == (0.25, IMAGENET_MEAN)
    assert loaded.module.config.img_size == 64
    assert loaded.module.dim == 64
    assert not loaded.module.training
    want = build_model("muse", loaded.module.config.as_dict())
    fill_backbone(want, path)
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(loaded.module(x).map, want.eval()(x).map)
    assert len(loaded.sha256) == 64


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="is no MUSE"):
        load_muse("uni2-h")
