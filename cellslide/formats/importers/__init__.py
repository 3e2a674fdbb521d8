"""Nuclei that other tools found: read from their files, placed on the slide, written as a table of ours.

`import_nuclei` is all that a command needs: file -> reader -> blocks -> placed and counted -> `cells.zarr`. The
formats, the frames and what happens to ids stand in docs/nuclei.md. Memory is that of the outlines and one block; JSON
is read as it streams.
"""

from __future__ import annotations

from cellslide.formats.importers.read import FORMATS, load_alignment, read_nuclei
from cellslide.formats.importers.records import Direction, ForeignNuclei, NucleiReport, Origin, Source, Unit
from cellslide.formats.importers.write import import_nuclei, write_foreign

__all__ = [
    "FORMATS",
    "Direction",
    "ForeignNuclei",
    "NucleiReport",
    "Origin",
    "Source",
    "Unit",
    "import_nuclei",
    "load_alignment",
    "read_nuclei",
    "write_foreign",
]
