"""`cellslide view`: finished slides in the browser of this machine."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from cellslide.cli.options import FOLDER, config_option, verbosity_options


@click.command()
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

    Prints an address and serves it until Ctrl-C. It listens on this machine alone, writes nothing, and gives out
    nothing outside of the folder but the pixels of its slides. The address holds a secret: keep it to yourself on a
    machine that others use. From afar: ssh -L 8700:127.0.0.1:8700 HOST cellslide view out --port 8700

    \b
    Examples:
      cellslide view out/slide --open
      cellslide view out --port 8700
      cellslide view out/slide --slide /archive/slide.svs
    """
    import webbrowser

    from cellslide.view.server import Viewer, open_server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with open_server(Viewer(outdir, slide), port) as server:
        click.echo(f"{server.address}  (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(server.address)
        server.serve_forever()
