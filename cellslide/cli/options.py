"""Options that several commands share, so that a flag has one name, one default and one help text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from cellslide.errors import UsageError, one_line
from cellslide.formats.registry import FORMATS

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def chain(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Join decorators into one; the first named stands first in the help."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def settings_of(kind: type[S], flags: Mapping[str, Any], **more: Any) -> S:
    """Return settings from the flags of their names; raises UsageError for values out of range."""
    return kind(**{field.name: flags[field.name] for field in fields(kind) if field.name in flags} | more)  # type: ignore[arg-type]


def slides_argument(function: F) -> F:
    """Add SLIDES (parameter `slides`, tuple of str): files, folders, globs, addresses, or one list of them."""
    return click.argument("slides", nargs=-1, required=True, metavar="SLIDES...")(function)


def output_option(function: F) -> F:
    """Add `-o/--output DIR` (parameter `output`, Path), default ./cellslide-out."""
    return click.option(
        "-o", "--output", type=FOLDER, default=Path("cellslide-out"), show_default=True,
        help="Folder for results; each slide gets its own folder inside.",
    )(function)  # fmt: skip


def _batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither auto nor a whole number") from None


def _formats(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    wrong = [name for name in names if name not in FORMATS]
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}: must be among {', '.join(FORMATS)}")
    return names


def format_option(default: str = "zarr,geojson") -> Callable[[F], F]:
    """Return the option `--format a,b` (parameter `formats`, tuple of checked names)."""
    return click.option(
        "--format", "formats", default=default, show_default=True, callback=_formats,
        help="What to write, with commas: " + ", ".join(FORMATS) + ".",
    )  # fmt: skip


geojson_options = chain(
    click.option(
        "--geojson-origin", type=click.Choice(["bounds", "level0"]), default="bounds", show_default=True,
        help="Zero point of the GeoJSON: the slide's bounds, as QuPath shows it, or the level-0 plane.",
    ),
    click.option(
        "--profile", type=click.Choice(["lean", "full"]), default="lean", show_default=True,
        help="Measurements in the GeoJSON: top probability, gate and area, or all.",
    ),
)  # fmt: skip


def shipped_by_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Read the word "default" as the model that ships for the command's task, as a callback of click."""
    return None if value == "default" else value


model_options = chain(
    click.option(
        "--model",
        metavar="ID",
        callback=shipped_by_name,
        help="Model from `cellslide weights list`.  [default: the one that ships]",
    ),
    click.option(
        "--weights",
        type=click.Path(exists=True, path_type=Path),
        metavar="PATH",
        help="Weights of a published checkpoint (.pth, .safetensors), or the folder of a training run.",
    ),
)

tta_option = click.option(
    "--tta",
    is_flag=True,
    help="Mean over four mirror images of each tile: outlines a little better, four times the time.",
)

fluorescence_option = click.option(
    "--allow-fluorescence", is_flag=True,
    help="Read slides of fluorescence too, as if they were H&E; they are refused otherwise.",
)  # fmt: skip

device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|mps|cuda|cuda:N", help="Where the network runs."
)

devices_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|mps|cuda|cuda:N,M,...",
    help="Where the network runs; of several devices, such as cuda:0,1,2, each takes the next slide.",
)  # fmt: skip


def batch_size_option(what: str) -> Callable[[F], F]:
    """Return the option `--batch-size auto|N`; `what` says what is counted."""
    return click.option(
        "--batch-size", default="auto", show_default=True, callback=_batch_size, metavar="auto|N",
        help=f"{what} Halved by itself when memory runs out.",
    )  # fmt: skip


precision_option = click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
    help="Number format of the network.",
)  # fmt: skip

seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed, kept in run.json.")

infer_options = chain(
    devices_option,
    batch_size_option("Tiles per forward pass, and crops of a classifier."),
    precision_option,
    click.option(
        "--engine", type=click.Choice(["torch", "onnx"]), default="torch", show_default=True,
        help="What runs the network.",
    ),
    click.option("--workers", type=int, help="Processes that decode.  [default: by the cores granted]"),
    click.option("--compile", is_flag=True, help="Compile the network first (torch)."),
    seed_option,
)  # fmt: skip

tile_options = chain(
    click.option(
        "--tile-size", type=int, help="Tile edge in pixels at the model's pixel size.  [default: the model's]"
    ),
    click.option("--overlap", type=int, help="Overlap of tiles in the same pixels.  [default: the model's]"),
)

tissue_options = chain(
    click.option("--no-tissue", is_flag=True, help="Search the whole slide, not only the tissue."),
    click.option("--tissue-mask", type=FILE, help="Mask image of the whole slide, any size; non-zero is tissue."),
    click.option("--roi", type=FILE, help="GeoJSON with polygons to search, with the zero point of --geojson-origin."),
)


class _PlainFormatter(logging.Formatter):
    """Messages as they are, but for characters by which a foreign name would steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message as one line."""
        return one_line(super().formatMessage(record))


def _set_logging(verbose: int, quiet: int) -> None:
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    logger = logging.getLogger("cellslide")
    logger.setLevel(level)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_PlainFormatter("%(message)s"))
        logger.addHandler(handler)


def _on_verbosity(ctx: click.Context, param: click.Parameter, value: int) -> int:
    levels = ctx.meta.setdefault("cellslide.verbosity", {})
    levels[param.name] = value
    _set_logging(levels.get("verbose", 0), levels.get("quiet", 0))
    return value


verbosity_options = chain(
    click.option(
        "-v", "--verbose", count=True, expose_value=False, is_eager=True, callback=_on_verbosity,
        help="Say more; show the traceback of an error.",
    ),
    click.option(
        "-q", "--quiet", count=True, expose_value=False, is_eager=True, callback=_on_verbosity, help="Say errors only."
    ),
)  # fmt: skip


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Take defaults from a YAML file; keys are the long flags, with or without hyphens. Flags given win."""
    if value is None:
        return None
    from cellslide.store.foreign_files import read_yaml

    settings = read_yaml(value, UsageError) or {}
    if not isinstance(settings, dict):
        raise click.BadParameter(f"{value}: must be a mapping of flags to values")
    ctx.default_map = {**(ctx.default_map or {}), **_by_parameter(ctx.command, settings, value)}
    return value


def _by_parameter(command: click.Command, settings: dict[Any, Any], path: Path) -> dict[str, Any]:
    names = {
        opt.lstrip("-").replace("-", "_"): p.name for p in command.params for opt in p.opts if opt.startswith("--")
    }
    found = {}
    for key, value in settings.items():
        name = names.get(str(key).lstrip("-").replace("-", "_"))
        if name is None:
            raise click.BadParameter(f"{path}: no option --{str(key).replace('_', '-')} in this command")
        found[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return found


config_option = click.option(
    "--config", type=FILE, is_eager=True, expose_value=False, callback=_load_config,
    help="YAML file with flags and values; flags given on the command line win.",
)  # fmt: skip

run_options = chain(
    config_option,
    click.option("--no-progress", is_flag=True, help="No progress bar."),
    click.option("--log-json", is_flag=True, help="One JSON line on stdout per slide at its end."),
    verbosity_options,
)
