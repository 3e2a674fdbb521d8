"""The page of one slide: crops cut again around the chosen cells, both paths run on them, maps laid over the tissue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellslide.classify.slide import spec_of_record
from cellslide.errors import UsageError
from cellslide.inference.crops import crop_corners, cut_naive, grid_centres
from cellslide.report.explain.gallery import Bars, Card, Heading, Picture, shrink, write_gallery
from cellslide.report.explain.paths import Explainer, Rerun
from cellslide.report.explain.select import Selection, Typed, read_typed, select_cells
from cellslide.slides.reopen import reopen
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import Categorical, CellTable, open_table
from cellslide.store.run_record import TABLE, read_record
from cellslide.types import ClassifierSpec, ClassSpec, CropSpec, Float32, Float64, Int64, Plane, RunRecord
from cellslide.weights.classifier import LoadedClassifier
from cellslide.weights.organs import look_up

PAGE_NAME = "explain.html"
CELLS_AT_ONCE = 4
PICTURE_PX = 376
# Other precisions and devices move a probability by less than this; more means other crops or other weights.
TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Scene:
    """What cells are cut from: slide, plane, crops of the run, and how their path was told of the organ.

    organs    index in the weights' organs by the name in the table, -1 for unknown.
    grid_px   step of the grid of shared contexts in plane pixels, if there was one.
    """

    slide: Slide
    plane: Plane
    spec: ClassifierSpec
    organs: Mapping[str, int]
    grid_px: int | None = None

    @classmethod
    def of(cls, slide: Slide, table: CellTable, spec: ClassifierSpec, grid_px: int | None) -> Scene:
        """Return the scene of a typed table."""
        column = table.column("organ", 0, 1)
        names = column.names if isinstance(column, Categorical) else ()
        organs = {name: look_up(spec, name).index for name in names}
        return cls(slide, Plane.of(slide.info, spec.mpp), spec, organs, grid_px)

    def centres(self, xy_level0: Float64) -> tuple[Float64, Float64]:
        """Return where the local crops and the contexts of cells (N, 2) are centred, in plane pixels."""
        centre = self.plane.from_level0(xy_level0)
        return centre, centre if self.grid_px is None else grid_centres(centre, self.grid_px)


def explain_slide(
    folder: Path,
    selection: Selection,
    loaded: LoadedClassifier,
    page: Path | None = None,
    *,
    moved_to: Path | None = None,
    runner_up: bool = False,
    device: str = "auto",
) -> tuple[Path, int]:
    """Write the page of cells of a folder that `classify` finished; return where it is and how many cells it shows.

    moved_to    where the slide is now, if it is not where it was.
    runner_up   explain the second class of each cell as well.
    Raises UsageError where the cells are not typed, or by other weights, or their slide is not where it was.
    """
    with open_table(folder / TABLE) as table:
        settings = how_typed(folder, table.run)
        spec = spec_of_record(folder, table.run)
        check_weights(loaded, spec)
        rows = select_cells(table, selection)
        with reopen(table, moved_to) as slide:
            scene = Scene.of(slide, table, spec, settings.get("context_grid"))
            explainer = Explainer(loaded, device)
            cards = _cards(table, rows, scene, explainer, 2 if runner_up else 1)
            heading = _heading(table, selection, scene, len(rows))
            return write_gallery(page or folder / PAGE_NAME, heading, cards), len(rows)


def how_typed(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return how `classify` was run on a slide's folder; raises UsageError where it was not."""
    settings = record.config.get("classify")
    if settings is None:
        raise UsageError(f"{folder}: its cells are not typed; run `cellslide classify {folder}` first")
    return dict(settings)


def weights_used(folder: Path) -> tuple[str | None, Path | None]:
    """Return the id or the file of the classifier that typed a folder's cells; raises UsageError where none did."""
    record = read_record(folder)
    if record is None:
        raise UsageError(f"{folder}: no run.json here; give the folder of one slide that `cellslide classify` finished")
    settings = how_typed(folder, record)
    if settings.get("weights"):
        return None, Path(settings["weights"])
    return str(settings["spec"]["weights_id"]), None


def check_weights(loaded: LoadedClassifier, spec: ClassifierSpec) -> None:
    """Raise UsageError where the weights are not those that typed the cells."""
    if loaded.spec.weights_sha256 != spec.weights_sha256:
        raise UsageError(
            f"the cells were typed by {spec.weights_id} ({spec.weights_sha256[:12]}), not by {loaded.spec.weights_id} "
            f"({loaded.spec.weights_sha256[:12]}): name those with --model or --weights"
        )


def _heading(table: CellTable, selection: Selection, scene: Scene, n: int) -> Heading:
    spec = scene.spec
    local, context = (f"{crop.field_px * spec.mpp:g} µm ({crop.input_px} px)" for crop in (spec.local, spec.context))
    lines = (
        f"{selection.in_words()} {n} shown of {len(table):,}; typed by {spec.weights_id}.",
        f"The local path sees a crop of {local}; the global path sees that crop too, and a context of {context}.",
        "Warm colours: where the last block found what speaks for the named class (Grad-CAM). Each map is scaled to "
        "its own maximum: it tells where, not how much, and what the network used, not whether that was right.",
        "Yellow: the nucleus, and in the context the field of the local crop; pointing at a picture hides it. "
        "g is the weight of the global path.",
    )
    warnings = []
    if scene.grid_px is not None:
        warnings.append(f"Neighbours share contexts on a grid of {scene.grid_px} px: a context need not be centred.")
    if not n:
        warnings.append("No cell is left by this choice.")
    return Heading(f"Why: {table.slide.slide_id}", lines, tuple(warnings))


