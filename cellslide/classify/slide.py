"""Type the nuclei of one slide: its cell table gains what was decided, and all that it was decided from.

table -> chosen cells -> regions, crops, network -> probabilities kept on disk -> rule -> columns -> other formats
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.classify.cells import Work, classify_cells, prepare
from cellslide.classify.columns import DecidedColumns, Rule
from cellslide.classify.engine import Classifier
from cellslide.classify.store import PartialProbs
from cellslide.config import ClassifyConfig, OutputConfig, TissueConfig
from cellslide.errors import SlideError, StaleError, UsageError
from cellslide.formats.files import renew_files, write_formats, write_missing
from cellslide.inference.finite import NOT_FINITE
from cellslide.plausibility.verdict import judge_folder
from cellslide.progress import IDLE, Watch
from cellslide.slides.identity import content_sha256
from cellslide.slides.slide import Slide
from cellslide.slides.tissue import find_tissue
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, TableExtender, open_table
from cellslide.store.file_list import changed_sizes
from cellslide.store.run_record import (
    TABLE,
    differences,
    flatten,
    plain,
    read_record,
)
from cellslide.store.slide_folder import close_record
from cellslide.types import (
    Bool,
    Calibration,
    ClassifierSpec,
    ClassSpec,
    CropSpec,
    Float64,
    Int64,
    PathProbs,
    RunRecord,
    WeightsRef,
)
from cellslide.weights.organs import Organ

# Fewer batches than this are done before an estimate would be read.
ESTIMATE_BATCHES = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Typing:
    """What the network did on a slide's cells: its spec, settings as `run.json` holds them, time, memory, batches.

    batch_size  local crops and contexts in one pass, at the end.
    """

    spec: ClassifierSpec
    settings: dict[str, Any]
    seconds: float
    peak_device_bytes: int
    batch_size: tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class SlideClassifier:
    """A classifier, the rule that decides from its probabilities, and what gives a slide's organ."""

    classifier: Classifier
    rule: Rule
    organ_of: Callable[[str | None], Organ]

    def find_organ(self, listed: str | None) -> Organ:
        """Return a slide's organ; raises UsageError for a word that is none, and for a rule that does not suit it."""
        organ = self.organ_of(listed)
        self.rule.for_organ(organ.trained).check()
        return organ


def classify_table(
    folder: Path, slide: Slide | None, classifier: Classifier, rule: Rule, organ: Organ, watch: Watch = IDLE
) -> tuple[RunRecord, bool]:
    """Type the cells of `folder/cells.zarr` from the pixels of `slide`; also return whether they were typed so before.

    Where the network's part is done, only the rule is applied anew, and `slide` may be None. Raises UsageError when the
    folder holds work done with other settings, Interrupted when asked to stop (what is done is kept).
    """
    typed = type_table(folder, slide, classifier, rule, organ, watch)
    if isinstance(typed, Typing):
        return write_typed(folder, typed, rule, classifier.config.output, watch), False
    return typed


def type_table(
    folder: Path, slide: Slide | None, classifier: Classifier, rule: Rule, organ: Organ, watch: Watch = IDLE
) -> Typing | tuple[RunRecord, bool]:
    """Do the network's part of `classify_table` and keep its probabilities on disk; `write_typed` does the rest.

    Where that part is done, return what `classify_table` does.
    """
    rule = rule.for_organ(organ.trained)
    rule.check()
    renew_files(folder, watch)
    with open_table(folder / TABLE) as table:
        record, settled = known_record(folder, table)
        xy = read_places(table)
        network = network_settings(xy, classifier, organ)
        if not classifier.config.output.overwrite and (earlier := record.config.get("classify")):
            if words := differences(earlier["network"], network):
                raise StaleError(f"{folder}: typed with other settings ({words}); --overwrite types it anew")
            return _decide_again(folder, record, rule, classifier.config.output, watch, settled)
    if slide is None:
        raise ValueError(f"{folder}: its cells are not typed, and there are no pixels")
    return type_cells(folder, xy, slide, classifier, organ, watch)


