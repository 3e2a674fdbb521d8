"""Recipes of trainings: one frozen dataclass a topic, read from YAML, every key checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cellslide.errors import UsageError, short
from cellslide.store.foreign_files import read_yaml
from cellslide.types import ClassSpec
from cellslide.weights.manifest import is_id

Supervision = Literal["auto", "instances", "foreground", "points"]
Range = tuple[float, float]


def require(ok: bool, key: str, value: object, legal: str) -> None:
    """Raise UsageError that names the key and what is legal, unless `ok`."""
    if not ok:
        raise UsageError(f"recipe {key}: {value} must be {legal}")


@dataclass(frozen=True, slots=True)
class ValConfig:
    """Which samples of a data set validate: whole patients, whole organs, a split of the manifest, or images by name
    (without suffix). Patients never straddle.

    share     of the others so large a part validates too, drawn by patient, or by image where no patient is named.
    area      of each other slide, the middle of it that holds this share of the area of its nuclei validates too.
    guard_um  nuclei so near to the middle do neither; None is the width of what the network sees of a nucleus.
    """

    patients: tuple[str, ...] = ()
    organs: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    split: str | None = None
    share: float = 0.0
    area: float = 0.0
    guard_um: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "area"):
            require(0 <= getattr(self, name) < 1, f"datasets.val.{name}", getattr(self, name), "0 up to 1, without 1")


@dataclass(frozen=True, slots=True)
class LabelConfig:
    """Which labels count of slides whose nuclei are in a table.

    column    of the labels; `class` takes those of `classify`.
    file      a table `cell_id,label` in its place. Ids are those of the bundle's cells where `xenium label` matched
              them, else of the nuclei; with a column `slide` it is of several slides.
    kept, min_confidence
              of the column `label`: only those that `xenium label` kept and is so sure of.
    matched   only nuclei that are one with a nucleus of the bundle, where the table knows one.
    """

    column: str = "label"
    file: str | None = None
    kept: bool = True
    min_confidence: float = 0.6
    matched: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.min_confidence <= 1, "labels.min_confidence", self.min_confidence, "0 to 1")


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold of a cross-validation, "K/N" with K from 1: every K-th of N parts validates, the others train.

    The parts of a data set are made of whole patients, of whole organs where no patient is named, and of runs of
    consecutive images where there is one organ; what a set's `val` says is pooled with the rest. A patient or an organ
    is in the same part in every data set, whatever else is in them.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        ok = self.count >= 2 and 1 <= self.index <= self.count
        require(ok, "fold", f"{self.index}/{self.count}", "K/N with N of 2 or more and K from 1 to N")

    @classmethod
    def of(cls, text: str | None) -> Fold | None:
        """Read "K/N"; None stays None. Raises UsageError for anything else."""
        if text is None:
            return None
        first, _, second = text.partition("/")
        if not (first.isdigit() and second.isdigit()):
            raise UsageError(f"recipe fold: {text} must be K/N, such as 1/5")
        return cls(int(first), int(second))


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """How one data set is used.

    supervision      auto (told from the manifest), instances (all branches), foreground (instance numbers are not
                     trusted where nuclei touch), points (foreground branch and types, at sure pixels only).
    mpp              a number in µm/px, "manifest", or "from-nuclei" (per image, so that the median nucleus has
                     `nucleus_um` as its diameter).
    weight           share of the drawn crops, relative to the other sets.
    split            the rows of the manifest that train, of one split or of several; "test" is never read.
    folds            whether its images validate in a cross-validation; False for labels that are no truth, which only
                     train, without the patients that validate elsewhere.
    trust_single     foreground sets: train the HoVer branch too where a blob holds one nucleus.
    exclude_patients patients that are left out altogether, because they stand in a set kept for evaluation.
    classes          names of points' and nuclei's classes that the recipe calls otherwise.
    point_radius_um, background_um
                     point sets: sure nucleus within the first, sure background beyond the second where it is bright.
    """

    weight: float = 1.0
    supervision: Supervision = "auto"
    mpp: float | str = "manifest"
    nucleus_um: float = 5.25
    split: str | tuple[str, ...] | None = "train"
    folds: bool = True
    trust_single: bool = True
    exclude_patients: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    point_radius_um: float = 1.25
    background_um: float = 8.0
    val: ValConfig = field(default_factory=ValConfig)

    def __post_init__(self) -> None:
        require(self.weight >= 0, "datasets.weight", self.weight, "0 or more")
        names = (self.split,) if isinstance(self.split, str) else self.split or ()
        require("test" not in names, "datasets.split", self.split, "another split: test data never enters training")
        require(self.val.split != "test", "datasets.val.split", self.val.split, "another split than test")
        known = isinstance(self.mpp, str) and self.mpp in ("manifest", "from-nuclei")
        ok = known or (not isinstance(self.mpp, str) and 0.05 <= self.mpp <= 2)
        require(ok, "datasets.mpp", self.mpp, "0.05 to 2, manifest or from-nuclei")


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Strength of the augmentation; a probability of 0 turns a step off.

    Ranges are (low, high); `he_scale` and `he_shift` act on stain amounts, `od_shift` on the optical density.
    `pale_p` is the share of crops in which some nuclei are bleached from within, as vesicular nuclei are, `artefact_p`
    the share that gets a patch out of focus, ink, a fold, or the rim of a bubble.
    """

    flip: bool = True
    pale_p: float = 0.0
    artefact_p: float = 0.0
    rotate_p: float = 0.5
    scale: Range = (0.7, 1.4)
    scale_p: float = 0.8
    shear: float = 0.08
    stain_p: float = 0.8
    he_scale: float = 0.35
    he_shift: float = 0.05
    color_p: float = 0.7
    brightness: float = 0.2
    contrast: float = 0.25
    saturation: float = 0.3
    hue: float = 0.05
    gamma: float = 0.25
    blur_p: float = 0.3
    blur_sigma: Range = (0.3, 1.4)
    sharpen_p: float = 0.15
    jpeg_p: float = 0.3
    jpeg_quality: Range = (30, 90)
    noise_p: float = 0.2
    noise_sigma: float = 8.0

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1], "augment.scale", self.scale, "a rising pair above 0")
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_p")):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "0 to 1")


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """AdamW and its schedule.

    schedule  exponential multiplies the rate by `gamma` each epoch; cosine falls to `final_lr` of it; constant stays
              after the warm-up.
    ema       decay of the averaged weights that are validated and written; 0 turns averaging off.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-4
    betas: Range = (0.9, 0.999)
    schedule: Literal["exponential", "cosine", "constant"] = "cosine"
    gamma: float = 0.85
    warmup_steps: int = 0
    final_lr: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "0 up to, not including, 1")


@dataclass(frozen=True, slots=True)
class OptimConfig(AdamConfig):
    """AdamW as CellViT is trained; the encoder learns at `encoder_lr_scale` of the rate."""

    encoder_lr_scale: float = 1.0
    betas: Range = (0.85, 0.95)
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    ema: float = 0.999


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture by its registry name, its configuration, and how its images and classes are named.

    encoder_weights  weights that the encoder starts from; encoder_licence: theirs, where their file does not say it.
    """

    arch: str = "cellvta"
    config: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    classes: tuple[str, ...] = ()
    freeze_encoder: bool = False
    freeze_norms: bool = False
    encoder_weights: str | None = None
    encoder_licence: str | None = None


