"""Training of CellDETR: boxes of masks, matching, losses, noise, contrast, modes, resume, files, starting weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import UsageError, WeightsError
from cellslide.models.celldetr import parallel_slots
from cellslide.train.celldetr.data import MarkedImage, boxed, collate, label_boxes, load_box_sets
from cellslide.train.celldetr.losses import (
    centred,
    corners,
    empty_loss,
    focal,
    giou,
    info_nce,
    label_loss,
    match,
    match_cost,
    noise_boxes,
    set_losses,
)
from cellslide.train.celldetr.recipe import CellDETRRecipe, MatcherConfig
from cellslide.train.celldetr.scores import BoxScores
from cellslide.train.celldetr.slots import denoising_slots, noised_slots
from cellslide.train.celldetr.training import (
    CellDETRTraining,
    known_at,
    load_backbone,
    load_init,
    rate_share,
)
from cellslide.train.export import trained_entry
from cellslide.train.fit import fit
from cellslide.train.recipe import build, load_recipe
from cellslide.train.task import FitOptions, build_recipe
from cellslide.train.tasks import celldetr
from cellslide.types import DetectDecode
from tests.support.published_efficientnet import LITE, published_efficientnet
from tests.support.train_sets import write_set

TINY = {
    "backbone": "resnet10t", "backbone_args": {"channels": [8, 8, 16, 16], "stem_width": 8}, "strides": [8, 16],
    "n_levels": 2, "norm": "own", "hidden_dim": 16, "n_heads": 2, "n_points": 2, "enc_layers": 1, "dec_layers": 2,
    "ffn_dim": 16, "num_queries": 12, "two_stage": True, "repr_layers": 2, "global_boxes": 2, "dropout": 0.1,
    "proposal_size": 0.15,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "mpp": 0.5, "crop_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 4,
    "model": {"config": TINY, "classes": ["a", "b"]},
    "optim": {"lr": 1e-3, "warmup_steps": 2, "ema": 0.9},
    "loss": {"contrastive": 0.1},
    "datasets": {"set": {"val": {"patients": ["C"]}}},
}  # fmt: skip
WEIGHTS = MatcherConfig()


def _recipe(**changes: Any) -> CellDETRRecipe:
    return build(CellDETRRecipe, {**RECIPE, **changes})


def _run(dataset: Path, folder: Path, recipe: CellDETRRecipe | None = None, **rest: Any) -> CellDETRTraining:
    options = FitOptions(folder, [dataset], **{"device": "cpu", "workers": 0, "log_every": 1000, **rest})
    return fit(celldetr.TASK, recipe or _recipe(), options)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [{"patient": p} for p in "ABC"], points=True)


def test_boxes_of_masks_are_as_wide_as_the_nuclei() -> None:
    labels = np.zeros((8, 10), np.int32)
    labels[2:5, 3:7] = 4
    labels[7, 9] = 9
    labels[0, 0] = -1
    ids, boxes = label_boxes(labels)
    assert ids.tolist() == [4, 9] and boxes.tolist() == [[3, 2, 7, 5], [9, 7, 10, 8]]
    assert label_boxes(np.zeros((4, 4), np.int32))[1].shape == (0, 4)


def test_a_crop_gives_shares_classes_and_what_is_known() -> None:
    labels = np.zeros((8, 10), np.int32)
    labels[2:5, 3:7], labels[7, 9], labels[0, 0] = 1, 2, -1
    classes = np.array([0, 2, 1], np.int32)
    crop = boxed(np.zeros((8, 10, 3), np.uint8), labels, classes, min_box_px=2)
    assert torch.allclose(crop.boxes, torch.tensor([[0.5, 3.5 / 8, 0.4, 3 / 8]]))
    assert crop.label.tolist() == [1]
    # Neither the pixel without annotation nor the sliver may make a query wrong.
    assert (~crop.known).nonzero().tolist() == [[0, 0], [7, 9]]
    empty = boxed(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32), np.array([-1], np.int32), 2)
    batch = collate([empty, empty])
    assert batch.boxes[0].shape == (0, 4) and batch.label[1].shape == (0,) and batch.image.shape == (2, 3, 8, 8)


def test_giou_and_conversions_by_hand() -> None:
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert giou(a, b).item() == pytest.approx(1 / 7 - (9 - 7) / 9)
    assert giou(a, a).item() == pytest.approx(1)
    assert giou(a, torch.tensor([3.0, 0, 4, 1])).item() == pytest.approx(-(8 - 5) / 8)
    assert torch.equal(corners(centred(b)), b) and centred(b).tolist() == [2, 2, 2, 2]


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([2.0, -1.0])
    p = logits.sigmoid()
    expected = [0.25 * (1 - p[0]) ** 2 * -p[0].log(), 0.75 * p[1] ** 2 * -(1 - p[1]).log()]
    assert torch.allclose(focal(logits, torch.tensor([1.0, 0.0])), torch.stack(expected))


def test_matching_is_the_best_of_all_pairings() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 5, 1, generator=rng), torch.rand(2, 5, 4, generator=rng) * 0.5 + 0.1
    targets = [torch.rand(3, 4, generator=rng) * 0.5 + 0.1, torch.zeros(0, 4)]
    pairs = match(logits, boxes, targets, WEIGHTS)
    cost = match_cost(logits[0, :, 0], boxes[0], targets[0], WEIGHTS)
    best = min(permutations(range(5), 3), key=lambda rows: sum(float(cost[q, t]) for t, q in enumerate(rows)))
    assert {(int(t), int(q)) for q, t in zip(*pairs[0], strict=True)} == set(enumerate(best))
    assert len(pairs[1].query) == 0
    # One entry by hand: class, L1 and GIoU each with its weight.
    p = logits[0, 1, 0].sigmoid()
    found, none = 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()
    one = 2 * (found - none) + 5 * (boxes[0, 1] - targets[0][2]).abs().sum()
    one = one - 2 * giou(corners(boxes[0, 1]), corners(targets[0][2]))
    assert cost[1, 2].item() == pytest.approx(one.item(), abs=1e-5)


def test_repeated_targets_are_found_more_than_once_where_queries_suffice() -> None:
    logits, boxes = torch.zeros(1, 5, 1), torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(1))
    targets = [torch.rand(2, 4, generator=torch.Generator().manual_seed(2))]
    twice = match(logits, boxes, targets, WEIGHTS, repeats=2)[0]
    assert sorted(twice.target.tolist()) == [0, 0, 1, 1] and len(set(twice.query.tolist())) == 4
    assert sorted(match(logits, boxes, targets, WEIGHTS, repeats=9)[0].target.tolist()) == [0, 0, 1, 1]
    with pytest.raises(FloatingPointError):
        match(logits * float("nan"), boxes, targets, WEIGHTS)


def test_set_losses_leave_out_queries_where_nobody_looked() -> None:
    targets = [torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.zeros(0, 4)]
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]).repeat(2, 1, 1)
    logits = torch.tensor([[3.0, 1.0], [0.0, 0.0]])[..., None]
    pairs = match(logits, boxes, targets, WEIGHTS)
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    parts = set_losses(logits, boxes, targets, pairs, everywhere)
    assert parts.bbox.item() == 0 and parts.giou.item() == pytest.approx(0, abs=1e-6)
    terms = focal(logits[..., 0], torch.tensor([[1.0, 0], [0, 0]]))
    assert parts.ce.item() == pytest.approx(terms.sum().item())
    known = torch.tensor([[False, False], [True, True]])
    assert set_losses(logits, boxes, targets, pairs, known).ce.item() == pytest.approx(
        (terms.sum() - terms[0, 1]).item()
    )
    assert parts.weighted(WEIGHTS).item() == pytest.approx(2 * terms.sum().item())


def test_what_is_known_is_read_at_the_centre_of_a_box() -> None:
    known = torch.ones(1, 4, 8, dtype=torch.bool)
    known[0, 3, 1] = False
    boxes = torch.tensor([[[1.5 / 8, 3.5 / 4, 0.9, 0.9], [3.5 / 8, 1.5 / 4, 0.1, 0.1], [1.0, 1.0, 0.1, 0.1]]])
    assert known_at(known, boxes).tolist() == [[False, True, True]]


def test_label_loss_counts_known_nuclei_only() -> None:
    logits = torch.tensor([[1.0, -1, 0], [0.5, 2, -2], [9, 9, 9]])
    expected = 16 * focal(logits[:2], torch.tensor([[0.0, 1, 0], [1, 0, 0]])).mean(1).mean()
    assert label_loss(logits, torch.tensor([1, 0, -1]), 16).item() == pytest.approx(expected.item())
    assert label_loss(logits, torch.tensor([-1, -1, -1]), 16).item() == 0
    expected = 16 * focal(logits, torch.zeros(3, 3)).mean()
    assert empty_loss(logits, 16).item() == pytest.approx(expected.item())
    assert empty_loss(logits[:0], 16).item() == 0


def test_noise_follows_equations_5_and_6() -> None:
    torch.manual_seed(0)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.1]]).repeat(4000, 1)
    noised = noise_boxes(box, 0.1, 0.4, grow=0.3)
    change = noised[:, 2:] / box[:, 2:] - 1
    assert (change.abs() >= 0.1 - 1e-5).all() and (change.abs() <= 0.4 + 1e-5).all()
    assert (change > 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    # Width and height are drawn apart.
    assert ((change[:, 0] > 0) != (change[:, 1] > 0)).float().mean().item() == pytest.approx(2 * 0.3 * 0.7, abs=0.03)
    shift = (noised[:, :2] - 0.5) / (box[:, 2:] / 2)
    assert (shift.abs() >= 0.1 - 1e-4).all() and (shift.abs() <= 0.4 + 1e-4).all()
    assert (shift > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    same = (noise_boxes(box, 0.1, 0.4, share=0.6) == box).all(1).float().mean()
    assert same.item() == pytest.approx(0.4, abs=0.03)
    at_edge = corners(noise_boxes(torch.tensor([[0.02, 0.98, 0.2, 0.2]]), 0.1, 0.2))[0]
    assert at_edge[0] == 0 and at_edge[3] == 1 and 0 < at_edge[2] < 0.2 and 0.8 < at_edge[1] < 1


def test_contrast_is_the_published_loss(shared: Path) -> None:
    stored = np.load(shared / "parity/celldetr_contrastive.npz")
    counts = stored["instance_length"].tolist()
    projected = torch.from_numpy(stored["contrastive_logits"])
    for temperature in (0.5, 0.1):
        loss = info_nce(projected, counts, temperature)
        assert loss.item() == pytest.approx(float(stored[f"loss_T{temperature}"]), abs=1e-5)
    own = [torch.from_numpy(boxes[:n]) for boxes, n in zip(stored["instance_boxes"], counts, strict=True)]
    slots = noised_slots(own, 0.3, 0.7, grow=0.3)
    assert torch.equal(slots.mask, torch.from_numpy(stored["attn_mask_head0"]))
    assert slots.counts == tuple(counts)
    theirs = torch.from_numpy(stored["instance_boxes"])
    assert slots.boxes.shape == theirs.shape and torch.equal(slots.boxes[:, -1], theirs[:, -1])
    # Copy k is one of nucleus k modulo n, in their boxes as in ours.
    for image, n in enumerate(counts):
        for boxes in (slots.boxes, theirs):
            copies = boxes[image, n:-1]
            origin = own[image][torch.arange(len(copies)) % n]
            inside = (copies[:, :2] - origin[:, :2]).abs() <= origin[:, 2:] * (0.35 + 0.1)
            assert inside.all()


def test_an_image_without_nuclei_gives_no_loss_and_no_blocked_row() -> None:
    slots = noised_slots([torch.zeros(0, 4), torch.full((3, 4), 0.3)])
    assert slots.boxes.shape == (2, 7, 4) and not slots.mask.all(-1).any()
    assert info_nce(torch.randn(1, 1, 4), [0]).item() == 0
    assert noised_slots([torch.zeros(0, 4)]).boxes.shape == (1, 1, 4)


def test_denoising_groups_see_themselves_only() -> None:
    own = [torch.full((2, 4), 0.3), torch.full((1, 4), 0.4)]
    slots = denoising_slots(own, n_global=1)
    assert slots.boxes.shape == (2, 7, 4) and not slots.mask.all(-1).any()
    seen = ~slots.mask[0]
    assert seen[0].tolist() == [True, True, False, False, False, False, True]
    assert seen[2].tolist() == [False, False, True, True, False, False, False]
    assert seen[5].tolist() == [False, False, False, False, True, True, False]
    assert seen[6].tolist() == [True, True, False, False, False, False, True]
    assert torch.equal(slots.boxes[0, :2], own[0]) and not torch.equal(slots.boxes[0, 4:6], own[0])
    assert torch.equal(slots.boxes[:, -1], torch.tensor([[0.5, 0.5, 1, 1]]).expand(2, 4))


class _Painter:
    """Finds boxes at given centres of a tile, as a detector of a whole image would."""

    def __init__(self, image: np.ndarray, doubtful: int = 0) -> None:
        self.image, self.doubtful = image, doubtful

    def __call__(self, x: Tensor) -> Mapping[str, Tensor]:
        rows, cols = np.nonzero(x[0, 0].numpy() == 7)
        boxes = np.stack([cols - 4, rows - 4, cols + 5, rows + 5], 1).astype(np.float32)
        prob = np.stack([cols % 2 == 0, cols % 2 == 1], 1).astype(np.float32)
        scores = np.full(len(rows), 0.9, np.float32)
        # Boxes of little score stand where nothing is.
        boxes = np.concatenate([boxes, np.tile(np.float32([[1, 1, 3, 3]]), (self.doubtful, 1))])
        scores = np.concatenate([scores, np.full(self.doubtful, 0.5, np.float32)])
        prob = np.concatenate([prob, np.full((self.doubtful, 2), 0.5, np.float32)])
        return {name: torch.from_numpy(value)[None] for name, value in
                (("boxes", boxes), ("scores", scores), ("class_prob", prob))}  # fmt: skip


def test_validation_finds_each_nucleus_once_across_tiles() -> None:
    rng = np.random.default_rng(0)
    image = np.full((150, 170, 3), 200, np.uint8)
    cells = rng.permutation(15 * 17)[:40]
    xy = np.stack([cells % 17, cells // 17], 1) * 10 + 5
    image[xy[:, 1], xy[:, 0]] = 7
    known = np.ones((150, 170), np.bool_)
    recipe = _recipe()
    scores = BoxScores(recipe)
    scores.add(MarkedImage("i", "set", image, xy + 0.5, xy[:, 0] % 2, known), _Painter(image))
    assert scores.take() == {"f1_set": 1.0, "f1": 1.0, "mean_f1": 1.0, "threshold": 0.4}
    # Half the truth missing: precision falls; where nobody looked, nothing counts.
    half = MarkedImage("i", "set", image, xy[:20] + 0.5, 1 - xy[:20, 0] % 2, known)
    scores.add(half, _Painter(image))
    taken = scores.take()
    assert taken["f1_set"] == pytest.approx(40 / 60) and taken["mean_f1"] == 0
    # Of several thresholds the one is taken at which the monitor is best.
    picking = BoxScores(_recipe(thresholds=[0.4, 0.8, 0.95]))
    picking.add(replace(half, xy=xy + 0.5, label=xy[:, 0] % 2), _Painter(image, doubtful=10))
    assert picking.take() == {"f1_set": 1.0, "f1": 1.0, "mean_f1": 1.0, "threshold": 0.8}
    hidden = known.copy()
    hidden[xy[20:, 1], xy[20:, 0]] = False
    scores.add(replace(half, known=hidden), _Painter(image))
    assert scores.take()["f1_set"] == 1


def test_validation_counts_nuclei_found_twice_unless_the_best_is_kept() -> None:
    image = np.full((64, 170, 3), 200, np.uint8)
    # 2 µm apart at 0.5 µm/px, twice within a tile and twice across the seam of two (own boxes end at 56 and 104).
    xy = np.array([[20, 20], [24, 20], [54, 40], [58, 40], [102, 30], [106, 30], [150, 50]])
    image[xy[:, 1], xy[:, 0]] = 7
    marked = MarkedImage("i", "set", image, xy[[0, 2, 4, 6]] + 0.5, np.zeros(4, np.int64), np.ones((64, 170), np.bool_))
    found = {}
    for nms_um in (0.0, 1.9, 2.0):
        scores = BoxScores(_recipe(nms_um=nms_um))
        scores.add(marked, _Painter(image))
        found[nms_um] = scores.take()["f1_set"]
    assert found == {0.0: pytest.approx(8 / 11), 1.9: pytest.approx(8 / 11), 2.0: 1.0}
    with pytest.raises(UsageError, match="nms_um"):
        _recipe(nms_um=-1)


def test_the_entry_says_which_boxes_validation_kept() -> None:
    recipe, metrics = _recipe(nms_um=2.5), {"val/threshold": 0.55, "val/f1": 0.81239, "train/loss": 3.0}
    trained = trained_entry(recipe, celldetr.entry(recipe, metrics), [], metrics)
    assert trained.detect == DetectDecode(0.55, 2.5) and trained.tile_px == 512 and trained.overlap_px == 128
    assert trained.metrics == {"validation": {"threshold": 0.55, "f1": 0.8124}}


def test_points_alone_validate_and_do_not_train(tmp_path: Path) -> None:
    points = write_set(tmp_path / "points", [{"patient": "P"}], masks=False, points=True)
    masks = write_set(tmp_path / "set", [{"patient": p} for p in "ABC"])
    settings = {"set": {}, "points": {"weight": 0, "val": {"patients": ["P"]}}}
    sets = load_box_sets([masks, points], _recipe(datasets=settings))
    assert [len(s.val) for s in sets] == [0, 1] and sets[1].val[0].label.tolist() == [0, 1] * 4
    with pytest.raises(UsageError, match=r"points only; .*datasets\.points\.weight"):
        load_box_sets([masks, points], _recipe(datasets={"set": {}}))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return not isinstance(left, list) or all(_same(a, b) for a, b in zip(left, right, strict=True))


def test_three_steps_resumed_to_four_equal_four_in_one_go(dataset: Path, tmp_path: Path) -> None:
    _run(dataset, tmp_path / "whole", max_steps=4)
    _run(dataset, tmp_path / "parts", max_steps=3)
    assert torch.load(tmp_path / "parts/last.ckpt", weights_only=True)["global_step"] == 2
    _run(dataset, tmp_path / "parts", max_steps=4)
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 4
    assert all(_same(whole[part], parts[part]) for part in ("state_dict", "optimizer_states", "callbacks"))
    entry = yaml.safe_load((tmp_path / "whole/model.yaml").read_text())
    assert entry["task"] == "detect" and entry["arch"] == "celldetr" and entry["config"]["num_classes"] == 2
    assert entry["detect"] == {"score_threshold": 0.4, "nms_um": 0.0}
    assert entry["trained_on"] == [{"dataset": "set", "licence": "CC0 1.0"}]
    card = json.loads((tmp_path / "whole/card.json").read_text())
    losses = {f"train/{name}" for name in ("ce", "bbox", "giou", "aux", "proposals", "label", "contrastive", "loss")}
    assert losses | {"val/f1", "val/f1_set"} <= set(card["metrics"])
    assert card["data"][0]["train"] == {"images": 2, "nuclei": 16}
    # The folder's weights are a network that the entry describes, and one that another run may begin with.
    again = build_recipe(_recipe())
    load_init(again, tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({"mode": "sequential"}, True),
        ({"boxes": "noised"}, True),
        ({"boxes": "denoising"}, True),
        ({"mode": "sequential", "loss": {"label": 0.0}}, False),
    ],
)
def test_every_mode_teaches_the_classes(dataset: Path, changes: dict[str, Any], learns: bool) -> None:
    recipe = _recipe(**{"loss": {}, **changes})
    torch.manual_seed(0)
    module = CellDETRTraining(recipe, build_recipe(recipe))
    from cellslide.train.celldetr.data import BoxDataset

    data = BoxDataset(load_box_sets([dataset], recipe), recipe)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.training_step(collate([data[0], data[1]]), 0).backward()
    gradient = module.net.decouple_class_embed.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == learns
    assert module.net.detr.bbox_embed[0].layers[-1].weight.grad.abs().sum() > 0


def test_parallel_classes_do_not_depend_on_the_other_image(dataset: Path) -> None:
    recipe = _recipe()
    torch.manual_seed(0)
    model = build_recipe(recipe).eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = [torch.rand(n, 4, generator=torch.Generator().manual_seed(n)) * 0.4 + 0.1 for n in (2, 5)]
    with torch.no_grad():
        both = parallel_slots(own, 2)
        together = model.represent(model.detect(image), both.boxes, both.mask).logits[0, :2]
        alone = parallel_slots(own[:1], 2)
        single = model.represent(model.detect(image[:1]), alone.boxes, alone.mask).logits[0, :2]
    assert torch.allclose(together, single, atol=1e-5)


def test_heads_may_differ_from_the_starting_weights_and_nothing_else(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    contrastive = build_recipe(_recipe(model={"config": TINY}))
    torch.save({"model_state_dict": contrastive.state_dict()}, tmp_path / "pretrained.pt")
    torch.manual_seed(1)
    model = build_recipe(_recipe(loss={}))
    before = model.decouple_class_embed.weight.clone()
    load_init(model, tmp_path / "pretrained.pt")
    assert torch.equal(model.wh_project.weight, contrastive.wh_project.weight)
    assert torch.equal(model.decouple_class_embed.weight, before)
    assert "decouple_class_embed, contrastive_project" in capsys.readouterr().out
    narrow = build_recipe(_recipe(model={"config": {**TINY, "ffn_dim": 8}}))
    with pytest.raises(WeightsError, match="other shape"):
        load_init(narrow, tmp_path / "pretrained.pt")


def test_a_backbone_is_found_under_any_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_recipe(_recipe())
    body = {f"some.encoder.{k}": v for k, v in source.detr.backbone[0].body.state_dict().items()}
    torch.save({**body, "head.weight": torch.zeros(3)}, tmp_path / "encoder.pt")
    torch.manual_seed(1)
    model = build_recipe(_recipe())
    load_backbone(model, tmp_path / "encoder.pt")
    name, value = next(iter(source.detr.backbone[0].body.state_dict().items()))
    assert torch.equal(model.detr.backbone[0].body.state_dict()[name], value)
    body.popitem()
    torch.save({k: v for k, v in body.items() if "layer1" not in k}, tmp_path / "encoder.pt")
    with pytest.raises(WeightsError, match="holds no backbone resnet10t"):
        load_backbone(model, tmp_path / "encoder.pt")


def test_recipe_checks_and_rates(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    loaded = load_recipe(CellDETRRecipe, path, {"epochs": 7, "model.encoder_weights": Path("encoder.pt")})
    assert loaded.epochs == 7 and loaded.model.encoder_weights == "encoder.pt"
    assert build(CellDETRRecipe, loaded.as_dict()) == loaded
    assert rate_share("detr.backbone.0.body.conv1.weight", loaded) == 0.1
    assert rate_share("detr.transformer.encoder.layers.0.linear1.weight", loaded) == 1
    for changes, key in (({"crop_px": 50}, "crop_px"), ({"boxes": "all"}, "boxes"), ({"loss": {"ce": -1}}, "loss.ce")):
        with pytest.raises(UsageError, match=key):
            _recipe(**changes)
    with pytest.raises(UsageError, match="det_classes"):
        build_recipe(_recipe(model={"config": {**TINY, "det_classes": 2, "repr_layers": 0}}))


def test_an_efficientnet_lite_fills_the_backbone(tmp_path: Path) -> None:
    model = build_recipe(_recipe(model={"config": {**TINY, "backbone": LITE, "backbone_args": {}}}))
    published = published_efficientnet(seed=2)
    torch.save(published, tmp_path / "lite.pth")
    load_backbone(model, tmp_path / "lite.pth")
    body = model.detr.backbone[0].body.state_dict()
    assert torch.equal(body["conv_stem.weight"], published["_conv_stem.weight"])
    assert torch.equal(body["blocks.6.0.conv_dw.weight"], published["_blocks.15._depthwise_conv.weight"])
