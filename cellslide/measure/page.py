"""One page with the numbers of all slides: counts by region, maps of the classes, neighbours, curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import shapely

from cellslide.measure.slide import SlideNumbers
from cellslide.report.images import heat_uri
from cellslide.report.rendering import part, template

MOST_SLIDES, MOST_ROWS = 50, 200
COLORS = ("#0550ae", "#b35900", "#1a7f37", "#8250df", "#bf3989", "#57606a")
WIDTH, HEIGHT = 260, 150


@dataclass(frozen=True, slots=True)
class Map:
    """Where nuclei of a class lie: a picture, what its brightest colour means, and outlines of regions over it."""

    name: str
    picture: str
    most: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of one pair of classes: SVG paths of the measure and of chance, and its value at the last radius."""

    of: str
    near: str
    path: str
    chance: str
    color: str


def render_page(numbers: Sequence[SlideNumbers]) -> str:
    """Return the page; the first MOST_SLIDES slides are shown, all stand in the tables."""
    shown = [_slide(found) for found in numbers[:MOST_SLIDES]]
    return template("measure.html").render(
        style=part("report.css"), slides=shown, n=len(numbers), size=(WIDTH, HEIGHT), most_rows=MOST_ROWS
    )


def _slide(found: SlideNumbers) -> dict[str, object]:
    classes = list(found.maps)
    rows = [row for row in found.regions if row["kind"] != "grid"]
    return {
        "name": found.slide, "classes": classes, "regions": rows[:MOST_ROWS], "left_out": len(rows) - MOST_ROWS,
        "maps": list(_maps(found)), "outline": _outline(found), "size_um": found.size_um,
        "neighbours": [row for row in found.neighbours if row["region"] == "all"],
        "lines": list(_lines(found)), "grid": sum(row["kind"] == "grid" for row in found.regions),
        "errors": found.errors,
    }  # fmt: skip


def _maps(found: SlideNumbers) -> Iterator[Map]:
    for name, values in found.maps.items():
        most = float(values.max(initial=0))
        if most:
            yield Map(name, heat_uri(values, most), most)


def _outline(found: SlideNumbers) -> str:
    words = []
    for _, shape in found.outlines:
        for polygon in shapely.get_parts(shapely.simplify(shape, found.size_um[0] / 500)):
            if isinstance(polygon, shapely.Polygon) and not polygon.is_empty:
                words.append("M" + "L".join(f"{x:.0f},{y:.0f}" for x, y in polygon.exterior.coords[:-1]) + "Z")
    return "".join(words)


def _lines(found: SlideNumbers) -> Iterator[Line]:
    """Yield the curves of the whole slide: times chance on a scale from 0 to 3, by radius."""
    curves: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in found.curves:
        if row["region"] == "all" and row["times_chance"] is not None:
            curves.setdefault((row["of"], row["near"]), []).append(row)
    for number, ((of, near), rows) in enumerate(curves.items()):
        last = rows[-1]["radius_um"]
        at = [(row["radius_um"] / last * WIDTH, row) for row in rows]
        high = [(x, _y(row["chance_high"])) for x, row in at]
        low = [(x, _y(row["chance_low"])) for x, row in reversed(at)]
        path = "M" + "L".join(f"{x:.0f},{_y(row['times_chance']):.0f}" for x, row in at)
        chance = "M" + "L".join(f"{x:.0f},{y:.0f}" for x, y in high + low) + "Z"
        yield Line(of, near, path, chance, COLORS[number % len(COLORS)])


def _y(times: float | None) -> float:
    return HEIGHT * (1 - min(max(times or 0.0, 0.0), 3.0) / 3)