class Recipe:
    """Everything a run depends on besides its data: what the recipes of all trainings share.

    monitor  validation score whose best epoch is kept; "" keeps the last one.
    tile_px  edge of the tiles that the trained network reads; None: as its architecture says.
    """

    __slots__ = ()
    id: str
    mpp: float
    batch_size: int
    epochs: int
    epoch_samples: int
    max_minutes: float | None
    seed: int
    precision: Literal["auto", "fp32", "bf16"]
    optim: AdamConfig
    model: Any
    monitor: str = ""
    tile_px: int | None = None

    def check_length(self, least_batch: int, fold: str | None = None) -> None:
        """Raise UsageError for an id, a pixel size, a length or a fold that cannot be."""
        require(is_id(self.id), "id", repr(self.id), "letters, digits, dots, hyphens and underscores")
        require(0.05 <= self.mpp <= 2, "mpp", self.mpp, "0.05 to 2 µm/px")
        require(self.batch_size >= least_batch, "batch_size", self.batch_size, f"{least_batch} or more")
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        ok = self.epoch_samples >= self.batch_size
        require(ok, "epoch_samples", self.epoch_samples, f"at least one batch ({self.batch_size})")
        Fold.of(fold)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in an epoch; an incomplete last batch is not drawn."""
        return self.epoch_samples // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epoch_steps * self.epochs

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network: arch, config, mean, std, and classes where there are any.

        Raises UsageError for a network that cannot learn what the recipe asks.
        """
        model = self.model
        found = {"arch": model.arch, "config": model.config, "mean": model.mean, "std": model.std}
        return found | ({"classes": class_specs(model.classes)} if hasattr(model, "classes") else {})

    @property
    def encoder(self) -> tuple[str, str | None] | None:
        """The weights that the encoder starts from, and the licence that the recipe names, or None."""
        model = getattr(self, "model", None)
        weights = getattr(model, "encoder_weights", None)
        return None if weights is None else (str(weights), getattr(model, "encoder_licence", None))

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers from which the recipe can be built again."""
        plain: dict[str, Any] = as_plain(asdict(self))  # type: ignore[call-overload]  # each recipe is a dataclass
        return plain


R = TypeVar("R", bound=Recipe)


def load_recipe(kind: type[R], path: Path | None, overrides: Mapping[str, Any] | None = None) -> R:
    """Read a recipe from YAML (None: all defaults); `overrides` replace its keys, "model.config" those of a topic.

    Raises UsageError that names an unknown key or a value of the wrong kind.
    """
    return build(kind, read_document(path, overrides))


def read_document(path: Path | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings in a YAML file (None: nothing), its keys replaced by those of `overrides` that are not None.

    Raises UsageError if it is no mapping.
    """
    document: Any = {}
    if path is not None:
        try:
            document = read_yaml(path, UsageError) or {}
        except (OSError, UsageError) as error:
            raise UsageError(f"--recipe {path}: cannot be read ({short(error)})") from error
    if not isinstance(document, dict):
        raise UsageError(f"--recipe {path}: must be a mapping of keys to values")
    for key, value in (overrides or {}).items():
        if value is not None:
            topic, _, name = key.rpartition(".")
            inner = (document.get(topic) or {}) if topic else document
            inner = {**inner, name: str(value) if isinstance(value, Path) else value}
            document = {**document, topic: inner} if topic else inner
    return document


