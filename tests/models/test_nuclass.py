"""NuClass: the published numbers and sizes, the organ's effect, the gate, and networks of any size by the same code."""

from __future__ import annotations

import json
import math
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.backbones import build_empty, create_backbone, depths, features, to_timm, tokens, width_of
from cellslide.models.checkpoint import load_strict
from cellslide.models.nuclass import NuClass, NuClassConfig, NuClassOutput, gate_statistics
from cellslide.models.nuclass_layout import canonical_state, fit_backbones, infer_config
from tests.support.published_nuclass import OWN, SIZES, images, small_model, to_hf

ATOL = 1e-5
ORGANS = torch.tensor([0, 1, 0])


def recipe_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return what the fixture's recipe fills the tensor `name` with; biases of q and v are 0 as in released weights."""
    if name.endswith(("q_proj.bias", "v_proj.bias")):
        return torch.zeros(shape)
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return torch.from_numpy(z * np.float32(1 / math.sqrt(np.prod(shape[1:]))))
    z = z * np.float32(0.05)
    return torch.from_numpy(1 + z if name.endswith(".weight") else z)


def normalised(seed: int, side: int, described: dict[str, Any]) -> Tensor:
    x = np.random.default_rng(seed).random((3, 3, side, side), dtype=np.float32)
    mean, std = (np.array(described[k], np.float32)[:, None, None] for k in ("mean", "std"))
    return torch.from_numpy((x - mean) / std)


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[NuClass, dict[str, Any], dict[str, np.ndarray]]:
    described = json.loads((shared / "parity" / "nuclass_gate_small.json").read_text())
    with np.load(shared / "parity" / "nuclass_gate_small.npz") as file:
        arrays = dict(file)
    tensors = {name: recipe_tensor(name, tuple(shape)) for name, shape in described["state_dict"].items()}
    state = canonical_state(tensors, {}, "fixture")
    config = NuClassConfig.of(infer_config(state, {}))
    module = build_empty(lambda: NuClass(config))
    load_strict(module, fit_backbones(module, state), "fixture")
    return module, described["config"], arrays


@torch.inference_mode()
def test_outputs_equal_the_published_ones(published: Any) -> None:
    module, described, arrays = published
    crops, contexts = normalised(0, 224, described), normalised(1, described["ctx_size"], described)
    organ = torch.from_numpy(arrays["organ_ids"])
    first, v, u = module.local_path(crops, organ), module.context_vector(contexts), module.crop_vector(crops)
    second = module.global_path(None, v, u)
    gate = module.gate(first.features, second.fused, first.logits, second.logits)
    out = NuClassOutput(first.logits, first.features, second.logits, second.fused, gate)
    got = {
        "uni_feature_A": first.raw, "uni_feature_B": u, "dino_pooler": v, "local_feature_post_film": first.features,
        "local_logits": first.logits, "global_fused": second.fused, "global_logits": second.logits,
        "gate": out.gate, "p_mix": out.probabilities,
        "local_logits_img0_all_organs": module.modelA.classify(first.raw[:1].expand(8, -1), torch.arange(8)).logits,
    }  # fmt: skip
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor.numpy(), arrays[name], rtol=0, atol=ATOL, err_msg=name)


@torch.inference_mode()
def test_gate_equals_the_published_one_on_synthetic_rows(published: Any) -> None:
    module, _, arrays = published
    names = ("syn_local_feature", "syn_global_fused", "syn_logits_local", "syn_logits_global")
    rows = [torch.from_numpy(arrays[name]) for name in names]
    for name, tensor in (
        ("syn_gate_input", module.gate_inputs(*rows)),
        ("syn_gate_logit", module.gate_logit(*rows)),
        ("syn_gate", module.gate(*rows)),
    ):
        np.testing.assert_allclose(tensor.numpy(), arrays[name], rtol=0, atol=ATOL, err_msg=name)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_published() -> None:
    """Table A5 of the paper; path global counts its copy of path local and the gate that it is trained with."""
    with torch.device("meta"):
        whole = NuClass()
        alone = NuClass(NuClassConfig(share_backbone=True, gate=False, local_aware_gate=True))
    paths = [count_parameters(path) for path in (whole.modelA, whole.modelB)]
    assert paths[0] == 683_392_656
    assert count_parameters(alone) == 989_168_033
    assert count_parameters(whole) - sum(paths) == 417_409
    assert sum(paths) == 1_670_299_296
    assert count_parameters(whole.context_backbone) == 303_129_600


