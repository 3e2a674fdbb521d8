"""Weights of detectors: the kind by the architecture, thresholds from the entry, files described and undescribed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import UsageError, WeightsError
from cellslide.inference.onnx_engine import OnnxEngine
from cellslide.inference.torch_engine import TorchEngine
from cellslide.models import architecture_of, build_model
from cellslide.models.registry import CELLDETR_MEAN, CELLDETR_STD, IMAGENET_MEAN, IMAGENET_STD
from cellslide.pipeline import segment_array
from cellslide.types import DetectDecode, Instances
from cellslide.weights import LoadedModel, Manifest, add_weights, load_model
from cellslide.weights.cache import file_sha256
from cellslide.weights.load import check_task
from cellslide.weights.manifest import parse_entry

CLASSES = [{"name": name, "color": [i, 2, 3]} for i, name in enumerate(("a", "b", "c"))]
POINTS: dict[str, Any] = {"encoder": "resnet10t", "widths": [16, 16, 16, 32],
                          "head": {"hidden": 16, "space_px": 8, "n_classes": 3, "embedding": True}}  # fmt: skip
BOXES: dict[str, Any] = {
    "backbone": "resnet10t", "norm": "own", "hidden_dim": 16, "n_heads": 4, "n_points": 2, "enc_layers": 1,
    "dec_layers": 2, "ffn_dim": 32, "num_queries": 20, "two_stage": True, "num_classes": 3, "repr_layers": 2,
    "global_boxes": 4, "score_threshold": 0.005,
}  # fmt: skip
CONFIGS = {"muse_points": POINTS, "celldetr": BOXES}
ARCHS = pytest.mark.parametrize("arch", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, CONFIGS[arch]).eval()


def output_of(folder: Path, arch: str, **changes: Any) -> Path:
    """Write what training writes: tensors and one manifest entry."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network(arch).state_dict().items()}, folder / "model.safetensors")
    raw = {
        "id": "mine", "task": "detect", "arch": arch, "file": "model.safetensors", "mpp": 0.5, "tile_px": 128,
        "overlap_px": 32, "config": CONFIGS[arch], "classes": CLASSES, "licence": "Apache-2.0",
        "sha256": file_sha256(folder / "model.safetensors"), **changes,
    }  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(raw))
    return folder


@ARCHS
def test_a_training_output_is_loaded_added_and_found_by_id(tmp_path: Path, arch: str) -> None:
    folder = output_of(tmp_path / "run", arch, detect={"score_threshold": 0.25, "nms_um": 2})
    spec = load_model(weights=folder).spec
    assert spec.kind == architecture_of(arch).kind == ("point" if arch == "muse_points" else "box")
    assert spec.detect == DetectDecode(0.25, 2.0) and spec.multiple_px == 32
    assert [c.name for c in spec.classes] == ["a", "b", "c"]
    assert spec.embedding_dim == (64 if arch == "muse_points" else 16)
    entry = add_weights(folder, "lab", Manifest.load())
    assert entry.detect == DetectDecode(0.25, 2.0)
    assert load_model("lab").spec == replace(spec, name="lab", weights_id="lab")


@ARCHS
def test_what_the_entry_does_not_say_is_as_published(tmp_path: Path, arch: str) -> None:
    detect = load_model(weights=output_of(tmp_path / "run", arch)).spec.detect
    assert detect == DetectDecode(0.4, 3.0 if arch == "muse_points" else 0.0)


