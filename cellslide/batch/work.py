"""What is done with each slide of a run: nuclei found, typed or both, read for their vectors, or decided anew.

Settings are pickled, networks are not: each process opens its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from cellslide import weights
from cellslide.batch.fetch import Fetch
from cellslide.batch.local_copy import LocalCopies, is_done, local_target
from cellslide.batch.run import SlideOutcome, failed, reported, tried, write_failure
from cellslide.batch.workers import Handle
from cellslide.classify import SlideClassifier, open_classifier, regate_slide
from cellslide.classify.foreign import import_cells
from cellslide.classify.rule_settings import RuleSettings
from cellslide.classify.slide import typed_by
from cellslide.classify.targets import Target, open_target, require_cells
from cellslide.config import ClassifyConfig, EmbedConfig, InferConfig, SegmentConfig
from cellslide.embed import Embedder, embed_target, open_embedder
from cellslide.errors import BusyError, SlideError, UsageError
from cellslide.formats.registry import find_formats
from cellslide.inference.device import available_cpus, require_devices
from cellslide.inference.segmenter import Segmenter, check_settings, load_segmenter
from cellslide.inference.stream import default_workers
from cellslide.pipeline import classify_slide, done_before, open_source, run_slide
from cellslide.progress import IDLE, Progress, StopCheck, Watch
from cellslide.slides.slide import Slide
from cellslide.store.slide_folder import held
from cellslide.types import Calibration, ClassifierSpec, RunRecord
from cellslide.weights import LoadedModel, muse
from cellslide.weights import classifier as classifier_weights
from cellslide.weights.classifier import LoadedClassifier, calibration_of, classifier_entry, spec_of
from cellslide.weights.load import find_weights
from cellslide.weights.organs import Organ, find_organ, look_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentWork:
    """How nuclei are found; `load` gives the model in place of the one that the settings name."""

    config: SegmentConfig
    load: Callable[..., LoadedModel] | None = None

    def check(self) -> None:
        """Raise UsageError, WeightsError or MissingDependencyError for settings with which no slide could be done."""
        if self.load is None:
            check_settings(self.config)

    def open(self) -> Segmenter:
        """Put the model on its device."""
        return load_segmenter(self.load or weights.load_model, self.config)


@dataclass(frozen=True, slots=True)
class ClassifyWork:
    """How nuclei are typed; `load` gives the classifier in place of the one that the settings name."""

    config: ClassifyConfig
    rule: RuleSettings = RuleSettings()
    load: Callable[..., LoadedClassifier] | None = None

    def check(self) -> None:
        """Raise UsageError for a rule or an organ that does not suit the classifier, or as `SegmentWork.check`."""
        find_formats(self.config.output.formats)
        entry = None if self.load else find_weights(self.config.model, self.config.weights, "classify")
        spec = self._loaded().spec if entry is None else spec_of(entry, "")
        rule = self.rule.rule(spec)
        self.rule.network(self.config)
        if self.config.organ is not None:
            rule.for_organ(look_up(spec, self.config.organ).trained).check()
        require_devices(self.config.infer.device)

    def open(self) -> SlideClassifier:
        """Put the classifier on its device."""
        classifier = open_classifier(self._loaded(), self.rule.network(self.config))
        spec = classifier.spec
        return SlideClassifier(classifier, self.rule.rule(spec), organ_finder(spec, self.config.organ))

    def _loaded(self) -> LoadedClassifier:
        return (self.load or classifier_weights.load_classifier)(self.config.model, self.config.weights)


def organ_finder(spec: ClassifierSpec, given: str | None) -> Callable[[str | None], Organ]:
    """Return what gives the organ for the list's word; checks the one that is given for all slides now."""
    if given is None:
        return partial(find_organ, spec)
    organ = find_organ(spec, given)
    return lambda _: organ


