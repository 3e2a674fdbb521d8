"""`cellslide measure`: the numbers of a study from finished slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cellslide.cli import grouped
from cellslide.cli.guarded import each, refuse
from cellslide.cli.options import FILE, FOLDER, verbosity_options

if TYPE_CHECKING:
    from cellslide.measure.slide import SlideNumbers


@grouped.define()
@click.argument("folder", type=FOLDER, metavar="OUT")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", default="numbers",
    show_default=True, help="Where tables and page are written.",
)  # fmt: skip
@click.option(
    "--regions", type=FILE, metavar="GEOJSON",
    help="Annotated regions, as QuPath exports them; OUT is then the folder of their one slide.",
)  # fmt: skip
@click.option(
    "--geojson-origin", "origin", type=click.Choice(["bounds", "level0"]), default="bounds", show_default=True,
    help="What the regions are relative to.",
)  # fmt: skip
@click.option("--grid", "grid_um", type=float, metavar="UM", help="Also squares of this edge.")
@click.option("--border", "border_um", type=float, metavar="UM", help="Also bands this wide along the tumour's border.")
@click.option("--with-artefacts", is_flag=True, help="Also count nuclei where the tissue is not clean.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws and shuffles of neighbours.")
@verbosity_options
def command(
    folder: Path,
    output: Path,
    regions: Path | None,
    origin: Literal["bounds", "level0"],
    grid_um: float | None,
    border_um: float | None,
    with_artefacts: bool,
    seed: int,
) -> None:
    """Count nuclei by region, with densities, shares, sizes, neighbours and distances, as tables and a page.

    OUT is an output folder, or the folder of one slide. Measured are the whole search, its pieces, annotated regions,
    squares of a grid and bands along the border of the tumour. Nothing in OUT is changed.

    \b
    Examples:
      cellslide measure out -o numbers
      cellslide measure out/slide --regions tumour.geojson -o numbers
      cellslide measure out --border 250 --grid 500
    """
    from cellslide.api import measure

    found: list[SlideNumbers] = []

    def work(slide: Path) -> None:
        numbers = measure(
            slide, regions=regions, origin=origin, grid_um=grid_um, border_um=border_um,
            with_artefacts=with_artefacts, seed=seed,
        )  # fmt: skip
        whole = numbers.regions[0]
        words = f"{whole['nuclei']:,} nuclei on {whole['mm2']:.2f} mm², {len(numbers.regions):,} regions"
        click.echo(f"{numbers.slide}: {words}; errors of the classifier: {numbers.errors}")
        found.append(numbers)

    failed = each(slide_folders(folder, regions), work)
    if found:
        from cellslide.measure.page import render_page
        from cellslide.measure.tables import write_tables
        from cellslide.store.atomic import write_text

        write_tables(found, output)
        write_text(output / "measure.html", render_page(found))
        click.echo(str(output / "measure.html"))
    refuse(failed, "slides could not be measured")


def slide_folders(folder: Path, regions: Path | None) -> list[Path]:
    """Return the slides' folders; raises UsageError for regions of more than one slide."""
    from cellslide.errors import UsageError
    from cellslide.view.folders import find_slides

    folders = list(find_slides(folder.resolve()).values())
    if regions is not None and len(folders) != 1:
        raise UsageError(f"--regions {regions}: {folder} holds {len(folders)} slides; give the folder of one")
    return folders
