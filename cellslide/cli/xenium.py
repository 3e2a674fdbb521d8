"""`cellslide xenium`: whether a Xenium bundle fits its slide, and labels of nuclei by marker genes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.options import chain, device_option, model_options, output_option, verbosity_options
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.api import Model
    from cellslide.xenium.check import XeniumCheck

BUNDLE = click.argument("bundle", type=click.Path(exists=True, path_type=Path), metavar="BUNDLE")
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
pair_options = chain(
    click.option("--slide", required=True, type=click.Path(exists=True, path_type=Path), metavar="FILE",
                 help="The H&E slide of the same section."),
    click.option("--alignment", type=FILE, metavar="FILE",
                 help="Matrix or landmarks (.csv), or regions (.geojson), where none stands beside the slide."),
    click.option("--mpp", type=float, metavar="F", help="Pixel size of the slide in µm, over what its file says."),
    click.option("--min-qv", "least_qv", type=float, default=20.0, show_default=True,
                 help="Least quality of transcripts that count."),
    model_options,
    device_option,
)  # fmt: skip


@click.group("xenium", cls=grouped.Group)
@verbosity_options
def command() -> None:
    """Read a Xenium experiment beside its H&E slide.

    \b
    Example:
      cellslide xenium check outs --slide he_image.ome.tif
      cellslide xenium label outs --slide he_image.ome.tif -o out
    """


@command.command("check")
@BUNDLE
@pair_options
@click.option("--fields", type=int, default=6, show_default=True, help="Squares of 256 µm whose nuclei are compared.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def check_command(
    bundle: Path, slide: Path, model: str | None, weights: Path | None, device: str, as_json: bool, **given: Any
) -> None:
    """Find out whether BUNDLE, its alignment and a slide belong together.

    Counts transcripts, compares pixel sizes, and finds nuclei on some squares of the slide: the bundle's nuclei must
    lie nearer to them than the same nuclei moved by 20 µm. Exit code 2 where the alignment cannot be right.

    \b
    Example:
      cellslide xenium check outs --slide he_image.ome.tif
      cellslide xenium check outs --slide he_image.ome.tif --alignment landmarks.csv --json
    """
    from cellslide.api import xenium_check

    found = xenium_check(bundle, slide, model=lambda: _finder(model, weights, device), **given)
    if as_json:
        click.echo(json.dumps({"verdict": found.verdict, **asdict(found)}, indent=2, ensure_ascii=False))
    else:
        _show(found)
    if found.reasons:
        raise UsageError(f"{bundle}: the alignment cannot be right: {'; '.join(found.reasons)}")


@command.command("label")
@BUNDLE
@pair_options
@output_option
@click.option("--markers", default="nuclass", show_default=True, metavar="NAME|FILE",
              help="Marker genes: the list of NuClass, or a YAML file `class: [genes]`.")  # fmt: skip
@click.option("--classes", default="", metavar="A,B", help="Only these classes of the list.")
@click.option("--clusters", type=FILE, metavar="FILE", help="xenium_clusters.csv of an earlier run, edited.")
@click.option("--min-transcripts", "least_transcripts", type=int, default=20, show_default=True, help="Of a cell.")
@click.option("--min-genes", "least_genes", type=int, default=5, show_default=True, help="Of a cell.")
@click.option("--resolution", type=float, default=0.6, show_default=True, help="Of Leiden; more gives more clusters.")
@click.option("--min-margin", "least_margin", type=float, default=0.25, show_default=True,
              help="By how much the best class must lead, in SDs of expression.")  # fmt: skip
@click.option("--min-confidence", "least_confidence", type=float, default=0.6, show_default=True, help="To be kept.")
@click.option("--match-um", type=float, default=3.0, show_default=True, help="Farthest nucleus that is the same (µm).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the clusters.")
def label_command(
    bundle: Path, slide: Path, output: Path, markers: str, classes: str, clusters: Path | None, model: str | None,
    weights: Path | None, device: str, alignment: Path | None, mpp: float | None, **settings: Any,
) -> None:  # fmt: skip
    """Label the nuclei of a slide by marker genes of BUNDLE, as NuClass does.

    Cells are clustered by their genes, clusters named by markers, and labels brought to the nuclei that `segment` finds
    on the slide, one to one. cells.zarr gains label, label_confidence, label_kept, purity, margin, cluster, matched_um
    and xenium_cell; beside it stand xenium.html to look at and xenium_clusters.csv to edit and give back.

    \b
    Example:
      cellslide xenium label outs --slide he_image.ome.tif -o out --classes T_Cell,Macrophage,Epithelial_Malignant
      cellslide xenium label outs --slide he_image.ome.tif -o out --clusters xenium_clusters.csv
    """
    from cellslide.api import xenium_label
    from cellslide.xenium.expression import LabelSettings

    counts = xenium_label(
        bundle, slide, output, alignment=alignment, markers=markers, clusters=clusters, mpp=mpp,
        classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
        settings=LabelSettings(**settings), model=lambda: _finder(model, weights, device),
    )  # fmt: skip
    for reason, n in counts.left_out.items():
        click.echo(f"left out, {reason}: {n:,} of {counts.cells:,} cells")
    click.echo(f"{counts.clusters} clusters; {counts.ambiguous:,} matched nuclei are ambiguous")
    click.echo(f"matched: {counts.matched:,} of {counts.nuclei_xenium:,} Xenium nuclei ({counts.matched_share:.1%})")
    click.echo(f"kept: {counts.kept:,} of {counts.labelled:,} labelled nuclei ({counts.kept_share:.1%})")
    for name, n in counts.labels.items():
        click.echo(f"  {name}: {n:,}")


def _finder(model: str | None, weights: Path | None, device: str) -> Model:
    from cellslide.api import load_model

    return load_model(model, weights=weights, task=None if model or weights else "segment", device=device)


def _show(found: XeniumCheck) -> None:
    test = found.test
    mirrored = ", mirrored" if found.mirrored else ""
    residual = "" if found.residual_um is None else f", landmarks off by {found.residual_um:.2f} µm (RMS)"
    lines = [
        ("bundle", f"version {found.version}, panel {found.panel}, {found.genes} genes"),
        ("cells", f"{found.cells:,}, {found.nuclei:,} nuclei"),
        ("transcripts", f"{found.transcripts:,}; {found.transcripts_qv:,} of quality {found.least_qv:g} or more, "
                        f"{found.transcripts_used:,} of these genes; {found.controls:,} controls"),
        ("alignment", f"{found.alignment}, turned by {found.turn_degrees:.1f}°{mirrored}{residual}"),
        ("pixel size", f"{found.mpp_matrix:.4f} µm by the alignment, {found.mpp_slide:.4f} µm by the slide"),
        ("transcripts there", f"{found.inside_slide:.1%} on the slide, {found.inside_tissue:.1%} on tissue"),
    ]  # fmt: skip
    if test.median_um is not None and test.shifted_um is not None:
        words = f"{test.median_um:.2f} µm apart (median of {test.n:,}), {test.shifted_um:.2f} µm when moved by 20 µm"
        lines.append(("nuclei", words))
    for name, words in lines:
        click.echo(f"{name:>18}  {words}")
    for words in found.warnings:
        click.echo(f"{'look':>18}  {words}")
    click.echo(f"{'verdict':>18}  {found.verdict}")
