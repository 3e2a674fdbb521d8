"""Opens a data set, in our form or as its authors distribute it."""

from __future__ import annotations

from pathlib import Path

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST, Dataset, read_dataset, require_split
from cellslide.evaluate.layouts import conic, consep, monuseg, nuclass, nuinsseg, ocelot, pannuke, puma
from cellslide.evaluate.layouts.layout import Layout

# The sign of the last one, any XML, is the weakest.
LAYOUTS = tuple(part.LAYOUT for part in (pannuke, conic, consep, ocelot, puma, nuinsseg, nuclass, monuseg))


def layout_of(root: Path) -> Layout | None:
    """Return the layout of a folder by the files in it, None for one with a manifest, or where none fits."""
    if (root / MANIFEST).is_file():
        return None
    return next((layout for layout in LAYOUTS if layout.fits(root)), None)


def open_dataset(root: Path, split: str | None = None) -> Dataset:
    """Read a folder with `manifest.csv`, or one of the layouts; `split` keeps one split.

    Raises UsageError if it is neither, if a file is missing or damaged, or if nothing is left.
    """
    layout = layout_of(root)
    if layout is None and not (root / MANIFEST).is_file():
        known = "; ".join(f"{layout.name}: {' or '.join(layout.signs)}" for layout in LAYOUTS)
        raise UsageError(f"{root}: not a data set, {MANIFEST} is missing, and so is what tells others ({known})")
    if layout is None:
        return read_dataset(root, split)
    samples = tuple(layout.read(root))
    chosen = tuple(s for s in samples if split in (None, s.split))
    require_split(root, split, {s.split for s in samples}, bool(chosen))
    return Dataset(root.resolve().name, root, chosen)