# Colours of classes, those of PanNuke first.
COLORS = ((255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68), (35, 255, 255))


def class_specs(names: Sequence[str]) -> tuple[ClassSpec, ...]:
    """Return classes with their colours."""
    return tuple(ClassSpec(name, COLORS[k % len(COLORS)]) for k, name in enumerate(names))


T = TypeVar("T")


def build(cls: type[T], document: object, where: str = "") -> T:
    """Build a dataclass of settings, and those inside it, from plain containers.

    Raises UsageError on unknown keys and wrong kinds.
    """
    if not isinstance(document, Mapping):
        raise UsageError(f"recipe {where or 'file'}: must be a mapping, found {document!r}")
    hints = typing.get_type_hints(cls)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(document) - set(kinds))
    if unknown:
        raise UsageError(f"recipe {where}: unknown key {', '.join(map(str, unknown))}; known: {', '.join(kinds)}")
    return cls(**{key: _convert(kinds[key], value, f"{where}{key}.") for key, value in document.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    key, origin, args = where.rstrip("."), typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where)
    if origin is Literal:
        require(value in args, key, value, "one of " + ", ".join(map(str, args)))
        return value
    if origin is types.UnionType or origin is typing.Union:
        return _convert_union(args, value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), key, value, "a mapping")
        return {name: _convert(args[1], item, f"{where}{name}.") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(value, key)
    require(type(value) is kind, key, repr(value), f"of type {getattr(kind, '__name__', kind)}")
    return value


def _number(value: float | str, key: str) -> float:
    # YAML reads 3e-4 as text, because it lacks the point.
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"recipe {key}: {value!r} must be a number") from None


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    if isinstance(value, str) and str in args:
        return value
    others = [a for a in args if a not in (type(None), str)]
    return _convert(others[0] if others else str, value, where)


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    require(isinstance(value, list | tuple), where.rstrip("."), value, "a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, where) for item in value)
    require(len(value) == len(args), where.rstrip("."), value, f"a list of {len(args)}")
    return tuple(_convert(kind, item, where) for kind, item in zip(args, value, strict=True))


def as_plain(value: Any) -> Any:
    """Return tuples as lists and mappings as dicts, at every depth."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in value]
    return value
