"""Checkpoints: read safely, strictly, and with sizes from their tensors."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cellslide.errors import WeightsError
from cellslide.models import architecture_of, build_model
from cellslide.models.checkpoint import (
    CONIC,
    PANNUKE,
    Checkpoint,
    build_empty,
    classes_of,
    guess_arch,
    infer_config,
    load_strict,
    mpp_of,
    normalisation_of,
    read_checkpoint,
)
from tests.support.parity import fill, load_keys

CELLVTA: dict[str, Any] = {
    "embed_dim": 64, "depth": 4, "num_heads": 1, "interaction_indexes": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "conv_inplane": 8, "decoder_widths": (4, 6, 8, 10), "deform_num_heads": 4, "img_size": 64,
}  # fmt: skip
CELLVIT: dict[str, Any] = {
    "embed_dim": 64, "depth": 4, "num_heads": 1, "extract_layers": (1, 2, 3, 4), "decoder_widths": (4, 6, 8, 10),
    "skip_widths": (8, 6), "img_size": 64,
}  # fmt: skip
# published class name -> (short name, small config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CellViTUNIAdapter": ("cellvta", CELLVTA),
    "CellViT256": ("cellvit_256", CELLVIT),
    "CellViTSAM": (
        "cellvit_sam_h", {**CELLVIT, "num_heads": 4, "global_attn_indexes": (1, 3), "window_size": 3, "neck_dim": 12},
    ),
    "CellViTUNI": ("cellvit_uni", CELLVIT),
    "CellViTVirchow": ("cellvit_virchow", {**CELLVIT, "patch_size": 14, "img_size": 56, "mlp_hidden": 96}),
    "CellViTVirchow2": (
        "cellvit_virchow2", {**CELLVIT, "patch_size": 14, "img_size": 56, "mlp_hidden": 96, "n_registers": 2},
    ),
}  # fmt: skip
PUBLISHED_CONFIG = {
    "data.num_nuclei_classes": 6,
    "dataset_config.nuclei_types.Background": 0,
    **{f"dataset_config.nuclei_types.{c.name}": i for i, c in enumerate(PANNUKE, start=1)},
    "transformations.normalize.mean": [0.5, 0.5, 0.5],
    "transformations.normalize.std": [0.5, 0.5, 0.5],
}


def model_of(name: str, **changes: Any) -> nn.Module:
    """Return a small model by published name, filled by the recipe."""
    short, config = MODELS[name]
    return fill(build_model(short, {**config, **changes}))


def publish(path: Path, name: str, module: nn.Module, **extra: Any) -> Path:
    """Write `module` in the layout of published checkpoints, a numpy scalar as metric included."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}
    content = {
        "arch": name, "epoch": 3, "model_state_dict": module.state_dict(),
        "optimizer_state_dict": {"state": moments, "param_groups": [{"betas": (0.9, 0.99)}]},
        "best_metric": np.float64(0.5),
        "config": PUBLISHED_CONFIG, "scaler_state_dict": None, "wandb_id": "abc", **extra,
    }  # fmt: skip
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", sorted(MODELS))
def test_small_models_load_without_being_told_their_sizes(name: str, tmp_path: Path) -> None:
    module = model_of(name)
    checkpoint = read_checkpoint(publish(tmp_path / "a.pth", name, module))
    assert checkpoint.arch == MODELS[name][0]
    config = infer_config(checkpoint)
    for key, value in MODELS[name][1].items():
        assert config[key] == value, key
    loaded = load_strict(build_empty(checkpoint.arch, config), checkpoint.state, "a.pth")
    assert not any(t.is_meta for t in loaded.state_dict().values())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = module(x), loaded(x)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize(
    ("keys", "arch", "expected"),
    [
        ("cellvta_uni_keys", "CellViTUNIAdapter", {"num_heads": 16, "deform_num_heads": 8, "conv_inplane": 64}),
        ("cellvit_256_keys", "CellViT256", {"num_heads": 6, "extract_layers": (3, 6, 9, 12)}),
        ("cellvit_sam_b_keys", "CellViTSAM", {"num_heads": 12, "global_attn_indexes": (2, 5, 8, 11), "img_size": 1024}),
        ("cellvit_sam_l_keys", "CellViTSAM", {"num_heads": 16, "extract_layers": (6, 12, 18, 24)}),
        ("cellvit_sam_h_keys", "CellViTSAM", {"num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)}),
        ("cellvit_uni_keys", "CellViTUNI", {"num_heads": 16, "num_tissue_classes": 19}),
        ("cellvit_virchow_keys", "CellViTVirchow", {"num_heads": 16, "mlp_hidden": 6832, "patch_size": 14}),
        ("cellvit_virchow2_keys", "CellViTVirchow2", {"num_heads": 16, "n_registers": 4, "img_size": 224}),
    ],
)  # fmt: skip
def test_published_shapes_give_published_models(keys: str, arch: str, expected: dict[str, Any], shared: Path) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in load_keys(shared, keys).items()}
    guessed = guess_arch(state)
    assert guessed == arch or build_empty(arch, {}).__class__ is build_empty(guessed or "", {}).__class__
    short = architecture_of(arch, state).name
    config = infer_config(Checkpoint(short, {"model.num_heads": 4}, state))
    assert {key: config[key] for key in expected} == expected
    built = build_empty(short, config).state_dict()
    assert {name: tuple(t.shape) for name, t in built.items()} == {name: tuple(t.shape) for name, t in state.items()}


def test_heads_outside_the_shapes_come_from_the_config() -> None:
    module = build_model("cellvit_256", {**CELLVIT, "num_heads": 4})
    state = module.state_dict()
    assert infer_config(Checkpoint("cellvit_256", {"model.num_heads": 4}, state))["num_heads"] == 4
    assert infer_config(Checkpoint("cellvit_256", {"model.num_heads": 7}, state))["num_heads"] == 1


def test_file_of_numpy_1_is_read(tmp_path: Path) -> None:
    new = publish(tmp_path / "new.pth", "CellViT256", model_of("CellViT256"))
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, data)
    assert read_checkpoint(old).arch == "cellvit_256"


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_named(zipped: bool, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    content = {"arch": "CellViT256", "model_state_dict": {}, "config": Evil(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"blocked: .*system") as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == 3
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 broken"])
def test_damaged_files_are_weights_errors(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_checkpoint(path)


def test_truncated_file_is_a_weights_error(tmp_path: Path) -> None:
    path = publish(tmp_path / "a.pth", "CellViT256", model_of("CellViT256"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"a\.pth"):
        read_checkpoint(path)


def test_dict_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"arch": "CellViT256", "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no `model_state_dict`"):
        read_checkpoint(tmp_path / "a.pth")


def test_bare_safetensors_are_recognised(tmp_path: Path) -> None:
    for name, (short, _) in MODELS.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(model_of(name).state_dict(), path)
        assert read_checkpoint(path).arch == short


def test_model_without_positions_is_recognised(tmp_path: Path) -> None:
    changes = {"use_pos_embed": False, "num_tissue_classes": 0, "num_nuclei_classes": 0}
    module = model_of("CellViTUNIAdapter", **changes)
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    config = infer_config(read_checkpoint(tmp_path / "a.safetensors"))
    assert {key: config[key] for key in changes} == changes
    load_strict(build_empty("cellvta", config), module.state_dict(), "a")


def test_missing_and_unexpected_are_all_listed() -> None:
    module = model_of("CellViT256")
    state = dict(module.state_dict())
    gone = ["hv_map_decoder.decoder0_header.2.weight", "encoder.norm.bias"]
    for name in gone:
        del state[name]
    state |= {"stray.a": torch.zeros(1), "stray.b": torch.zeros(2), "encoder.norm.weight": torch.zeros(3)}
    with pytest.raises(WeightsError) as caught:
        load_strict(build_empty(*MODELS["CellViT256"]), state, "x.pth")
    message = str(caught.value)
    assert message.startswith("x.pth does not fit CellViT: 2 missing: ")
    assert all(name in message for name in gone)
    assert "2 unexpected: stray.a, stray.b" in message
    assert "encoder.norm.weight (3,) for (64,)" in message


def test_half_precision_is_read_as_float32() -> None:
    module = model_of("CellViT256").half()
    loaded = load_strict(build_empty(*MODELS["CellViT256"]), module.state_dict(), "x")
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}


def test_data_parallel_prefix_is_dropped(tmp_path: Path) -> None:
    state = {f"module.{name}": t for name, t in model_of("CellViT256").state_dict().items()}
    torch.save({"arch": "CellViT256", "config": {}, "model_state_dict": state}, tmp_path / "a.pth")
    assert "encoder.pos_embed" in read_checkpoint(tmp_path / "a.pth").state


def test_nested_config_is_flattened(tmp_path: Path) -> None:
    nested = {"transformations": {"normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}}
    path = publish(tmp_path / "a.pth", "CellViT256", model_of("CellViT256"), config=nested)
    assert normalisation_of(read_checkpoint(path).config) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_classes_come_from_the_config_with_known_colours() -> None:
    prefix = "dataset_config.nuclei_types."
    config = {f"{prefix}background": 0, f"{prefix}Odd": 2, f"{prefix}Dead": 1}
    got = classes_of(config, 3)
    assert [c.name for c in got] == ["Dead", "Odd"]
    assert got[0].color == (254, 255, 0)


def test_classes_fall_back_by_count() -> None:
    assert classes_of({}, 6) == PANNUKE
    assert classes_of({}, 7) == CONIC
    assert classes_of({"dataset_config.nuclei_types.Only": 1}, 6) == PANNUKE
    assert classes_of({}, 0) == ()
    assert [c.name for c in classes_of({}, 4)] == ["class 1", "class 2", "class 3"]


def test_pixel_size_from_the_config() -> None:
    assert mpp_of({"data.magnification": 20}) == 0.5
    assert mpp_of({"magnification": 40, "data.mpp": 0.3}) == 0.3
    assert mpp_of({}) is None
