"""`cellslide dataset`: corrected nuclei become a data set, and what to correct next."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cellslide.cli import grouped
from cellslide.cli.options import FOLDER, verbosity_options
from cellslide.errors import UsageError

ENDINGS = (".geojson", ".geojson.gz", ".json")


@grouped.define()
@click.argument("folder", type=FOLDER, metavar="OUT")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR|FILE",
    help="Folder of the new data set; with --suggest the GeoJSON to write (a folder for several slides).",
)  # fmt: skip
@click.option(
    "--corrections", type=click.Path(exists=True, path_type=Path), metavar="FILE|DIR",
    help="GeoJSON of one slide, or a folder with SLIDE_ID.geojson for each.",
)  # fmt: skip
@click.option(
    "--suggest", "n", type=click.IntRange(1), metavar="N", help="Write N places of each slide that are worth checking."
)
@click.option("--mpp", type=click.FloatRange(0.05, 2), default=0.25, show_default=True, help="Of the images, µm.")
@click.option("--tile-size", type=click.IntRange(64), default=512, show_default=True, help="Largest edge, px.")
@click.option(
    "--val", type=click.IntRange(0), default=0, show_default=True, help="So many slides, the last by name, validate."
)
@click.option(
    "--checked", default="checked", show_default=True, metavar="CLASS",
    help="Class of the annotations around what was checked as a whole.",
)  # fmt: skip
@click.option(
    "--geojson-origin", "origin", type=click.Choice(["bounds", "level0"]), default="bounds", show_default=True,
    help="What the corrections are relative to.",
)  # fmt: skip
@click.option("--licence", default="", metavar="TEXT", help="Licence of the images, for the manifest.")
@verbosity_options
def command(
    folder: Path, output: Path, corrections: Path | None, n: int | None, mpp: float, tile_size: int, val: int,
    checked: str, origin: Literal["bounds", "level0"], licence: str,
) -> None:  # fmt: skip
    """Make a data set of corrected nuclei, to train on: from what was corrected in QuPath, or by another tool.

    OUT holds the results that were corrected. Draw annotations of the class "checked" around what you have looked at as
    a whole; in them, nuclei are true as they are in the file: all of them (as QuPath exports them), or changes to OUT,
    each with a property `correction`. A slide is never in two splits.

    \b
    Examples:
      cellslide dataset out/slide --suggest 20 -o check.geojson
      cellslide dataset out/slide --corrections corrected.geojson -o set
      cellslide dataset out --corrections corrected/ --val 1 -o many
      cellslide train cellvta set --init model.safetensors -o runs/mine
    """
    from cellslide.view.folders import find_slides

    slides = dict(find_slides(folder.resolve()))
    if (corrections is None) == (n is None):
        raise UsageError("give --corrections for a data set, or --suggest N for places to check")
    if n is not None:
        return _suggest(slides, output, n, origin)
    assert corrections is not None
    from cellslide.api import make_dataset

    chosen = _pair(slides, corrections)
    cuts = make_dataset(
        chosen, output, mpp=mpp, tile_px=tile_size, val=val, checked=checked, origin=origin, licence=licence
    )
    for name, cut in zip(sorted(place.name for place in chosen), cuts, strict=True):
        bare = f", {cut.without_outline:,} of them without an outline" if cut.without_outline else ""
        left = f"; {cut.left_out_share:.0%} of the regions is in no square" if cut.left_out_share > 0.01 else ""
        lost = f"; {cut.beside:,} corrections lie in no checked region and are not used" if cut.beside else ""
        click.echo(f"{name}: {len(cut.rows)} images, {cut.nuclei:,} nuclei{bare}{left}{lost}")
    click.echo(str(output))


def _suggest(slides: dict[str, Path], output: Path, n: int, origin: Literal["bounds", "level0"]) -> None:
    from cellslide.api import suggest_corrections

    for name, place in slides.items():
        file = output if len(slides) == 1 else output / f"{name}.geojson"
        found = suggest_corrections(place, file, n, origin=origin)
        click.echo(f"{name}: {len(found)} places in {file}")


def _pair(slides: dict[str, Path], corrections: Path) -> dict[Path, Path]:
    """Return the file of each slide; raises UsageError where slides and files do not go together."""
    if corrections.is_file():
        if len(slides) != 1:
            raise UsageError(f"--corrections {corrections}: OUT holds {len(slides)} slides; give the folder of one")
        return dict.fromkeys(slides.values(), corrections)
    files = {path.name.split(".geojson")[0].removesuffix(".json"): path for path in sorted(corrections.iterdir())
             if path.name.endswith(ENDINGS)}  # fmt: skip
    lost = sorted(set(files) - set(slides))
    if lost or not files:
        what = f"no slide {lost[0]} in OUT" if lost else "no SLIDE_ID.geojson in it"
        raise UsageError(f"--corrections {corrections}: {what}; slides are {', '.join(list(slides)[:6])}")
    return {slides[name]: path for name, path in files.items()}
