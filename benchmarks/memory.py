"""Peak memory on a slide of ten times the tiles, against that on the small one, in one process that only grows.

`python -m benchmarks.memory` prints both and ends with 1 where they differ by more than 300 MiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lattice import paint_lattice, segment_lattice

MIB = 1 << 20
ALLOWED_MIB = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both slides; returns 1 where memory grew with the slide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000, help="nuclei of the small slide")
    parser.add_argument("--tile-size", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    peaks, tiles = [], []
    with tempfile.TemporaryDirectory(prefix="cellslide-memory-") as folder:
        for name, cells in (("small", options.cells), ("large", 10 * options.cells)):
            path = Path(folder) / f"{name}.tif"
            paint_lattice(path, cells)
            record = segment_lattice(path, Path(folder) / "out", ("zarr", "geojson"), options.tile_size)
            peaks.append(record.peak_rss_bytes / MIB)
            tiles.append(record.counts.tiles)
    grown = peaks[1] - peaks[0]
    if options.json:
        print(json.dumps({"tiles": tiles, "peak_mib": peaks, "grown_mib": grown}))
    else:
        print(f"{tiles[0]} tiles: {peaks[0]:,.0f} MiB; {tiles[1]} tiles: {peaks[1]:,.0f} MiB; grown {grown:,.0f} MiB")
    return int(grown > ALLOWED_MIB)


if __name__ == "__main__":
    sys.exit(main())
