"""Compare runs of different models on the same slides: counts, agreement within 3 µm, seconds per mm² of tissue.

    python benchmarks/agreement.py out-outlines out-boxes out-points --json agreement.json

Each argument is an output folder of `cellslide segment` (DIR/<slide_id>/cells.zarr). Nuclei of two runs are paired one
to one, as many pairs as possible; agreement is the F1 of one run against the other, which is the same both ways.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cellslide.classify.slide import read_places
from cellslide.evaluate.detection import RADIUS_UM, pair_points
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.types import Float64, RunRecord

TABLE, TISSUE = "cells.zarr", "tissue.geojson"


@dataclass(frozen=True, slots=True)
class Run:
    """One model on one slide: places (N, 2) in µm, searched tissue in mm², seconds that the run took."""

    folder: Path
    model: str
    xy_um: Float64
    tissue_mm2: float
    seconds: float

    @property
    def row(self) -> dict[str, object]:
        """What is told of the run alone."""
        area = self.tissue_mm2
        return {
            "run": str(self.folder.parent),
            "model": self.model,
            "nuclei": len(self.xy_um),
            "tissue_mm2": round(area, 4),
            "nuclei_per_mm2": round(len(self.xy_um) / area, 1) if area else None,
            "seconds": round(self.seconds, 1),
            "seconds_per_mm2": round(self.seconds / area, 2) if area else None,
        }


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two runs on one slide: pairs within the radius, F1 of either against the other, median distance of a pair."""

    first: str
    second: str
    pairs: int
    share_of_first: float | None
    share_of_second: float | None
    f1: float | None
    median_um: float | None


def read_run(folder: Path) -> Run:
    """Read the run that lies in a slide's folder."""
    record = read_record(folder)
    if record is None:
        raise SystemExit(f"{folder}: no run.json; name output folders of `cellslide segment`")
    with open_table(folder / TABLE) as table:
        size = (table.slide.mpp_x, table.slide.mpp_y)
        places = read_places(table) * size
    return Run(folder, _model(record), places, tissue_mm2(folder / TISSUE, size), record.seconds.total)


def _model(record: RunRecord) -> str:
    return record.weights[0].id if record.weights else "unknown"


def tissue_mm2(path: Path, mpp: tuple[float, float]) -> float:
    """Return the area of the regions that were searched; a GeoJSON is in level-0 pixels."""
    from shapely.geometry import shape

    features = json.loads(path.read_text(encoding="utf-8"))["features"] if path.exists() else []
    return sum(shape(f["geometry"]).area for f in features) * mpp[0] * mpp[1] / 1e6


def agree(first: Run, second: Run, radius_um: float = RADIUS_UM) -> Agreement:
    """Compare two runs on the same slide."""
    pairs = pair_points(first.xy_um, second.xy_um, radius_um)
    n, total = len(pairs), len(first.xy_um) + len(second.xy_um)
    return Agreement(
        first=str(first.folder.parent),
        second=str(second.folder.parent),
        pairs=n,
        share_of_first=n / len(first.xy_um) if len(first.xy_um) else None,
        share_of_second=n / len(second.xy_um) if len(second.xy_um) else None,
        f1=2 * n / total if total else None,
        median_um=float(np.median(pairs.distance_px)) if n else None,
    )


def compare(folders: list[Path], radius_um: float = RADIUS_UM) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Return for each slide that at least two folders hold its runs and the agreement of each two of them."""
    slides = sorted({p.parent.name for folder in folders for p in folder.glob(f"*/{TABLE}")})
    found = {}
    for slide in slides:
        runs = [read_run(folder / slide) for folder in folders if (folder / slide / TABLE).is_dir()]
        if len(runs) > 1:
            both = itertools.combinations(runs, 2)
            found[slide] = {
                "runs": [run.row for run in runs],
                "agreement": [asdict(agree(a, b, radius_um)) for a, b in both],
            }
    return found


def main() -> None:
    """Print the comparison as text, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTDIR")
    parser.add_argument("--radius-um", type=float, default=RADIUS_UM)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = compare(options.folders, options.radius_um)
    if not found:
        sys.exit("no slide lies in two of the folders")
    for slide, content in found.items():
        for rows in content.values():
            print(slide, *rows, sep="\n  ")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
