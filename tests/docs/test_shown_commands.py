"""The commands that README and `--help` show: each is understood; what needs no more than this machine runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.evaluate.dataset import write_manifest
from tests.conftest import CHECKOUT
from tests.painted import DISC, grid_centres, paint_slide
from tests.support.labelled import add_image, discs

# Why an example is only understood here: what it needs beyond the package and one small slide.
NEEDS = {
    "a device, a scheduler, or more than one process": ("cuda", "--scheduler", "--jobs"),
    "a network": ("--download", "--online", "muse-vit", "weights fetch", "weights add"),
    "weights that do not ship": (
        "mine.safetensors",
        "model.safetensors",
        "backbone.pth",
        "runs/",
        "CLASSIFIER",
        "--model ID",
    ),
    "a training": ("train ", "pretrain "),
    "a server": ("view ",),
    "minutes": ("bench", "demo", "--model classical"),
    "a Xenium run": ("xenium ",),
    "a file of vectors": ("vectors.npz",),
    "what an example before it wrote, elsewhere": ("--predictions", "compare ", "/elsewhere", "/archive"),
}


def shown_in_help(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from shown_in_help(command.get_command(context, name), (*path, name))  # type: ignore[arg-type]
        return
    for line in (command.help or "").splitlines():
        # A line of a table that explains names the command without its arguments.
        if (found := re.match(r"\s+(cellslide (?!COMMAND)\S.*)", line)) and "  " not in found[1]:
            yield found[1]


def shown_in_readme() -> Iterator[str]:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$|^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in "".join(block).splitlines():
            if line.startswith("cellslide "):
                yield re.sub(r"\s+#.*$", "", line)


COMMANDS = tuple(dict.fromkeys([*shown_in_help(cli), *shown_in_readme()]))


def needs(line: str) -> str | None:
    return next((why for why, words in NEEDS.items() if any(word in line for word in words)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the examples name."""
    root = tmp_path_factory.mktemp("shown")
    (root / "slides").mkdir()
    for name, mpp in (("slide.svs", 0.5), ("slides/a.ndpi", 0.5), ("scan.tif", None), ("slide.tif", None)):
        paint_slide(
            root / name, 320, 240, mpp, grid_centres(320, 240, 36), 9.0, background="tissue", disc_color=DISC
        )  # fmt: skip
    for name in ("list.csv", "slides.csv"):
        (root / name).write_text("path,organ\nslide.svs,breast\n")
    points = "".join(f"{x},{y}\n" for x, y in grid_centres(320, 240, 36))
    (root / "nuclei.csv").write_text("x,y\n" + points)
    square = '{"type":"Polygon","coordinates":[[[%d,%d],[%d,%d],[%d,%d],[%d,%d],[%d,%d]]]}'
    feature = '{"type":"Feature","geometry":%s,"properties":{"objectType":"%s"}}'
    corners = ((-8, -8), (8, -8), (8, 8), (-8, 8), (-8, -8))
    nuclei = [
        square % tuple(int(v) for dx, dy in corners for v in (x + dx, y + dy)) for x, y in grid_centres(320, 240, 36)
    ]
    collection = '{"type":"FeatureCollection","features":[%s]}'
    (root / "qupath.geojson").write_text(collection % ",".join(feature % (n, "detection") for n in nuclei))
    roi = square % (0, 0, 300, 0, 300, 220, 0, 220, 0, 0)
    (root / "tumour.geojson").write_text(collection % feature % (roi, "annotation"))
    checked = (
        '{"type":"Feature","geometry":%s,"properties":{"objectType":"annotation","classification":{"name":"checked"}}}'
    )
    (root / "corrected").mkdir()
    for name in ("corrected.geojson", "corrected/slide.geojson", "corrected/a.geojson"):
        (root / name).write_text(collection % checked % roi)
    labels = discs((96, 96), [(30, 30), (60, 60)], 9)
    for name in ("dataset", "data/tnbc", "data/mine", "data/typed", "data/brca-m2c", "data/other-organ"):
        write_manifest(root / name, [add_image(root / name, "one", labels, split="val")])
    return root


def test_examples_are_found() -> None:
    assert len(COMMANDS) > 60
    assert any(line.startswith("cellslide classify") and "--organ lung" in line for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_is_understood(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = shlex.split(line.partition(" > ")[0])[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, line
        command, words = found, words[1:]
    # Files that other examples write are not there yet: only whether they may be named counts here.
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            monkeypatch.setattr(parameter.type, "exists", False)
    command.make_context(line, list(words))


def test_examples_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an order in which each finds what it needs: slides are segmented before they are typed."""
    monkeypatch.chdir(place)
    order = ["info", "segment", "classify", "run"]
    lines = [line for line in COMMANDS if needs(line) is None]
    lines.sort(key=lambda line: order.index(line.split()[1]) if line.split()[1] in order else len(order))
    assert len(lines) > 25
    lines.insert(0, "cellslide segment slides/ -o out")  # shown with a device that is not here
    for number, line in enumerate(lines):
        words = shlex.split(line)[1:]
        # One folder holds a slide of a name, done in one way: examples of other ways get folders of their own.
        if words[0] == "run" or {"scan.tif", "slide.tif", "--cells"} & set(words):
            words = [f"out-{number}" if word == "out" else word for word in words]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, f"{line}: {result.output}{result.exception}"
    assert {"out", "points"} <= {path.name for path in place.iterdir()}
