"""Nuclei of another tool brought into a slide's folder before they are typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cellslide.classify.targets import Target, open_target
from cellslide.config import ClassifyConfig
from cellslide.errors import UsageError
from cellslide.formats.importers import Source, import_nuclei, load_alignment
from cellslide.progress import IDLE
from cellslide.slides.identity import content_sha256, other_slide
from cellslide.store.run_record import differences, flatten, plain, read_record
from cellslide.store.slide_folder import held


def import_cells(target: Target, config: ClassifyConfig) -> str:
    """Make the cell table of a slide from `--cells`, unless it is made of them already; returns one line on what came.

    Raises UsageError where the file cannot be used, or the folder holds other cells.
    """
    if config.cells is None:
        raise ValueError("no --cells given")
    if target.has_cells and not config.output.overwrite:
        _check_same(target, config.cells, config)
        return f"{target.folder}: the nuclei of {config.cells} are there already"
    source = _source(config)
    new, allowed = replace(target, known=None), config.allow_fluorescence
    with open_target(new, config.mpp, allowed) as slide, held(target.folder, IDLE):
        report = import_nuclei(
            config.cells, slide, target.folder, source.unit, source.alignment, source.origin, source.mpp,
            source.direction,
        )  # fmt: skip
    return f"{config.cells}: {report.in_words()}"


def _source(config: ClassifyConfig) -> Source:
    matrix = None if config.alignment is None else load_alignment(config.alignment)
    origin, direction = config.output.geojson_origin, config.alignment_direction
    return Source(config.cells_unit, origin, config.cells_mpp, matrix, direction)


def _check_same(target: Target, path: Path, config: ClassifyConfig) -> None:
    """Raise UsageError unless the folder's cells came from this file, read in this way, for this slide."""
    folder = target.folder
    record = read_record(folder)
    if words := other_slide(record, target.source.path):
        raise UsageError(f"{folder}: {words}; give another --output")
    found = dict(record.config.get("cells") or {}) if record is not None else {}
    if not found:
        raise UsageError(f"{folder}: holds cells that did not come from --cells; --overwrite replaces them")
    source = _source(config)
    matrix = None if source.alignment is None else source.alignment.tolist()
    asked = {"sha256": content_sha256(path), **plain(replace(source, alignment=None)), "alignment": matrix}
    found.pop("path", None)
    if words := differences(flatten(found), flatten(asked)):
        raise UsageError(f"{folder}: holds other cells ({words}); --overwrite replaces them")
