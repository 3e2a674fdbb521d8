"""Published CellDETR files: names, sizes that the tensors tell, strict loading; and the Swin of the first work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.errors import WeightsError
from cellslide.models import build_model
from cellslide.models.celldetr import CellDETR, CellDETRConfig
from cellslide.models.celldetr_layout import config_of, is_celldetr, own_names
from cellslide.models.checkpoint import build_empty, infer_config, load_strict, read_checkpoint
from cellslide.models.detr import PaddedSwinBlock
from tests.support.parity import fill, load_fixture, shapes_of

Shapes = dict[str, tuple[int, ...]]
TINY_SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 3}
SMALL: dict[str, Any] = {
    "backbone": "swin_tiny_patch4_window7_224", "backbone_args": TINY_SWIN, "strides": [8, 16, 32], "norm": "own",
    "feature_norm": True, "hidden_dim": 16, "n_heads": 2, "enc_layers": 1, "dec_layers": 1, "ffn_dim": 16,
    "two_stage": True, "num_queries": 9, "det_classes": 6, "first_class": 1, "num_classes": 0, "repr_layers": 0,
    "query_fraction": 1 / 3,
}  # fmt: skip


def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (n_out, n_in), **({f"{name}.bias": (n_out,)} if bias else {})}


def norm(name: str, n: int) -> Shapes:
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def swin(dim: int, depths: tuple[int, ...], window: int, stages: tuple[int, ...]) -> Shapes:
    """Return names and shapes of the original Swin with a norm behind each of the `stages` that it gives."""
    found = {
        "patch_embed.proj.weight": (dim, 3, 4, 4),
        "patch_embed.proj.bias": (dim,),
        **norm("patch_embed.norm", dim),
    }
    for i, depth in enumerate(depths):
        c, heads = dim * 2**i, dim // 32 * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            found |= norm(f"{block}norm1", c) | norm(f"{block}norm2", c)
            found[f"{block}attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            found[f"{block}attn.relative_position_index"] = (window**2, window**2)
            found |= linear(f"{block}attn.qkv", c, 3 * c) | linear(f"{block}attn.proj", c, c)
            found |= linear(f"{block}mlp.fc1", c, 4 * c) | linear(f"{block}mlp.fc2", 4 * c, c)
        if i < 3:
            found |= linear(f"layers.{i}.downsample.reduction", 4 * c, 2 * c, bias=False)
            found |= norm(f"layers.{i}.downsample.norm", 4 * c)
    for i in stages:
        found |= norm(f"norm{i}", dim * 2**i)
    return found


def attention(name: str, points: int = 2 * 8 * 4 * 4) -> Shapes:
    found = linear(f"{name}.sampling_offsets", 256, points) | linear(f"{name}.attention_weights", 256, points // 2)
    return found | linear(f"{name}.value_proj", 256, 256) | linear(f"{name}.output_proj", 256, 256)


def transformer(layers: int) -> Shapes:
    """Return names and shapes of the first work's transformer: two stages, `layers` each way."""
    found: Shapes = {"level_embed": (4, 256)}
    for i in range(layers):
        for side, norms in (("encoder", 2), ("decoder", 3)):
            name = f"{side}.layers.{i}."
            found |= attention(f"{name}{'self_attn' if side == 'encoder' else 'cross_attn'}")
            found |= linear(f"{name}linear1", 256, 1024) | linear(f"{name}linear2", 1024, 256)
            for n in range(1, norms + 1):
                found |= norm(f"{name}norm{n}", 256)
        found |= {
            f"decoder.layers.{i}.self_attn.in_proj_weight": (768, 256),
            f"decoder.layers.{i}.self_attn.in_proj_bias": (768,),
            **linear(f"decoder.layers.{i}.self_attn.out_proj", 256, 256),
        }
    found |= linear("enc_output", 256, 256) | norm("enc_output_norm", 256)
    return found | linear("pos_trans", 512, 512) | norm("pos_trans_norm", 512)