def type_cells(
    folder: Path, xy: Float64, slide: Slide, classifier: Classifier, organ: Organ, watch: Watch = IDLE
) -> Typing:
    """Run the network on cells `xy` (N, 2), level-0 pixels, that it has not seen yet; keep its results in `folder`.

    Raises UsageError where other settings began it, Interrupted when asked to stop, SlideError without any number.
    """
    began, config, spec = time.perf_counter(), classifier.config, classifier.spec
    network, rows = network_settings(xy, classifier, organ), choose_cells(xy, slide, config)
    store = PartialProbs.open(folder, network, len(xy), len(spec.classes), config.output.overwrite)
    broken = run_network(slide, xy, rows, store, classifier, organ, watch)
    settings = {**describe(classifier, organ), "network": network}
    if broken:
        settings["not_finite"] = broken
    batch_size = classifier.batch_size, classifier.context_batch if classifier.has_global else None
    return Typing(spec, settings, time.perf_counter() - began, classifier.peak_device_bytes(), batch_size)


def write_typed(folder: Path, typing: Typing, rule: Rule, output: OutputConfig, watch: Watch = IDLE) -> RunRecord:
    """Write the columns of cells that `type_slide` has typed, here or on another machine, and the other formats.

    Raises SlideError when what the network said is not there.
    """
    began, network = time.perf_counter(), typing.settings["network"]
    rule = rule.for_organ(typing.settings["organ_trained"])
    with open_table(folder / TABLE) as table:
        record, settled = known_record(folder, table)
        if not PartialProbs.is_there(folder):
            if settled and record.config.get("classify", {}).get("network") == network:
                return record  # Written by a process that died before it could tell.
            raise SlideError(f"{folder}: no typed cells are kept here; run the same command again")
        store = typed_store(folder, typing)
        note_typing(record, typing)
        watch.progress.stage("write")
        columns = DecidedColumns(store.block, rule, typing.settings["organ"])
        write_columns(table, record, columns, typing.settings, typing.spec.classes)
    finish(folder, record, output, began - typing.seconds, watch, typing.peak_device_bytes)
    # Last: until the record tells of it, a killed run needs what the network said.
    store.remove()
    return record


def typed_store(folder: Path, typing: Typing) -> PartialProbs:
    """Open what `type_cells` kept."""
    network = typing.settings["network"]
    return PartialProbs.open(folder, network, int(network["cells.n"]), len(typing.spec.classes))


def note_typing(record: RunRecord, typing: Typing) -> None:
    """Put into the record how long the network took and in what batches."""
    record.seconds.classify = typing.seconds
    record.batch_size.local, record.batch_size.context = typing.batch_size


def known_record(folder: Path, table: CellTable) -> tuple[RunRecord, bool]:
    """Return the record of a folder, and whether all files there are of this table.

    How cells are typed is taken from the table: a run that was killed after the table was replaced has not come to
    write the other files, nor the record.
    """
    record = read_record(folder) or table.run
    typed = table.run.config.get("classify")
    if typed is None or typed == record.config.get("classify"):
        return record, True
    record.config, record.weights = {**record.config, "classify": typed}, table.run.weights
    record.batch_size = table.run.batch_size
    return record, False


def regate_slide(folder: Path, rule: Rule, output: OutputConfig, watch: Watch = IDLE) -> RunRecord:
    """Apply another rule to cells that are typed, without the network; raises UsageError where they are not."""
    began = time.perf_counter()
    renew_files(folder, watch)
    with open_table(folder / TABLE) as table:
        record, _ = known_record(folder, table)
        settings = typed_settings(folder, record)
        rule = rule.for_organ(settings.get("organ_trained"))
        rule.check()
        if settings.get("paths") == "local" and rule.decision.gate in ("safe", "global"):
            raise UsageError(
                f"--gate {rule.decision.gate}: {folder} holds the local path alone; type it again with --paths both"
            )
        watch.progress.stage("write")
        columns = DecidedColumns(partial(_from_table, table), rule, str(settings["organ"]))
        write_columns(table, record, columns, settings, spec_of_record(folder, record).classes)
    finish(folder, record, output, began, watch, 0)
    return record


def _decide_again(
    folder: Path, record: RunRecord, rule: Rule, output: OutputConfig, watch: Watch, settled: bool
) -> tuple[RunRecord, bool]:
    PartialProbs.discard(folder)  # A run that was killed at its very end left it.
    if settled and record.config["classify"]["rule"] == described(rule):
        write_missing(folder, output, record, watch, changed_sizes(folder))
        return record, True
    return regate_slide(folder, rule, output, watch), False


