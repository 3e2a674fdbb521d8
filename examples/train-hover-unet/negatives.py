"""Regions of real slides that hold no nucleus: keratin, ink, glass, blur. As training tiles, and as a count of what a
run found there.

`negatives.geojson` has a polygon for each region in level-0 pixels, with the slide's file name and the reason.

    python negatives.py tiles SLIDES_FOLDER -o runs/negatives
    python negatives.py count out/CMU-1-Small-Region out/HE_example
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import shapely
from shapely.geometry import shape

from cellslide.evaluate.dataset import write_manifest
from cellslide.slides.slide import open_slide
from cellslide.store.cell_table import open_table
from cellslide.types import Plane

REGIONS = Path(__file__).with_name("negatives.geojson")
LICENCES = {"CMU-1-Small-Region.svs": "CC0 1.0", "HE_example.tif": "Apache-2.0"}
MARGIN_PX = 96
IGNORE = 65535


def regions() -> list[dict[str, Any]]:
    """Return the regions: polygon, slide and reason."""
    features = json.loads(REGIONS.read_text(encoding="utf-8"))["features"]
    return [{"polygon": shape(f["geometry"]), **f["properties"]} for f in features]


@click.group()
def main() -> None:
    """Regions of real slides that hold no nucleus."""


@main.command()
@click.argument("slides", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def tiles(slides: Path, output: Path) -> None:
    """Cut the regions out of SLIDES as a data set: 0 inside a region, 65535, not known, around it."""
    for folder in ("images", "masks"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for i, region in enumerate(regions()):
        with open_slide(slides / region["slide"]) as slide:
            info = slide.info
            x0, y0, x1, y1 = (int(v) for v in region["polygon"].bounds)
            plane = Plane.of(info, info.mpp_x)
            left, top = max(x0 - MARGIN_PX, 0), max(y0 - MARGIN_PX, 0)
            right, bottom = min(x1 + MARGIN_PX, info.width_px), min(y1 + MARGIN_PX, info.height_px)
            image = slide.read_plane(plane, (left, top, right, bottom))
        mask = np.full(image.shape[:2], IGNORE, np.uint16)
        ring = np.array(region["polygon"].exterior.coords) - (left, top)
        cv2.fillPoly(mask, [np.int32(ring)], 0)
        name = f"{Path(region['slide']).stem}-{i:02}.png"
        cv2.imwrite(str(output / "images" / name), image[..., ::-1])
        cv2.imwrite(str(output / "masks" / name), mask)
        height, width = mask.shape
        size = {"mpp": info.mpp_x, "width": width, "height": height, "n_nuclei": 0}
        about = {"split": "train", "licence": LICENCES[region["slide"]], "note": region["reason"]}
        rows.append({"file": f"images/{name}", "mask": f"masks/{name}", **size, **about})
        click.echo(f"{name}: {region['reason']}")
    write_manifest(output, rows)


@main.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def count(results: tuple[Path, ...]) -> None:
    """Count the nuclei that runs (folders of slides) place in the regions, by reason."""
    for folder in results:
        cells = open_table(folder / "cells.zarr")
        points = shapely.points(np.column_stack([cells.column("x"), cells.column("y")]))
        found: Counter[str] = Counter()
        for region in regions():
            if Path(region["slide"]).stem == folder.name:
                found[region["reason"]] += int(shapely.contains(region["polygon"], points).sum())
        click.echo(f"{folder.name}: {sum(found.values())} of {len(points)} nuclei, {dict(found)}")


if __name__ == "__main__":
    main()
