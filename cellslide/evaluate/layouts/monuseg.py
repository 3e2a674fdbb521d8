"""MoNuSeg: images NAME.tif of 1000 px at 40x and outlines NAME.xml of ImageScope (Kumar et al. 2017, 2020)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source
from cellslide.evaluate.layouts.layout import Layout, file_image, files, fill, image_size, sample
from cellslide.store.foreign_files import read_text
from cellslide.types import Int32

# Characters of a TCGA name that tell the patient.
PATIENT = 12
# MoNuSegTestData, or a folder that somebody called "test".
TEST = re.compile(r"test( ?data)?$", re.IGNORECASE)


def read(root: Path) -> Iterator[Sample]:
    """Yield the images; what lies in a folder for tests is of the split test, all else of train."""
    images = {path.stem: path for path in files(root, "*.tif")}
    for path in files(root, "*.xml"):
        if path.stem not in images:
            raise UsageError(f"{path}: its image {path.stem}.tif is missing")
        image = images[path.stem]
        size = image_size(image)
        source = Source(partial(file_image, image), partial(nuclei, path, size))
        folders = (root.resolve().name, *path.relative_to(root).parts[:-1])
        split = "test" if any(TEST.search(name) for name in folders) else "train"
        yield sample(root, image, size, source, path, 0.25, split=split, patient=path.stem[:PATIENT])


def nuclei(path: Path, size: tuple[int, int]) -> tuple[Int32, Sequence[str]]:
    """Return the label map of an image of `size` (width, height), as the authors' script fills it, and no classes.

    Their pixel k covers [k - 0.5, k + 0.5] and is counted from 1; of outlines that overlap the first counts.
    """
    try:
        regions = ElementTree.fromstring(read_text(path, UsageError)).iter("Region")
        rings = [np.array([(float(v.attrib["X"]), float(v.attrib["Y"])) for v in r.iter("Vertex")]) for r in regions]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: its outlines cannot be read ({error})") from error
    kept = [ring - 0.5 for ring in rings if len(ring) >= 3]
    return fill(kept[::-1], size), [""] * len(kept)


LAYOUT = Layout("monuseg", ("*.xml",), read, "CC BY-NC-SA 4.0")
