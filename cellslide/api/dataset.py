"""Corrected slides as data sets, and what to correct next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellslide.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cellslide.api.slides import PathLike
    from cellslide.dataset.cut import Cut
    from cellslide.dataset.suggest import Suggestion
    from cellslide.slides.regions import Origin

# Where neither the caller nor the run says a pixel size.
MPP, TILE_PX = 0.25, 512


def make_dataset(
    corrections: Mapping[Path, Path],
    out: PathLike,
    *,
    mpp: float = MPP,
    tile_px: int = TILE_PX,
    val: int = 0,
    checked: str = "checked",
    origin: Origin = "bounds",
    licence: str = "",
) -> list[Cut]:
    """Cut the checked regions of finished slides into a data set that `train`, `calibrate` and `evaluate` take.

    corrections  the folder of each slide's results, and its file of corrections.
    out          folder to write; it must not exist.
    mpp          pixel size of the images in µm; tile_px  their largest edge.
    val          so many of the slides, the last ones by name, validate (split "val"); the others train.
    checked      class of the annotations around what was checked as a whole.
    Raises UsageError for corrections that do not suit their slide, and for a slide that is not there any more.
    """
    from cellslide.classify.targets import expand_targets, open_target
    from cellslide.dataset.corrections import read_corrections
    from cellslide.dataset.cut import cut_slide
    from cellslide.evaluate.dataset import write_manifest
    from cellslide.store.atomic import Staging
    from cellslide.store.cell_table import open_table
    from cellslide.store.foreign_files import is_plain
    from cellslide.store.run_record import TABLE

    folder = Path(out)
    if folder.exists():
        raise UsageError(f"-o {folder}: is there already; give a new folder")
    if not 0 <= val < max(len(corrections), 1):
        raise UsageError(f"--val {val}: must leave a slide to train on; there are {len(corrections)}")
    staging, cuts = Staging(folder), []
    try:
        for name in ("images", "masks", "points"):
            (staging.folder / name).mkdir(parents=True)
        for number, (place, file) in enumerate(sorted(corrections.items(), key=lambda item: str(item[0]))):
            [target] = expand_targets([str(place)], Path(place).parent)
            if target.known is not None and not is_plain(target.known.path):
                raise UsageError(f"OUT {place}: its slide {target.known.path} is not there any more; put it back there")
            split = "val" if number >= len(corrections) - val else "train"
            with open_table(Path(place) / TABLE) as table:
                found = read_corrections(Path(file), table, origin, checked)
                organ = str(table.run.config.get("organ") or "")
            about: dict[str, object] = {
                "split": split, "patient": target.source.slide_id, "organ": organ, "licence": licence,
                "note": "corrected nuclei",
            }  # fmt: skip
            with open_target(target, None) as slide:
                cuts.append(cut_slide(staging.folder, slide, found, mpp, tile_px, about))
        write_manifest(staging.folder, [row for cut in cuts for row in cut.rows])
        staging.publish()
    except BaseException:
        staging.abort()
        raise
    return cuts


def suggest_corrections(folder: PathLike, out: PathLike, n: int, *, origin: Origin = "bounds") -> list[Suggestion]:
    """Write squares around the n nuclei of a finished slide that are most worth a correction, as GeoJSON for QuPath."""
    from cellslide.dataset.suggest import suggest, write_suggestions
    from cellslide.store.cell_table import open_table
    from cellslide.store.run_record import TABLE

    with open_table(Path(folder) / TABLE) as table:
        found = suggest(table, n)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_suggestions(Path(out), table, found, origin)
    return found