@dataclass(frozen=True, slots=True)
class SlideWork:
    """Find the nuclei of slides, type them, or both; `copies` is where slides are copied to first."""

    segment: SegmentWork | None = None
    classify: ClassifyWork | None = None
    copies: LocalCopies | None = None

    @property
    def stages(self) -> int:
        """How often the progress of a slide begins."""
        return (self.segment is not None) + (self.classify is not None)

    def check(self) -> None:
        """Raise as the checks of both parts, before anything starts."""
        for part in (self.segment, self.classify):
            if part is not None:
                part.check()

    def look(self, target: Target) -> Slide | None:
        """Open a slide as the work will; one at an address is asked for."""
        if target.source.remote is not None:
            if self.segment is None:
                require_cells(target)
            Fetch(target.source).ask()
            return None
        return self.open_slide(target)

    def open_slide(self, target: Target) -> Slide:
        """Open a slide that is here as the work will."""
        if self.segment is not None:
            return open_source(target.source, self.segment.config)
        if self.classify is None:
            raise ValueError("nothing to do")
        return open_typed(target, self.classify.config)

    def on(self, device: str | None, processes: int) -> SlideWork:
        """Return the work of one of so many processes: on a device, if named, with its share of the cores."""
        segment, classify = self.segment, self.classify
        if segment is not None:
            infer = on_device(segment.config.infer, device, processes)
            segment = replace(segment, config=replace(segment.config, infer=infer))
        if classify is not None:
            infer = on_device(classify.config.infer, device, processes)
            classify = replace(classify, config=replace(classify.config, infer=infer))
        return replace(self, segment=segment, classify=classify)

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Open the networks and give what does one slide."""
        work = self.on(device, processes)
        with ExitStack() as stack:
            # A classifier that is refused must not wait for the model before it.
            by = None if work.classify is None else work.classify.open()
            segmenter = None if work.segment is None else stack.enter_context(work.segment.open())
            yield partial(self._one, segmenter, by)

    def _one(
        self,
        segmenter: Segmenter | None,
        by: SlideClassifier | None,
        target: Target,
        progress: Progress,
        stop: StopCheck,
    ) -> SlideOutcome:
        watch, began = Watch(progress, stop), time.perf_counter()
        with ExitStack() as stack:
            try:
                if target.source.remote is not None and not self._anew:
                    known = done_before(target, segmenter, by, watch)
                    if known is not None:
                        return reported(target, tried(target.source, lambda: known))
                target = stack.enter_context(self.local(target, watch))
            except (SlideError, UsageError, BusyError) as error:
                note = None if segmenter is None else partial(write_failure, target.source, segmenter, target.folder)
                return failed(target.source, error, time.perf_counter() - began, note)
            return do_slide(target, segmenter, by, watch)

    @property
    def _anew(self) -> bool:
        last = self.classify or self.segment
        return last is not None and last.config.output.overwrite

    @contextmanager
    def local(self, target: Target, watch: Watch) -> Iterator[Target]:
        """Yield a slide with its copy on a local disk; raises as `local_target`."""
        done = not self._anew and is_done(target, typed=self.classify is not None)
        left = done and target.source.remote is None
        with local_target(target, None if left else self.copies, watch) as copied:
            yield copied


def open_typed(target: Target, config: ClassifyConfig | EmbedConfig) -> Slide:
    """Open the slide of a target that has cells; raises as `require_cells` and `open_target`."""
    require_cells(target)
    return open_target(target, config.mpp, config.allow_fluorescence)


def do_slide(
    target: Target, segmenter: Segmenter | None, by: SlideClassifier | None, watch: Watch = IDLE
) -> SlideOutcome:
    """Find the nuclei of a slide, type them, or both, write its page, and return how it ended.

    A slide of which some tiles failed is typed all the same, and counts as failed. Raises Interrupted when asked to
    stop, and errors of environment or weights, which no other slide would escape.
    """
    watch.check()
    source, folder = target.source, target.folder
    if segmenter is not None:
        work = partial(run_slide, source, segmenter, by, folder.parent, watch)
        return reported(target, tried(source, work, partial(write_failure, source, segmenter, folder)))
    if by is None:
        raise ValueError("nothing to do")
    return reported(target, tried(source, partial(classify_slide, target, by, watch)))


@dataclass(frozen=True, slots=True)
class EmbedWork:
    """Read the vectors of the cells of slides."""

    config: EmbedConfig
    stages: ClassVar[int] = 1

    def check(self) -> None:
        """Raise MissingDependencyError for a device that is not there."""
        require_devices(self.config.infer.device)

    def look(self, target: Target) -> Slide:
        """Open a slide as the work will."""
        return open_typed(target, self.config)

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Open the backbone and give what does one slide."""
        config = replace(self.config, infer=on_device(self.config.infer, device, processes))
        yield partial(self._one, open_embedder(muse.load_muse(config.model, config.weights), config))

    def _one(self, embedder: Embedder, target: Target, progress: Progress, stop: StopCheck) -> SlideOutcome:
        return reported(target, tried(target.source, partial(embed_target, target, embedder, Watch(progress, stop))))


@dataclass(frozen=True, slots=True)
class RegateWork:
    """Apply another rule to the typed cells of slides, without the network.

    config  names other weights where their calibration is to stand for that of those the cells were typed with.
    """

    config: ClassifyConfig
    rule: RuleSettings
    stages: ClassVar[int] = 1

    def check(self) -> None:
        """Raise UsageError for a format that is unknown."""
        find_formats(self.config.output.formats)

    def look(self, target: Target) -> None:
        """Raise UsageError where a slide has no cells."""
        require_cells(target)

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Handle]:
        """Give what does one slide."""
        model, file = self.config.model, self.config.weights
        named = model is not None or file is not None
        yield partial(self._one, calibration_of(classifier_entry(model, file)) if named else None)

    def _one(
        self, calibration: Calibration | None, target: Target, progress: Progress, stop: StopCheck
    ) -> SlideOutcome:
        work = partial(self._regate, target, calibration, Watch(progress, stop))
        return reported(target, tried(target.source, work))

    def _regate(self, target: Target, calibration: Calibration | None, watch: Watch) -> tuple[RunRecord, bool]:
        require_cells(target)
        with held(target.folder, watch) as watch:
            rule = self.rule.rule(typed_by(target.folder), calibration)
            return regate_slide(target.folder, rule, self.config.output, watch), False


def on_device(config: InferConfig, device: str | None, processes: int) -> InferConfig:
    """Return the settings for one of so many processes: its device, and its share of the cores to decode with."""
    config = config if device is None else replace(config, device=device)
    if config.workers is None and processes > 1:
        config = replace(config, workers=max(1, default_workers(available_cpus()) // processes))
    return config


def bring_cells(targets: Sequence[Target], config: ClassifyConfig) -> Target:
    """Make the cell table of the one slide from `--cells`; returns the slide. Raises UsageError for more slides."""
    if len(targets) != 1:
        raise UsageError(f"--cells {config.cells}: name the one slide that they lie on, not {len(targets)}")
    log.info("%s", import_cells(targets[0], config))
    return targets[0]
