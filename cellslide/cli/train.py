"""`cellslide train NAME DATASET... -o DIR`: the trainings of the registry."""

from __future__ import annotations

from cellslide.cli.training import TrainingGroup

command = TrainingGroup(
    "train",
    help="""Train a model on labelled data sets: nuclei (cellvta), or their types in three stages (nuclass-...).

    \b
    Examples:
      cellslide train cellvta data/tnbc data/mine --recipe recipe.yaml -o runs/mine
      cellslide train nuclass-local data/typed --recipe local.yaml -o runs/local
      cellslide train nuclass-global data/typed --recipe global.yaml --local runs/local -o runs/global
      cellslide train nuclass-gate data/typed --recipe gate.yaml --local runs/local --global runs/global -o runs/gate
    """,
)