def first_work(dim: int, depths: tuple[int, ...], window: int, stages: tuple[int, ...], layers: int) -> Shapes:
    """Return names and shapes of a file of the first work, the heads a second time in the decoder."""
    found = {f"backbone.0.body.{name}": shape for name, shape in swin(dim, depths, window, stages).items()}
    found |= {f"transformer.{name}": shape for name, shape in transformer(layers).items()}
    for place in ("", "transformer.decoder."):
        for i in range(layers + 1):
            found |= linear(f"{place}class_embed.{i}", 256, 6)
            for j, n_out in enumerate((256, 256, 4)):
                found |= linear(f"{place}bbox_embed.{i}.layers.{j}", 256, n_out)
    for i in range(4):
        c = dim * 2 ** stages[i] if i < len(stages) else dim * 8
        side = 1 if i < len(stages) else 3
        found |= {f"input_proj.{i}.0.weight": (256, c, side, side), f"input_proj.{i}.0.bias": (256,)}
        found |= norm(f"input_proj.{i}.1", 256)
    return found


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        (
            (96, (2, 2, 6, 2), 7, (1, 2, 3), 3),
            {"backbone": "swin_tiny_patch4_window7_224", "strides": (8, 16, 32), "num_queries": 600, "enc_layers": 3},
        ),
        (
            (96, (2, 2, 6, 2), 7, (0, 1, 2, 3), 3),
            {"backbone": "swin_tiny_patch4_window7_224", "strides": (4, 8, 16, 32), "num_queries": 600},
        ),
        (
            (192, (2, 2, 18, 2), 12, (0, 1, 2, 3), 6),
            {"backbone": "swin_large_patch4_window12_384", "num_queries": 900, "dec_layers": 6},
        ),
    ],
)
def test_files_of_the_first_work_tell_their_sizes_and_fit(layout: Any, wanted: dict[str, Any]) -> None:
    published = on_meta(first_work(*layout))
    assert is_celldetr(published)
    state = own_names(published)
    config = config_of(state, {})
    assert {key: config[key] for key in wanted} == wanted
    assert (config["det_classes"], config["first_class"], config["repr_layers"], config["n_heads"]) == (6, 1, 0, 8)
    with torch.device("meta"):
        model = CellDETR(CellDETRConfig(**config))
    assert shapes_of(model) == {name: tuple(t.shape) for name, t in state.items()}
    assert model.n_types == 5


def test_the_second_work_tells_its_sizes(shared: Path) -> None:
    described, _ = load_fixture(shared, "celldetr_r50_pannuke")
    extra = load_fixture(shared, "celldetr_contrastive")[0]["extra_state_dict"]
    for more in ({}, extra):
        state = own_names(on_meta({name: tuple(shape) for name, shape in (described["state_dict"] | more).items()}))
        told = CellDETRConfig(**config_of(state, {}))
        assert told == CellDETRConfig(mode="parallel", window_px=256, projection=bool(more))


def test_a_swin_below_the_second_work_is_named_alike() -> None:
    theirs, ours = "backbone.0.body.", "detr.backbone.0.body."
    names = {
        f"detr.{theirs}layers.0.blocks.1.attn.qkv.weight": f"{ours}layers_0.blocks.1.attn.qkv.weight",
        f"{theirs}layers.0.downsample.norm.bias": f"{ours}layers_1.downsample.norm.bias",
        f"{theirs}layers.2.downsample.reduction.weight": f"{ours}layers_3.downsample.reduction.weight",
        f"{theirs}norm3.weight": "detr.backbone.0.norms.3.weight",
        f"{theirs}layer3.0.downsample.0.weight": f"{ours}layer3.0.downsample.0.weight",
        "xy_project.weight": "xy_project.weight",
    }
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    assert own_names(tensors) == {names[name]: tensor for name, tensor in tensors.items()}
    assert own_names(own_names(tensors)) == own_names(tensors)