def network_settings(xy: Float64, classifier: Classifier, organ: Organ) -> dict[str, str]:
    """Return what decides the probabilities of cells `xy` (N, 2), as flat text; equal settings may share them."""
    config, spec = classifier.config, classifier.spec
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("paths", "context_grid", "adaptive", "max_cells", "sample")
    }
    settings |= {"mpp": spec.mpp, "local": plain(spec.local), "context": plain(spec.context), "organ": organ.name}
    settings |= {"weights": {"id": spec.weights_id, "sha256": spec.weights_sha256}, "precision": classifier.precision}
    if config.max_cells is not None or config.sample is not None:
        settings["seed"] = config.infer.seed
    if config.adaptive is not None:
        settings["temperature_local"] = spec.calibration.temperature_local
    settings["roi"] = None if config.roi is None else content_sha256(config.roi)
    settings["cells"] = {"n": len(xy), "found": hashlib.sha256(np.ascontiguousarray(xy).tobytes()).hexdigest()[:16]}
    return flatten(settings)


def choose_cells(xy: Float64, slide: Slide, config: ClassifyConfig) -> Int64:
    """Return the rows of cells (N, 2) that `--roi`, `--sample` and `--max-cells` leave, sorted; drawn by `--seed`."""
    rows = np.flatnonzero(np.isfinite(xy).all(axis=1))
    if config.roi is not None:
        tissue = TissueConfig(enabled=False, roi=config.roi, roi_origin=config.output.geojson_origin)
        rows = rows[find_tissue(slide, tissue).contains(xy[rows])]
    wanted = len(rows) if config.sample is None else int(np.ceil(config.sample * len(rows)))
    wanted = min(wanted, len(rows) if config.max_cells is None else config.max_cells)
    if wanted < len(rows):
        rows = np.sort(np.random.default_rng(config.infer.seed).permutation(rows)[:wanted])
    return np.asarray(rows, np.int64)


def read_places(table: CellTable) -> Float64:
    """Return the centroids (N, 2) of all cells in level-0 pixels."""
    return np.stack([table.vector("x"), table.vector("y")], axis=1).astype(np.float64)


