"""Measure the writers of the cell table on made-up nuclei: CPU seconds, MB and peak memory, each in its own process.

    python benchmarks/write.py --cells 1000000 --parts zarr,geojson,parquet

The peak is what the process held beyond the imported packages ("baseline"); nuclei come in blocks, as from a slide.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

PARTS = ("zarr", "geojson", "geojson-full", "parquet", "csv", "labels", "read")
BLOCK, VERTICES, EDGE_PX = 20_000, 24, 60_000
NAMES = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")


def make_blocks(n: int, fine: bool) -> Iterator[object]:
    """Yield `n` ellipses of 24 vertices in the order of a slide; vertices on half pixels, or anywhere if `fine`."""
    from cellslide.types import Cells

    angle = 2 * np.pi * np.arange(VERTICES) / VERTICES
    for first in range(0, n, BLOCK):
        rng = np.random.default_rng(first)
        m = min(BLOCK, n - first)
        low, high = (20 + (EDGE_PX - 40) * k / n for k in (first, first + m))
        centre = np.stack([rng.uniform(20, EDGE_PX - 20, m), np.sort(rng.uniform(low, high, m))], axis=1)
        a, turn = rng.uniform(8, 16, (m, 1)), rng.uniform(0, np.pi, (m, 1))
        u, v = a * np.cos(angle), a * rng.uniform(0.6, 1, (m, 1)) * np.sin(angle)
        xy = np.stack([u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn)], axis=2)
        xy = (xy + centre[:, None]).reshape(-1, 2)
        yield Cells(
            centre,
            np.full(m, first // BLOCK, np.int32),
            np.full(m, first // BLOCK, np.int32),
            rng.random(m, np.float32),
            (a[:, 0] ** 2).astype(np.float32),
            rng.dirichlet([0.5] * len(NAMES), m).astype(np.float32),
            None,
            xy if fine else np.round(xy * 2) / 2,
            np.arange(m + 1, dtype=np.int64) * VERTICES,
        )


def write_zarr(folder: Path, n: int, fine: bool) -> float:
    """Write the table; returns the CPU seconds spent in the writer alone."""
    from cellslide.table import CellTableWriter
    from cellslide.types import ClassSpec, Level, ModelSpec, RunRecord, SlideInfo

    levels = (Level(EDGE_PX, EDGE_PX, 1.0),)
    slide = SlideInfo("bench", Path("bench"), "none", EDGE_PX, EDGE_PX, 0.25, 0.25, "flag", levels)
    classes = tuple(ClassSpec(name, (40 * k, 99, 200)) for k, name in enumerate(NAMES))
    spec = ModelSpec("bench", "mask", 0.25, 1024, 128, (0.5,) * 3, (0.5,) * 3, classes)
    writer, spent = CellTableWriter(folder / "cells.zarr", slide, spec), 0.0
    for block in make_blocks(n, fine):
        begin = time.process_time()
        writer.append(block)  # type: ignore[arg-type]
        spent += time.process_time() - begin
    begin = time.process_time()
    writer.close(RunRecord("0", "done", {}, {}, [], "cpu", "none", "fp32", 0, "2026-01-01T00:00:00Z"))
    return spent + time.process_time() - begin


def read_all(folder: Path) -> Path:
    """Read every column and outline once, in blocks."""
    from cellslide.table import open_table

    with open_table(folder / "cells.zarr") as table:
        rows = sum(len(chunk) for chunk in table.iter_chunks(features=True))
        if rows != table.n:
            raise SystemExit(f"{rows} rows read of {table.n}")
    return folder / "cells.zarr"


def other_part(part: str, folder: Path) -> tuple[float, Path]:
    """Make one format from the table; returns CPU seconds and the path."""
    from cellslide.export import write_csv, write_parquet
    from cellslide.geojson import write_geojson
    from cellslide.labels import write_labels
    from cellslide.table import open_table

    table = open_table(folder / "cells.zarr")
    writers: dict[str, Callable[[], Path]] = {
        "geojson": lambda: write_geojson(table, folder),
        "geojson-full": lambda: write_geojson(table, folder, profile="full"),
        "parquet": lambda: write_parquet(table, folder),
        "csv": lambda: write_csv(table, folder),
        "labels": lambda: write_labels(table, folder),
        "read": lambda: read_all(folder),
    }
    begin = time.process_time()
    path = writers[part]()
    return time.process_time() - begin, path


def peak_mb() -> float:
    """Return the most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def size_mb(path: Path) -> float:
    """Return the size of a file or folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def child(part: str, folder: Path, n: int, fine: bool) -> None:
    """Run one part in this process and print its numbers as JSON."""
    import cellslide.export
    import cellslide.table  # noqa: F401

    for _ in make_blocks(BLOCK, fine):
        baseline = peak_mb()
    spent, path = (write_zarr(folder, n, fine), folder / "cells.zarr") if part == "zarr" else other_part(part, folder)
    numbers = {"cpu_s": spent, "mb": size_mb(path), "peak_mb": peak_mb(), "baseline_mb": baseline, "file": path.name}
    print(json.dumps(numbers))


def main() -> None:
    """Run the parts one after another and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--parts", default="zarr,geojson,geojson-full,parquet,csv,read")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--fine", action="store_true", help="vertices anywhere, not on half pixels")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder, args.cells, args.fine)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        print(f"{args.cells:,} nuclei\n| part | file | CPU s | MB | peak MB above baseline |\n|---|---|---|---|---|")
        for part in dict.fromkeys(["zarr", *args.parts.split(",")]):
            more = ["--folder", str(folder), "--cells", str(args.cells), *(["--fine"] if args.fine else [])]
            command = [sys.executable, __file__, "--child", part, *more]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            got = json.loads(done.stdout.splitlines()[-1])
            above = got["peak_mb"] - got["baseline_mb"]
            print(f"| {part} | {got['file']} | {got['cpu_s']:.1f} | {got['mb']:.0f} | {above:.0f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