def _cards(table: CellTable, rows: Int64, scene: Scene, explainer: Explainer, n_classes: int) -> Iterator[Card]:
    spec = scene.spec
    for first in range(0, len(rows), CELLS_AT_ONCE):
        typed = read_typed(table, rows[first : first + CELLS_AT_ONCE])
        targets = explained_classes(typed.prob, n_classes)
        rerun = run_again(typed, scene, explainer, targets)
        for i in range(len(typed)):
            yield _card(typed, i, scene, rerun, [spec.classes[int(target[i])] for target in targets])


def explained_classes(prob: Float32, n: int) -> list[Int64]:
    """Return the `n` most probable classes of each row (N, K), the first one decided, ties by the classes' order."""
    order = np.argsort(-prob, axis=1, kind="stable")
    return [np.ascontiguousarray(order[:, k]) for k in range(min(n, prob.shape[1]))]


def run_again(typed: Typed, scene: Scene, explainer: Explainer, targets: Sequence[Int64]) -> Rerun:
    """Cut the crops of cells again and run both paths, or the local one alone where that is all that was run."""
    centre, middle = scene.centres(typed.xy)
    local = cut_naive(scene.slide, scene.plane, centre, scene.spec.local)
    wanted = np.isfinite(typed.global_).all(axis=1)
    context = cut_naive(scene.slide, scene.plane, middle, scene.spec.context) if wanted.any() else None
    organ = torch.tensor([scene.organs[name] for name in typed.organ], dtype=torch.int64)
    return explainer.run(local, context, organ, targets)


def _card(typed: Typed, i: int, scene: Scene, rerun: Rerun, explained: Sequence[ClassSpec]) -> Card:
    classes = scene.spec.classes
    skipped = not np.isfinite(typed.global_[i]).all()
    bars = (
        Bars("local path", typed.local[i], classes),
        Bars("global path", typed.global_[i], classes),
        Bars("decision, calibrated", typed.prob[i], classes),
    )
    return Card(
        int(typed.cell_id[i]), typed.uuid[i], (float(typed.xy[i, 0]), float(typed.xy[i, 1])),
        typed.class_name[i], typed.class_top[i], float(typed.class_prob[i]), float(typed.gate[i]),
        typed.path[i], typed.organ[i], bars,
        _pictures(typed, i, scene, rerun, explained, skipped),
        _remarks(typed, i, rerun, skipped),
    )  # fmt: skip


def _remarks(typed: Typed, i: int, rerun: Rerun, skipped: bool) -> tuple[str, ...]:
    """Say where a path answers otherwise than the table holds."""
    pairs = [("local", typed.local[i], rerun.local[i])]
    if rerun.global_ is not None and not skipped:
        pairs.append(("global", typed.global_[i], rerun.global_[i]))
    return tuple(
        f"The {name} path says {now.max():.3f} here, the table {then.max():.3f}: not the same pixels or precision."
        for name, then, now in pairs
        if np.abs(then - now).max() > TOLERANCE
    )


def _pictures(
    typed: Typed, i: int, scene: Scene, rerun: Rerun, classes: Sequence[ClassSpec], skipped: bool
) -> tuple[tuple[Picture, ...], ...]:
    """Return the plain crops and the maps of the decided class, then a row of maps for each further class."""
    local = _plain(typed, i, scene, scene.spec.local, "local crop", None)
    plain = [local]
    if not skipped:
        plain.append(_plain(typed, i, scene, scene.spec.context, "context", scene.spec.local.field_px))
    rows = []
    for spec, heats in zip(classes, rerun.heats, strict=True):
        maps = [_heated(local, heats.local[i], f"local path: {spec.name}")]
        if not skipped and heats.global_local is not None and heats.context is not None:
            maps.append(_heated(local, heats.global_local[i], f"global path, own crop: {spec.name}"))
            maps.append(_heated(plain[1], heats.context[i], f"global path, context: {spec.name}"))
        rows.append(tuple(maps))
    return ((*plain, *rows[0]), *rows[1:])


def _heated(picture: Picture, heat: Float32, caption: str) -> Picture:
    return replace(picture, heat=heat, caption=caption if heat.any() else f"{caption} (nothing speaks for it)")


def _plain(typed: Typed, i: int, scene: Scene, crop: CropSpec, name: str, frame_field: int | None) -> Picture:
    """Cut a crop for the eye: the whole field at the plane's resolution, borders as the network sees them."""
    centre, middle = scene.centres(typed.xy[i : i + 1])
    about = centre if frame_field is None else middle
    field = cut_naive(scene.slide, scene.plane, about, replace(crop, input_px=crop.field_px))
    image = shrink(field[0].permute(1, 2, 0).numpy().astype(np.uint8), PICTURE_PX)
    factor = image.shape[0] / crop.field_px
    corner = crop_corners(about, crop.field_px)[0]
    ring = typed.outline_xy[i]
    outline = None if ring is None else (scene.plane.from_level0(ring) - corner) * factor
    x, y = ((centre[0] - corner) * factor).tolist()
    frame = None if frame_field is None else frame_field * factor
    caption = f"{name}, {crop.field_px * scene.plane.mpp:g} µm"
    return Picture(caption, image, scene.plane.mpp / factor, (x, y), outline, None, frame)
