"""`cellslide info`: what a slide file says of itself, also where its pixel size is unknown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.options import fluorescence_option, slides_argument, verbosity_options

if TYPE_CHECKING:
    from cellslide.slides.inputs import SlideInput
    from cellslide.slides.readers import SlideHeader


@grouped.define()
@slides_argument
@click.option("--mpp", type=float, help="µm per pixel of level 0, over what the file says.")
@fluorescence_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object; one a line for several slides.")
@verbosity_options
def command(slides: tuple[str, ...], mpp: float | None, allow_fluorescence: bool, as_json: bool) -> None:
    """Show size, levels, pixel size and where it came from, and the bounds of slides.

    A slide whose pixel size is unknown or not believable is shown all the same, with the reason; the other commands
    refuse it until --mpp is given. A slide that is refused for other reasons is refused here as well.

    \b
    Example:
      cellslide info slide.svs
      cellslide info slide.svs --json
      cellslide info slides/ --mpp 0.25
    """
    from cellslide.errors import SlideError
    from cellslide.slides.inputs import expand_slides
    from cellslide.slides.slide import inspect_slide

    items = expand_slides(slides)
    failed = []
    for item in items:
        try:
            header = inspect_slide(item.path, allow_fluorescence)
        except SlideError as error:
            if len(items) == 1:
                raise
            failed.append(item.path)
            click.echo(f"cellslide: {error}", err=True)
            continue
        _show(header, item, mpp, as_json, single=len(items) == 1)
    if failed:
        raise SlideError(f"{len(failed)} of {len(items)} slides cannot be read")


def _show(header: SlideHeader, item: SlideInput, mpp: float | None, as_json: bool, single: bool) -> None:
    facts, problem = slide_facts(header, mpp if mpp is not None else item.mpp, "flag" if mpp is not None else "list")
    if as_json:
        click.echo(json.dumps(facts, indent=2 if single else None, ensure_ascii=False))
    else:
        _print(facts, problem, header.read_by)


def slide_facts(header: SlideHeader, mpp: float | None, source: str) -> tuple[dict[str, Any], str | None]:
    """Return what `--json` prints, and why the pixel size is unknown if it is.

    bounds is [x, y, width, height] in level-0 pixels. Raises PixelSizeError for an `mpp` that cannot be.
    """
    from cellslide.errors import PixelSizeError
    from cellslide.slides.pixel_size import choose

    problem = None
    mpp_x = mpp_y = chosen = None
    try:
        mpp_x, mpp_y, chosen = choose(header.path, header.found, mpp, "list" if source == "list" else "flag")
    except PixelSizeError as error:
        if mpp is not None:
            raise
        problem = str(error)
    levels = [{"width": v.width_px, "height": v.height_px, "downsample": v.downsample} for v in header.levels]
    facts = {
        "path": str(header.path),
        "vendor": header.vendor,
        "width": header.width_px,
        "height": header.height_px,
        "levels": levels,
        "mpp_x": mpp_x,
        "mpp_y": mpp_y,
        "mpp_source": chosen,
        "objective_power": header.objective_power,
        "bounds": list(header.bounds) if header.bounds else None,
    }
    return facts, problem


def _print(facts: dict[str, Any], problem: str | None, read_by: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_rows(facts), ("read by", read_by)]:
        table.add_row(name, Text(value))
    if problem:
        table.add_row("", Text(problem, style="yellow"))
    console = Console(highlight=False)
    console.print(Text(facts["path"], style="bold cyan"))
    console.print(table)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    levels = [f"{v['width']} x {v['height']} (1/{v['downsample']:.6g})" for v in facts["levels"]]
    rows = [
        ("vendor", facts["vendor"]),
        ("size", f"{facts['width']} x {facts['height']} px"),
        ("levels", "\n".join(levels)),
        ("pixel size", "unknown"),
        ("objective", f"{facts['objective_power']:g}x" if facts["objective_power"] else "not stated"),
    ]
    if facts["mpp_x"] is not None:
        width_mm, height_mm = facts["width"] * facts["mpp_x"] / 1e3, facts["height"] * facts["mpp_y"] / 1e3
        rows[1] = ("size", f"{rows[1][1]}, {width_mm:.2f} x {height_mm:.2f} mm")
        rows[3] = ("pixel size", f"{facts['mpp_x']:.4g} x {facts['mpp_y']:.4g} µm ({facts['mpp_source']})")
    if facts["bounds"]:
        x, y, width, height = facts["bounds"]
        rows.append(("bounds", f"{width} x {height} px at ({x}, {y}); QuPath shows this part only"))
    return rows