def test_registry_builds_it() -> None:
    module = build_model("NuClass", {**OWN, "num_classes": 3, "num_organs": 1})
    assert isinstance(module, NuClass)
    assert module.modelA.tissue_embedder.num_embeddings == 2


@torch.inference_mode()
def test_unknown_organ_modulates_nothing() -> None:
    module = small_model()
    crops = images(28, 1)
    unknown, first, second = (module.local_path(crops, torch.tensor([organ])) for organ in (-1, 0, 1))
    assert torch.equal(unknown.features, module.modelA.feat_norm(unknown.raw))
    assert not torch.allclose(unknown.features, first.features)
    assert not torch.allclose(first.logits, second.logits)


@torch.inference_mode()
def test_learned_unknown_organ_has_its_own_row() -> None:
    module = small_model({"learned_unknown": True})
    crops = images(28, 1)
    unknown = module.local_path(crops, torch.tensor([-1])).features
    assert torch.equal(unknown, module.local_path(crops, torch.tensor([2])).features)
    assert not torch.allclose(unknown, module.modelA.feat_norm(module.modelA.encode(crops)))


@torch.inference_mode()
def test_classifier_without_organs_has_no_film() -> None:
    module = small_model({"context": None}, organs=0)
    assert not any("tissue" in name for name in module.state_dict())
    out = module.local_path(images(28), torch.tensor([-1, -1, -1]))
    assert torch.equal(out.features, module.modelA.feat_norm(out.raw))


def test_film_begins_as_no_change() -> None:
    module = NuClass(NuClassConfig.of({**OWN, "context": None}, 3, 2)).eval()
    out = module.local_path(images(32, 2), torch.tensor([0, 1]))
    assert torch.equal(out.features, module.modelA.feat_norm(out.raw))


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other() -> None:
    module = small_model()
    crops, contexts = images(28), images(32, seed=2)
    whole = module(crops, contexts, ORGANS)
    for i in range(3):
        one = module(crops[i : i + 1], contexts[i : i + 1], ORGANS[i : i + 1])
        torch.testing.assert_close(one.probabilities, whole.probabilities[i : i + 1], atol=1e-6, rtol=0)


@torch.inference_mode()
def test_mix_is_between_the_paths() -> None:
    module = small_model()
    out = module(images(28), images(32), ORGANS)
    local, global_ = out.logits_local.softmax(1), out.logits_global.softmax(1)
    g = out.gate[:, None]
    torch.testing.assert_close(out.probabilities, (1 - g) * local + g * global_)
    assert bool(((g > 0) & (g < 1)).all())


@torch.inference_mode()
def test_equal_backbones_are_shared_and_change_nothing() -> None:
    module = small_model()
    crops, contexts = images(28), images(32)
    module.share_equal_backbones()
    assert not module.shares_backbone
    module.modelB.uni_encoder.load_state_dict(module.modelA.uni_encoder.state_dict())
    before = module(crops, contexts, ORGANS)
    module.share_equal_backbones()
    assert module.shares_backbone and module.config.share_backbone
    assert not any(name.startswith("modelB.uni_encoder") for name in module.state_dict())
    assert module.global_backbone is module.local_backbone
    torch.testing.assert_close(module(crops, contexts, ORGANS).probabilities, before.probabilities, atol=0, rtol=0)
    v = module.context_vector(contexts)
    raw = module.local_path(crops, ORGANS).raw
    assert torch.equal(module.global_path(None, v, raw).logits, module.global_path(crops, v).logits)