def test_a_file_loads_strictly_and_gives_what_was_saved(tmp_path: Path) -> None:
    model = build_model("celldetr", {**SMALL, "backbone": "resnet18", "backbone_args": {}, "feature_norm": False,
                                     "strides": [8, 16], "n_levels": 3})  # fmt: skip
    fill(model)
    published = {name.removeprefix("detr."): t for name, t in model.state_dict().items()}
    published |= {f"transformer.decoder.{n}": t for n, t in published.items() if n.startswith(("class_", "bbox_"))}
    torch.save({"model": published, "epoch": 3}, tmp_path / "celldetr.pth")
    checkpoint = read_checkpoint(tmp_path / "celldetr.pth")
    assert checkpoint.arch == "celldetr"
    config = {**infer_config(checkpoint), "num_queries": 9, "window_px": 0}
    assert (config["backbone"], config["norm"], config["strides"]) == ("resnet18", "own", (8, 16))
    loaded = load_strict(build_empty("celldetr", config), checkpoint.state, "file")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for name, value in model(x).items():
            assert torch.equal(value, loaded(x)[name]), name
    del published["input_proj.0.0.bias"]
    torch.save({"model": published}, tmp_path / "damaged.pth")
    with pytest.raises(WeightsError, match=r"1 missing: detr\.input_proj\.0\.0\.bias"):
        load_strict(build_empty("celldetr", config), read_checkpoint(tmp_path / "damaged.pth").state, "file")


@torch.inference_mode()
def test_a_swin_that_was_built_empty_keeps_its_constants() -> None:
    model = fill(build_model("celldetr", SMALL))
    loaded = load_strict(build_empty("celldetr", SMALL), model.state_dict(), "weights")
    x = torch.randn(1, 3, 96, 64)
    before, after = model(x), loaded(x)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["embedding"].shape == (1, 9, 16) and before["class_prob"].shape == (1, 9, 5)


def shifted_attention(block: nn.Module, x: Tensor, window: int, shift: int) -> Tensor:
    """Return what the original block adds to one map (H, W, C): token by token, padded before it is shifted."""
    attention = block.attn
    h, w, c = x.shape
    x = F.pad(block.norm1(x), (0, 0, 0, -w % window, 0, -h % window))
    rows, columns = x.shape[:2]
    heads = attention.num_heads
    q, k, v = attention.qkv(x).reshape(rows, columns, 3, heads, c // heads).unbind(2)
    out = torch.zeros(rows, columns, heads, c // heads)

    def place(i: int, length: int) -> tuple[int, int, int]:
        """Return a token's window and place in it after the shift, and the region it came from."""
        at = (i - shift) % length
        region = 0 if at < length - window else (1 if at < length - shift else 2)
        return at // window, at % window, region if shift else 0

    places = {(i, j): (place(i, rows), place(j, columns)) for i in range(rows) for j in range(columns)}
    for (i, j), (row, column) in places.items():
        near = [o for o, (r, s) in places.items() if (r[0], s[0]) == (row[0], column[0])]
        logits = []
        for o in near:
            r, s = places[o]
            offset = (row[1] - r[1] + window - 1) * (2 * window - 1) + column[1] - s[1] + window - 1
            same = (r[2], s[2]) == (row[2], column[2])
            scaled = (q[i, j] * k[o]).sum(-1) * (c // heads) ** -0.5
            logits.append(scaled + attention.relative_position_bias_table[offset] + (0.0 if same else -100.0))
        share = torch.stack(logits).softmax(0)
        out[i, j] = sum(p[:, None] * v[o] for p, o in zip(share, near, strict=True))
    return attention.proj(out.flatten(2))[:h, :w]


@torch.inference_mode()
def test_blocks_pad_before_they_shift() -> None:
    """Maps of published sizes are never whole windows, so the order decides what each window holds."""
    model = fill(build_model("celldetr", SMALL))
    assert isinstance(model, CellDETR)
    stage = model.detr.backbone[0].body["layers_1"]
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 16)
    for block, shift in zip(stage.blocks, (0, 1), strict=True):
        assert isinstance(block, PaddedSwinBlock)
        nn.init.normal_(block.attn.relative_position_bias_table)
        seen = x + shifted_attention(block, x[0], 3, shift)
        wanted = seen + block.mlp(block.norm2(seen))
        assert torch.allclose(block(x), wanted, atol=1e-5)
