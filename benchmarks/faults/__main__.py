"""The whole campaign, one after another: `python -m benchmarks.faults` prints runs / lost cells / corrupted outputs.

Both must be 0. At least 200 runs with random kills, poisoned inputs, a disk that is full, shards at once into one
folder, killed Dask workers and a killed scheduler. It takes about half an hour on two cores; `--quick` a few minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time

CAMPAIGN = (
    ("kills", "--runs", "200"),
    ("poisoned",),
    ("full_disk",),
    ("shards", "--slides", "200", "--shards", "4"),
    ("dask_faults", "--slides", "200", "--kills", "4"),
    ("dask_faults", "--slides", "24", "--kills", "0", "--scheduler-dies"),
)
QUICK = (
    ("kills", "--runs", "20"),
    ("poisoned",),
    ("full_disk", "--more", "1.6"),
    ("shards", "--slides", "20", "--shards", "4"),
    ("dask_faults", "--slides", "20", "--kills", "1"),
    ("dask_faults", "--slides", "12", "--kills", "0", "--scheduler-dies"),
)
FIGURE = re.compile(r"(\d+) runs / (\d+) lost cells / (\d+) corrupted outputs")


def main() -> int:
    """Run it; returns 1 where any part found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs of each")
    options = parser.parse_args()
    total, failed = [0, 0, 0], []
    for part in QUICK if options.quick else CAMPAIGN:
        began = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.faults.{part[0]}", *part[1:]]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        told = FIGURE.findall(done.stdout)
        figures = [int(n) for n in told[-1]] if told else [0, 0, 0]
        total = [a + b for a, b in zip(total, figures, strict=True)]
        if done.returncode or not told:
            failed.append(" ".join(part))
        print(f"{' '.join(part)}: {done.stdout.rpartition(chr(13))[2].strip()} ({time.monotonic() - began:.0f} s)")
    print(f"{total[0]} runs / {total[1]} lost cells / {total[2]} corrupted outputs")
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
