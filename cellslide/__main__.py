"""`python -m cellslide` is the `cellslide` command."""

from cellslide.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="cellslide")
