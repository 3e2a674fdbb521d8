"""Commands whose help shows first what people use first, and that all know `--help-all` and `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

# Where an option stands in the help, by the name of its parameter; what is not named here is "Other".
SECTIONS = {
    "Input": (
        "mpp", "allow_fluorescence", "no_tissue", "tissue_mask", "roi", "cells", "cells_unit", "cells_mpp", "alignment",
        "alignment_direction", "organ", "slide", "split", "limit", "class_map", "predictions", "nuclei", "protocol",
        "max_cells", "sample", "recipe", "uncertain", "disagree", "local", "global_",
    ),
    "Output": (
        "output", "folder", "formats", "geojson_origin", "profile", "overwrite", "fresh", "to", "as_json", "json_file",
        "per_image", "reliability", "runner_up", "dry_run",
    ),
    "Model": ("model", "weights", "classifier", "classifier_weights", "detector", "tta", "random_size"),
    "Speed": (
        "device", "batch_size", "precision", "engine", "workers", "compile", "tile_size", "overlap", "paths",
        "context_size", "context_grid", "adaptive", "read_mpp", "field_px", "max_minutes", "max_steps",
    ),
    "Decision": ("gate", "tau", "gamma", "thresholds", "abstain", "prior", "taxonomy", "regate", "target", "unseen"),
    "Many slides": ("shard", "jobs", "scheduler", "stage_dir", "log_json", "strict"),
}  # fmt: skip
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}
# The options that people use first, in this order; a help shows six.
FIRST = (
    "output", "folder", "organ", "model", "cells", "predictions", "split", "mpp", "formats", "device", "recipe",
    "uncertain", "slide", "as_json", "json_file", "overwrite", "dry_run",
)  # fmt: skip
N_FIRST = 6
# So many are shown at once all the same.
FEW = 10


class Command(click.Command):
    """A command whose help has sections, and that has a dry run."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not any(param.name == "dry_run" for param in self.params):
            self.params.append(
                click.Option(["--dry-run"], is_flag=True, help="Check the request, print what it would do, and stop.")
            )
            if self.callback is not None:
                self.callback = partial(_run_or_plan, self.callback)
        show = click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
            help="Show this message with all options.",
        )  # fmt: skip
        self.params.append(show)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first options and the names of the others, or all of them in their sections."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not p.hidden]
        if ctx.meta.get("cellslide.help_all") or len(options) <= FEW:
            for section, here in _sections(options):
                _write(formatter, section, here, ctx)
            return
        first = sorted((p for p in options if p.name in FIRST), key=lambda p: FIRST.index(p.name or ""))[:N_FIRST]
        _write(formatter, "First options", first, ctx)
        with formatter.section("More, explained by --help-all"):
            rest = _sections([p for p in options if p not in first])
            formatter.write_dl([(section, "  ".join(max(p.opts, key=len) for p in here)) for section, here in rest])


def _sections(options: list[click.Option]) -> Iterator[tuple[str, list[click.Option]]]:
    for section in (*SECTIONS, "Other"):
        if here := [p for p in options if SECTION_OF.get(p.name or "", "Other") == section]:
            yield section, here


def _write(formatter: click.HelpFormatter, title: str, options: list[click.Option], ctx: click.Context) -> None:
    with formatter.section(title):
        formatter.write_dl([record for p in options if (record := p.get_help_record(ctx)) is not None])


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta["cellslide.help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _run_or_plan(callback: Callable[..., Any], *args: Any, dry_run: bool, **given: Any) -> Any:
    """Run a command, or print what it would read and write; raises UsageError where that cannot be written."""
    if not dry_run:
        return callback(*args, **given)
    from cellslide.batch.preflight import check_output

    ctx = click.get_current_context()
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        for path in value if isinstance(value, tuple) else (value,):
            if not isinstance(path, Path) and not (isinstance(param, click.Argument) and isinstance(path, str)):
                continue
            if path_exists(path):
                click.echo(f"would read {path}  {size_of(Path(path)) / 1e6:,.1f} MB")
            elif isinstance(path, Path):
                check_output(path.parent)
                click.echo(f"would write {path}")
    click.echo(f"{ctx.command_path}: its options and paths are good; nothing was done")
    return 0


def path_exists(path: str | Path) -> bool:
    """Tell whether there is a file or folder of this name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


define = partial(click.command, cls=Command)
