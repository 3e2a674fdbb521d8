"""MUSE: self-distillation of images and of the nuclei that two views share, at any scale (NuLo).

Frame: nuclei are in pixels of each view, (x, y).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.muse import MuseBackbone
from cellslide.models.muse_layout import backbone_state, fill_backbone
from cellslide.store.atomic import beside
from cellslide.train.export import ModelWriter, model_writer, trained_entry, weights_in
from cellslide.train.pretrain.data import MuseViews, Views
from cellslide.train.pretrain.distill import Center, DinoHead, cosine_between, follow, image_loss, nucleus_loss
from cellslide.train.pretrain.fields import FieldSet, Sources
from cellslide.train.pretrain.module import Feed, Pretraining, begin
from cellslide.train.pretrain.recipe import HeadConfig, MuseRecipe
from cellslide.train.pretrain.watch import read
from cellslide.train.run import Outcome, RunOptions, fit
from cellslide.weights.manifest import WeightsEntry

# What the published checkpoints call the backbone of their `teacher`.
PUBLISHED_PREFIX = "module."
TEACHER = "teacher.pth"


class Said(NamedTuple):
    """What a network says of views: image vectors (B, V, E), nucleus vectors (n, D) in the order of `seen`."""

    image: Tensor
    nuclei: Tensor


class MuseStudent(nn.Module):
    """A MUSE backbone with a head for images and one for nuclei; the teacher is another of the same."""

    def __init__(self, backbone: MuseBackbone, head: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_head = DinoHead(backbone.image_dim, head)
        self.nucleus_head = DinoHead(backbone.dim, head)

    def forward(self, views: Sequence[Tensor], xy: Tensor, seen: Tensor) -> Said:
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
        return Said(torch.cat(images, dim=1), torch.cat(nuclei, dim=1)[seen])


class MuseTraining(Pretraining):
    """Trains a student to say of one view what the teacher, its moving average, says of another (eq. 7)."""

    watched = ("image", "nucleus")
    recipe: MuseRecipe

    def __init__(self, recipe: MuseRecipe, backbone: MuseBackbone, feed: Feed, stop_on_collapse: bool = False) -> None:
        student = MuseStudent(backbone, recipe.head)
        teacher = copy.deepcopy(student).requires_grad_(False)
        super().__init__(recipe, teacher, student, feed, stop_on_collapse)
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
            told = self.teacher([global_], views.xy[:, :2], views.seen[:, :2])
            logits = self.teacher.image_head(told.image), self.teacher.nucleus_head(told.nuclei)
            wanted = self.image_center.targets(logits[0], self.teacher_temp)
            wanted_nuclei = self.nucleus_center.targets(logits[1], self.teacher_temp)
        said = self.student([global_, local], views.xy, views.seen)
        log_probs = (self.student.image_head(said.image) / distill.student_temp).log_softmax(-1)
        log_nuclei = (self.student.nucleus_head(said.nuclei) / distill.student_temp).log_softmax(-1)
        of_images = image_loss(wanted, log_probs)
        of_nuclei, matched = nucleus_loss(wanted_nuclei, log_nuclei, views.seen)
        total = self.check_finite(distill.image * of_images + distill.nucleus * of_nuclei)
        self.say({"train/loss": total, "train/image": of_images, "train/nucleus": of_nuclei, "train/matched": matched})
        self.say(read(told.image.flatten(0, 1), wanted.flatten(0, 1), self.image_center.value).as_dict("image"))
        self.say(read(told.nuclei, wanted_nuclei, self.nucleus_center.value).as_dict("nucleus"))
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


def pretrain_muse(
    sources: Sources, recipe: MuseRecipe, options: RunOptions, stop_on_collapse: bool = False
) -> MuseTraining:
    """Pretrain, or go on from `folder/last.ckpt` if it is there; returns the module with student and teacher.

    `options.init` is a backbone to start from: what an earlier run wrote, or a published checkpoint.
    Raises UsageError for sources or a recipe that do not fit, CollapseError if asked to, Interrupted on a signal.
    """
    start, sets = begin(sources, recipe, options)
    backbone = build_model(recipe.model.arch, recipe.model.config)
    if not isinstance(backbone, MuseBackbone):
        raise UsageError(f"recipe model.arch: {recipe.model.arch} must be muse, muse_vit_s, muse_vit_b or muse_r50")
    if options.init is not None and start.checkpoint is None:
        fill_backbone(backbone, weights_in(options.init))
    feed = Feed(MuseViews(sets, recipe), options.workers, start.first_epoch)
    module = MuseTraining(recipe, backbone, feed, stop_on_collapse)
    outcome = Outcome(writer(recipe, sets, sources), "", 0.0, recipe.optim.grad_clip)
    fit(module, (None, None), options, start, outcome)
    return module


def writer(recipe: MuseRecipe, sets: Sequence[FieldSet], sources: Sources) -> ModelWriter:
    """Return what writes the teacher: its backbone as a model of its own, and whole in the published layout."""
    write_backbone = model_writer(recipe, [s.as_dict() for s in sets], lambda _: entry_of(recipe, sources))

    def write(folder: Path, state: Mapping[str, Tensor], metrics: Mapping[str, float], step: int) -> None:
        write_backbone(folder, backbone_state(state, str(folder)), metrics, step)
        write_published(folder / TEACHER, state)

    return write


def write_published(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a teacher as the published checkpoints are laid out: `teacher`, names below `module.`."""
    named = {PUBLISHED_PREFIX + name: value.detach().cpu() for name, value in state.items()}
    # To an open file: torch puts the name of a path into the file.
    with beside(path) as scratch, scratch.open("wb") as file:
        torch.save({"teacher": named}, file)


def entry_of(recipe: MuseRecipe, sources: Sources) -> WeightsEntry:
    """Return the manifest entry of a pretrained backbone, without what its file tells."""
    return replace(
        trained_entry(recipe, "backbone", recipe.model.arch, recipe.model, sources.named, {}),
        config=recipe.model.config,
        citation="MUSE, Yang et al. 2026 (method); weights trained with cellslide",
    )
