"""The command group: what it lists, how it ends."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from cellslide.cli.main import COMMANDS, cli
from cellslide.cli.options import config_option, verbosity_options
from cellslide.errors import CellslideError, Interrupted, PixelSizeError, SlideError, WeightsError
from tests.conftest import CHECKOUT

README = CHECKOUT / "README.md"
FAILURES: dict[str, BaseException] = {
    "slide": SlideError("broken.svs: cannot be read,\nsay so"),
    "usage": PixelSizeError("a.svs: no pixel size; give --mpp"),
    "weights": WeightsError("no such weights"),
    "sigint": Interrupted(130),
    "sigterm": Interrupted(143),
    "abort": KeyboardInterrupt(),
    "bug": ZeroDivisionError("division by zero"),
}


@click.command()
@click.argument("kind")
@verbosity_options
def failing(kind: str) -> None:
    """Raise what is asked for."""
    raise FAILURES[kind]


@click.command()
@click.option("--tile-size", type=int, default=7)
@click.option("--format", "formats", default="zarr")
@config_option
def showing(tile_size: int, formats: str) -> None:
    """Print what arrived."""
    click.echo(f"{tile_size} {formats}")


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    logger = logging.getLogger("cellslide")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> Result:
    monkeypatch.setitem(COMMANDS, "failing", (f"{__name__}:failing", "fails"))
    monkeypatch.setitem(COMMANDS, "showing", (f"{__name__}:showing", "shows"))
    return CliRunner().invoke(cli, list(args))


@pytest.mark.parametrize(
    ("kind", "code"),
    [("slide", 1), ("usage", 2), ("weights", 3), ("sigint", 130), ("sigterm", 143), ("abort", 130), ("bug", 1)],
)
def test_errors_are_one_line_and_a_code(monkeypatch: pytest.MonkeyPatch, kind: str, code: int) -> None:
    result = run(monkeypatch, "failing", kind)
    assert result.exit_code == code
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.lstrip().startswith("cellslide: ")
    assert "Traceback" not in result.stderr


def test_verbose_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "failing", "slide", "-v")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "broken.svs" in result.stderr


@pytest.mark.parametrize("args", [["nonsense"], ["failing"], ["failing", "slide", "--no-such-flag"]])
def test_wrong_usage_is_2(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    result = run(monkeypatch, *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_config_file_sets_and_flags_win(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("tile-size: 512\nformat: [zarr, csv]\n")
    assert run(monkeypatch, "showing", "--config", str(file)).stdout == "512 zarr,csv\n"
    assert run(monkeypatch, "showing", "--config", str(file), "--tile-size", "64").stdout == "64 zarr,csv\n"
    file.write_text("tile-sise: 512\n")
    wrong = run(monkeypatch, "showing", "--config", str(file))
    assert wrong.exit_code == 2
    assert "tile-sise" in wrong.stderr


def test_version_flag_prints_version() -> None:
    from cellslide import __version__

    assert CliRunner().invoke(cli, ["--version"]).stdout.strip().endswith(__version__)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.stderr
    assert "Example" in result.stdout
    assert f"cellslide {name}" in result.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_stands_in_the_readme(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    fences = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL))
    assert re.search(rf"cellslide {name}\b", fences), f"README shows no example of `cellslide {name}`"


def test_readme_names_only_commands_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|[`/ ])cellslide ([a-z]+)\b", "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S))))
    assert named <= set(COMMANDS), named - set(COMMANDS)


def test_every_command_is_in_the_table() -> None:
    files = (CHECKOUT / "cellslide" / "cli").glob("*.py")
    defined = {p.stem for p in files if re.search(r"^(def command\(|command\b.*= )", p.read_text(), flags=re.MULTILINE)}
    assert defined == {where.split(":")[0].rsplit(".", 1)[1] for where, _ in COMMANDS.values()}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_waits_for_no_torch(name: str) -> None:
    code = f"""
import sys
from cellslide.cli.main import cli
try:
    cli([{name!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
print("HEAVY", [m for m in ("torch", "timm", "geopandas", "zarr", "lightning", "onnxruntime") if m in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith("HEAVY []")


def test_error_tree_has_the_codes_of_the_contract() -> None:
    assert (CellslideError.exit_code, PixelSizeError.exit_code, WeightsError.exit_code) == (1, 2, 3)
