"""How cost grows with nuclei and tiles: CPU seconds from 1,000 nuclei on, and the exponent of the line through them.

    python -m benchmarks.scaling --most 10000000

Tiles grow with the nuclei (about 260 of those to a tile). What a run costs at the start hides in few nuclei, so the
line is drawn through the sizes from 100,000 on; 1 is linear. With --memory the writers' peaks are shown, too, each size
in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cellslide.bench import FakeDetector, detect_cells, square_slide
from cellslide.bench.merge import MPP, PER_MM2
from cellslide.bench.write import PARTS, in_process, write_part
from cellslide.nuclei.merge import merge_stream
from cellslide.slides.tiles import tile_grid
from cellslide.types import Cells, Plane

LEAST, FIT_FROM, WARM = 1_000, 100_000, 2_000
WRITERS = PARTS[:3]


def merge_seconds(n: int) -> float:
    """Return the CPU seconds of the merge of `n` nuclei alone, tiles made as they are asked for."""
    size_px = int(np.sqrt(n / PER_MM2) * 1000 / MPP)
    info = square_slide(size_px, MPP)
    grid = tile_grid(Plane.of(info, MPP), 1024, 128)
    made = detect_cells(FakeDetector.over(size_px, n, jitter_px=0.6, miss=0.005), grid, info)
    making = 0.0

    def parts() -> Iterator[Cells]:
        nonlocal making
        while True:
            begin = time.process_time()
            part = next(made, None)
            making += time.process_time() - begin
            if part is None:
                return
            yield part

    begin = time.process_time()
    for _ in merge_stream(parts(), grid):
        pass
    return time.process_time() - begin - making


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Return the slope of log seconds over log size, through the sizes from FIT_FROM on (all, if those are not two)."""
    pairs = [(n, s) for n, s in zip(sizes, seconds, strict=True) if n >= FIT_FROM]
    pairs = pairs if len(pairs) > 1 else list(zip(sizes, seconds, strict=True))
    x, y = np.log(np.array(pairs, np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    """Print a table, sizes across, and each stage's exponent at its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000, help="nuclei of the largest size")
    parser.add_argument("--memory", action="store_true", help="also show the peak memory of each writer")
    args = parser.parse_args()
    sizes = [n for k in range(12) if (n := LEAST * 10**k) <= args.most]
    print("| stage |" + "".join(f" {n:,} |" for n in sizes) + " exponent |\n|---|" + "---|" * (len(sizes) + 1))
    merge_seconds(WARM)
    seconds: dict[str, list[float]] = {"merge": [merge_seconds(n) for n in sizes]}
    peaks: dict[str, list[float]] = {}
    for n in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            for part in WRITERS:
                if args.memory:
                    got = in_process(part, Path(scratch), n)
                    peaks.setdefault(part, []).append(got.peak_mb)
                    seconds.setdefault(part, []).append(got.cpu_s)
                    continue
                seconds.setdefault(part, []).append(write_part(part, Path(scratch), n)[0])
    for stage, spent in seconds.items():
        print(f"| {stage}, CPU s |" + "".join(f" {s:.3g} |" for s in spent) + f" {exponent(sizes, spent):.2f} |")
    for stage, held in peaks.items():
        print(f"| {stage}, peak MB |" + "".join(f" {mb:.0f} |" for mb in held) + " |")


if __name__ == "__main__":
    main()