def run_network(
    slide: Slide, places: Float64, rows: Int64, store: PartialProbs, classifier: Classifier, organ: Organ, watch: Watch
) -> int:
    """Type the cells `rows` of `places` (N, 2) that `store` lacks; returns for how many the network gave no number.

    These are not kept and stay untyped. Raises Interrupted when asked to stop, SlideError where it is all of them.
    """
    broken: list[Int64] = []
    todo = store.missing(rows)
    xy = places[todo]
    work = prepare(slide, xy, classifier)
    if len(todo) > ESTIMATE_BATCHES * classifier.batch_size:
        log.info("%s: %s", slide.info.slide_id, estimate(work, classifier))
    pieces = sum(-(-len(region.rows) // classifier.rows_at_once) for region in work.regions)
    watch.progress.begin(slide.info.slide_id, pieces, 0)
    watch.progress.stage("pieces")
    with closing(classify_cells(slide, xy, organ.index, classifier, work)) as results:
        for part, probs in results:
            finite = np.isfinite(probs.local).all(axis=1)
            if not finite.all():
                broken.append(todo[part[~finite]])
                part = part[finite]
                probs = PathProbs(probs.local[finite], probs.global_[finite], probs.gate[finite])
            store.add(todo[part], probs)
            watch.progress.advance(len(part))
            watch.check()
    return _told(slide, np.sort(np.concatenate(broken)), len(rows)) if broken else 0


def _told(slide: Slide, broken: Int64, n: int) -> int:
    """Say which nuclei the network gave no numbers for; returns how many."""
    if len(broken) == n:
        raise SlideError(f"{slide.info.path}: not one of {n:,} nuclei could be typed: {NOT_FINITE}")
    few = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    log.warning("%s: %d nuclei stay untyped (cell_id %s): %s", slide.info.path, len(broken), few, NOT_FINITE)
    return len(broken)


def estimate(work: Work, classifier: Classifier) -> str:
    """Return in words how long typing takes here, from one batch that is tried; reading runs beside it."""
    least, most = work.seconds(classifier.pace)
    adaptive = classifier.config.adaptive is not None and classifier.has_global
    span = f"{in_time(least)} to {in_time(most)}" if adaptive else in_time(most)
    contexts = f", {work.n_contexts:,} contexts" if classifier.has_global else ""
    return f"{len(work):,} cells{contexts}, about {span} on {classifier.device} ({classifier.precision})"


def in_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _from_table(table: CellTable, start: int, stop: int) -> tuple[PathProbs, Bool]:
    local, global_ = (table.matrix(name, start, stop) for name in ("prob_local", "prob_global"))
    return PathProbs(local, global_, table.vector("gate", start, stop)), ~np.isnan(local).any(axis=1)


def write_columns(
    table: CellTable,
    record: RunRecord,
    columns: DecidedColumns,
    settings: Mapping[str, Any],
    classes: tuple[ClassSpec, ...],
) -> None:
    """Write the table anew with what was decided; fills `record.config["classify"]` and the weights."""
    extender, n = TableExtender(table), len(table)
    try:
        # One block at least: a slide without cells has these columns too.
        for start in range(0, max(n, 1), BLOCK_ROWS):
            extender.append(columns.block(start, min(start + BLOCK_ROWS, n)))
        note(record, columns, settings)
        columns.name_projected(extender.group)
        extender.close(record, classes)
    except BaseException:
        extender.abort()
        raise


def note(record: RunRecord, columns: DecidedColumns, settings: Mapping[str, Any]) -> None:
    """Put into the record how cells were typed, and what came of it."""
    rule, tally = columns.rule, columns.tally
    before = record.config.get("classify", {}).get("spec", {}).get("weights_id")
    spec = settings["spec"]
    kept = [ref for ref in record.weights if ref.id not in (before, spec["weights_id"])]
    record.weights = [*kept, WeightsRef(spec["weights_id"], spec["weights_sha256"], spec["licence"])]
    counts = asdict(tally)
    counts["mass_lost"] = tally.mass_lost / tally.typed if rule.taxonomy is not None and tally.typed else None
    record.counts.nuclei += record.counts.rejected - tally.rejected
    record.counts.rejected, record.counts.abstained = tally.rejected, tally.abstained
    record.config = {**record.config, "classify": {**settings, "rule": described(rule), "counts": counts}}


def describe(classifier: Classifier, organ: Organ) -> dict[str, Any]:
    """Return how the network was run, as `run.json` holds it."""
    settings = {name: plain(getattr(classifier.config, name)) for name in _KEPT}
    settings |= {"organ": organ.name, "organ_trained": organ.trained}
    settings |= {"spec": plain(classifier.spec), "device": classifier.device}
    return settings | {"precision": classifier.precision}


_KEPT = (
    "model", "weights", "paths", "context_size", "context_grid", "adaptive", "max_cells", "sample", "roi", "cells",
)  # fmt: skip


def described(rule: Rule) -> dict[str, Any]:
    """Return the rule as `run.json` holds it."""
    taxonomy = None if rule.taxonomy is None else list(rule.taxonomy.names)
    settings: dict[str, Any] = plain({"decision": rule.decision, "calibration": rule.calibration, "taxonomy": taxonomy})
    return settings


def finish(folder: Path, record: RunRecord, output: OutputConfig, began: float, watch: Watch, peak: int) -> None:
    """Write the other formats anew, those that are there and those asked for, then `run.json`."""
    record.verdict = judge_folder(folder, record)
    write_formats(folder, output, record, watch, anew=True)
    shaped = {"geojson_origin": output.geojson_origin, "profile": output.profile}
    record.config = {**record.config, "output": {**record.config.get("output", {}), **shaped}}
    close_record(record, folder, peak, began)


def typed_settings(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return `config.classify` of a record; raises UsageError where the cells are not typed."""
    settings = record.config.get("classify")
    if settings is None:
        raise UsageError(f"{folder}: its cells are not typed; leave --regate out to run the network")
    return dict(settings)


def typed_by(folder: Path) -> ClassifierSpec:
    """Return the spec of the classifier that typed the cells of a folder; raises UsageError where they are not."""
    with open_table(folder / TABLE) as table:
        return spec_of_record(folder, known_record(folder, table)[0])


def spec_of_record(folder: Path, record: RunRecord) -> ClassifierSpec:
    """Return the spec of the classifier that typed a folder's cells."""
    stored: dict[str, Any] = dict(typed_settings(folder, record)["spec"])
    calibration: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored.pop("calibration").items()
    }
    classes = tuple(ClassSpec(c["name"], (c["color"][0], c["color"][1], c["color"][2])) for c in stored.pop("classes"))
    crops: dict[str, Any] = {name: CropSpec(**stored.pop(name)) for name in ("local", "context")}
    plainly: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return ClassifierSpec(**plainly, **crops, classes=classes, calibration=Calibration(**calibration))
