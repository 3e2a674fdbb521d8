"""Kill segment, classify and export at random instants and before random steps on disk, run them again, and compare.

`python -m benchmarks.faults.kills --runs 200` prints runs / lost cells / corrupted outputs; both must be 0. A slide's
folder is corrupted where, after the run that is let through, a file differs by a byte from that of a run that was never
killed, or is missing or too many. Only the times that a run notes of itself may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.forked import End, Kill, run, use_fakes

SLIDE = "slide"
# A run may be killed so often before it is let through.
MOST_KILLS = 4


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, the folder that it starts from and the one that it must end as."""

    name: str
    arguments: tuple[str, ...]
    before: Path | None
    after: Path
    end: End


@dataclass(slots=True)
class Tally:
    """What came of a campaign; `words` says what was wrong."""

    runs: int = 0
    killed: int = 0
    rounds: int = 0
    lost_cells: int = 0
    corrupted: int = 0
    words: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the figure that counts."""
        return f"{self.runs} runs / {self.lost_cells} lost cells / {self.corrupted} corrupted outputs"


class Campaign:
    """A painted slide, its results by runs that nobody killed, and the folder in which runs are killed."""

    def __init__(self, work: Path, seed: int, workers: int = 0) -> None:
        self.work, self.out, self.log = work, work / "out", work / "log.txt"
        self.slide, self.random, self.tally = work / f"{SLIDE}.tif", random.Random(seed), Tally()
        paint(self.slide)
        self.stages = self._references(workers)

    def _references(self, workers: int) -> list[Stage]:
        out, common = str(self.out), ("--device", "cpu", "--no-progress", "--batch-size", "4")
        slide, formats = str(self.slide), "zarr,geojson,csv"
        commands = {
            "segment": ("segment", slide, "-o", out, "--no-tissue", "--workers", str(workers), *common),
            "classify": ("classify", slide, "-o", out, "--organ", "breast", *common),
            "export": ("export", out, "--format", "geojson,csv,parquet,labels", "--profile", "full"),
        }
        stages: list[Stage] = []
        for name, arguments in commands.items():
            arguments = arguments if name == "export" else (*arguments, "--format", formats)
            end = run(arguments, self.out, self.log)
            if end.code != 0:
                raise SystemExit(f"{name} without a kill ended with {end.code}:\n{self.log.read_text()}")
            after = self.work / name
            shutil.copytree(self.out / SLIDE, after)
            stages.append(Stage(name, arguments, stages[-1].after if stages else None, after, end))
        return stages

    def round(self) -> None:
        """Take one stage, kill it some times, let it through, and compare."""
        stage, tally = self.random.choice(self.stages), self.tally
        shutil.rmtree(self.out, ignore_errors=True)
        if stage.before is not None:
            shutil.copytree(stage.before, self.out / SLIDE)
        tally.rounds += 1
        for _ in range(self.random.randint(1, MOST_KILLS)):
            kill = self._kill(stage)
            code = run(stage.arguments, self.out, self.log, kill).code
            tally.runs += 1
            tally.killed += code == -9
            if code not in (-9, 0):
                self._note(f"{stage.name} after a kill ended with {code}")
        code = run(stage.arguments, self.out, self.log).code
        tally.runs += 1
        if code != 0:
            self._note(f"{stage.name} did not go on: it ended with {code}")
        self.compare(stage)

    def _kill(self, stage: Stage) -> Kill:
        if self.random.random() < 0.4:
            return Kill(after_s=self.random.uniform(0, stage.end.seconds))
        # Where files are moved into place or removed, there is most to go wrong.
        steps = stage.end.moves if self.random.random() < 0.6 else range(stage.end.steps)
        return Kill(at_step=self.random.choice(steps))

    def compare(self, stage: Stage) -> None:
        """Count what a stage has lost or left otherwise than it must be."""
        found, expected = digests(self.out / SLIDE), digests(stage.after)
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        lost = len(uuids(stage.after) - uuids(self.out / SLIDE))
        self.tally.lost_cells += lost
        self.tally.corrupted += bool(wrong)
        if wrong or lost:
            self._note(f"{stage.name}: {lost} cells lost; differing: {', '.join(wrong[:5])}")

    def _note(self, words: str) -> None:
        self.tally.words.append(f"round {self.tally.rounds}: {words}; {self.log.read_text()[-600:]}")


def paint(path: Path) -> None:
    """Paint discs of two colours, some of them on the seams of tiles."""
    from tests.painted import DISC, PINK_DISC, paint_slide

    places = [(x, y) for y in range(32, 320, 32) for x in range(32, 450, 32)]
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    paint_slide(path, 460, 330, 0.5, places, 7.0, disc_color=colors, background="tissue")


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a slide's folder, of what in it does not tell of time and memory."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if "/uns/run/" in name:
            continue
        found[name] = hashlib.sha256(settled(path)).hexdigest()
    return found


def settled(path: Path) -> bytes:
    """Return what of a file must not depend on kills: of the page all but numbers, since it tells the seconds."""
    if path.name == "report.html":
        return re.sub(rb"[0-9]+([.,][0-9]+)*", b"0", path.read_bytes())
    if path.name == "run.json":
        return settled_record(path).encode()
    return path.read_bytes()


def settled_record(path: Path) -> str:
    """Return what of a run record must not depend on kills."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in ("started", "finished", "seconds", "peak_rss_bytes", "peak_device_bytes", "files"):
        del record[name]
    # Advice names the folder.
    for check in (record.get("verdict") or {}).get("checks", ()):
        del check["advice"]
    # When the table was made is how classify knows it again.
    record["config"].get("classify", {}).get("network", {}).pop("cells.found", None)
    return json.dumps(record, sort_keys=True)


def uuids(folder: Path) -> set[str]:
    """Return the ids of all cells of a table, none where it cannot be read."""
    from cellslide.errors import CellslideError
    from cellslide.store.cell_table import open_table

    try:
        with open_table(folder / "cells.zarr") as table:
            return set(table.vector("uuid").astype(str).tolist())
    except (CellslideError, OSError, KeyError, ValueError):
        return set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="end after so many runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes of segment")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    use_fakes()
    with tempfile.TemporaryDirectory(prefix="cellslide-kills-") as work:
        campaign = Campaign(Path(work), options.seed, options.workers)
        tally = campaign.tally
        while tally.runs < options.runs:
            campaign.round()
            if not options.json:
                print(f"\r{tally}, {tally.killed} killed", end="", flush=True)
    steps = {stage.name: stage.end.steps for stage in campaign.stages}
    if options.json:
        names = ("runs", "killed", "rounds", "lost_cells", "corrupted", "words")
        print(json.dumps({name: getattr(tally, name) for name in names} | {"steps": steps}))
    else:
        print(f"\r{tally}, {tally.killed} killed in {tally.rounds} rounds; steps on disk of each: {steps}")
        print("\n".join(tally.words))
    return int(bool(tally.lost_cells or tally.corrupted or tally.words))


if __name__ == "__main__":
    sys.exit(main())
