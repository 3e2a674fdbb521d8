"""The `cellslide` command: finds commands by name without importing them, and turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from cellslide import __version__
from cellslide.errors import CellslideError, UsageError, one_line, trouble

# name -> (where it lives, short help). The help stands here so that `--help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("cellslide.cli.info:command", "Show size, levels and pixel size of a slide."),
    "doctor": ("cellslide.cli.doctor:command", "Check packages, GPU, codecs, cache and weights."),
    "segment": ("cellslide.cli.segment:command", "Find every nucleus of one or many slides."),
    "classify": (
        "cellslide.cli.classify:command",
        "Type nuclei, ours or any other tool's, with calibrated probability.",
    ),
    "run": ("cellslide.cli.run:command", "Segment and classify in one go."),
    "export": ("cellslide.cli.export:command", "Write other formats from a finished cells.zarr."),
    "report": ("cellslide.cli.report:command", "Write a page per slide that tells whether to trust the run."),
    "verify": ("cellslide.cli.verify:command", "Check that the files of finished slides agree."),
    "compare": ("cellslide.cli.compare:command", "Compare two results of the same slides, with pictures."),
    "measure": ("cellslide.cli.measure:command", "Count nuclei by region: densities, shares, neighbours, distances."),
    "dataset": ("cellslide.cli.dataset:command", "Make a data set of corrected nuclei; say what to correct next."),
    "view": ("cellslide.cli.view:command", "Walk through a slide and its nuclei in the browser of this machine."),
    "explain": ("cellslide.cli.explain:command", "Show where the classifier looked, on chosen cells."),
    "evaluate": ("cellslide.cli.evaluate:command", "Score a model or its predictions on a labelled data set."),
    "train": ("cellslide.cli.train:command", "Train a segmentation model on labelled data sets."),
    "embed": ("cellslide.cli.embed:command", "Give every nucleus a feature vector of a MUSE backbone."),
    "probe": ("cellslide.cli.probe:command", "Probe such vectors on typed nuclei: neighbours, linear layer."),
    "pretrain": ("cellslide.cli.pretrain:command", "Learn nuclei without labels, from slides or tiles."),
    "calibrate": ("cellslide.cli.calibrate:command", "Fit a classifier's confidence on labelled nuclei."),
    "xenium": ("cellslide.cli.xenium:command", "Check and label a slide by its Xenium transcripts."),
    "genes": ("cellslide.cli.genes:command", "Predict genes that were not measured, by morphology and transcripts."),
    "weights": ("cellslide.cli.weights:command", "List, show, fetch, verify or add model weights."),
    "bench": ("cellslide.cli.bench:command", "Measure the speed of the stages on this machine."),
    "demo": ("cellslide.cli.demo:command", "Run the whole thing on a slide that is made here, offline."),
}

# How the help lists them; what is named in no section stands in the last.
SECTIONS = {
    "Slides": ("run", "segment", "classify", "embed", "xenium", "genes"),
    "Results": ("report", "measure", "view", "explain", "compare", "export", "verify"),
    "Models": ("weights", "evaluate", "calibrate", "probe", "dataset", "train", "pretrain"),
    "This machine": ("info", "doctor", "bench", "demo"),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called, and that ends with cellslide's exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return [name for names in _sections().values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None if there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, from the tables alone."""
        for section, names in _sections().items():
            with formatter.section(section):
                formatter.write_dl([(name, COMMANDS[name][1]) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; raises UsageError with the nearest names where there is none."""
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        near = get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `cellslide --help`"
        raise UsageError(f"no command {name}: {hint}")

    def main(  # type: ignore[override]  # click's two overloads say no more than this
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *,
        standalone_mode: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run; in standalone mode leave with the exit code that the outcome asks for."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        _heed_warning()
        code = self._run(args, prog_name, **extra)
        if args is None and code > 128:
            # Stopped: a thread may still be in the middle of a pass of the network, which the end would wait for.
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, AttributeError):
                    stream.flush()
            os._exit(code)
        sys.exit(code)

    def _run(self, args: Sequence[str] | None, prog_name: str | None, **extra: Any) -> int:
        if not __debug__:
            # Libraries below do part of their work inside assertions.
            return _say("does not run under python -O or PYTHONOPTIMIZE, which leave checks out: unset them", 3)
        try:
            result = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            return _refuse(error)
        except (click.Abort, KeyboardInterrupt):
            return _say("stopped", 130)
        except CellslideError as error:
            return _say(str(error), error.exit_code)
        except BrokenPipeError:
            # `cellslide ... | head`: the reader left; nothing more can be written, also not at shutdown.
            sys.stdout = None  # type: ignore[assignment]
            return 1
        except (OSError, MemoryError) as error:
            return _say(trouble(error) or f"unexpected {type(error).__name__}: {error} (-v shows where)", 1)
        except Exception as error:
            return _say(f"unexpected {type(error).__name__}: {error} (-v shows where)", 1)
        return result if isinstance(result, int) else 0


def _refuse(error: click.ClickException) -> int:
    """Say on one line what click refuses, show the help where nothing was asked, and return the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    hint = "" if ctx is None else f"; see `{ctx.command_path} --help`"
    return _say(f"{error.format_message().rstrip('.')}{hint}", error.exit_code)


def _sections() -> dict[str, list[str]]:
    """Return the commands of each section, those of none in the last."""
    found = {section: [name for name in names if name in COMMANDS] for section, names in SECTIONS.items()}
    found["This machine"] += [name for name in COMMANDS if not any(name in names for names in SECTIONS.values())]
    return found


def _heed_warning() -> None:
    """End as after SIGTERM when Slurm warns by SIGUSR1 before the work has begun; once it has, it stops cleanly."""
    number = getattr(signal, "SIGUSR1", None)
    if number is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))


def _say(message: str, code: int) -> int:
    """Print one line on stderr, the traceback too under `-v`, and return the exit code."""
    if logging.getLogger("cellslide").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    click.echo("cellslide: " + one_line(message), err=True)
    return code


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="cellslide")
def cli() -> None:
    """A slide in, a table of its nuclei out: QuPath GeoJSON and a SpatialData zarr.

    \b
    Example:
      cellslide demo                              see it work, offline, in three minutes
      cellslide run slide.svs -o out              every nucleus of a slide, found and typed
      cellslide COMMAND --help                    options and examples of one command

    Completion by the Tab key, for bash (zsh and fish alike): put into ~/.bashrc
    eval "$(_CELLSLIDE_COMPLETE=bash_source cellslide)"
    """
    from cellslide.inference.cpu_memory import share_freed_memory

    share_freed_memory()  # before the first thread
