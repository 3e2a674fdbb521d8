"""Slides through Dask while workers and the scheduler are killed: nothing may be lost, nothing may be half-written.

    python -m benchmarks.faults.dask_faults --slides 20 --kills 3         # a scheduler and two workers of its own
    python -m benchmarks.faults.dask_faults --slides 200 --kills 0        # a large batch, and how long it takes
    python -m benchmarks.faults.dask_faults --slides 20 --scheduler-dies  # names what is left; the same again ends it

Painted slides and the fake network of the tests stand for real ones. Prints runs / lost cells / corrupted outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from tests.painted import grid_centres, paint_slide

ROOT = Path(__file__).resolve().parents[2]
SIZE, STEP = (700, 500), 60
CELLSLIDE = (
    "import sys, cellslide.weights\n"
    "from tests.support.cluster_fakes import load_deadly\n"
    "cellslide.weights.load_model = load_deadly\n"
    "from cellslide.cli.main import cli\n"
    "cli(sys.argv[1:])\n"
)


@dataclass
class Cluster:
    """A scheduler and workers, processes of their own, that can be killed one by one."""

    folder: Path
    file: Path = field(init=False)
    scheduler: subprocess.Popen[bytes] = field(init=False)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--no-dashboard")

    def _start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", what, "--scheduler-file", str(self.file), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{what}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def add_worker(self) -> None:
        """Start a worker that has both tags."""
        arguments = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
        self.workers.append(self._start("worker", *arguments, "--resources", "GPU=1 CPU=1"))

    def close(self) -> None:
        """End all of it."""
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.terminate()
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def cluster_in(folder: Path, workers: int) -> Iterator[Cluster]:
    """Yield a cluster with so many workers."""
    folder.mkdir(parents=True)
    cluster = Cluster(folder)
    try:
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.close()


def paint(folder: Path, slides: int) -> int:
    """Paint slides that differ, with the same nuclei; returns the nuclei of one."""
    folder.mkdir(parents=True)
    centres = grid_centres(*SIZE, STEP, 20)
    for k in range(slides):
        paint_slide(folder / f"s{k:04d}.tif", *SIZE, 0.5, centres, 7.0, (1,), seed=k)
    return len(centres)


def segment(folder: Path, out: Path, scheduler: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start `cellslide segment` on the cluster."""
    flags = ("--no-tissue", "--device", "cpu", "--workers", "0", "--batch-size", "1", "--no-progress")
    command = [sys.executable, "-c", CELLSLIDE, "segment", str(folder), "-o", str(out), "--scheduler", str(scheduler)]
    with log.open("ab") as stream:
        return subprocess.Popen([*command, *flags], cwd=ROOT, stdout=stream, stderr=stream)


def wait_killing(
    process: subprocess.Popen[bytes], cluster: Cluster, args: argparse.Namespace, rng: random.Random
) -> tuple[int, bool]:
    """Wait for the command, killing workers at random times, and the scheduler if asked; returns what was killed."""
    kills, died = 0, False
    while process.poll() is None:
        time.sleep(rng.uniform(2.0, 8.0))
        if args.scheduler_dies and not died and process.poll() is None and finished(args.out) >= args.slides // 4:
            cluster.scheduler.send_signal(signal.SIGKILL)
            died = True
        elif kills < args.kills and process.poll() is None and finished(args.out):
            cluster.workers.pop(rng.randrange(len(cluster.workers))).send_signal(signal.SIGKILL)
            cluster.add_worker()
            kills += 1
    return kills, died


def finished(out: Path) -> int:
    """Return how many slides have a table."""
    return sum(1 for _ in out.glob("*/cells.zarr"))


def check(out: Path, slides: int, nuclei: int) -> tuple[int, int]:
    """Return lost cells and corrupted outputs: all nuclei in each table, each record done, nothing left lying about."""
    lost = corrupted = 0
    for k in range(slides):
        folder = out / f"s{k:04d}"
        try:
            record = read_record(folder)
            with open_table(folder / "cells.zarr") as table:
                ids, n = table.vector("cell_id"), len(table)
            lost += max(0, nuclei - n)
            whole = record is not None and record.status == "done" and record.counts.nuclei == n
            corrupted += not (whole and np.array_equal(ids, np.arange(n)) and not list(folder.glob(".*")))
        except Exception as error:
            print(f"{folder}: {type(error).__name__}: {error}")
            lost, corrupted = lost + nuclei, corrupted + 1
    return lost, corrupted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="workers to kill")
    parser.add_argument("--scheduler-dies", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="cellslide-dask-") as scratch:
        root = Path(scratch)
        args.out = root / "out"
        nuclei = paint(root / "slides", args.slides)
        began, runs, kills, code, owed = time.perf_counter(), 0, 0, None, args.scheduler_dies
        while code != 0 and runs < 5:
            with cluster_in(root / f"cluster{runs}", 2) as cluster:
                process = segment(root / "slides", args.out, cluster.file, root / "log")
                workers, died = wait_killing(process, cluster, args, rng)
                code, runs, kills = process.returncode, runs + 1, kills + workers + died
                print(f"run {runs}: exit code {code}, {finished(args.out)} of {args.slides} slides have a table")
                args.kills, args.scheduler_dies = max(0, args.kills - workers), args.scheduler_dies and not died
        lost, corrupted = check(args.out, args.slides, nuclei)
        print(f"{args.slides} slides, {kills} kills, {time.perf_counter() - began:.0f} s")
        print(f"{runs} runs / {lost} lost cells / {corrupted} corrupted outputs")
        if owed and args.scheduler_dies:
            print("the scheduler was not killed: the slides were done before; ask for more --slides")
            code = 1
        if code != 0 or lost or corrupted:
            print((root / "log").read_text(errors="replace")[-3000:])
            sys.exit(1)


if __name__ == "__main__":
    main()
