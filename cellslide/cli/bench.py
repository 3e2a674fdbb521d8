"""`cellslide bench`: measure the speed of single stages on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cellslide.bench import Timing


def _measure(stage: str, nuclei: int | None, rounds: int) -> list[Timing]:
    from cellslide.bench import bench_decode, bench_merge

    if stage == "decode":
        return bench_decode(nuclei or 800, rounds=rounds)
    return bench_merge(nuclei or 1_000_000, rounds=rounds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stage", type=click.Choice(["decode", "merge"]))
@click.option("--nuclei", type=click.IntRange(1), help="How many.  [default: 800 in a 1024 px tile; merge 1,000,000]")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Repeats; shows the median.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(stage: str, nuclei: int | None, rounds: int, as_json: bool) -> None:
    """Measure the speed of the stages on this machine.

    decode: HoVer maps of one tile to nuclei with outlines and class probabilities, beside the plain published form.
    merge: overlapping tiles to one list of nuclei, outlines carried along.
    CPU milliseconds, medians; the ratio says how many times faster than the first line.

    \b
    Example:
      cellslide bench decode
      cellslide bench merge --nuclei 200000 --json
    """
    timings = _measure(stage, nuclei, rounds)
    if as_json:
        rows = [
            {"name": t.name, "cpu_ms": round(t.cpu_ms, 2), "cpu_ms_min": round(t.cpu_ms_min, 2), "nuclei": t.count}
            | {"ratio": round(timings[0].cpu_ms / t.cpu_ms, 2)}
            for t in timings
        ]
        click.echo(json.dumps({"stage": stage, "rounds": rounds, "results": rows}))
        return
    click.echo(f"{'form':<34}{'CPU ms':>10}{'least':>10}{'nuclei':>12}{'ratio':>8}")
    for t in timings:
        ratio = timings[0].cpu_ms / t.cpu_ms
        click.echo(f"{t.name:<34}{t.cpu_ms:>10.1f}{t.cpu_ms_min:>10.1f}{t.count:>12,}{ratio:>8.1f}")