@torch.inference_mode()
def test_context_can_be_dropped_row_by_row() -> None:
    module = small_model()
    u, v = module.crop_vector(images(28)), module.context_vector(images(32))
    width = module.config.proj_width
    whole, half = module.global_path(None, v, u).fused, module.global_path(None, v, u, 0.5).fused
    dropped = module.global_path(None, v, u, torch.tensor([1.0, 0.0, 1.0])).fused
    torch.testing.assert_close(half[:, width:], whole[:, width:] / 2)
    assert torch.equal(half[:, :width], whole[:, :width])
    assert torch.equal(dropped[[0, 2]], whole[[0, 2]])
    assert not dropped[1, width:].any()


@torch.inference_mode()
def test_one_path_alone() -> None:
    local = small_model({"context": None})
    assert not local.has_global and not local.shares_backbone and local.context_patch_px == 1
    out = local(images(28), None, ORGANS)
    assert torch.equal(out.probabilities, out.logits_local.softmax(1))
    with pytest.raises(UsageError, match="local path only"):
        local.context_vector(images(32))
    alone = small_model({"share_backbone": True, "gate": False})
    out = alone(images(28), images(32), ORGANS)
    assert torch.equal(out.gate, torch.ones(3))
    torch.testing.assert_close(out.probabilities, out.logits_global.softmax(1))
    with pytest.raises(ValueError, match="crops or their vectors"):
        alone.global_path(None, torch.zeros(3, 64))


def test_statistics_of_known_rows() -> None:
    sure, even = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.full((1, 4), 0.25)
    expected = torch.tensor([[1.0, 0.25, 0.0, 1.0, 1.0, 0.0, -0.75, 0.75]])
    torch.testing.assert_close(gate_statistics(sure, even), expected)


def test_every_parameter_is_in_one_group_and_depth_grows_towards_the_input() -> None:
    module = small_model()
    groups = module.parameter_groups()
    grouped = [id(p) for group in groups for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    depth = {id(p): (group.part, group.depth) for group in groups for p in group.parameters}
    uni, dino = module.local_backbone, module.context_backbone
    assert depth[id(uni.patch_embed.proj.weight)] == ("local_backbone", 2)
    assert depth[id(uni.blocks[0].attn.qkv.weight)] == ("local_backbone", 1)
    assert depth[id(uni.blocks[1].attn.qkv.weight)] == ("local_backbone", 0)
    assert depth[id(dino.blocks[1].attn.qkv.weight)] == ("context_backbone", 0)
    assert depth[id(module.modelB.proj_ctx[1].weight)] == ("global_head", 0)
    assert depth[id(module.gate_mlp[0].weight)] == ("gate", 0)


def test_shared_backbone_is_grouped_once() -> None:
    module = small_model({"share_backbone": True})
    parts = [part for part, _ in module.parts()]
    assert parts == ["local_backbone", "local_head", "context_backbone", "global_head", "gate"]


SWIN = {"img_size": 64, "window_size": 2, "depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        ("convnext_femto", {}),
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "patch_size": 32}),
    ],
)
@torch.inference_mode()
def test_any_backbone_of_timm_gives_one_vector(name: str, args: dict[str, Any]) -> None:
    backbone = create_backbone(name, args).eval()
    x = images(64, 2)
    vector, places = features(backbone, x, "avg"), tokens(backbone, x)
    empty = load_strict(build_empty(partial(create_backbone, name, args)), backbone.state_dict(), name)
    assert torch.equal(features(empty, x, "avg"), vector)
    assert vector.shape == (2, width_of(backbone))
    assert places.shape[:2] == (2, 4)
    assert min(depths(backbone).values()) == 0 < max(depths(backbone).values())


@torch.inference_mode()
def test_patch_mean_leaves_class_and_register_tokens_out() -> None:
    backbone = small_model().context_backbone
    x = images(48, 2)
    out = backbone.forward_features(x)
    assert out.shape[1] == 1 + 4 + 9
    torch.testing.assert_close(features(backbone, x, "mean"), out[:, 5:].mean(1))
    assert torch.equal(tokens(backbone, x), out[:, 5:])
    assert torch.equal(features(backbone, x, "cls"), out[:, 0])


def test_wrong_backbones_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean .*resnet18"):
        create_backbone("resnet81")
    with pytest.raises(ValueError, match="resnet10t with pool cls"):
        create_backbone("resnet10t", pool="cls")
    with pytest.raises(ValueError, match="pool 'sum'"):
        create_backbone("resnet10t", pool="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mlp_layer 'other'"):
        create_backbone("uni2_h", {"mlp_layer": "other", "depth": 1})


