"""A point detector's training: matching, losses, fields with surroundings, consistency, resuming, scores, files."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.errors import UsageError, WeightsError
from cellslide.models import build_model
from cellslide.models.point_head import PointOutput
from cellslide.train.augment import crop_matrix
from cellslide.train.export import load_start, read_state
from cellslide.train.fit import fit
from cellslide.train.points.data import (
    IGNORED,
    SUPERVISED,
    UNLABELLED,
    FieldDataset,
    Fields,
    PointImage,
    cut_field,
    draw_centre,
    join,
    load_point_sets,
    point_mask,
)
from cellslide.train.points.losses import UNKNOWN, Truth, consistency_weight, inside, mask_loss, match, point_losses
from cellslide.train.points.recipe import PointLossConfig, PointsRecipe
from cellslide.train.points.training import (
    Found,
    PointsTraining,
    ScoreBoard,
    annotated,
    field_losses,
    find_points,
    follow,
    load_backbone,
)
from cellslide.train.recipe import AugmentConfig, build, load_recipe
from cellslide.train.task import FitOptions, build_recipe
from cellslide.train.tasks import points
from tests.support.published_efficientnet import LITE, published_efficientnet
from tests.support.train_sets import painted, write_set

TINY = {"encoder": "resnet10t", "widths": [8, 8, 16, 16], "head": {"hidden": 16, "space_px": 8, "aux_mask": True}}
MODEL = {"arch": "muse_points", "config": TINY, "classes": ["a", "b"]}
STILL = dict.fromkeys(("rotate_p", "scale_p", "stain_p", "color_p", "blur_p", "sharpen_p", "jpeg_p", "noise_p"), 0.0)
RECIPE: dict[str, Any] = {
    "field_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 4, "precision": "fp32", "model": MODEL,
    "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2, "ema": 0.9},
    "datasets": {"set": {"val": {"patients": ["C"]}}},
}  # fmt: skip


def _recipe(**changes: Any) -> PointsRecipe:
    return build(PointsRecipe, {**RECIPE, **changes})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [{"patient": p} for p in "ABC"], masks=False, points=True)


def _image(**changes: Any) -> PointImage:
    picture, _, centres = painted(0)
    known: dict[str, Any] = {
        "name": "0", "dataset": "set", "image": picture, "window": (0, 0, 64, 64),
        "mask": point_mask(centres, (64, 64), 4), "region": np.full((64, 64), SUPERVISED, np.int8),
        "xy": centres, "label": np.arange(len(centres)) % 2, "typed": True, "mpp": 0.5,
    }  # fmt: skip
    return PointImage(**known | changes)


# Losses.


def _truth(points: list[list[float]], label: list[int], supervised: list[bool]) -> Truth:
    return Truth(torch.tensor(points).reshape(-1, 2), torch.tensor(label, dtype=torch.int64), torch.tensor(supervised))


def test_matching_weighs_distance_against_class() -> None:
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [30.0, 0.0]])
    truth = _truth([[1.0, 0.0]], [1], [True, True, True])
    # Distances 1 and 3 differ by 0.2 of cost; p(class 1) of the farther is higher by more than that, or by less.
    surer = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 9.0, 0.0]])
    assert match(points, surer, truth, PointLossConfig())[0].tolist() == [1]
    assert match(points, surer, truth, PointLossConfig(cost_class=0.1))[0].tolist() == [0]
    # A nucleus of unknown class asks only for a nucleus, and an unsupervised proposal is no candidate.
    unknown = truth._replace(label=torch.tensor([UNKNOWN]))
    assert match(points, surer, unknown, PointLossConfig())[0].tolist() == [0]
    hidden = truth._replace(supervised=torch.tensor([True, False, True]))
    assert match(points, surer, hidden, PointLossConfig())[0].tolist() == [0]
    none = truth._replace(supervised=torch.zeros(3, dtype=torch.bool))
    assert not len(match(points, surer, none, PointLossConfig())[0])


def test_matching_is_the_best_of_all_assignments() -> None:
    torch.manual_seed(0)
    points, logits = torch.rand(5, 2) * 20, torch.randn(5, 3)
    truth = _truth((torch.rand(3, 2) * 20).tolist(), [0, 1, 1], [True] * 5)
    prob = logits.softmax(1)

    def cost(pairs: list[tuple[int, int]]) -> float:
        apart = [0.1 * float((points[q] - truth.points[t]).norm()) - float(prob[q, truth.label[t]]) for q, t in pairs]
        return sum(apart)

    best = min(cost([(q, t) for t, q in enumerate(chosen)]) for chosen in itertools.permutations(range(5), 3))
    proposal, nucleus = match(points, logits, truth, PointLossConfig())
    assert cost(list(zip(proposal.tolist(), nucleus.tolist(), strict=True))) == pytest.approx(best, abs=1e-6)


def test_point_losses_by_hand() -> None:
    points = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]]])
    logits = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 2.0]]])
    log = logits[0].log_softmax(1)
    config = PointLossConfig()
    entropy, regression = point_losses(points, logits, [_truth([[10.0, 2.0]], [1], [True, True, True])], config)
    # Proposal 1 is matched; the others are background at 0.4.
    expected = -(log[1, 1] + 0.4 * log[0, 2] + 0.4 * log[2, 2]) / 1.8
    assert entropy.item() == pytest.approx(expected.item()) and regression.item() == pytest.approx(5e-3 * 4)
    # What is not supervised does not count, and class weights do.
    config = PointLossConfig(class_weight=(1.0, 3.0))
    entropy, _ = point_losses(points, logits, [_truth([[10.0, 2.0]], [1], [False, True, True])], config)
    assert entropy.item() == pytest.approx(-(3 * log[1, 1] + 0.4 * log[2, 2]).item() / 3.4)
    # Of unknown class: any class will do.
    entropy, _ = point_losses(
        points, logits, [_truth([[10.0, 2.0]], [UNKNOWN], [False, True, False])], PointLossConfig()
    )
    assert entropy.item() == pytest.approx(-math.log(1 - log[1, 2].exp().item()))


def test_losses_of_a_batch_are_pooled_and_empty_fields_count() -> None:
    torch.manual_seed(0)
    points, logits = torch.rand(2, 6, 2) * 20, torch.randn(2, 6, 3)
    full = _truth([[3.0, 4.0], [12.0, 5.0], [7.0, 7.0]], [0, 1, 1], [True] * 6)
    empty = _truth([], [], [True] * 6)
    both = point_losses(points, logits, [full, empty], PointLossConfig())
    alone = point_losses(points[:1], logits[:1], [full], PointLossConfig())
    assert both[1].item() == pytest.approx(alone[1].item())
    background = -logits[1].log_softmax(1)[:, 2].mean()
    # 3 matched + 3 background at 0.4 weigh 4.2; six background of the empty field 2.4.
    assert both[0].item() == pytest.approx((alone[0] * 4.2 + background * 2.4).item() / 6.6, rel=1e-5)
    nothing = point_losses(
        points, logits, [empty._replace(supervised=torch.zeros(6, dtype=torch.bool))] * 2, PointLossConfig()
    )
    assert [float(x) for x in nothing] == [0, 0]


def test_mask_loss_is_the_focal_loss_of_known_pixels() -> None:
    logits = torch.tensor([[[[2.0, -1.0], [0.5, 3.0]]]])
    target = torch.tensor([[[1, 0], [-1, 0]]], dtype=torch.int8)
    p = logits.sigmoid().flatten()
    by_hand = [0.25 * (1 - p[0]) ** 2 * -p[0].log(), *(0.75 * p[i] ** 2 * -(1 - p[i]).log() for i in (1, 3))]
    assert mask_loss(logits, target, PointLossConfig()).item() == pytest.approx(float(sum(by_hand)) / 3, rel=1e-5)
    assert mask_loss(logits, torch.full_like(target, -1), PointLossConfig()).item() == 0


def test_consistency_rises_along_half_a_cosine() -> None:
    assert [consistency_weight(0.1, i, 100) for i in (0, 50, 100, 500)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert consistency_weight(0.1, 25, 100) == pytest.approx(0.05 * (1 - math.cos(math.pi / 4)))


def test_inside_looks_up_the_pixel_of_a_point() -> None:
    region = torch.zeros(4, 6, dtype=torch.bool)
    region[1, 5] = True
    points = torch.tensor([[5.0, 1.0], [5.9, 1.9], [6.0, 1.0], [1.0, 5.0], [4.99, 1.0], [-0.5, 1.0]])
    assert inside(points, region).tolist() == [True, True, False, False, False, False]


# Fields.


def test_points_follow_the_picture() -> None:
    recipe = _recipe(augment={**STILL, "rotate_p": 1.0, "scale_p": 1.0})
    item = _image()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = crop_matrix(rng, recipe.augment, np.array([32.0, 32.0]), 64)
        field = cut_field(rng, item, matrix, recipe, plain=False)
        grey = field.image[0].float().mean(0)
        dark = [grey[int(y), int(x)] < 150 for x, y in field.points]
        assert len(dark) >= 3 and all(dark)
        at = field.points.floor().long()
        assert (field.mask[0][at[:, 1], at[:, 0]] == 1).all()


def test_an_unturned_field_is_the_picture() -> None:
    recipe = _recipe(augment={**STILL, "flip": False})
    item = _image()
    field = cut_field(np.random.default_rng(0), item, np.eye(2, 3), recipe, plain=True)
    assert np.array_equal(field.image[0].permute(1, 2, 0).numpy(), item.image) and torch.equal(field.image, field.plain)
    assert np.allclose(field.points.numpy(), item.xy) and field.count.tolist() == [len(item.xy)]
    assert np.array_equal(field.mask[0].numpy(), item.mask) and (field.region == SUPERVISED).all()


def test_a_window_lies_anywhere_in_a_larger_field() -> None:
    recipe = _recipe(field_px=128, augment={**STILL, "flip": False}, centred=1.0)
    item = _image()
    corners = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        matrix = np.column_stack([np.eye(2), draw_centre(rng, item, recipe) - 64])
        field = cut_field(rng, item, np.round(matrix).astype(np.float64), recipe, plain=True)
        rows, cols = (field.region[0] == SUPERVISED).nonzero().T
        assert (rows.max() - rows.min() + 1, cols.max() - cols.min() + 1) == (64, 64)
        assert ((field.region[0] == SUPERVISED) | (field.region[0] == UNLABELLED)).all()
        assert (field.mask[0][field.region[0] == UNLABELLED] == -1).all()
        assert field.count.item() == len(item.xy)
        corners.append([int(cols.min()), int(rows.min())])
    assert np.min(corners, 0).max() <= 8 and np.max(corners, 0).min() >= 56
    # The mirrored surroundings are no white paper.
    assert field.image[0][:, field.region[0] == UNLABELLED].float().std() > 10


def test_a_smaller_field_lies_in_its_window_and_classes_are_balanced() -> None:
    recipe = _recipe(field_px=32, centred=1.0, balance=1.0, augment=STILL)
    xy = np.array([[40.0, 40.0]] * 30 + [[216.0, 216.0]])
    item = _image(
        image=np.zeros((256, 256, 3), np.uint8), window=(0, 0, 256, 256), xy=xy, label=np.array([0] * 30 + [1])
    )
    centres = np.array([draw_centre(np.random.default_rng(s), item, recipe) for s in range(200)])
    assert centres.min() >= 16 and centres.max() <= 240
    rare = (np.abs(centres - 216) <= 8).all(1).mean()
    assert 0.35 < rare < 0.65
    assert ((np.abs(centres - 216) <= 8).all(1) | (np.abs(centres - 40) <= 8).all(1)).all()


def test_sets_are_read_as_points(tmp_path: Path) -> None:
    typed = write_set(tmp_path / "set", [{"patient": p} for p in "AC"], masks=False, points=True)
    outlined = write_set(tmp_path / "outlined", [{"patient": "D"}, {"patient": "C"}])
    labels = np.asarray(Image.open(outlined / "masks/0.png")).copy()
    labels[:4] = 65535
    Image.fromarray(labels).save(outlined / "masks/0.png")
    recipe = _recipe(mpp=0.25, model={**MODEL, "classes": ["b", "other"]})
    first, second = load_point_sets([typed, outlined], recipe)
    image = first.train[0]
    _, _, centres = painted(0)
    assert image.image.shape == (128, 128, 3) and np.allclose(image.xy, centres * 2)
    # Class a is none of the recipe's: its points teach the place alone, and the image cannot score types.
    assert image.label.tolist() == [UNKNOWN, 0] * 4 and not image.typed
    assert image.mask[tuple(image.xy[0].astype(int)[::-1])] == 1 and set(np.unique(image.mask)) == {-1, 0, 1}
    # Patient C validates in the other set.
    assert len(second.train) == 1
    drawn = second.train[0]
    assert np.abs(drawn.xy - centres * 2).max() < 1.5 and (drawn.label == UNKNOWN).all()
    assert (
        (drawn.region[:8] == IGNORED).all() and (drawn.region[8:] == SUPERVISED).all() and (drawn.mask[:8] == -1).all()
    )


def _surround(dataset: Path, at: tuple[str, str] = ("20", "12")) -> np.ndarray:
    """Put image 0 of a set into a wider one and say so in its manifest."""
    rng = np.random.default_rng(5)
    wide = rng.integers(0, 255, (100, 120, 3)).astype(np.uint8)
    wide[12:76, 20:84] = np.asarray(Image.open(dataset / "images/0.png"))
    Image.fromarray(wide).save(dataset / "images/wide.png")
    with (dataset / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[0] |= {"field": "images/wide.png", "field_x": at[0], "field_y": at[1]}
    with (dataset / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return wide


def test_real_surroundings_are_used_where_a_set_has_them(dataset: Path) -> None:
    wide = _surround(dataset)
    with_field, without = load_point_sets([dataset], _recipe())[0].train
    assert np.array_equal(with_field.image, wide) and with_field.window == (20, 12, 84, 76)
    assert np.allclose(with_field.xy, painted(0)[2] + (20, 12))
    assert (with_field.region == SUPERVISED).sum() == 64 * 64 and with_field.region[0, 0] == UNLABELLED
    assert annotated(with_field, np.array([[20.0, 12.0], [19.9, 12.0], [83.9, 75.9]])).tolist() == [True, False, True]
    assert without.window == (0, 0, 64, 64)
    for at, said in ((("100", "12"), "does not lie inside its field"), (("", "12"), "line 2: field needs")):
        _surround(dataset, at)
        with pytest.raises(UsageError, match=said):
            load_point_sets([dataset], _recipe())


def test_a_field_depends_on_its_number_alone(dataset: Path) -> None:
    sets = load_point_sets([dataset], _recipe())
    fields = FieldDataset(sets, _recipe())
    one = [fields[i] for i in (3, 1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(one[0], one[2], strict=True))
    assert not torch.equal(one[0].image, one[1].image)
    both = join(one[:2])
    assert both.image.shape == (2, 3, 64, 64) and both.count.sum() == len(both.points) == len(both.label)
    assert not torch.equal(FieldDataset(sets, _recipe(seed=1))[3].image, one[0].image)


# The training module.


class Fixed(torch.nn.Module):
    """Says the same points whatever the image: rows of x, y, class (0..C-1, C = background), confidence as a logit."""

    def __init__(self, rows: list[tuple[float, float, int, float]], n_classes: int = 2) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.points = torch.tensor([row[:2] for row in rows])[None]
        self.logits = torch.zeros(1, len(rows), n_classes + 1)
        for i, row in enumerate(rows):
            self.logits[0, i, row[2]] = row[3]

    def raw(self, x: Tensor) -> PointOutput:
        n = len(x)
        return PointOutput(self.points.repeat(n, 1, 1) + self.bias, self.logits.repeat(n, 1, 1) + self.bias)


def _fields(region: Tensor, points: Tensor, label: Tensor) -> Fields:
    image = torch.zeros(1, 3, *region.shape, dtype=torch.uint8)
    mask = torch.zeros(1, *region.shape, dtype=torch.int8)
    return Fields(image, image, mask, region[None].to(torch.int8), points, label, torch.tensor([len(points)]))


def test_the_teacher_teaches_outside_the_window_only() -> None:
    region = torch.full((64, 64), UNLABELLED)
    region[:, :32] = SUPERVISED
    rows = [
        (10.0, 10.0, 0, 9.0),  # in the window
        (50.0, 10.0, 1, 9.0),  # sure
        (52.0, 10.0, 0, 8.0),  # the same nucleus, less sure
        (50.0, 40.0, 0, 0.1),  # a nucleus, not sure
        (51.0, 41.0, 2, 5.0),  # background beside it
        (40.0, 60.0, 2, 5.0),  # background
    ]
    recipe = _recipe(consistency={"weight": 0.1})
    training = PointsTraining(recipe, Fixed(rows))
    batch = _fields(region, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    (truth,) = training.pseudo_labels(batch, training(batch.image))
    assert truth.points.tolist() == [[50.0, 10.0]] and truth.label.tolist() == [1]
    assert truth.supervised.tolist() == [False, True, True, False, False, True]
    loss = training.consistency_loss(training(batch.image), batch)
    loss.backward()
    assert loss > 0 and training.model.bias.grad is not None
    # Nothing is unlabelled: nothing to agree on.
    whole = _fields(torch.full((64, 64), SUPERVISED), batch.points, batch.label)
    assert training.consistency_loss(training(whole.image), whole).item() == 0


def test_only_the_window_is_supervised() -> None:
    region = torch.full((64, 64), UNLABELLED)
    region[:, :32] = SUPERVISED
    batch = _fields(region, torch.tensor([[10.0, 12.0]]), torch.tensor([0]))
    near, far = (10.0, 10.0, 0, 2.0), (50.0, 10.0, 0, 9.0)
    losses = [field_losses(Fixed(rows).raw(batch.image), batch, _recipe()) for rows in ([near], [near, far])]
    assert losses[0].total.item() == losses[1].total.item() > 0
    assert losses[0].regression.item() == pytest.approx(5e-3 * 4)


def test_a_teacher_follows_weights_and_statistics() -> None:
    student, teacher = (build_recipe(_recipe()) for _ in range(2))
    follow(teacher, student, 0.0, 10_000)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in student.state_dict().items())
    before = teacher.state_dict()["head.reg_head.layers.0.weight"].clone()
    with torch.no_grad():
        student.state_dict()["head.reg_head.layers.0.weight"].add_(1)
    follow(teacher, student, 0.9, 10_000)
    assert torch.allclose(teacher.state_dict()["head.reg_head.layers.0.weight"], before + 0.1, atol=1e-6)


def test_points_are_read_as_in_use() -> None:
    rows = [
        (10.0, 10.0, 0, 3.0),
        (12.0, 10.0, 1, 5.0),
        (30.0, 30.0, 1, 0.5),
        (45.0, 20.0, 2, 5.0),
        (69.0, 10.0, 0, 9.0),
    ]
    training = PointsTraining(_recipe(detect={"score_threshold": 0.8}), Fixed(rows))
    found = find_points(training, np.zeros((40, 60, 3), np.uint8))
    # 3 µm are 6 px; one is unsure, one is background, one lies beyond the picture.
    assert found.xy.tolist() == [[12.0, 10.0]] and found.label.tolist() == [1]


def test_scores_are_pooled_by_the_published_rule() -> None:
    board = ScoreBoard(2, 0.5)
    item = _image(xy=np.array([[10.0, 10.0], [30.0, 10.0], [50.0, 10.0]]), label=np.array([0, 0, 1]))
    # The second is exactly 6 px away, which is too far; the third is of the wrong class.
    board.add(item, Found(np.array([[10.0, 15.9], [30.0, 16.0], [50.0, 11.0]]), np.array([0, 0, 0])))
    board.add(item, Found(np.array([[50.0, 11.0]]), np.array([1])))
    board.add(_image(typed=False, dataset="masks"), Found(painted(0)[2], np.zeros(8, np.int64)))
    scores = board.take(("a", "b"))
    assert scores["f1_a"] == pytest.approx(2 * 1 / (2 * 1 + 2 + 3)) and scores["f1_b"] == pytest.approx(2 / 3)
    assert scores["mean_f1"] == pytest.approx((scores["f1_a"] + scores["f1_b"]) / 2)
    assert scores["detection_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 3)) and scores["detection_masks_f1"] == 1
    assert (scores["precision"], scores["recall"]) == (3 / 4, 0.5) and not board.take(("a", "b"))
    # What is found where nobody annotated counts neither way.
    region = np.full((64, 64), UNLABELLED, np.int8)
    region[:, :40] = SUPERVISED
    wide = _image(xy=item.xy, label=item.label, region=region)
    board.add(wide, Found(np.array([[10.0, 10.0], [30.0, 10.0], [60.0, 60.0]]), np.array([0, 0, 1])))
    assert board.take(("a", "b"))["detection_f1"] == 1


# Whole runs.


def _train(dataset: Path, folder: Path, recipe: Mapping[str, Any] = RECIPE, **rest: Any) -> PointsTraining:
    options = FitOptions(folder, [dataset], **{"device": "cpu", "workers": 0, "log_every": 1000, **rest})
    return fit(points.TASK, build(PointsRecipe, recipe), options)


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in items for k, v in _tensors(item, f"{name}/{key}").items()}


def test_four_steps_resumed_to_six_equal_six_in_one_go(dataset: Path, tmp_path: Path) -> None:
    recipe = {
        **RECIPE,
        "field_px": 96,
        "batch_size": 1,
        "epoch_samples": 2,
        "consistency": {"weight": 0.5, "threshold": 0.4, "ema": 0.8},
    }
    _train(dataset, tmp_path / "whole", recipe, max_steps=6)
    _train(dataset, tmp_path / "parts", recipe, max_steps=4)
    half = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    _train(dataset, tmp_path / "parts", recipe, max_steps=6, workers=1)
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert half["global_step"] == 4 and whole["global_step"] == parts["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "callbacks"):
        left, right = _tensors(whole[part]), _tensors(parts[part])
        assert left.keys() == right.keys() and left
        assert all(torch.equal(value, right[name]) for name, value in left.items())
    weight = "backbone.decoder.decoder1.first_block.layer.0.weight"
    states = whole["state_dict"]
    assert not torch.equal(half["state_dict"][f"model.{weight}"], states[f"model.{weight}"])
    assert not torch.equal(states[f"teacher.{weight}"], states[f"model.{weight}"])
    with pytest.raises(UsageError, match=r"another recipe \(batch_size, consistency"):
        _train(dataset, tmp_path / "parts", RECIPE)


def test_a_small_network_learns_painted_discs(dataset: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "epoch_samples": 120, "epochs": 1, "augment": STILL, "loss": {"mask": 10.0},
              "optim": {"lr": 5e-3, "schedule": "cosine", "warmup_steps": 2, "ema": 0.5}}  # fmt: skip
    _train(dataset, tmp_path / "run", recipe)
    metrics = json.loads((tmp_path / "run/card.json").read_text())["metrics"]
    # Types are given to like discs in turn, so only places can be learned.
    assert metrics["val/detection_f1"] > 0.8


def test_a_run_writes_what_a_manifest_needs(dataset: Path, tmp_path: Path) -> None:
    _train(dataset, tmp_path / "run", {**RECIPE, "detect": {"score_threshold": 0.3, "nms_um": 2.5}}, max_steps=2)
    entry = yaml.safe_load((tmp_path / "run/model.yaml").read_text())
    assert (entry["task"], entry["arch"], entry["mpp"]) == ("detect", "muse_points", 0.5)
    assert entry["detect"] == {"score_threshold": 0.3, "nms_um": 2.5}
    assert [c["name"] for c in entry["classes"]] == ["a", "b"] and entry["config"]["head"]["n_classes"] == 2
    assert entry["trained_on"] == [{"dataset": "set", "licence": "CC0 1.0"}]
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["data"][0]["train"] == {"images": 2, "nuclei": {"a": 8, "b": 8, "of unknown class": 0}}
    # The entry builds a network that the weights fill, and the next run may start from them.
    load_start(build_model(entry["arch"], entry["config"]), tmp_path / "run/model.safetensors")
    again = _train(dataset, tmp_path / "next", {**RECIPE, "epochs": 1, "optim": {"lr": 1e-9}}, init=tmp_path / "run")
    started = torch.load(tmp_path / "next/last.ckpt", weights_only=True)["state_dict"]
    kept = read_state(tmp_path / "run/model.safetensors")["head.conv.weight"]
    assert torch.allclose(started["model.head.conv.weight"], kept, atol=1e-6) and again.global_step == 2


def test_a_backbone_starts_from_published_and_own_files(tmp_path: Path) -> None:
    config = _recipe().network()["config"]
    torch.manual_seed(1)
    source: Any = build_model("muse_points", config)
    model: Any = build_model("muse_points", config)
    own = source.backbone.state_dict()
    published = {f"module.backbone.{name}": value for name, value in own.items()}
    head = model.head.conv.weight.clone()
    for document in (
        {"teacher": {**published, "module.head.mlp.0.weight": torch.zeros(1)}, "student": {"x": torch.zeros(1)}},
        {f"backbone.{name}": value for name, value in own.items()} | {"head.conv.weight": torch.zeros(1)},
        own,
    ):
        torch.save(document, tmp_path / "w.pt")
        model.backbone.load_state_dict({k: torch.zeros_like(v) for k, v in own.items()})
        load_backbone(model, tmp_path / "w.pt")
        assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in own.items())
    assert torch.equal(model.head.conv.weight, head)
    missing = {name: value for name, value in own.items() if not name.endswith("decoder1.first_block.layer.0.weight")}
    torch.save(missing, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="1 missing: decoder.decoder1"):
        load_backbone(model, tmp_path / "w.pt")


def test_encoder_alone_fills_the_encoder_and_leaves_the_decoder(tmp_path: Path) -> None:
    model: Any = build_model("muse_points", {"encoder": LITE, "widths": [8, 8, 8, 8], "head": {"hidden": 8}})
    rest = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.encoder.encoder.")}
    published = published_efficientnet(seed=5)
    torch.save(published, tmp_path / "lite.pth")
    load_backbone(model, tmp_path / "lite.pth")
    network = model.backbone.encoder.encoder
    assert torch.equal(network.conv_stem.weight, published["_conv_stem.weight"])
    by_timm = {k: torch.full_like(v, 2) for k, v in network.state_dict().items()}
    torch.save(by_timm, tmp_path / "timm.pth")
    load_backbone(model, tmp_path / "timm.pth")
    assert bool((network.conv_stem.weight == 2).all())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())


def test_recipes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {classes: [a]}\noptim: {schedule: cosine}\n")
    recipe = load_recipe(
        PointsRecipe,
        tmp_path / "r.yaml",
        {"batch_size": 2, "mpp": None, "model.encoder_weights": tmp_path / "w.pt"},
    )
    assert recipe.model.arch == "muse_points" and recipe.model.mean[0] == 0.485 and recipe.batch_size == 2
    assert recipe.model.encoder_weights == str(tmp_path / "w.pt")
    for change, said in (
        ({"field_px": 100}, "field_px: 100 must be a multiple of 32"),
        ({"model": {"classes": []}}, "model.classes"),
        ({"loss": {"class_weight": [1.0]}}, r"loss.class_weight: \[1.0\] must be empty or 2 numbers"),
        ({"consistency": {"weight": -1.0}}, "consistency.weight"),
        ({"balance": 2.0}, "balance"),
    ):
        with pytest.raises(UsageError, match=said):
            _recipe(**change)
    with pytest.raises(UsageError, match="head.n_classes: 5 must be 2"):
        _recipe(model={**MODEL, "config": {"head": {"n_classes": 5}}}).network()
    assert AugmentConfig() == _recipe().augment


def test_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cellslide.cli.main import cli

    for extra, said in (([], "model.classes"), (["--recipe", str(tmp_path / "r.yaml")], "manifest.csv")):
        (tmp_path / "r.yaml").write_text("model: {classes: [a]}\n")
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "muse-points", str(tmp_path), "-o", str(tmp_path / "out"), *extra])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
