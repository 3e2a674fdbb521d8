"""What the process of a device does with each slide: segment, classify, or both; see `workers`.

Settings are pickled, models are not: each process loads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from cellslide.batch.local_copy import LocalCopies, done_before, local_targets
from cellslide.batch.run import SlideOutcome, classify_slides, run_slides, segment_slides
from cellslide.batch.workers import Handle
from cellslide.classify import Classifier, open_classifier
from cellslide.classify.columns import Rule
from cellslide.classify.targets import Target
from cellslide.config import ClassifyConfig, InferConfig, SegmentConfig
from cellslide.inference.device import available_cpus
from cellslide.inference.segmenter import Segmenter, load_segmenter
from cellslide.inference.stream import default_workers
from cellslide.progress import Progress, StopCheck, Watch
from cellslide.types import ClassifierSpec
from cellslide.weights import LoadedModel, load_model
from cellslide.weights.classifier import LoadedClassifier, load_classifier
from cellslide.weights.organs import Organ

OrganOf = Callable[[str | None], Organ]


@dataclass(frozen=True, slots=True)
class SegmentWork:
    """Find the nuclei of slides; `load` gives the model of the settings."""

    config: SegmentConfig
    copies: LocalCopies | None = None
    load: Callable[..., LoadedModel] = load_model

    @contextmanager
    def segmenter(self, device: str, processes: int) -> Iterator[Segmenter]:
        """Open the model on a device, its decoding processes a share of the cores."""
        config = replace(self.config, infer=on_device(self.config.infer, device, processes))
        with load_segmenter(self.load, config) as segmenter:
            yield segmenter

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Give what segments one slide."""
        with self.segmenter(device, processes) as segmenter:
            yield partial(self._one, segmenter)

    def _one(self, segmenter: Segmenter, target: Target, progress: Progress, stop: StopCheck) -> SlideOutcome:
        watch = Watch(progress, stop)
        out_dir, is_done = target.folder.parent, done_before("segment", segmenter.config.output.overwrite)
        with local_targets([target], self.copies, watch, is_done) as targets:
            (outcome,) = segment_slides((t.source for t in targets), segmenter, out_dir, watch)
        return outcome


@dataclass(frozen=True, slots=True)
class ClassifyWork:
    """Type the nuclei of slides by a rule; `organ_of` gives the organ for what a list says, `load` the classifier."""

    config: ClassifyConfig
    rule: Rule
    organ_of: Callable[[ClassifierSpec], OrganOf]
    copies: LocalCopies | None = None
    load: Callable[..., LoadedClassifier] = load_classifier

    def classifier(self, device: str, processes: int) -> Classifier:
        """Open the classifier on a device."""
        config = replace(self.config, infer=on_device(self.config.infer, device, processes))
        return open_classifier(self.load(config.model, config.weights), config)

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Give what types one slide."""
        yield partial(self._one, self.classifier(device, processes))

    def _one(self, classifier: Classifier, target: Target, progress: Progress, stop: StopCheck) -> SlideOutcome:
        watch = Watch(progress, stop)
        is_done = done_before("classify", classifier.config.output.overwrite)
        with local_targets([target], self.copies, watch, is_done) as targets:
            (outcome,) = classify_slides(targets, classifier, self.rule, self.organ_of(classifier.spec), watch)
        return outcome


@dataclass(frozen=True, slots=True)
class RunWork:
    """Find and type the nuclei of slides."""

    segment: SegmentWork
    classify: ClassifyWork

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Give what does one slide."""
        classifier = self.classify.classifier(device, processes)
        with self.segment.segmenter(device, processes) as segmenter:
            yield partial(self._one, segmenter, classifier)

    def _one(
        self, segmenter: Segmenter, classifier: Classifier, target: Target, progress: Progress, stop: StopCheck
    ) -> SlideOutcome:
        watch = Watch(progress, stop)
        rule, organ_of = self.classify.rule, self.classify.organ_of(classifier.spec)
        out_dir, is_done = target.folder.parent, done_before("classify", segmenter.config.output.overwrite)
        with local_targets([target], self.segment.copies, watch, is_done) as targets:
            sources = (t.source for t in targets)
            (outcome,) = run_slides(sources, segmenter, classifier, rule, organ_of, out_dir, watch)
        return outcome


def on_device(config: InferConfig, device: str, processes: int) -> InferConfig:
    """Return the settings for one of so many processes: its device, and its share of the cores to decode with."""
    workers = config.workers
    if workers is None:
        workers = max(1, default_workers(available_cpus()) // processes)
    return replace(config, device=device, workers=workers)