@ARCHS
def test_a_file_without_an_entry_takes_the_image_norm_of_its_architecture(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "found.safetensors"
    # The sizes of a backbone with a deep stem are read from no tensor.
    config = CONFIGS[arch] | ({"backbone": "resnet18"} if arch == "celldetr" else {})
    save_file({k: v.contiguous() for k, v in build_model(arch, config).state_dict().items()}, path)
    spec = load_model(weights=path).spec
    norms = {"celldetr": (CELLDETR_MEAN, CELLDETR_STD), "muse_points": (IMAGENET_MEAN, IMAGENET_STD)}
    assert (spec.mean, spec.std) == norms[arch]


def test_one_class_without_a_name_is_the_nucleus(tmp_path: Path) -> None:
    config = {**POINTS, "head": {**POINTS["head"], "n_classes": 1}}
    folder = output_of(tmp_path / "run", "muse_points", config=config, classes=[], sha256=None)
    save_file(build_model("muse_points", config).state_dict(), folder / "model.safetensors")
    assert load_model(weights=folder).spec.classes == ()
    named = yaml.safe_load((folder / "model.yaml").read_text()) | {"classes": CLASSES[:1]}
    (folder / "model.yaml").write_text(yaml.safe_dump(named))
    assert [c.name for c in load_model(weights=folder).spec.classes] == ["a"]


@ARCHS
def test_classes_and_task_must_fit_the_network(tmp_path: Path, arch: str) -> None:
    with pytest.raises(WeightsError, match="3 nucleus types, mine names 2 classes"):
        load_model(weights=output_of(tmp_path / "two", arch, classes=CLASSES[:2]))
    with pytest.raises(WeightsError, match=f"{arch} gives .*s, so its task is not segment"):
        load_model(weights=output_of(tmp_path / "task", arch, task="segment"))


def test_segment_and_detect_stand_for_each_other_and_for_nothing_else() -> None:
    manifest = Manifest.load()
    check_task(manifest.entry("cellslide-nuclei-small"), "detect")
    check_task(manifest.entry("celldetr-swin-t-3to4-pannuke"), "segment")
    for task in ("classify", "backbone"):
        with pytest.raises(UsageError, match=f"made to detect, not to {task}"):
            check_task(manifest.entry("celldetr-swin-t-3to4-pannuke"), task)
    with pytest.raises(UsageError, match="made to classify"):
        load_model("cells-breast-small")


def test_detect_and_segment_are_ids_of_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model("segment").spec.weights_id == Manifest.load().defaults["segment"]
    shipped = Manifest.load().defaults.get("detect")
    if shipped is None:
        with pytest.raises(UsageError, match="no weights for detect ship"):
            load_model("detect")
    else:
        assert load_model("detect").spec.weights_id == shipped


def test_the_entry_s_thresholds_are_checked_and_kept() -> None:
    raw = {"id": "x", "task": "detect", "arch": "celldetr", "source": "user", "licence": "MIT"}
    entry = parse_entry({**raw, "detect": {"score_threshold": 0.3}}, Path(), "here")
    assert entry.as_dict()["detect"] == {"score_threshold": 0.3, "nms_um": 0.0}
    for wrong in ({"score_threshold": 1.2}, {"nms_um": -1}, {"threshold": 0.3}):
        with pytest.raises(WeightsError, match=r"here: x: .*(score_threshold|nms_um|threshold)"):
            parse_entry({**raw, "detect": wrong}, Path(), "here")


def test_kinds_follow_the_architecture() -> None:
    kinds = {"cellvta": "mask", "CellViTSAM": "mask", "celldetr": "box", "muse_points": "point", "dpa_p2pnet": "point"}
    assert {name: architecture_of(name).kind for name in kinds} == kinds


CONFIG = SegmentConfig(
    tissue=TissueConfig(enabled=False),
    infer=InferConfig(device="cpu", workers=0, batch_size=1),
    output=OutputConfig(formats=("zarr",)),
)


@ARCHS
def test_a_real_network_does_not_depend_on_the_batch(tmp_path: Path, arch: str) -> None:
    loaded = load_model(weights=output_of(tmp_path / "run", arch, detect={"score_threshold": 0.0}))
    spec = replace(loaded.spec, detect=DetectDecode(0.0, 0.0))
    model = LoadedModel(spec, loaded.module, loaded.entry)
    image = np.random.default_rng(0).integers(0, 256, (150, 230, 3), np.uint8)
    one, three = (
        segment_array(model, image, 0.5, replace(CONFIG, infer=replace(CONFIG.infer, batch_size=b))) for b in (1, 3)
    )
    assert len(one) == len(three) > 10
    np.testing.assert_allclose(one.centroid_xy, three.centroid_xy, atol=0.02)
    assert one.embedding is not None and three.embedding is not None
    np.testing.assert_allclose(one.embedding, three.embedding, atol=1e-4)
    assert one.class_prob is not None
    np.testing.assert_allclose(one.class_prob.sum(axis=1), 1, atol=1e-5)
    assert (one.box_xyxy is not None) == (arch == "celldetr")


@pytest.mark.slow
def test_onnx_finds_the_points_that_torch_finds(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra `export` (onnx, onnxscript)")

    loaded = load_model(weights=output_of(tmp_path / "run", "muse_points"))
    loaded = replace(loaded, spec=replace(loaded.spec, detect=DetectDecode(0.0, 0.0)))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    torch_found = TorchEngine(loaded.module, loaded.spec, CONFIG.infer, 64).launch(images)()
    engine = OnnxEngine(loaded.module, loaded.spec, InferConfig(device="cpu", engine="onnx"), 64)
    for a, b in zip(torch_found, engine.launch(images)(), strict=True):
        assert isinstance(a, Instances) and isinstance(b, Instances) and len(a) == len(b) > 0
        np.testing.assert_allclose(a.centroid_xy, b.centroid_xy, atol=1e-2)
        np.testing.assert_allclose(a.score, b.score, atol=1e-4)
        assert a.embedding is not None and b.embedding is not None
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-3)


def test_boxes_are_not_exported(tmp_path: Path) -> None:
    loaded = load_model(weights=output_of(tmp_path / "run", "celldetr"))
    with pytest.raises(UsageError, match="--engine onnx: mine gives boxes.*--engine torch"):
        OnnxEngine(loaded.module, loaded.spec, InferConfig(device="cpu", engine="onnx"), 64)
