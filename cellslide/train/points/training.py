"""Training of a point detector: loss inside the annotated window, consistency with a teacher outside, validation.

Validation follows BRCA-M2C: points within 3 µm, class by class, counts of all images pooled, the mean of the F1 scores.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.evaluate.detection import Tally
from cellslide.evaluate.protocols import BRCA_M2C, OPTIMAL, Marks
from cellslide.models import muse_layout
from cellslide.models.backbones import holds_network
from cellslide.models.checkpoint import read_tensors
from cellslide.models.muse import ConvEncoder
from cellslide.models.point_head import Keep, MusePoints, PointOutput, found_points
from cellslide.nuclei.nms import point_nms
from cellslide.train.export import weights_in
from cellslide.train.module import ImageTraining
from cellslide.train.points.data import SUPERVISED, UNLABELLED, Fields, PointImage
from cellslide.train.points.losses import PointLosses, Truth, consistency_weight, inside, mask_loss, point_losses
from cellslide.train.points.recipe import FIELD_MULTIPLE, PointsRecipe
from cellslide.types import Bool, Float64, Int64, UInt8
from cellslide.weights.backbone import fill_backbone

ENCODER = "backbone.encoder."


class PointsTraining(ImageTraining):
    """Trains a model whose `raw` maps images (B, 3, H, W) to a PointOutput.

    The teacher, there only if the recipe asks for consistency, is a slower average of the weights; checkpoints keep it.
    """

    whole = PointImage
    recipe: PointsRecipe

    def __init__(self, recipe: PointsRecipe, model: nn.Module) -> None:
        super().__init__(recipe, model)
        self.teacher = _frozen_copy(model) if recipe.consistency.weight > 0 else None
        self._scores = ScoreBoard(len(recipe.model.classes), recipe.mpp)
        if recipe.model.freeze_encoder:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(ENCODER))

    @property
    def keep(self) -> Keep:
        """Which points count: as in use, where the model's head says so."""
        return self.model.config.head.keep if isinstance(self.model, MusePoints) else "argmax"

    def forward(self, image: Tensor) -> PointOutput:
        """Return what the head says of uint8 images (B, 3, H, W)."""
        output: PointOutput = self.model.raw(self.normalise(image))  # type: ignore[operator]
        return output

    def train(self, mode: bool = True) -> PointsTraining:
        """Switch modes, leaving the teacher and a frozen encoder in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.recipe.model.freeze_encoder:
            self.model.get_submodule(ENCODER.rstrip(".")).eval()
        return self

    def rate_share(self, name: str) -> float:
        """Return the share of the learning rate of a parameter: the encoder has its own."""
        return self.recipe.optim.encoder_lr_scale if name.startswith(ENCODER) else 1.0

    def training_step(self, batch: Fields, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        output = self(batch.image)
        parts = field_losses(output, batch, self.recipe)
        shown, total = parts._asdict(), parts.total
        if self.teacher is not None:
            weight = self.consistency_now()
            agreement = self.consistency_loss(output, batch)
            total = total + weight * agreement
            shown |= {"consistency": agreement, "consistency_weight": torch.tensor(weight)}
        return self.log_losses(total, shown, len(batch.image))

    def consistency_now(self) -> float:
        """Return the weight of the consistency loss at this step."""
        return consistency_weight(self.recipe.consistency.weight, self.global_step, self.recipe.total_steps)

    def consistency_loss(self, output: PointOutput, batch: Fields) -> Tensor:
        """Return the same losses against the teacher's points, where the fields are not annotated."""
        truths = self.pseudo_labels(batch, output)
        return torch.stack(point_losses(output.points, output.logits, truths, self.recipe.loss)).sum()

    @torch.no_grad()
    def pseudo_labels(self, batch: Fields, output: PointOutput) -> list[Truth]:
        """Return what the teacher finds outside the annotated windows, for each field.

        Proposals near a nucleus that it is not sure of, below the threshold but not background, teach nothing.
        """
        assert self.teacher is not None
        taught = self.teacher.raw(self.normalise(batch.plain))  # type: ignore[operator]
        height, width = batch.image.shape[-2:]
        found = found_points(taught, (height, width), keep=self.keep)
        radius = self.recipe.detect.nms_um / self.recipe.mpp
        truths = []
        for i, region in enumerate(batch.region):
            points, score, label = found["points"][i], found["scores"][i], found["class_prob"][i].argmax(1)
            unlabelled = region == UNLABELLED
            rows = ((score > 0) & inside(points, unlabelled)).nonzero()[:, 0]
            kept = rows[_kept_rows(points[rows], score[rows], radius)]
            sure = score[kept] >= self.recipe.consistency.threshold
            free = inside(output.points[i], unlabelled) & ~_near(output.points[i], points[kept[~sure]], radius)
            truths.append(Truth(points[kept[sure]].float(), label[kept[sure]], free))
        return truths

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher towards the weights, and end when the time is up."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.teacher is not None:
            follow(self.teacher, self.model, self.recipe.consistency.ema, self.global_step)

    def validation_step(self, item: PointImage, batch_idx: int) -> None:
        """Score one whole image."""
        self._scores.add(item, find_points(self, item.image))

    def on_validation_epoch_end(self) -> None:
        """Log F1 scores over all validation images."""
        for name, value in self._scores.take(self.recipe.model.classes).items():
            self.log(f"val/{name}", value)


