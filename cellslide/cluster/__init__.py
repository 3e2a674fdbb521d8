"""Many slides on many machines through Dask: one task a stage of a slide, results through disk.

`connect` finds a scheduler or starts processes on this machine, `drive` hands out the stages and hears how they end,
`stages` is what a worker does, `guard` counts the workers that a slide has killed.
"""

from cellslide.cluster.connect import open_cluster
from cellslide.cluster.drive import over_cluster
from cellslide.cluster.stages import Job, Stage

__all__ = ["Job", "Stage", "open_cluster", "over_cluster"]
