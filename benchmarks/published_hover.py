"""HoVer decode: the plain published form against cellslide's, on tiles with few and many nuclei.

Run `python benchmarks/published_hover.py`. The plain form (`cellslide.bench.plain_hover`) follows the published steps
with scikit-image, SciPy and OpenCV and makes a mask of the whole tile for every nucleus; both forms must give the same
label map.
"""

from __future__ import annotations

import sys

import numpy as np

from cellslide.bench import BenchOptions, measure, plain_hover, synthetic_maps
from cellslide.nuclei.hover_decode import hover_instances
from cellslide.types import HoverDecode


def main() -> int:
    """Print CPU milliseconds and ratios; returns 1 when the label maps differ."""
    same = True
    for n in (100, 400, 800, 1400):
        raw = synthetic_maps(n)
        same &= np.array_equal(plain_hover(raw)[0], hover_instances(raw.hover_maps(), HoverDecode()))
        print(f"{n} nuclei drawn, 1024 px tile")
        for row in measure("decode", BenchOptions(nuclei=n, rounds=5)):
            print(f"  {row.form:<36}{row.value:9.1f} ms CPU  {row.count:6d} nuclei  {row.ratio:5.1f} x")
    print("label maps equal" if same else "LABEL MAPS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
