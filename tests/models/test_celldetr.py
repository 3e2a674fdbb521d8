"""CellDETR against the published network, and what its parts promise: boxes, modes, batches, windows, proposals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellslide.models.celldetr import CellDETR, CellDETRConfig, DetrOutput, contrastive_slots, parallel_slots
from cellslide.models.detr_layers import BoxDeformAttn, DecoderLayer, Memory
from tests.support.parity import fill, load_fixture, max_error, shapes_of

# The published networks differ by less than 5e-6 between single and double precision.
ATOL = 2e-5
SMALL = CellDETRConfig(
    backbone="resnet10t",
    backbone_args={"channels": [8, 8, 16, 16], "stem_width": 8},
    strides=(8, 16),
    norm="own",
    hidden_dim=16,
    n_heads=2,
    n_points=2,
    n_levels=3,
    enc_layers=1,
    dec_layers=2,
    ffn_dim=16,
    num_queries=12,
    num_classes=3,
    repr_layers=2,
    global_boxes=2,
)


def _small(**changes: Any) -> CellDETR:
    torch.manual_seed(0)
    model = fill(CellDETR(replace(SMALL, **changes)))
    assert isinstance(model, CellDETR)
    return model


@cache
def _published(shared: Path) -> tuple[CellDETR, DetrOutput]:
    """Return the network of both fixtures, and what it says of their two images."""
    described, _ = load_fixture(shared, "celldetr_r50_pannuke")
    mean, std = (np.array(described["config"][k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    images = [np.random.default_rng(seed).random((1, 3, 256, 256), dtype=np.float32) for seed in (0, 1)]
    model = fill(CellDETR(CellDETRConfig(projection=True)))
    assert isinstance(model, CellDETR)
    with torch.inference_mode():
        return model, model.detect(torch.from_numpy((np.concatenate(images) - mean) / std))


def _first(output: DetrOutput) -> DetrOutput:
    memory = replace(output.memory, tokens=output.memory.tokens[:1], valid_ratios=output.memory.valid_ratios[:1])
    return replace(output, logits=output.logits[:1], boxes=output.boxes[:1], memory=memory)


def test_detections_are_the_published_ones(shared: Path) -> None:
    _, arrays = load_fixture(shared, "celldetr_r50_pannuke")
    _, output = _published(shared)
    assert max_error(output.logits[:1], arrays["det_pred_logits"]) < ATOL
    assert max_error(output.boxes[:1], arrays["det_pred_boxes"]) < ATOL
    for i, layer in enumerate(output.aux):
        assert max_error(layer.logits[:1], arrays[f"det_aux{i}_logits"]) < ATOL
        assert max_error(layer.boxes[:1], arrays[f"det_aux{i}_boxes"]) < ATOL
    tokens = output.memory.tokens[:1]
    assert max_error(tokens[:, ::17], arrays["encoder_memory_every17"]) < ATOL


@torch.inference_mode()
def test_sequential_embeddings_and_classes_are_the_published_ones(shared: Path) -> None:
    _, arrays = load_fixture(shared, "celldetr_r50_pannuke")
    model, output = _published(shared)
    output = _first(output)
    seen = model.represent(output, output.boxes)
    assert max_error(seen.embedding[:, ::9], arrays["seq_repr_embedding_every9"]) < ATOL
    assert max_error(seen.logits, arrays["seq_class_logits"]) < ATOL


@torch.inference_mode()
def test_parallel_embeddings_and_classes_are_the_published_ones(shared: Path) -> None:
    _, arrays = load_fixture(shared, "celldetr_r50_pannuke")
    model, output = _published(shared)
    output = _first(output)
    kept = output.boxes[0][output.logits[0, :, 0].sigmoid() > float(arrays["par_test_threshold"])]
    slots = parallel_slots([kept], model.config.global_boxes)
    seen = model.represent(output, slots.boxes, slots.mask)
    assert slots.counts == (int(arrays["par_test_n_kept"]),)
    assert max_error(slots.boxes, arrays["par_test_instance_boxes"]) < ATOL
    assert max_error(seen.logits, arrays["par_test_class_logits"]) < ATOL
    assert max_error(seen.embedding[:, : len(kept)], arrays["par_test_repr_embedding"]) < ATOL


@torch.inference_mode()
def test_ragged_given_boxes_are_seen_as_published(shared: Path) -> None:
    _, arrays = load_fixture(shared, "celldetr_r50_pannuke")
    model, output = _published(shared)
    slots = parallel_slots([torch.from_numpy(arrays[f"given_boxes_img{i}"]) for i in (0, 1)], model.config.global_boxes)
    seen = model.represent(output, slots.boxes, slots.mask)
    assert max_error(slots.boxes, arrays["given_instance_boxes"]) == 0
    assert max_error(seen.logits, arrays["given_class_logits"]) < ATOL
    for i, count in enumerate(slots.counts):
        assert max_error(seen.embedding[i, :count], arrays[f"given_repr_embedding_img{i}"]) < ATOL


@torch.inference_mode()
def test_contrastive_slots_and_projections_are_the_published_ones(shared: Path) -> None:
    _, arrays = load_fixture(shared, "celldetr_contrastive")
    model, output = _published(shared)
    boxes, counts = torch.from_numpy(arrays["instance_boxes"]), [int(n) for n in arrays["instance_length"]]
    slots = contrastive_slots(
        [boxes[i, :n] for i, n in enumerate(counts)], [boxes[i, n:-1] for i, n in enumerate(counts)]
    )
    assert max_error(slots.boxes, arrays["instance_boxes"]) == 0
    assert np.array_equal(slots.mask.numpy(), arrays["attn_mask_head0"])
    seen = model.contrast(output, slots)
    assert max_error(seen.embedding[:, ::4], arrays["repr_embedding_every4"]) < ATOL
    assert max_error(seen.logits, arrays["contrastive_logits"]) < ATOL


def test_keys_and_parameters_are_the_published_ones(shared: Path) -> None:
    described, _ = load_fixture(shared, "celldetr_r50_pannuke")
    aliases = {f"detr.transformer.decoder.{name.removeprefix('detr.')}" for name in described["state_dict"]}
    wanted = {name: tuple(shape) for name, shape in described["state_dict"].items() if name not in aliases}
    assert len(described["state_dict"]) - len(wanted) == len(described["tied_keys_skipped"])
    for projection, key in ((False, "celldetr_r50_pannuke"), (True, "celldetr_contrastive")):
        with torch.device("meta"):
            model = CellDETR(CellDETRConfig(projection=projection))
        extra = {} if not projection else load_fixture(shared, key)[0]["extra_state_dict"]
        assert shapes_of(model) == wanted | {name: tuple(shape) for name, shape in extra.items()}
        assert sum(p.numel() for p in model.parameters()) == load_fixture(shared, key)[0]["n_params"]


def test_a_state_dict_with_aliases_loads_and_a_stranger_does_not() -> None:
    model = _small()
    state = dict(model.state_dict())
    aliases = {f"detr.transformer.decoder.{n.removeprefix('detr.')}": t for n, t in state.items() if "bbox_embed" in n}
    assert len(aliases) == 12
    model.load_state_dict(state | aliases, strict=True)
    with pytest.raises(RuntimeError, match="stranger"):
        model.load_state_dict(state | {"stranger": torch.zeros(1)}, strict=True)


def test_constrained_attention_sees_nothing_outside_its_box() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
    query, tokens = torch.randn(1, 1, 8), torch.randn(1, 256, 8)
    far = torch.ones(16, 16, dtype=torch.bool)
    # Bilinear sampling reaches the pixels beside the box as well.
    far[5:11, 5:11] = False
    other = torch.where(far.reshape(1, 256, 1), torch.randn(1, 256, 8), tokens)
    for constrained in (True, False):
        layer = BoxDeformAttn(8, 1, 2, 4, constrained)
        torch.nn.init.normal_(layer.sampling_offsets.weight, std=5.0)
        before, after = (
            layer.attend(query, boxes, Memory(t, ((16, 16),), torch.ones(1, 1, 2))) for t in (tokens, other)
        )
        assert torch.equal(before, after) is constrained


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    layer = BoxDeformAttn(8, 1, 2, 4)
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    padding[:, :, 6:] = True
    tokens, query, place = torch.randn(1, 64, 8), torch.randn(1, 5, 8), torch.full((1, 5, 2), 0.9)
    changed = torch.where(padding.reshape(1, 64, 1), tokens + 1, tokens)
    ratios = torch.tensor([[[0.75, 1.0]]])
    seen = [layer.attend(query, place, Memory(t, ((8, 8),), ratios, padding.flatten(1))) for t in (tokens, changed)]
    assert torch.equal(*seen)
    assert not torch.equal(*(layer.attend(query, place, Memory(t, ((8, 8),), ratios)) for t in (tokens, changed)))


@torch.inference_mode()
def test_boxes_are_of_the_image_whatever_its_padding() -> None:
    """The first boxes are learned places in 0..1 of the image, so they scale with it and not with what is padded."""
    model = CellDETR(replace(SMALL, dec_layers=1)).eval()
    for h, w in ((64, 96), (50, 70)):
        boxes = model(torch.zeros(1, 3, h, w))["boxes"][0]
        centres = model.detr.transformer.reference_points(model.detr.query_embed.weight[:, :16]).sigmoid()
        wanted = centres * torch.tensor([w, h])
        assert torch.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, wanted, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_scores_classes_and_embeddings_of_what_is_kept(mode: str) -> None:
    torch.manual_seed(1)
    images = torch.randn(3, 3, 64, 64)
    # Between the scores of these images, so that they keep different numbers of queries.
    scores = _small().detect(images).logits.sigmoid()
    middle = scores.flatten().sort().values[17:19]
    assert middle.diff() > 1e-4
    model = _small(mode=mode, score_threshold=float(middle.mean()))
    together = model(images)
    kept = together["scores"] > 0
    assert torch.equal(kept, scores[..., 0] > model.config.score_threshold)
    assert len(set(kept.sum(1).tolist())) > 1
    assert torch.allclose(together["class_prob"][kept].sum(-1), torch.ones(int(kept.sum())))
    for i in range(3):
        alone = model(images[i : i + 1])
        for name, value in alone.items():
            rows = (slice(None),) if name in ("boxes", "scores") else (kept[i],)
            assert torch.allclose(value[0][rows], together[name][i][rows], atol=1e-4), name
    _, seen = model.forward_sequential(images)
    if mode == "parallel":
        _, slots, seen = model.forward_parallel(images)
        assert slots.counts == tuple(kept.sum(1).tolist())
        wanted = torch.cat([seen.logits[i, :n] for i, n in enumerate(slots.counts)])
    else:
        wanted = seen.logits[kept]
    assert torch.allclose(together["scores"][kept], wanted.sigmoid().amax(-1), atol=1e-5)


@torch.inference_mode()
def test_an_image_without_nuclei_has_none() -> None:
    found = _small(mode="parallel", score_threshold=0.9999)(torch.randn(1, 3, 64, 64))
    assert not found["scores"].any()
    assert all(t.isfinite().all() for t in found.values())


@torch.inference_mode()
def test_a_head_that_types_by_itself_leaves_the_first_logit_out() -> None:
    model = _small(det_classes=4, first_class=1, repr_layers=0, num_classes=0, query_fraction=0.5, score_threshold=0.01)
    x = torch.randn(1, 3, 64, 64)
    found, output = model(x), model.detect(x)
    assert model.n_types == 3 and "decouple_decoder" not in dict(model.named_children())
    best = output.logits[..., 1:].sigmoid().amax(-1)
    assert int((found["scores"] > 0).sum()) == 6
    assert torch.equal(found["scores"].amax(-1), best.amax(-1))
    assert torch.equal(found["class_prob"].argmax(-1), output.logits[..., 1:].argmax(-1))
    assert torch.equal(found["embedding"], output.hidden)


@torch.inference_mode()
def test_windows_share_the_centres_of_a_large_image() -> None:
    model = _small(window_px=64, window_stride_px=48, score_threshold=0.01)
    image = torch.randn(2, 3, 64, 150)
    found = model(image)
    # Windows at 0, 48 and 86; borders halve the overlaps.
    assert found["boxes"].shape == (2, 36, 4)
    for i, (start, low, high) in enumerate(((0, -999, 56), (48, 56, 99), (86, 99, 999))):
        alone = model(image[..., start : start + 64])
        rows = slice(12 * i, 12 * i + 12)
        boxes = alone["boxes"] + torch.tensor([start, 0, start, 0])
        x = (boxes[..., 0] + boxes[..., 2]) / 2
        scores = torch.where((x >= low) & (x < high), alone["scores"], torch.zeros(()))
        assert torch.allclose(found["boxes"][:, rows], boxes, atol=1e-4)
        assert torch.allclose(found["scores"][:, rows], scores, atol=1e-4)
        assert torch.allclose(found["embedding"][:, rows], alone["embedding"], atol=1e-3)


@torch.inference_mode()
def test_two_stages_begin_at_the_best_proposals() -> None:
    torch.manual_seed(0)
    model = CellDETR(replace(SMALL, two_stage=True, proposal_size=0.2)).eval()
    assert not hasattr(model.detr, "query_embed") and len(model.detr.class_embed) == 3
    output = model.detect(torch.randn(2, 3, 64, 64))
    assert output.proposals is not None
    assert output.proposals.boxes.shape == (2, 8 * 8 + 4 * 4 + 2 * 2, 4)
    best = output.proposals.logits[..., 0].topk(12, dim=1).indices
    wanted = output.proposals.boxes.gather(1, best[..., None].expand(-1, -1, 4))
    # Untrained heads change no box.
    assert torch.allclose(output.boxes, wanted, atol=1e-4)
    grid = output.proposals.boxes[0, :64].reshape(8, 8, 4)
    assert torch.allclose(grid[2, 5], torch.tensor([5.5 / 8, 2.5 / 8, 0.2, 0.2]), atol=1e-5)


@torch.inference_mode()
def test_fewer_tokens_than_queries_give_fewer_boxes() -> None:
    found = _small(two_stage=True, num_queries=500)(torch.randn(1, 3, 64, 64))
    assert found["boxes"].shape == (1, 84, 4)


def test_gradients_reach_every_parameter_but_the_idle_attention() -> None:
    torch.manual_seed(0)
    model = CellDETR(replace(SMALL, two_stage=True, projection=True))
    for head in model.detr.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    x = torch.randn(2, 3, 64, 64)
    output, seen = model.forward_sequential(x)
    slots = contrastive_slots([b[:3] for b in output.boxes.detach()], [b[3:6] for b in output.boxes.detach()])
    assert output.proposals is not None
    finite = output.proposals.boxes.clamp(0, 1)
    parts: list[Tensor] = [output.boxes, output.logits, finite, output.proposals.logits, seen.logits]
    parts += [layer.boxes for layer in output.aux] + [layer.logits for layer in output.aux]
    parts.append(model.contrast(output, slots).logits)
    sum(t.square().mean() for t in parts).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith(("decouple_decoder.inital_layer.self_attn", "decouple_decoder.inital_layer.norm2"))
               for name in idle), idle  # fmt: skip
    assert idle and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_classes_do_not_move_boxes() -> None:
    """Boxes are taken as they are by the representation decoder, so a class loss says nothing of where a nucleus is."""
    model = CellDETR(SMALL)
    _, seen = model.forward_sequential(torch.randn(1, 3, 64, 64))
    seen.logits.square().mean().backward()
    assert all(p.grad is None for p in model.detr.bbox_embed.parameters())
    assert model.detr.transformer.level_embed.grad is not None


def test_masked_boxes_do_not_change_what_others_see() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(8, 8, 1, 2, 2, 0.0)
    x = torch.randn(1, 4, 8)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :, 3] = True
    other = torch.cat([x[:, :3], torch.randn(1, 1, 8)], dim=1)
    assert torch.allclose(layer.compare(x, None, mask)[:, :3], layer.compare(other, None, mask)[:, :3], atol=1e-6)
    assert not torch.allclose(layer.compare(x, None)[:, :3], layer.compare(other, None)[:, :3], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 18}, "hidden_dim 18"),
        ({"n_levels": 1}, "n_levels 1"),
        ({"mode": "both"}, "mode 'both'"),
        ({"first_class": 1}, "first_class 1"),
        ({"det_classes": 4}, "det_classes"),
        ({"query_fraction": 0.0}, "query_fraction"),
        ({"window_stride_px": 8}, "window_stride_px 8"),
        ({"mode": "parallel", "global_boxes": 0}, "global_boxes 0"),
        ({"backbone": "resnet9000"}, "resnet9000"),
        ({"strides": (8, 64)}, "64"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CellDETR(replace(SMALL, **changes))