def _frozen_copy(model: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(model)
    teacher.requires_grad_(False)
    return teacher.eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Move a teacher's weights and norm statistics towards the student's; the decay grows up to `decay`."""
    keep = min(decay, (1 + step) / (10 + step))
    theirs = student.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name].to(value.dtype), 1 - keep)
        else:
            value.copy_(theirs[name])


def field_losses(output: PointOutput, batch: Fields, recipe: PointsRecipe) -> PointLosses:
    """Return the losses of a batch where it is annotated; only what the network placed there is held against it."""
    labels = zip(batch.points.split(batch.count.tolist()), batch.label.split(batch.count.tolist()), strict=True)
    supervised = [inside(p, r == SUPERVISED) for p, r in zip(output.points, batch.region, strict=True)]
    truths = []
    for (points, label), where, region in zip(labels, supervised, batch.region, strict=True):
        known = inside(points, region == SUPERVISED)
        truths.append(Truth(points[known], label[known], where))
    entropy, regression = point_losses(output.points, output.logits, truths, recipe.loss)
    mask = entropy.new_zeros(()) if output.mask is None else mask_loss(output.mask, batch.mask, recipe.loss)
    return PointLosses(entropy, regression, mask)


def _kept_rows(points: Tensor, score: Tensor, radius_px: float) -> Tensor:
    kept = point_nms(points.double().cpu().numpy(), score.float().cpu().numpy(), radius_px)
    return torch.from_numpy(np.asarray(kept, np.int64)).to(points.device)


def _near(points: Tensor, others: Tensor, radius_px: float) -> Tensor:
    """Return bool (Q,): whether points (Q, 2) have any of `others` (N, 2) within the radius."""
    if not len(others):
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    return torch.cdist(points.detach().float(), others.float()).amin(1) <= radius_px


class Found(NamedTuple):
    """Points of one image: xy float64 (N, 2), px; label int64 (N,)."""

    xy: Float64
    label: Int64


@torch.no_grad()
def find_points(training: PointsTraining, image: UInt8) -> Found:
    """Run the model on one whole image (H, W, 3), mirrored to a multiple of 32, and read its points as in use."""
    recipe = training.recipe
    height, width = image.shape[:2]
    edges = (0, -height % FIELD_MULTIPLE), (0, -width % FIELD_MULTIPLE), (0, 0)
    padded = np.pad(image, edges, mode="symmetric")
    batch = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))[None].to(training.device)
    output = found_points(training(batch), padded.shape[:2], keep=training.keep)
    xy = output["points"][0].double().cpu().numpy()
    score = output["scores"][0].float().cpu().numpy()
    label = output["class_prob"][0].argmax(1).cpu().numpy()
    there = (score > 0) & (score >= recipe.detect.score_threshold) & (xy < (width, height)).all(1)
    xy, score, label = xy[there], score[there], label[there]
    kept = point_nms(xy, score, recipe.detect.nms_um / recipe.mpp)
    return Found(xy[kept], label[kept].astype(np.int64))


def annotated(item: PointImage, xy: Float64) -> Bool:
    """Return bool (N,): whether points (N, 2) of an image lie where all its nuclei are known."""
    height, width = item.region.shape
    col, row = np.floor(xy).astype(int).clip(0, (width - 1, height - 1)).T
    return np.asarray(item.region[row, col] == SUPERVISED)


class ScoreBoard:
    """Counts of the images seen so far, pooled: of typed images by class and without, of others by data set.

    Typed images are compared as BRCA-M2C's authors do, others by as many pairs as possible, within 3 µm.
    """

    def __init__(self, n_classes: int, mpp: float) -> None:
        self.n_classes, self.mpp = n_classes, mpp
        self.clear()

    def clear(self) -> None:
        """Forget all images."""
        self.by_class = [Tally()] * self.n_classes
        self.detection: dict[str, Tally] = defaultdict(Tally)

    def add(self, item: PointImage, found: Found) -> None:
        """Count one image; points where it is not annotated count neither way."""
        true_rows, rows = annotated(item, item.xy), annotated(item, found.xy)
        true, pred = Marks(item.xy[true_rows]), Marks(found.xy[rows])
        rule = BRCA_M2C if item.typed else OPTIMAL
        self.detection["" if item.typed else item.dataset] += rule.tally(true, pred, self.mpp)
        if item.typed:
            labels = item.label[true_rows], found.label[rows]
            counts = rule.class_tallies(true, labels[0], pred, labels[1], self.n_classes, self.mpp)
            self.by_class = [a + b for a, b in zip(self.by_class, counts, strict=True)]

    def take(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Return the scores of all images so far, and forget them."""
        scores: dict[str, float] = {}
        for dataset, counts in self.detection.items():
            scores["_".join(filter(None, ("detection", dataset, "f1")))] = counts.f1 or 0.0
            if not dataset:
                scores |= {"precision": counts.precision or 0.0, "recall": counts.recall or 0.0}
        f1 = {name: c.f1 for name, c in zip(classes, self.by_class, strict=True) if c.f1 is not None}
        if f1:
            scores |= {f"f1_{name}": value for name, value in f1.items()}
            scores["mean_f1"] = float(np.mean(list(f1.values())))
        self.clear()
        return scores


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Fill the backbone from a published or pretrained one, or from that of a detector (a file, or a run's folder).

    A file that holds the convolutional encoder alone, as timm or EfficientNet-Lite name it, fills the encoder. Heads in
    the file are left out; raises WeightsError where a tensor of the backbone is missing or of another shape.
    """
    file = weights_in(Path(path))
    encoder = model.get_submodule("backbone").encoder
    if isinstance(encoder, ConvEncoder) and holds_network(read_tensors(file)[0], encoder.encoder):
        fill_backbone(encoder.encoder, str(file))
    else:
        muse_layout.fill_backbone(model.get_submodule("backbone"), file)
