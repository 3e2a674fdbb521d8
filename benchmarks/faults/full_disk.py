"""Let segment, classify and export run into a full disk again and again, give it a little more room, and compare.

`python -m benchmarks.faults.full_disk` prints runs / lost cells / corrupted outputs; both must be 0. Each run that
finds no room must end with exit code 1 and say so in one line. The disk is a small one in memory, mounted in a
namespace of its own, so Linux is needed and the right to make one (`unshare -rm`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.forked import run, use_fakes
from benchmarks.faults.kills import SLIDE, Campaign, Stage

PAGE = 4096
FULL = "the disk is full"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns 1 where anything was lost or not said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--more", type=float, default=1.15, help="factor by which the disk grows after each run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.inside:
        command = [sys.executable, "-m", "benchmarks.faults.full_disk", "--more", str(options.more), "--inside"]
        return subprocess.run(["unshare", "-rm", *command], check=False).returncode
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    use_fakes()
    with tempfile.TemporaryDirectory(prefix="cellslide-full-") as work:
        campaign = Campaign(Path(work), 0)
        for stage in campaign.stages:
            fill(campaign, stage, options.more)
    print(campaign.tally, *campaign.tally.words, sep="\n")
    return int(bool(campaign.tally.words))


def fill(campaign: Campaign, stage: Stage, more: float) -> None:
    """Run one stage on a disk with next to no room, which grows until the stage is done; then compare."""
    out, tally = campaign.out, campaign.tally
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    pages = 8 if stage.before is None else used_pages(stage.before) + 8
    mount("-t", "tmpfs", "-o", f"size={pages * PAGE}", "none", str(out))
    try:
        if stage.before is not None:
            shutil.copytree(stage.before, out / SLIDE)
        while (code := once(campaign, stage)) != 0:
            if code != 1 or FULL not in campaign.log.read_text():
                tally.words.append(f"{stage.name} on a full disk ended with {code}: {campaign.log.read_text()[-500:]}")
                break
            pages = int(pages * more) + 1
            mount("-o", f"remount,size={pages * PAGE}", str(out))
        campaign.compare(stage)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def once(campaign: Campaign, stage: Stage) -> int:
    """Run a stage; returns its exit code."""
    campaign.log.unlink(missing_ok=True)
    campaign.tally.runs += 1
    return run(stage.arguments, campaign.out, campaign.log).code


def used_pages(folder: Path) -> int:
    """Return the room that the files of a folder take."""
    return sum(-(-p.stat().st_size // PAGE) + 1 for p in folder.rglob("*"))


def mount(*arguments: str) -> None:
    """Call mount."""
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
