"""`cellslide pretrain NAME SLIDES_OR_TILES... -o DIR`: the pretrainings of the registry."""

from __future__ import annotations

from cellslide.cli.training import TrainingGroup

command = TrainingGroup(
    "pretrain",
    help="""Learn from slides or tiles without labels, given where the nuclei are: MUSE, or CellDETR's contrast.

    SLIDES_OR_TILES are slides whose nuclei `cellslide segment` found, its output folders, or data sets with masks or
    points, of which only the places count.

    \b
    Examples:
      cellslide segment slides/ -o out
      cellslide pretrain muse out -o runs/muse --recipe muse.yaml
      cellslide pretrain muse slides/*.svs data/tnbc --nuclei out -o runs/muse --devices 4
      cellslide pretrain celldetr out --recipe contrastive.yaml -o runs/contrastive --stop-on-collapse
    """,
)
