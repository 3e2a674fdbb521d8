"""Training of CellDETR: boxes by set matching, classes in parallel or sequential mode, and embeddings by contrast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cellslide.errors import WeightsError
from cellslide.models.backbones import efficientnet_to_timm, is_efficientnet
from cellslide.models.celldetr import CellDETR, DetrOutput, Found, Slots, parallel_slots
from cellslide.models.celldetr_layout import own_names
from cellslide.models.checkpoint import check_fit
from cellslide.train.celldetr.data import BoxCrops, MarkedImage
from cellslide.train.celldetr.losses import (
    PARALLEL_FACTOR,
    SEQUENTIAL_FACTOR,
    Pairs,
    SetParts,
    empty_loss,
    info_nce,
    label_loss,
    match,
    noise_boxes,
    set_losses,
)
from cellslide.train.celldetr.recipe import CellDETRRecipe
from cellslide.train.celldetr.scores import BoxScores
from cellslide.train.celldetr.slots import NEAR, denoising_slots, noised_slots
from cellslide.train.export import read_state
from cellslide.train.module import ImageTraining

# What one training has and another has not: heads of the classes, and of the contrast.
CLASS_HEAD = "decouple_class_embed."
HEADS = (CLASS_HEAD, "contrastive_project.")


class CellDETRTraining(ImageTraining):
    """Trains CellDETR on crops with boxes; validation counts what its inference finds within 3 µm."""

    whole = MarkedImage
    recipe: CellDETRRecipe

    def __init__(self, recipe: CellDETRRecipe, model: CellDETR) -> None:
        super().__init__(recipe, model)
        self._scores = BoxScores(recipe)
        if recipe.model.probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(CLASS_HEAD))

    def train(self, mode: bool = True) -> CellDETRTraining:
        """Switch modes; a network of which only the last layer learns stays in evaluation mode."""
        super().train(mode)
        if self.recipe.model.probe:
            self.model.eval()
        return self

    @property
    def net(self) -> CellDETR:
        """The network."""
        assert isinstance(self.model, CellDETR)
        return self.model

    def rate_share(self, name: str) -> float:
        """Return the share of the learning rate of a parameter: backbone and sampling have their own."""
        return rate_share(name, self.recipe)

    def training_step(self, batch: BoxCrops, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        output = self.net.detect(self.normalise(batch.image))
        parts, pairs = self.detection_loss(output, batch)
        weights = self.recipe.loss
        if weights.label > 0 and self.recipe.model.classes:
            parts["label"] = weights.label * self.class_loss(output, batch, pairs)
        if weights.contrastive > 0:
            parts["contrastive"] = weights.contrastive * self.contrastive_loss(output, batch)
        return self.log_losses(torch.stack(list(parts.values())).sum(), parts, len(batch.image))

    def detection_loss(self, output: DetrOutput, batch: BoxCrops) -> tuple[dict[str, Tensor], list[Pairs]]:
        """Return the weighted terms by name, summed over the decoder's layers, and the pairs of its last layer."""
        weights = self.recipe.loss
        last, pairs = self._layer(Found(output.logits, output.boxes), batch)
        parts = {"ce": weights.ce * last.ce, "bbox": weights.bbox * last.bbox, "giou": weights.giou * last.giou}
        others = [self._layer(found, batch)[0].weighted(weights) for found in output.aux]
        if others:
            parts["aux"] = torch.stack(others).sum()
        if output.proposals is not None:
            repeats = self.recipe.matcher.proposal_repeats
            first = self._layer(output.proposals, batch, repeats)[0].weighted(weights)
            parts["proposals"] = weights.proposals * first
        return parts, pairs

    def _layer(self, found: Found, batch: BoxCrops, repeats: int = 1) -> tuple[SetParts, list[Pairs]]:
        pairs = match(found.logits, found.boxes, batch.boxes, self.recipe.matcher, repeats)
        known = known_at(batch.known, found.boxes)
        return set_losses(found.logits, found.boxes, batch.boxes, pairs, known), pairs

    def class_loss(self, output: DetrOutput, batch: BoxCrops, pairs: Sequence[Pairs]) -> Tensor:
        """Return the loss of the classes that the representation decoder gives, not weighted."""
        if self.recipe.mode == "sequential":
            logits = self.net.represent(output, output.boxes.detach()).logits
            found = torch.cat([rows[pair.query] for rows, pair in zip(logits, pairs, strict=True)])
            true = torch.cat([label[pair.target] for label, pair in zip(batch.label, pairs, strict=True)])
            return label_loss(found, true, SEQUENTIAL_FACTOR)
        slots = self.box_slots(batch.boxes)
        logits = self.net.represent(output, slots.boxes, slots.mask).logits
        label = torch.cat(batch.label)
        loss = label_loss(own_rows(logits, slots), label, PARALLEL_FACTOR)
        if self.recipe.boxes != "denoising":
            return loss
        near, far = own_rows(logits, slots, 1), own_rows(logits, slots, 2)
        return loss + 0.5 * label_loss(near, label, PARALLEL_FACTOR) + 0.5 * empty_loss(far, PARALLEL_FACTOR)

    def box_slots(self, own: Sequence[Tensor]) -> Slots:
        """Return what the representation decoder sees in parallel mode."""
        n_global = self.net.config.global_boxes
        if self.recipe.boxes == "denoising":
            return denoising_slots(own, n_global)
        if self.recipe.boxes == "noised":
            own = [noise_boxes(boxes, *NEAR, share=0.6) for boxes in own]
        return parallel_slots(own, n_global)

    def contrastive_loss(self, output: DetrOutput, batch: BoxCrops) -> Tensor:
        """Return the InfoNCE loss of noised boxes against the nuclei of their image, not weighted."""
        weights = self.recipe.loss
        slots = noised_slots(batch.boxes, *weights.noise)
        return info_nce(self.net.contrast(output, slots).logits, slots.counts, weights.temperature)

    def validation_step(self, item: MarkedImage, batch_idx: int) -> None:
        """Score one whole image."""
        self._scores.add(item, self._infer)

    def _infer(self, image: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(self.normalise(image.to(self.device)))
        return outputs

    def on_validation_epoch_end(self) -> None:
        """Log detection F1 of each data set, their mean, and the classes' mean F1 where nuclei are typed."""
        for name, value in self._scores.take().items():
            self.log(f"val/{name}", value)


def rate_share(name: str, recipe: CellDETRRecipe) -> float:
    """Return the share of the learning rate of a parameter by its name."""
    if name.startswith("detr.backbone."):
        return recipe.optim.encoder_lr_scale
    samples = "sampling_offsets" in name or "reference_points" in name
    return recipe.optim.point_lr_scale if samples else 1.0


def known_at(known: Tensor, boxes: Tensor) -> Tensor:
    """Return bool (B, Q): whether the centre of boxes (B, Q, 4) lies where `known` (B, H, W) is annotated."""
    height, width = known.shape[1:]
    size = boxes.new_tensor([width, height])
    xy = (boxes[..., :2].detach() * size).long()
    index = xy[..., 1].clamp(0, height - 1) * width + xy[..., 0].clamp(0, width - 1)
    return known.flatten(1).gather(1, index)


def own_rows(values: Tensor, slots: Slots, group: int = 0) -> Tensor:
    """Return the rows (M, C) of `values` (B, N, C) that stand for the images' own boxes, or for a group of copies."""
    return torch.cat([rows[group * n : (group + 1) * n] for rows, n in zip(values, slots.counts, strict=True)])


def load_init(model: nn.Module, path: Path) -> None:
    """Fill a network from a file of weights, or from the folder of a run; a head that the two do not share stays.

    A head is that of the classes or of the contrast: a contrastive checkpoint lacks the first. Raises WeightsError for
    anything else that does not fit, UsageError if there is no file.
    """
    state, wanted = own_names(read_state(path)), model.state_dict()
    shapes = [{name: value.shape for name, value in names.items()} for names in (state, wanted)]
    other = tuple(h for h in HEADS if _under(h, shapes[0]) != _under(h, shapes[1]))
    if other:
        print(f"init {path}: not taken are the heads {', '.join(h.rstrip('.') for h in other)}", flush=True)
    state = {name: value for name, value in state.items() if not name.startswith(other)}
    wanted = {name: value for name, value in wanted.items() if not name.startswith(other)}
    check_fit(wanted, state, f"{path}: does not fit")
    model.load_state_dict(state, strict=False)


def _under(prefix: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


def load_backbone(model: CellDETR, path: str | Path) -> None:
    """Fill the backbone from any file that holds its weights under one prefix; raises WeightsError if none does.

    Counters of batch norms, which constants have not, do not matter. An EfficientNet-Lite is read under its published
    names too.
    """
    state = read_state(Path(path))
    body = model.detr.backbone[0].body
    state = efficientnet_to_timm(state, body) if is_efficientnet(state) else state
    wanted = {name: value for name, value in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    first = next(iter(wanted))
    for prefix in sorted({name.removesuffix(first) for name in state if name.endswith(first)}):
        found = {name: state[prefix + name] for name in wanted if prefix + name in state}
        if found.keys() == wanted.keys() and all(found[name].shape == wanted[name].shape for name in wanted):
            body.load_state_dict(found, strict=False)
            return
    raise WeightsError(f"{path}: holds no backbone {model.config.backbone} as model.config of --recipe describes it")
