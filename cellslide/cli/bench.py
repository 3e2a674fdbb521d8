"""`cellslide bench`: measure the speed of single stages on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cellslide.bench import Timing


STAGES = ("decode", "merge")


def _measure(stage: str, nuclei: int | None, rounds: int) -> list[Timing]:
    from cellslide.bench import bench_decode, bench_merge

    if stage == "decode":
        return bench_decode(nuclei or 800, rounds=rounds)
    return bench_merge(nuclei or 1_000_000, rounds=rounds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stages", nargs=-1, type=click.Choice(STAGES), metavar="[decode|merge]...")
@click.option("--nuclei", type=click.IntRange(1), help="How many.  [default: 800 in a 1024 px tile; merge 1,000,000]")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Repeats; shows the median.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(stages: tuple[str, ...], nuclei: int | None, rounds: int, as_json: bool) -> None:
    """Measure the speed of the stages on this machine, all of them or those named.

    decode: HoVer maps of one tile to nuclei with outlines and class probabilities, beside the plain published form.
    merge: overlapping tiles to one list of nuclei, outlines carried along.
    CPU milliseconds, medians; the ratio says how many times faster than the first line.

    \b
    Example:
      cellslide bench
      cellslide bench merge --nuclei 200000 --json
    """
    results = {stage: _measure(stage, nuclei, rounds) for stage in dict.fromkeys(stages or STAGES)}
    if as_json:
        rows = {stage: [_row(t, timings[0]) for t in timings] for stage, timings in results.items()}
        click.echo(json.dumps({"rounds": rounds, "stages": rows}))
        return
    for timings in results.values():
        click.echo(f"{'form':<34}{'CPU ms':>10}{'least':>10}{'nuclei':>12}{'ratio':>8}")
        for t in timings:
            ratio = timings[0].cpu_ms / t.cpu_ms
            click.echo(f"{t.name:<34}{t.cpu_ms:>10.1f}{t.cpu_ms_min:>10.1f}{t.count:>12,}{ratio:>8.1f}")


def _row(timing: Timing, first: Timing) -> dict[str, str | float]:
    return {
        "name": timing.name,
        "cpu_ms": round(timing.cpu_ms, 2),
        "cpu_ms_min": round(timing.cpu_ms_min, 2),
        "nuclei": timing.count,
        "ratio": round(first.cpu_ms / timing.cpu_ms, 2),
    }
