"""Networks by name: loaded once, used for one slide or image after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cellslide.config import (
    ClassifyConfig,
    EmbedConfig,
    Engine,
    InferConfig,
    Precision,
    SegmentConfig,
    TileConfig,
    TissueConfig,
)
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.classify import Classifier, SlideClassifier
    from cellslide.classify.decision import GateRule
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.embed import Embedder
    from cellslide.inference.segmenter import Segmenter
    from cellslide.weights import LoadedClassifier, LoadedModel, WeightsEntry
    from cellslide.weights.muse import LoadedMuse

Task: TypeAlias = Literal["segment", "detect", "classify", "backbone"]
# A model, its id, what gives one when it is needed, or None for the one that ships.
ModelLike: TypeAlias = "str | Model | Callable[[], Model] | None"


class Model:
    """A network with its weights, used for one slide or image after another; a context manager.

    task     what it was loaded for: "segment" and "detect" find nuclei, "classify" types them, "backbone" embeds them.
    name     the id of its weights.
    classes  the names of its classes, in the order of the columns of probabilities; empty where it does not type.
    """

    def __init__(
        self,
        loaded: LoadedModel | LoadedClassifier | LoadedMuse,
        task: Task,
        infer: InferConfig,
        asked: tuple[str | None, Path | None] = (None, None),
    ) -> None:
        self.loaded: Any = loaded
        self.task, self.infer = task, infer
        self._settings: dict[str, Any] = {"model": asked[0], "weights": asked[1], "infer": infer}
        spec = getattr(loaded, "spec", None)
        self.name: str = self.loaded.entry.id if spec is None else spec.weights_id or spec.name
        self.classes: tuple[str, ...] = () if spec is None else tuple(c.name for c in spec.classes)
        self._segmenters: dict[object, Segmenter] = {}

    def __repr__(self) -> str:
        return f"Model({self.name!r}, task={self.task!r}, device={self.infer.device!r})"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that decode; the model can be used again, they start anew then."""
        while self._segmenters:
            self._segmenters.popitem()[1].detector.close()

    def segmenter(self, config: SegmentConfig) -> Segmenter:
        """Return the network on its device for slides with these settings; the processes are those of earlier calls."""
        return self._segmenter(replace(config, **self._settings))

    def image_segmenter(
        self, tiles: TileConfig | None = None, tta: bool = False, batch_size: int | None = None
    ) -> Segmenter:
        """Return the network on its device for images in memory: it decodes in this process."""
        # Few tiles: decoding them here is quicker than starting processes.
        infer = replace(self.infer, workers=self.infer.workers or 0, batch_size=self.infer.batch_size or batch_size)
        given = {**self._settings, "infer": infer}
        return self._segmenter(
            SegmentConfig(**given, tissue=TissueConfig(enabled=False), tiles=tiles or TileConfig(), tta=tta)
        )

    def _segmenter(self, config: SegmentConfig) -> Segmenter:
        from cellslide.inference.segmenter import check_formats, open_segmenter

        self._require("segment", "detect")
        key = config.infer, config.tiles, config.tta
        if key not in self._segmenters:
            self._segmenters[key] = open_segmenter(self.loaded, config)
        segmenter = self._segmenters[key]
        check_formats(segmenter.spec, config.output.formats)
        return replace(segmenter, config=replace(config, tiles=segmenter.config.tiles))

    def classifier(self, config: ClassifyConfig) -> Classifier:
        """Return the network on its device, to type cells with these settings."""
        from cellslide.classify import open_classifier

        self._require("classify")
        return open_classifier(self.loaded, replace(config, **self._settings))

    def slide_classifier(self, config: ClassifyConfig, rule: GateRule | RuleSettings | None = None) -> SlideClassifier:
        """Return the network on its device with the rule that decides; raises UsageError for one that does not fit."""
        from cellslide.batch.work import organ_finder
        from cellslide.classify import SlideClassifier
        from cellslide.classify.rule_settings import RuleSettings

        settings = rule if isinstance(rule, RuleSettings) else RuleSettings(rule)
        classifier = self.classifier(settings.network(config))
        return SlideClassifier(classifier, settings.rule(classifier.spec), organ_finder(classifier.spec, config.organ))

    def embedder(self, config: EmbedConfig) -> Embedder:
        """Return the network on its device, to embed cells with these settings."""
        from cellslide.embed import open_embedder

        self._require("backbone")
        return open_embedder(self.loaded, replace(config, **self._settings))

    def _require(self, *tasks: Task) -> None:
        if self.task not in tasks:
            raise UsageError(f"model {self.name}: loaded to {self.task}; load it with task={tasks[0]!r}")


def load_model(
    name: str | None = None,
    *,
    weights: str | Path | None = None,
    task: Task | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    engine: Engine = "torch",
    compile: bool = False,
    seed: int = 0,
) -> Model:
    """Load a network by its id, from a file of weights, or the one that ships for the task.

    task        None takes the task that the weights were made for, and "segment" where they do not say it.
    batch_size  tiles, crops or windows in a pass; None lets the device decide.
    workers     processes that decode outlines; None takes the cores granted, 0 decodes in this process.
    Raises UsageError for an unknown id or another task, WeightsError where the weights are missing or do not fit.
    """
    infer = InferConfig(device, batch_size, precision, engine, workers, compile, seed)
    file = None if weights is None else Path(weights)
    task = task or task_of(name, file) or "segment"
    return Model(_load(name, file, task), task, infer, (name, file))


def _load(name: str | None, weights: Path | None, task: Task) -> LoadedModel | LoadedClassifier | LoadedMuse:
    if task == "classify":
        from cellslide.weights.classifier import load_classifier

        return load_classifier(name, weights)
    if task == "backbone":
        from cellslide.weights.muse import load_muse

        return load_muse(name, weights)
    if task not in ("segment", "detect"):
        raise UsageError(f"task {task}: must be segment, detect, classify or backbone")
    from cellslide.weights import load_model

    return load_model(name, weights, task)


def task_of(name: str | None, weights: Path | None = None) -> Task | None:
    """Return the task of an id, or of the `model.yaml` beside a file of weights; None where neither names it."""
    from cellslide.weights import Manifest
    from cellslide.weights.load import entry_beside

    if name is not None:
        entry = Manifest.load().entries.get(name)
    else:
        entry = None if weights is None else entry_beside(weights)
    return None if entry is None else entry.task


@contextmanager
def opened(model: ModelLike, task: Task | None) -> Iterator[Model]:
    """Yield a model; one that was named, or that ships, is loaded here and closed at the end."""
    if isinstance(model, Model):
        yield model
        return
    with load_model(model, task=task) if model is None or isinstance(model, str) else model() as loaded:
        yield loaded


def list_models(task: Task | None = None) -> tuple[WeightsEntry, ...]:
    """Return what is known of all models, or of those for a task: id, licence, classes, pixel size and scores."""
    from cellslide.weights import Manifest

    return tuple(entry for entry in Manifest.load().entries.values() if task in (None, entry.task))


def fetch_model(name: str, accept_licence: str | None = None) -> Path:
    """Download the weights of a model after its licence is accepted by its name; return the file.

    Weights that are here already are only checked. Raises UsageError without consent, WeightsError where they may not
    or cannot be fetched.
    """
    from cellslide.weights import Manifest, fetch

    return fetch(Manifest.load().entry(name), accept_licence, lambda licence: False)
