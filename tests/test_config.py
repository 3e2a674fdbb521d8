"""Settings are checked where they are made, and the message names the flag and the legal range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cellslide.config import InferConfig, SegmentConfig, TileConfig, TissueConfig
from cellslide.errors import UsageError
from cellslide.formats.registry import find_formats


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileConfig(size_px=32), r"--tile-size 32: must be 64 to 8192 px"),
        (lambda: TileConfig(overlap_px=-1), r"--overlap -1: must be 0 to 2048 px"),
        (lambda: TileConfig(256, 129), r"--overlap 129: must be at most half of --tile-size \(128 px\)"),
        (lambda: InferConfig(batch_size=0), r"--batch-size 0: must be auto or 1 to 1024"),
        (lambda: InferConfig(workers=-1), r"--workers -1: must be 0 to 256"),
        (lambda: find_formats(("xml",)), r"--format xml: must be one of zarr, geojson, parquet, csv, labels"),
        (lambda: SegmentConfig(mpp=25.0), r"--mpp 25.0: must be 0.05 to 2 µm per pixel"),
        (lambda: TissueConfig(enabled=False, mask=Path("m.png")), r"--tissue-mask m.png: must be left out"),
    ],
)
def test_values_out_of_range_name_the_flag(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_defaults_are_legal() -> None:
    assert SegmentConfig().output.formats == ("zarr", "geojson")
