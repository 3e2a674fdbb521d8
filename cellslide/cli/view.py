"""`cellslide view`: finished slides in the browser of this machine."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.options import FOLDER, config_option, verbosity_options

if TYPE_CHECKING:
    from cellslide.view.server import Server


@grouped.define()
@click.argument("outdir", type=FOLDER, metavar="OUTDIR_OR_SLIDEDIR")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default="any free one",
    help="Port of 127.0.0.1 to listen on.",
)  # fmt: skip
@click.option(
    "--slide", type=click.Path(exists=True, path_type=Path), help="The slide, where it has moved since; one slide only."
)
@click.option("--open", "open_browser", is_flag=True, help="Open the browser.")
@config_option
@verbosity_options
def command(outdir: Path, port: int, slide: Path | None, open_browser: bool) -> None:
    """Show finished slides with their nuclei in a browser, to walk through and to try other thresholds on.

    Prints a link that works once, for one browser, and serves until Ctrl-C; Enter prints another. It listens on this
    machine alone, writes nothing, and gives out nothing outside of the folder but the pixels of its slides.
    From afar: ssh -L 8700:127.0.0.1:8700 -t HOST cellslide view out --port 8700

    \b
    Examples:
      cellslide view out/slide --open
      cellslide view out --port 8700
      cellslide view out/slide --slide /archive/slide.svs
    """
    import webbrowser

    from cellslide.view.answers import Viewer
    from cellslide.view.server import open_server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if hasattr(signal, "SIGTTIN"):
        # A job in the background is not stopped for looking at the keyboard.
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    with open_server(Viewer(outdir, slide), port) as server:
        address = server.address
        click.echo(f"{address}  (works once; Enter prints another link, Ctrl-C ends)")
        Thread(target=_print_links, args=(server,), daemon=True).start()
        if open_browser:
            webbrowser.open(address)
        server.serve_forever()


def _print_links(server: Server) -> None:
    """Print a link that works whenever Enter is pressed."""
    if sys.stdin is None or not sys.stdin.isatty():
        return
    # Not by `sys.stdin`, whose lock a thread that waits would hold at the end of the process.
    with suppress(OSError):  # of a job in the background, which has no terminal to read from
        while os.read(sys.stdin.fileno(), 4096):
            click.echo(server.address)
