"""Give poisoned inputs beside a good slide: each must be named, the good one done, and nothing else touched.

    python -m benchmarks.faults.poisoned

Slides: cut, empty, of another kind, of impossible sizes, with a spoilt tile. Nuclei of other tools: packed wrongly,
spoilt, of another kind. Weights: with code in them. Prints runs / lost cells / corrupted outputs; both must be 0.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.faults.forked import run, use_fakes
from benchmarks.faults.kills import SLIDE, Tally, digests, paint, uuids

SEGMENT = ("--no-tissue", "--device", "cpu", "--workers", "0", "--no-progress", "--format", "zarr,geojson")
CLASSIFY = ("--organ", "breast", "--device", "cpu", "--no-progress")


class Kitchen:
    """A good slide and its result, into whose folder nothing poisoned may reach."""

    def __init__(self, work: Path) -> None:
        self.work, self.out, self.log, self.tally = work, work / "out", work / "log.txt", Tally()
        self.slide, self.good = work / f"{SLIDE}.tif", work / "good"
        paint(self.slide)
        self.run("segment", str(self.slide), "-o", str(self.out), *SEGMENT, expect=0)
        shutil.copytree(self.out / SLIDE, self.good)

    def run(self, *arguments: str, expect: int) -> str:
        """Run a command that must end with a code; returns what it said."""
        self.log.unlink(missing_ok=True)
        code = run(arguments, self.out, self.log).code
        self.tally.runs += 1
        said = self.log.read_text()
        if code != expect or "Traceback" in said:
            self.tally.words.append(f"{arguments[1]} ended with {code}, not {expect}: {said[-500:]}")
        return said

    def compare(self, poison: str) -> None:
        """Count what of the good slide is not as it was."""
        lost = len(uuids(self.good) - uuids(self.out / SLIDE))
        wrong = digests(self.out / SLIDE) != digests(self.good)
        self.tally.lost_cells += lost
        self.tally.corrupted += wrong
        if lost or wrong:
            self.tally.words.append(f"{poison}: {lost} cells lost, files {'differ' if wrong else 'agree'}")

    def slides(self, folder: Path) -> None:
        """Segment each poisoned slide with the good one, from nothing."""
        for poison in sorted(folder.iterdir()):
            shutil.rmtree(self.out)
            self.run("segment", str(poison), str(self.slide), "-o", str(self.out), *SEGMENT, expect=1)
            self.compare(poison.name)
            rows = {row["slide"]: row for row in csv.DictReader((self.out / "summary.csv").open(newline=""))}
            row = rows.get(poison.name.partition(".")[0], {})
            if not (row.get("error") or row.get("failed_tiles", "0") != "0") or rows[SLIDE]["status"] != "done":
                self.tally.words.append(f"{poison.name}: the summary does not name it: {rows}")

    def nuclei(self, folder: Path) -> None:
        """Classify with each poisoned file of nuclei; the finished slide must stay as it is."""
        for poison in sorted(folder.iterdir()):
            flags = ("--cells", str(poison), "--overwrite", "-o", str(self.out), *CLASSIFY)
            self.run("classify", str(self.slide), *flags, expect=2)
            self.compare(poison.name)

    def weights(self, folder: Path) -> None:
        """Segment anew with weights that hold code, which must not run."""
        import cellslide.weights
        from cellslide.weights.load import load_model

        cellslide.weights.load_model = load_model  # the real one again: it must refuse them
        for poison in sorted(folder.iterdir()):
            flags = ("--weights", str(poison), "--overwrite", "-o", str(self.out), *SEGMENT)
            self.run("segment", str(self.slide), *flags, expect=3)
            self.compare(poison.name)
            if (self.work / "ran").exists():
                self.tally.words.append(f"{poison.name}: the code in it ran")


def poison_slides(whole: Path, folder: Path) -> None:
    """Write the poisoned slides."""
    from tests.support.hostile_files import bad_slides, spoil_tile, write_png_bomb

    folder.mkdir()
    for name, content in bad_slides(whole).items():
        (folder / name.replace(".", "-", name.count(".") - 1)).write_bytes(content)
    write_png_bomb(folder / "bomb.png")
    (folder / "spoilt-tile.tif").write_bytes(spoil_tile(whole))


def poison_nuclei(folder: Path) -> None:
    """Write the poisoned files of nuclei."""
    from tests.support.hostile_files import bad_nuclei

    folder.mkdir()
    for name, content in bad_nuclei().items():
        (folder / name).write_bytes(content)


def poison_weights(folder: Path, marker: Path) -> None:
    """Write weights that make the file `marker` when they are unpickled."""
    import torch

    from tests.support.hostile_files import Evil

    folder.mkdir()
    for name in ("w.pth", "w.pt", "w.ckpt"):
        torch.save({"model_state_dict": {"a": Evil(marker)}}, folder / name)


def main() -> int:
    """Run it; returns 1 where anything was lost, touched or not said."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    use_fakes()
    with tempfile.TemporaryDirectory(prefix="cellslide-poisoned-") as name:
        work = Path(name)
        kitchen = Kitchen(work)
        poison_slides(kitchen.slide, work / "slides")
        poison_nuclei(work / "nuclei")
        poison_weights(work / "weights", work / "ran")
        kitchen.slides(work / "slides")
        kitchen.nuclei(work / "nuclei")
        kitchen.weights(work / "weights")
        inputs = sum(len(list((work / kind).iterdir())) for kind in ("slides", "nuclei", "weights"))
    print(f"{kitchen.tally}, {inputs} poisoned inputs", *kitchen.tally.words, sep="\n")
    return int(bool(kitchen.tally.words))


if __name__ == "__main__":
    sys.exit(main())
