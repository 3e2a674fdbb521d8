"""Shards of one list at once into one folder: no slide may be lost, none done twice, and one summary holds them all.

    python -m benchmarks.faults.shards --slides 200 --shards 4

Painted slides and the fake network of the tests stand for real ones. Prints runs / lost cells / corrupted outputs.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults.forked import use_fakes
from tests.painted import paint_slide


def paint(folder: Path, slides: int) -> dict[str, int]:
    """Paint slides with one to seven discs each; returns how many, by slide."""
    discs = {}
    for k in range(slides):
        centres = [(40.0 + 40 * i, 50.0) for i in range(1 + k % 7)]
        paint_slide(folder / f"s{k:04d}.tif", 360, 100, 0.5, centres, 7.0, (1,))
        discs[f"s{k:04d}"] = len(centres)
    return discs


def start(folder: Path, number: int, shards: int) -> int:
    """Start one shard in a forked process; returns its process number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    from cellslide.cli.main import cli

    flags = ("--no-tissue", "--device", "cpu", "--workers", "0", "--format", "zarr", "-q", "--no-progress")
    try:
        cli(["segment", str(folder / "*.tif"), "-o", str(folder / "out"), "--shard", f"{number}/{shards}", *flags])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(1)


def main() -> None:
    """Run the shards and compare the summary with what was painted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()
    use_fakes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        discs, began = paint(folder, args.slides), time.monotonic()
        pids = [start(folder, number, args.shards) for number in range(1, args.shards + 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        with (folder / "out" / "summary.csv").open(newline="") as file:
            rows = {row["slide"]: row for row in csv.DictReader(file)}
    lost = set(discs) - set(rows)
    wrong = [s for s, row in rows.items() if (row["status"], row["cells"]) != ("done", str(discs[s]))]
    seconds = time.monotonic() - began
    what = f"{args.slides} slides, {args.shards} shards at once"
    cells = sum(max(0, n - int(rows[slide]["cells"] or 0) if slide in rows else n) for slide, n in discs.items())
    print(f"{what}: {len(lost)} lost rows, {len(wrong)} wrong, {seconds:.0f} s")
    print(f"{args.shards} runs / {cells} lost cells / {len(lost) + len(wrong)} corrupted outputs")
    sys.exit(bool(lost or wrong or any(codes)))


if __name__ == "__main__":
    main()