def test_config_reads_back() -> None:
    config = NuClassConfig.of(OWN, 3, 2)
    assert NuClassConfig.of(config.as_dict(), 3, 2) == config
    local = NuClassConfig.of({"local": "resnet10t", "context": None}, 2, 0)
    assert local.local.resolved_pool == "avg" and local.context is None
    with pytest.raises(TypeError, match="contxt"):
        NuClassConfig.of({"contxt": None})
    with pytest.raises(ValueError, match="at least 2"):
        NuClassConfig.of({}, num_classes=1)


@torch.inference_mode()
def test_model_built_without_memory_equals_one_built_with_it() -> None:
    for sizes in (OWN, SIZES):
        make = partial(NuClass, NuClassConfig.of(sizes, 3, 2))
        plain = make().eval()
        empty = build_empty(make)
        assert all(p.is_meta for p in empty.parameters())
        load_strict(empty, plain.state_dict(), "model")
        crops, contexts = images(28), images(32)
        assert torch.equal(empty(crops, contexts, ORGANS).probabilities, plain(crops, contexts, ORGANS).probabilities)


def meta_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return DINOv3 tensors as Meta's own files have them: one bias of which the third of k is masked."""
    found: dict[str, Tensor] = {"rope_embed.periods": torch.ones(16)}
    for name, tensor in state.items():
        name = name.replace("reg_token", "storage_tokens").replace("gamma_", "ls")
        name = name + ".gamma" if name.endswith((".ls1", ".ls2")) else name
        if name.endswith("q_bias"):
            stem = name.removesuffix("q_bias")
            found[stem + "qkv.bias"] = torch.cat([tensor, torch.full_like(tensor, 7.0), state[stem + "v_bias"]])
            found[stem + "qkv.bias_mask"] = torch.ones(3 * len(tensor))
        elif name == "mask_token":
            found[name] = tensor[0]
        elif not name.endswith("v_bias"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("spelling", ["layer", "model.layer", "meta", "timm"])
def test_dinov3_is_read_under_every_spelling(spelling: str) -> None:
    backbone = small_model().context_backbone
    state = backbone.state_dict()
    named = {"meta": meta_names, "timm": dict}.get(spelling, lambda s: to_hf(s, spelling))(state)
    fitted = to_timm(named, backbone)
    assert set(fitted) == set(state)
    assert all(torch.equal(fitted[name], state[name]) for name in state)


def test_dinov3_of_timm_lacks_only_what_is_zero() -> None:
    backbone = small_model().context_backbone
    state = backbone.state_dict()
    lean = {n: t for n, t in state.items() if n != "mask_token" and not n.endswith(("q_bias", "v_bias"))}
    fitted = to_timm(lean, backbone)
    assert set(fitted) == set(state)
    assert not fitted["mask_token"].any() and not fitted["blocks.0.attn.q_bias"].any()


def test_biases_without_a_place_are_left_out_only_where_they_are_zero() -> None:
    """timm's plain DINOv3 has no biases of q and v; released weights have them, all zero."""
    with torch.device("meta"):
        plain = create_backbone("vit_large_patch16_dinov3", {"embed_dim": 64, "depth": 2, "num_heads": 1}, "cls")
    state = to_hf(small_model().context_backbone.state_dict())
    zeroed = {name: torch.zeros_like(t) if name.endswith("_proj.bias") and "attention" in name and "o_proj" not in name
              else t for name, t in state.items()}  # fmt: skip
    assert set(to_timm(zeroed, plain)) == set(plain.state_dict())
    left = set(to_timm(state, plain)) - set(plain.state_dict())
    assert left == {f"blocks.{i}.attn.{w}_bias" for i in (0, 1) for w in "qv"}


def test_classifier_of_a_timm_file_is_left_out() -> None:
    backbone = create_backbone("resnet10t")
    state = {**backbone.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    assert set(to_timm(state, backbone)) == set(backbone.state_dict())
