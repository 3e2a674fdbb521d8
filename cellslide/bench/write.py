"""Write: the table, GeoParquet and the QuPath file of made-up nuclei, each in a process of its own; time and memory.

    python -m cellslide.bench.write table FOLDER 1000000

is such a process: it prints one JSON object. Nuclei come in blocks, as from a slide.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.bench.fake import square_slide
from cellslide.bench.merge import MILLION, UNIT
from cellslide.bench.rows import BenchOptions, Row, Target, cpu_ms, row
from cellslide.formats.arrow_files import write_csv, write_parquet
from cellslide.formats.geojson import write_geojson
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import peak_rss_bytes
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Cells, ClassSpec, ModelSpec, RunRecord

STAGE = "write"
BLOCK, VERTICES, EDGE_PX = 20_000, 24, 60_000
NAMES = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
PARTS = ("table", "geoparquet", "qupath", "qupath-full", "csv", "read")
WARM, WARM_CELLS, PLAIN_CELLS = "warm", 2_000, 20_000


@dataclass(frozen=True, slots=True)
class Writing:
    """What one process measured: CPU seconds, size of the file, most memory it held, and that before the first cell."""

    cpu_s: float
    mb: float
    peak_mb: float
    base_mb: float


def made_blocks(n: int, fine: bool = False) -> Iterator[Cells]:
    """Yield `n` ellipses of 24 vertices in the order of a slide; vertices on half pixels, or anywhere if `fine`."""
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
        number = np.full(m, first // BLOCK, np.int32)
        yield Cells(
            centroid_xy=centre,
            tile_index=number,
            row=number,
            score=rng.random(m, np.float32),
            area_um2=(a[:, 0] ** 2).astype(np.float32),
            class_prob=rng.dirichlet([0.5] * len(NAMES), m).astype(np.float32),
            contour_xy=xy if fine else np.round(xy * 2) / 2,
            contour_start=np.arange(m + 1, dtype=np.int64) * VERTICES,
        )


def write_table(path: Path, n: int, fine: bool = False) -> float:
    """Write a table of `n` made-up nuclei; returns the CPU seconds spent in the writer alone."""
    classes = tuple(ClassSpec(name, (40 * k, 99, 200)) for k, name in enumerate(NAMES))
    spec = ModelSpec("bench", "mask", 0.25, 1024, 128, (0.5,) * 3, (0.5,) * 3, classes)
    writer, spent = CellTableWriter(path, square_slide(EDGE_PX), spec), 0.0
    for block in made_blocks(n, fine):
        begin = time.process_time()
        writer.append(block)
        spent += time.process_time() - begin
    begin = time.process_time()
    writer.close(RunRecord("0", "done", {}, {}, [], "cpu", "none", "fp32", 0, "2026-01-01T00:00:00Z"))
    return spent + time.process_time() - begin


def write_part(part: str, folder: Path, n: int, fine: bool = False) -> tuple[float, Path]:
    """Make one of PARTS from `FOLDER/cells.zarr`, or that itself; returns CPU seconds and the path."""
    path = folder / "cells.zarr"
    if part == "table":
        return write_table(path, n, fine), path
    begin = time.process_time()
    with open_table(path) as table:
        if part == "geoparquet":
            path = write_parquet(table, folder)
        elif part.startswith("qupath"):
            path = write_geojson(table, folder, profile="full" if part == "qupath-full" else "lean")
        elif part == "csv":
            path = write_csv(table, folder)
        elif (read := sum(len(chunk) for chunk in table.iter_chunks(features=True))) != len(table):
            raise SystemExit(f"{read} rows read of {len(table)}")
    return time.process_time() - begin, path


def size_mb(path: Path) -> float:
    """Return the size of a file or folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def in_process(part: str, folder: Path, n: int, fine: bool = False) -> Writing:
    """Measure one part in a process of its own, after a few cells that load what it needs."""
    # The other parts read a table, and this process is not the one that is measured.
    if not (folder / WARM / "cells.zarr").exists():
        write_table(folder / WARM / "cells.zarr", WARM_CELLS)
    command = [sys.executable, "-m", __name__, part, str(folder), str(n), *(["fine"] if fine else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Writing(**json.loads(done.stdout.splitlines()[-1]))


def plain_features(blocks: list[Cells]) -> int:
    """Write QuPath features one by one as a dict each, with the json module and gzip; returns how many."""
    count = 0
    with tempfile.TemporaryFile() as raw, gzip.GzipFile(fileobj=raw, mode="wb") as stream:
        for cells in blocks:
            assert cells.class_prob is not None and cells.contour_xy is not None and cells.contour_start is not None
            for i in range(len(cells)):
                ring = cells.contour_xy[cells.contour_start[i] : cells.contour_start[i + 1]].round(2).tolist()
                stream.write(json.dumps(_plain_feature(cells, i, [*ring, ring[0]])).encode())
                count += 1
    return count


def _plain_feature(cells: Cells, i: int, ring: list[list[float]]) -> dict[str, Any]:
    from uuid import NAMESPACE_URL, uuid5

    assert cells.class_prob is not None
    top = int(cells.class_prob[i].argmax())
    x, y = cells.centroid_xy[i]
    measured = {"probability": cells.class_prob[i, top], "score": cells.score[i], "area µm²": cells.area_um2[i]}
    return {
        "type": "Feature",
        "id": str(uuid5(NAMESPACE_URL, f"{x:.2f},{y:.2f}")),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "detection",
            "classification": {"name": NAMES[top], "color": [40 * top, 99, 200]},
            "measurements": {name: round(float(value), 4) for name, value in measured.items()},
        },
    }


def rows(options: BenchOptions) -> Iterator[Row]:
    """Measure features made one by one, then each writer with `nuclei` (1,000,000) nuclei."""
    n = options.nuclei or MILLION
    sample = list(made_blocks(min(n, PLAIN_CELLS)))
    count, times = cpu_ms(lambda: plain_features(sample), 1)
    plain = row(STAGE, "QuPath, a dict and json each", [t * MILLION / count / 1e3 for t in times], UNIT, count)
    yield row(STAGE, plain.form, [plain.value or 0.0], UNIT, count, plain.value)
    with tempfile.TemporaryDirectory() as scratch:
        found = {part: [in_process(part, Path(scratch), n) for _ in range(options.rounds)] for part in PARTS[:3]}
    both = [a.cpu_s + b.cpu_s for a, b in zip(found["table"], found["geoparquet"], strict=True)]
    per = MILLION / n
    for part, runs in found.items():
        target = Target(6) if part == "qupath" else Target()
        seconds = [run.cpu_s * per for run in runs]
        yield row(STAGE, part, seconds, UNIT, n, plain.value, target, f"{runs[0].mb * per:.0f} MB per million")
    yield row(STAGE, "table + geoparquet", [s * per for s in both], UNIT, n, plain.value, Target(5))
    for part, runs in found.items():
        most = Target(300 if part == "qupath" else 400)
        note = f"{runs[0].base_mb:.0f} MB of it before the first nucleus"
        yield row(STAGE, f"{part}, memory", [run.peak_mb for run in runs], "MB", n, None, most, note)


def main(part: str, folder: str, n: str, fine: str = "") -> None:
    """Measure one part in this process."""
    write_part(part, Path(folder) / WARM, WARM_CELLS)
    base = peak_rss_bytes() / 1e6
    spent, path = write_part(part, Path(folder), int(n), bool(fine))
    print(json.dumps({"cpu_s": spent, "mb": size_mb(path), "peak_mb": peak_rss_bytes() / 1e6, "base_mb": base}))


if __name__ == "__main__":
    main(*sys.argv[1:])
