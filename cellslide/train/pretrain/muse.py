"""MUSE: self-distillation of images and of the nuclei that two views share, at any scale (NuLo).

Frame: nuclei are in pixels of each view, (x, y).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellslide.models.muse import MuseBackbone
from cellslide.models.muse_layout import backbone_state, fill_backbone
from cellslide.store.atomic import beside
from cellslide.train.export import weights_in
from cellslide.train.pretrain.data import MuseViews, Views
from cellslide.train.pretrain.distill import Center, DinoHead, cosine_between, follow, image_loss, nucleus_loss
from cellslide.train.pretrain.module import Pretraining
from cellslide.train.pretrain.recipe import HeadConfig, MuseRecipe
from cellslide.train.pretrain.watch import read
from cellslide.train.task import Run

# What the published checkpoints call the backbone of their `teacher`.
PUBLISHED_PREFIX = "module."
TEACHER = "teacher.pth"


class ViewFeatures(NamedTuple):
    """Features of views: image vectors (B, V, E), nucleus vectors (n, D) in the order of `seen`."""

    image: Tensor
    nuclei: Tensor


class MuseStudent(nn.Module):
    """A MUSE backbone with a head for images and one for nuclei; the teacher is another of the same."""

    def __init__(self, backbone: MuseBackbone, head: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_head = DinoHead(backbone.image_dim, head)
        self.nucleus_head = DinoHead(backbone.dim, head)

    def forward(self, views: Sequence[Tensor], xy: Tensor, seen: Tensor) -> ViewFeatures:
        """Return the features of views of several sizes, each (B, V_i, 3, S, S), and of their nuclei that are `seen`.

        xy (B, V, M, 2) in pixels of each view, seen bool (B, V, M), both over the views of all sizes in their order.
        """
        images, nuclei, first = [], [], 0
        for batch in views:
            b, v = batch.shape[:2]
            if v:
                found = self.backbone(batch.flatten(0, 1))
                places = xy[:, first : first + v].flatten(0, 1)
                images.append(found.image.unflatten(0, (b, v)))
                # In float32: half precision would round a nucleus's place to a tenth of a pixel of the map.
                nuclei.append(self.backbone.nucleus_features(found.map.float(), places).unflatten(0, (b, v)))
            first += v
        return ViewFeatures(torch.cat(images, dim=1), torch.cat(nuclei, dim=1)[seen])


class MuseTraining(Pretraining):
    """Trains a student to say of one view what the teacher, its moving average, says of another (eq. 7)."""

    watched = ("image", "nucleus")
    recipe: MuseRecipe

    def __init__(self, run: Run, backbone: MuseBackbone) -> None:
        recipe = run.recipe
        student = MuseStudent(backbone, recipe.head)
        teacher = copy.deepcopy(student).requires_grad_(False)
        super().__init__(run, teacher, student, MuseViews(run.sets, recipe))
        self.student = student
        momentum = recipe.distill.center_momentum
        self.image_center = Center(recipe.head.prototypes, momentum)
        self.nucleus_center = Center(recipe.head.prototypes, momentum)

    @property
    def teacher(self) -> MuseStudent:
        """The moving average of the student, which is written."""
        assert isinstance(self.model, MuseStudent)
        return self.model

    @property
    def teacher_temp(self) -> float:
        """The teacher's temperature at this step."""
        distill = self.recipe.distill
        share = min(1.0, self.epochs_done / distill.temp_epochs) if distill.temp_epochs > 0 else 1.0
        return distill.teacher_temp + share * (distill.final_teacher_temp - distill.teacher_temp)

    def training_step(self, views: Views, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts and readings; raises FloatingPointError if not finite."""
        distill = self.recipe.distill
        global_, local = self.normalized_views(views)
        with torch.no_grad():
            taught = self.teacher([global_], views.xy[:, :2], views.seen[:, :2])
            logits = self.teacher.image_head(taught.image), self.teacher.nucleus_head(taught.nuclei)
            wanted = self.image_center.targets(logits[0], self.teacher_temp)
            wanted_nuclei = self.nucleus_center.targets(logits[1], self.teacher_temp)
        learned = self.student([global_, local], views.xy, views.seen)
        log_probs = (self.student.image_head(learned.image) / distill.student_temp).log_softmax(-1)
        log_nuclei = (self.student.nucleus_head(learned.nuclei) / distill.student_temp).log_softmax(-1)
        of_images = image_loss(wanted, log_probs)
        of_nuclei, matched = nucleus_loss(wanted_nuclei, log_nuclei, views.seen)
        total = self.check_finite(distill.image * of_images + distill.nucleus * of_nuclei)
        self.log_means(
            {"train/loss": total, "train/image": of_images, "train/nucleus": of_nuclei, "train/matched": matched}
        )
        self.log_means(read(taught.image.flatten(0, 1), wanted.flatten(0, 1), self.image_center.value).as_dict("image"))
        self.log_means(read(taught.nuclei, wanted_nuclei, self.nucleus_center.value).as_dict("nucleus"))
        self.image_center.update(logits[0].flatten(0, 1))
        self.nucleus_center.update(logits[1])
        return total

    def normalized_views(self, views: Views) -> tuple[Tensor, Tensor]:
        """Return both kinds of views as the network takes them."""
        one, two = (
            self.normalized(v.flatten(0, 1)).unflatten(0, v.shape[:2]) if v.shape[1] else v.float()
            for v in (views.global_, views.local)
        )
        return one, two

    def on_after_backward(self) -> None:
        """Hold the heads' last layers still at the start, as DINO does."""
        if self.epochs_done < self.recipe.distill.frozen_epochs:
            for head in (self.student.image_head, self.student.nucleus_head):
                head.prototypes.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the teacher follow, then end if the time is up."""
        momentum = cosine_between(self.recipe.distill.momentum, 1.0, self.progress)
        follow(self.teacher, self.student, momentum)
        super().on_train_batch_end(outputs, batch, batch_idx)


def load_init(backbone: MuseBackbone, path: Path) -> None:
    """Fill the backbone with one to begin with: what an earlier run wrote, or a published checkpoint."""
    fill_backbone(backbone, weights_in(path))


def backbone_of(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a teacher that are written as a model of its own."""
    return backbone_state(state, "the teacher")


def write_teacher(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write a teacher as the published checkpoints are laid out: `teacher`, names below `module.`."""
    named = {PUBLISHED_PREFIX + name: value.detach().cpu() for name, value in state.items()}
    # To an open file: torch puts the name of a path into the file.
    with beside(folder / TEACHER) as scratch, scratch.open("wb") as file:
        torch.save({"teacher": named}, file)
