"""Classifiers from files: every published layout, our own folders, organs, calibration, and what is refused."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from cellslide.errors import UsageError, WeightsError
from cellslide.models.nuclass import NuClass
from cellslide.types import Calibration, ClassSpec, CropSpec
from cellslide.weights import Manifest, add_weights
from cellslide.weights.backbone import fill_backbone
from cellslide.weights.classifier import (
    LoadedClassifier,
    calibration_as_yaml,
    calibration_of,
    classifier_entry,
    load_classifier,
)
from cellslide.weights.manifest import PACKAGE, WeightsEntry, parse_entry
from cellslide.weights.organs import VOCABULARY, Organ, canonical, find_organ
from tests.support.published_nuclass import OWN, gate_state, global_state, images, local_state, small_model, to_hf

ORGANS = torch.tensor([0, 7, 3])
CROPS = {
    "local": {"field_px": 64, "input_px": 32, "border": "reflect", "resample": "area"},
    "context": {"field_px": 128, "input_px": 32},
}
PUBLISHED_CLASSES = (
    "Acinar", "B_Cell", "Cardiomyocyte", "Ductal", "Endocrine", "Endothelial", "Endothelial_TumorAssociated",
    "Epithelial_Airway", "Epithelial_Alveolar", "Epithelial_Malignant", "Fibroblast", "Macrophage", "Mast_Cell",
    "Smooth_Muscle", "T_Cell", "Tumor_Associated_Fibroblast",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def model() -> NuClass:
    return small_model(classes=16, organs=8)


def lightning(state: dict[str, Tensor], path: Path, **settings: Any) -> Path:
    """Write a checkpoint as Lightning does, with the settings of the class that was trained."""
    config = argparse.Namespace(out=Path("runs"), lr=1e-4)
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"config": config, **settings}}, path)
    return path


def write_own(folder: Path, changes: dict[str, Any] | None = None, **values: Any) -> Path:
    """Write a folder as training does: three classes, two organs."""
    folder.mkdir(parents=True, exist_ok=True)
    module = small_model({**OWN, **(changes or {})})
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "model.safetensors")
    entry = {
        "id": "own", "task": "classify", "arch": "nuclass", "file": "model.safetensors", "licence": "Apache-2.0",
        "config": {**module.config.as_dict(), "crops": CROPS}, "mpp": 0.25, "organs": ["breast", "lung"],
        "classes": [{"name": n, "color": [1, 2, 3]} for n in ("a", "b", "c")], "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2], **values,
    }  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump({k: v for k, v in entry.items() if v is not None}))
    return folder


@torch.inference_mode()
def same_answers(loaded: LoadedClassifier, want: NuClass) -> None:
    crops, contexts = images(28), images(32)
    got, expected = loaded.module(crops, contexts, ORGANS), want(crops, contexts, ORGANS)
    torch.testing.assert_close(got.logits_local, expected.logits_local)
    if loaded.module.has_global:
        torch.testing.assert_close(got.logits_global, expected.logits_global)
    if loaded.module.has_gate:
        torch.testing.assert_close(got.gate, expected.gate)


# ---- published files


@pytest.mark.parametrize("layer", ["layer", "model.layer"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_gate_checkpoint_loads(model: NuClass, tmp_path: Path, layer: str, suffix: str) -> None:
    path, state = tmp_path / f"gate{suffix}", gate_state(model, layer)
    if suffix == ".ckpt":
        lightning(state, path, num_tissues=8)
    elif suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    loaded = load_classifier(weights=path)
    assert not loaded.module.training
    same_answers(loaded, model)
    spec = loaded.spec
    assert tuple(c.name for c in spec.classes) == PUBLISHED_CLASSES
    assert spec.organs[0] == "breast" and spec.organs[7] == "pancreas" and len(spec.organs) == 8
    assert spec.local == CropSpec(224, 224, "zero", "bilinear")
    assert spec.context == CropSpec(1024, 384, "zero", "bilinear")
    assert spec.mpp == 0.25 and not spec.learned_unknown and spec.weights_sha256


def test_gate_checkpoint_with_training_parts_and_wrappers_loads(model: NuClass, tmp_path: Path) -> None:
    state = gate_state(model)
    state |= {"modelB.a_head.1.weight": torch.zeros(2, 2), "modelB.gate_mlp.0.bias": torch.zeros(2)}
    state = {name.replace("uni_encoder.", "uni_encoder._orig_mod."): tensor for name, tensor in state.items()}
    state = {"module." + name.replace("modelB.head.", "modelB.head_B."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state}, tmp_path / "gate.ckpt")
    same_answers(load_classifier(weights=tmp_path / "gate.ckpt"), model)


def test_path_local_alone_loads(model: NuClass, tmp_path: Path) -> None:
    loaded = load_classifier(weights=lightning(local_state(model), tmp_path / "local.ckpt"))
    assert not loaded.module.has_global
    same_answers(loaded, model)


def test_path_global_alone_loads_with_its_copy_of_path_local(model: NuClass, tmp_path: Path) -> None:
    want = small_model(classes=16, organs=8)
    want.modelA.uni_encoder.load_state_dict(want.modelB.uni_encoder.state_dict())
    loaded = load_classifier(weights=lightning(global_state(want), tmp_path / "global.ckpt"))
    assert loaded.module.shares_backbone and not loaded.module.has_gate
    assert loaded.spec.context.input_px == 512
    same_answers(loaded, want)


def test_equal_backbones_of_both_paths_are_one(tmp_path: Path) -> None:
    want = small_model(classes=16, organs=8)
    want.modelB.uni_encoder.load_state_dict(want.modelA.uni_encoder.state_dict())
    torch.save(gate_state(want), tmp_path / "gate.pth")
    loaded = load_classifier(weights=tmp_path / "gate.pth")
    assert loaded.module.shares_backbone
    same_answers(loaded, want)


@pytest.mark.parametrize("named", [["x", "y", "z"], {"x": 0, "z": 2, "y": 1}, {0: "x", 1: "y", 2: "z"}])
def test_class_names_come_from_the_settings(tmp_path: Path, named: Any) -> None:
    state = local_state(small_model({"context": None}, classes=3, organs=4))
    loaded = load_classifier(weights=lightning(state, tmp_path / "local.ckpt", class_names=named))
    assert [c.name for c in loaded.spec.classes] == ["x", "y", "z"]
    assert loaded.spec.organs == ("organ 1", "organ 2", "organ 3", "organ 4")


def test_one_embedding_more_than_organs_is_the_unknown_one(tmp_path: Path) -> None:
    want = small_model({"context": None, "learned_unknown": True}, classes=16, organs=8)
    loaded = load_classifier(weights=lightning(local_state(want), tmp_path / "local.ckpt"))
    assert loaded.spec.learned_unknown and len(loaded.spec.organs) == 8
    unknown = torch.full((3,), -1)
    crops = images(28)
    torch.testing.assert_close(loaded.module.local_path(crops, unknown).logits, want.local_path(crops, unknown).logits)


def test_missing_and_unexpected_tensors_are_listed(model: NuClass, tmp_path: Path) -> None:
    state = gate_state(model)
    del state["modelB.dino_model.layer.1.norm1.weight"], state["gate_proj_B.0.bias"]
    state |= {"modelB.surplus.weight": torch.zeros(1), "modelA.head.1.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "gate.pth")
    with pytest.raises(WeightsError) as caught:
        load_classifier(weights=tmp_path / "gate.pth")
    said = str(caught.value)
    assert "2 missing: gate_proj_B.0.bias, modelB.dino_model.blocks.1.norm1.weight" in said
    assert "1 unexpected: modelB.surplus.weight" in said
    assert "modelA.head.1.bias (5,) for (16,)" in said
    assert caught.value.exit_code == 3


def test_tensor_that_tells_a_size_is_named_when_it_is_missing(model: NuClass, tmp_path: Path) -> None:
    state = gate_state(model)
    del state["modelB.proj_uni.1.weight"]
    torch.save(state, tmp_path / "gate.pth")
    with pytest.raises(WeightsError, match=r"modelB\.proj_uni\.1\.weight.* is missing"):
        load_classifier(weights=tmp_path / "gate.pth")


def test_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder.pos_embed": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="no classifier"):
        load_classifier(weights=tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="no such file"):
        load_classifier(weights=tmp_path / "absent.pth")


# ---- the manifest's entry


def test_published_entry_takes_the_file_of_a_user(model: NuClass, tmp_path: Path) -> None:
    path = lightning(gate_state(model), tmp_path / "mine.ckpt")
    same_answers(load_classifier("nuclass", path), model)
    add_weights(path, "nuclass", Manifest.load())
    same_answers(load_classifier("nuclass"), model)
    changed = lightning({**gate_state(model), "gate_mlp.6.bias": torch.ones(1)}, tmp_path / "changed.ckpt")
    with pytest.raises(WeightsError, match="first used"):
        load_classifier("nuclass", changed)


def test_published_entry_is_missing_with_the_steps_to_get_it() -> None:
    with pytest.raises(WeightsError, match=r"cellslide weights add FILE --id nuclass") as caught:
        load_classifier("nuclass")
    assert caught.value.exit_code == 3


def test_weights_of_another_task_are_refused() -> None:
    with pytest.raises(UsageError, match="made to segment, not to classify"):
        load_classifier("cellslide-nuclei-small")


# ---- our own folders


@torch.inference_mode()
@pytest.mark.parametrize("named", ["", "model.yaml", "model.safetensors"])
def test_folder_of_training_loads(tmp_path: Path, named: str) -> None:
    folder = write_own(tmp_path / "run", calibration={"temperature_mix": 1.5}, safe_gate={"tau": 0.6})
    loaded = load_classifier(weights=folder / named if named else folder)
    spec = loaded.spec
    assert (spec.name, spec.organs, spec.learned_unknown) == ("own", ("breast", "lung"), True)
    assert spec.local == CropSpec(64, 32, "reflect", "area") and spec.context == CropSpec(128, 32)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert spec.calibration == Calibration(temperature_mix=1.5, tau=0.6)
    want = small_model(OWN)
    crops, contexts, organ = images(32), images(32), torch.tensor([0, 1, -1])
    got = loaded.module(crops, contexts, organ)
    torch.testing.assert_close(got.probabilities, want(crops, contexts, organ).probabilities)
    assert loaded.module.context_patch_px == 8


def test_folder_of_a_local_path_loads(tmp_path: Path) -> None:
    loaded = load_classifier(weights=write_own(tmp_path, {"context": None}))
    assert not loaded.module.has_global


def test_entry_is_known_without_building_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_own(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was built")

    monkeypatch.setattr("cellslide.models.backbones.create_backbone", refuse)
    assert classifier_entry(weights=folder).id == "own"


def test_trained_folder_can_be_added(tmp_path: Path) -> None:
    entry = add_weights(write_own(tmp_path / "run"), "mine", Manifest.load())
    assert entry.task == "classify"
    assert load_classifier("mine").spec.weights_id == "mine"


def _without_crops(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "crops"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "crops": {**CROPS, "local": {"field_px": 0, "input_px": 32}}}, "field_px 0"),
        (lambda c: {**c, "crops": {**CROPS, "local": {**CROPS["local"], "border": "wrap"}}}, "border 'wrap'"),
        (lambda c: {**c, "crops": {**CROPS, "local": {**CROPS["local"], "size": 3}}}, "size"),
        (lambda c: {**c, "crops": {**CROPS, "other": {}}}, "unknown keys other"),
        (_without_crops, "config.crops is missing"),
        (lambda c: {**c, "head_widht": 3}, "head_widht"),
        (lambda c: {**c, "context": {"name": "no_such_net"}}, "no_such_net"),
        (lambda c: {**c, "head_width": 17}, "other shape"),
    ],
)  # fmt: skip
def test_faults_of_an_entry_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    folder = write_own(tmp_path)
    entry = yaml.safe_load((folder / "model.yaml").read_text())
    entry["config"] = change(entry["config"])
    (folder / "model.yaml").write_text(yaml.safe_dump(entry))
    with pytest.raises(WeightsError, match=message):
        load_classifier(weights=folder)


def test_classes_must_be_as_many_as_the_network_has(tmp_path: Path) -> None:
    two = [{"name": n, "color": [1, 2, 3]} for n in "ab"]
    with pytest.raises(WeightsError, match="3 classes, own names 2"):
        load_classifier(weights=write_own(tmp_path, classes=two))


# ---- organs


def test_organ_is_found_by_name_or_by_another_word_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = load_classifier(weights=write_own(tmp_path)).spec
    caplog.clear()
    assert find_organ(spec, "lung") == find_organ(spec, " Lung ") == find_organ(spec, "bronchus") == Organ("lung", 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert find_organ(spec, None) == find_organ(spec, "Unknown") == Organ("unknown", -1, None)
    assert len(caplog.records) == 2 and "learned embedding" in caplog.text


@pytest.mark.parametrize(("word", "near"), [("lnug", "lung"), ("kidny", "kidney"), ("oesophagos", "esophagus")])
def test_a_word_that_is_no_organ_is_refused_with_near_names(tmp_path: Path, word: str, near: str) -> None:
    spec = load_classifier(weights=write_own(tmp_path)).spec
    with pytest.raises(UsageError, match=rf"--organ {word}.*{near}") as caught:
        find_organ(spec, word)
    assert caught.value.exit_code == 2


def test_an_organ_that_was_not_trained_runs_as_unknown_under_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = {"abstain": 0.3, "abstain_unseen": 0.62, "accuracy_unseen": 0.71}
    spec = load_classifier(weights=write_own(tmp_path, calibration=calibration)).spec
    with caplog.at_level(logging.WARNING):
        assert find_organ(spec, "Urinary_bladder") == Organ("bladder", -1, False)
    assert all(word in caplog.text for word in ("bladder", "breast, lung", "0.62", "71%"))


def test_names_of_the_vocabulary_are_one_organ_each() -> None:
    words = [word for name, others in VOCABULARY.items() for word in (name, *others)]
    assert len(words) == len(set(words)) and all(word == word.lower() for word in words)
    assert canonical("Colorectal") == "colon" and canonical("spaceship") is None


# ---- calibration


def _entry(calibration: Any = None, safe_gate: Any = None) -> WeightsEntry:
    raw = {"id": "e", "task": "classify", "arch": "nuclass", "source": "user", "calibration": calibration,
           "safe_gate": safe_gate, "classes": [{"name": n, "color": [0, 0, 0]} for n in "ab"]}  # fmt: skip
    return parse_entry(raw, PACKAGE, "test")


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(),
        Calibration(1.5, 0.5, 2.0, (0.9, 0.8), (0.7, 0.6), 0.35, 0.1, False, (0.4, 0.5), 0.3),
        Calibration(confusion=((9, 1), (2, 8))),
    ],
)
def test_calibration_reads_back(calibration: Calibration) -> None:
    first, second = yaml.safe_load(yaml.safe_dump(calibration_as_yaml(calibration), sort_keys=False)) or ({}, {})
    assert calibration_of(_entry(first, second)) == calibration


def test_entry_without_calibration_has_the_defaults() -> None:
    assert calibration_of(_entry()) == Calibration()


@pytest.mark.parametrize(
    ("calibration", "safe_gate", "message"),
    [
        ({"temprature": 1.0}, None, "unknown keys temprature"),
        ({"temperature_mix": 0}, None, "above 0"),
        ({"thresholds": [0.1]}, None, "1 numbers for 2 classes"),
        (None, {"reliability_local": [0.1, 0.2, 0.3]}, "3 numbers for 2 classes"),
        (None, {"tau": "high"}, "high"),
        ({"confusion": [[1, 2]]}, None, "2 rows of 2 counts"),
        ({"confusion": [[1, 2], [0.5, 1]]}, None, "whole numbers"),
    ],
)
def test_faults_of_a_calibration_are_named(calibration: Any, safe_gate: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        calibration_of(_entry(calibration, safe_gate))


# ---- plain backbones


def test_backbone_is_filled_from_a_file_or_folder(model: NuClass, tmp_path: Path) -> None:
    want = model.context_backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in to_hf(want).items()}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        other = small_model(seed=5).context_backbone
        assert fill_backbone(other, str(source)) == "model.safetensors"
        assert all(torch.equal(tensor, want[name]) for name, tensor in other.state_dict().items())
        assert all(p.requires_grad for p in other.parameters())


def test_backbone_that_does_not_fit_or_is_not_here_is_named(model: NuClass, tmp_path: Path) -> None:
    torch.save(to_hf(model.context_backbone.state_dict()), tmp_path / "dino.pth")
    with pytest.raises(WeightsError, match=r"missing: .*unexpected: "):
        fill_backbone(model.local_backbone, str(tmp_path / "dino.pth"))
    with pytest.raises(WeightsError, match="cellslide weights fetch uni2-h"):
        fill_backbone(model.local_backbone, "uni2-h")
    with pytest.raises(UsageError, match="no backbone"):
        fill_backbone(model.local_backbone, "nuclass")
    with pytest.raises(WeightsError, match="hf download owner/name"):
        fill_backbone(model.local_backbone, "hf-hub:owner/name")
    (tmp_path / "second.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match="holds 2 weights files"):
        fill_backbone(model.local_backbone, str(tmp_path))


def test_published_classes_stand_in_the_manifest() -> None:
    entry = Manifest.load().entry("nuclass")
    assert tuple(c.name for c in entry.classes) == PUBLISHED_CLASSES
    assert len({c.color for c in entry.classes}) == 16 and isinstance(entry.classes[0], ClassSpec)
    assert entry.organs == ("breast", "colon", "heart", "kidney", "liver", "lung", "ovary", "pancreas")
