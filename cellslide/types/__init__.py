"""Typed records that cross stage borders. Only numpy is imported here.

Frames
------
level-0    pixels of the full-resolution slide plane, no bounds offset subtracted.
plane      the slide resampled to the model's pixel size; `Plane` converts between the two.
tile       plane pixels relative to the top left corner of a tile's read box.

Points are (x, y), arrays [row, col], boxes xyxy and half-open. Pixel i covers [i, i + 1), so its centre is i + 0.5.
"""

from cellslide.types.arrays import Bool, Float32, Float64, Int32, Int64, UInt8
from cellslide.types.classifier import Calibration, ClassifierSpec, CropSpec, PathProbs
from cellslide.types.fields import FIELD_MEASURES, Fields
from cellslide.types.model import ClassSpec, DetectDecode, HoverDecode, ModelKind, ModelSpec, hex_color
from cellslide.types.nuclei import Cells, HoverMaps, Instances, NoOutput, Record, concat, take_rings
from cellslide.types.run import (
    WORDS,
    BatchSize,
    Check,
    Counts,
    FailedTile,
    RunRecord,
    Seconds,
    Verdict,
    WeightsRef,
    Word,
)
from cellslide.types.slide import Level, MppSource, Plane, SlideInfo, Tile

__all__ = [
    "BatchSize",
    "Bool",
    "Calibration",
    "Cells",
    "Check",
    "ClassSpec",
    "ClassifierSpec",
    "Counts",
    "CropSpec",
    "DetectDecode",
    "FIELD_MEASURES",
    "FailedTile",
    "Fields",
    "Float32",
    "Float64",
    "HoverDecode",
    "HoverMaps",
    "Instances",
    "Int32",
    "Int64",
    "Level",
    "ModelKind",
    "ModelSpec",
    "MppSource",
    "NoOutput",
    "PathProbs",
    "Plane",
    "Record",
    "RunRecord",
    "Seconds",
    "SlideInfo",
    "Tile",
    "UInt8",
    "Verdict",
    "WORDS",
    "WeightsRef",
    "Word",
    "concat",
    "hex_color",
    "take_rings",
]
