"""Ten million nuclei of one slide: how long the work beside the network takes, and how much memory.

`python -m benchmarks.ten_million` makes a generated slide, segments it with a fake engine, writes the table and the
QuPath files, and prints what each stage took. It ends with 1 unless every nucleus is there, once, in order.
`--cells 1000000` is enough to see whether memory grows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lattice import STEP_PX, paint_lattice, segment_lattice
from cellslide.store.cell_table import open_table

MIB = 1 << 20


def missing(table: Path, expected: int) -> int:
    """Return how many of the lattice's places hold no cell or more than one; raises ValueError where ids are not 0.."""
    side = round(np.sqrt(expected))
    seen = np.zeros(side * side, np.int64)
    with open_table(table) as cells:
        for chunk in cells.iter_chunks(outlines=False):
            column, row = (chunk.cells.centroid_xy // STEP_PX).astype(np.int64).T
            np.add.at(seen, row * side + column, 1)
            if not np.array_equal(chunk.cell_id, np.arange(chunk.start, chunk.start + len(chunk))):
                raise ValueError("cell_id is not the number of the row")
    return int((seen != 1).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns 1 where nuclei are missing or twice there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000_000)
    parser.add_argument("--format", default="zarr,geojson")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cellslide-many-") as folder:
        path, out = Path(folder) / "lattice.tif", Path(folder) / "out"
        expected = paint_lattice(path, options.cells)
        record = segment_lattice(path, out, tuple(options.format.split(",")))
        wrong = missing(out / "lattice" / "cells.zarr", expected)
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    seconds = {name: round(getattr(record.seconds, name), 1) for name in ("read", "infer", "merge", "write", "total")}
    print(f"{record.counts.nuclei:,} of {expected:,} nuclei, {wrong} places wrong, {record.counts.tiles:,} tiles")
    print(f"seconds {seconds}; peak memory {record.peak_rss_bytes / MIB:,.0f} MiB; output {size / MIB:,.0f} MiB")
    return int(record.counts.nuclei != expected or wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
