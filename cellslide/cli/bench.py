"""`cellslide bench`: measure the speed of single stages on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.options import FOLDER, device_option, model_options

if TYPE_CHECKING:
    from cellslide.bench import Timing
    from cellslide.classify.effects import Effect

# What is measured unless stages are named; typing needs a classifier.
STAGES = ("decode", "merge")
ALL_STAGES = (*STAGES, "classify")


def _measure(stage: str, nuclei: int | None, rounds: int) -> list[Timing]:
    from cellslide.bench import bench_decode, bench_merge

    if stage == "decode":
        return bench_decode(nuclei or 800, rounds=rounds)
    return bench_merge(nuclei or 1_000_000, rounds=rounds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stages", nargs=-1, type=click.Choice(ALL_STAGES), metavar="[decode|merge|classify]...")
@click.option(
    "--nuclei",
    type=click.IntRange(1),
    help="How many.  [default: decode 800 in 1024 px; merge 1,000,000; classify 200]",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Repeats; shows the median.")
@model_options
@click.option(
    "--random",
    "random_size",
    type=click.Choice(["full", "small"]),
    help="classify: a network of random weights, as large as the published one or small.",
)
@click.option(
    "--cells-of", type=FOLDER, metavar="SLIDEDIR", help="classify: a slide's folder.  [default: painted cells]"
)
@click.option("--context-size", type=int, metavar="N", help="classify: edge of the context in px.")
@click.option("--batch-size", type=click.IntRange(1), help="classify: local crops in one pass.  [default: auto]")
@click.option("--compile", "compile_", is_flag=True, help="classify: also measure the compiled network.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(stages: tuple[str, ...], nuclei: int | None, rounds: int, as_json: bool, **flags: Any) -> None:
    """Measure the speed of the stages on this machine: decode and merge, or those named.

    decode: HoVer maps of one tile to nuclei with outlines and class probabilities, beside the plain published form.
    merge: overlapping tiles to one list of nuclei, outlines carried along.
    CPU milliseconds, medians; the ratio says how many times faster than the first line.

    classify: the same cells typed with each saving, and how it changes the mixed probabilities beside the first line.

    \b
    Example:
      cellslide bench
      cellslide bench merge --nuclei 200000 --json
      cellslide bench classify --cells-of out/slide --nuclei 1000
      cellslide bench classify --random full --device cuda --context-size 512
    """
    timed = [stage for stage in dict.fromkeys(stages or STAGES) if stage in STAGES]
    results = {stage: _measure(stage, nuclei, rounds) for stage in timed}
    rows: dict[str, list[Any]] = {stage: [_row(t, timings[0]) for t in timings] for stage, timings in results.items()}
    if not as_json:
        for timings in results.values():
            _show(timings)
    if "classify" in stages:
        rows["classify"] = [_effect(effect, as_json) for effect in _effects(nuclei or 200, **flags)]
    if as_json:
        click.echo(json.dumps({"rounds": rounds, "stages": rows}))


def _show(timings: list[Timing]) -> None:
    click.echo(f"{'form':<34}{'CPU ms':>10}{'least':>10}{'nuclei':>12}{'ratio':>8}")
    for t in timings:
        ratio = timings[0].cpu_ms / t.cpu_ms
        click.echo(f"{t.name:<34}{t.cpu_ms:>10.1f}{t.cpu_ms_min:>10.1f}{t.count:>12,}{ratio:>8.1f}")


def _effects(
    n: int,
    model: str | None,
    weights: Path | None,
    random_size: Any,
    cells_of: Path | None,
    context_size: int | None,
    batch_size: int | None,
    compile_: bool,
    device: str,
) -> Iterator[Effect]:
    from contextlib import closing

    from cellslide.classify.effects import cells_of_folder, measure_effects, painted_cells, random_classifier
    from cellslide.config import ClassifyConfig, InferConfig
    from cellslide.weights.classifier import load_classifier

    config = ClassifyConfig(
        context_size=context_size, infer=InferConfig(device=device, batch_size=batch_size, compile=compile_)
    )
    loaded = random_classifier(random_size) if random_size else load_classifier(model, weights)
    slide, xy = painted_cells(n) if cells_of is None else cells_of_folder(cells_of, n)
    with closing(slide):
        yield from measure_effects(loaded, slide, xy, 0 if loaded.spec.organs else -1, config)


def _effect(effect: Effect, quiet: bool) -> dict[str, Any]:
    if not quiet:
        if effect.name.startswith("plain"):
            click.echo(
                f"{'way':<24}{'cells/s':>10}{'contexts':>10}{'skipped':>9}{'same class':>12}{'mean change':>13}"
                f"{'most':>8}"
            )
        click.echo(
            f"{effect.name:<24}{effect.cells_per_s:>10.1f}{effect.contexts:>10,}{effect.skipped:>9.1%}"
            f"{effect.agreement:>12.2%}{effect.mean_change:>13.2g}{effect.max_change:>8.2g}"
        )
    return asdict(effect)


def _row(timing: Timing, first: Timing) -> dict[str, str | float]:
    return {
        "name": timing.name,
        "cpu_ms": round(timing.cpu_ms, 2),
        "cpu_ms_min": round(timing.cpu_ms_min, 2),
        "nuclei": timing.count,
        "ratio": round(first.cpu_ms / timing.cpu_ms, 2),
    }
