"""`cellslide calibrate` on a small classifier of our own: what it writes, and that it is read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from cellslide.cli.main import cli
from cellslide.types import Calibration, CropSpec
from cellslide.weights.manifest import WeightsEntry, read_entry
from tests.support.fake_classifier import CLASSES, fake_loaded
from tests.support.typed_set import write_typed_set

CROPS = {"local": {"field_px": 24, "input_px": 16}, "context": {"field_px": 64, "input_px": 32}}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments), "--no-progress", "--device", "cpu"])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightsEntry:
    """The fake classifier, whose entry lies in a folder of its own."""
    entry = WeightsEntry("mine", "classify", "nuclass", file="m.safetensors", classes=CLASSES, root=tmp_path / "w")
    loaded = fake_loaded(calibration=Calibration())
    loaded.entry = entry
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda model, weights: loaded)
    return entry


def test_fits_and_writes_the_entry(tmp_path: Path, fake: WeightsEntry) -> None:
    from cellslide.weights.classifier import calibration_of

    root = write_typed_set(tmp_path / "set", 4, wrong=2)
    picture = tmp_path / "new" / "before-after.png"
    result = run("calibrate", root, "--reliability", picture, "--target", "0.8")
    assert result.exit_code == 0, result.output
    assert "18 nuclei" in result.output and str(fake.root / "model.yaml") in result.output
    (fake.root / "m.safetensors").write_bytes(b"")
    written = read_entry(fake.root / "model.yaml")
    assert replace(written, calibration=None, safe_gate=None) == fake
    found = calibration_of(written)
    # The fake is nearly sure of each disc, and two labels in nine are false.
    assert found.temperature_local > 2
    assert found.reliability_local is not None and found.reliability_local[0] == pytest.approx(10 / 14, abs=0.2)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert not list(fake.root.glob("*.tmp"))


def test_the_split_is_kept_to(tmp_path: Path, fake: WeightsEntry) -> None:
    root = write_typed_set(tmp_path / "set", 3)
    assert "9 nuclei" in run("calibrate", root, "--split", "train", "-o", tmp_path / "e.yaml").output
    assert (tmp_path / "e.yaml").is_file() and not fake.root.exists()
    missing = run("calibrate", root, "--split", "other")
    assert missing.exit_code == 2 and "train, val" in missing.output


def test_wrong_use_ends_with_2(tmp_path: Path, fake: WeightsEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_typed_set(tmp_path / "set", 2)
    for arguments, word in (
        (("--target", "1.5"), "--target"),
        (("--map-class", "blue=pink"), "--map-class"),
        (("--map-class", "blue=tumour"), "--map-class"),
        (("--organ", "brest"), "breast"),
    ):
        result = run("calibrate", root, *arguments)
        assert result.exit_code == 2 and word in result.output, arguments
    points = root / "points" / "i0.csv"
    points.write_text("x,y,class\n30,30,tumour\n")
    unknown = run("calibrate", root)
    assert unknown.exit_code == 2 and "--map-class" in unknown.output
    assert not fake.root.exists(), "nothing is written where anything is wrong"
    packaged = fake_loaded()
    packaged.entry = WeightsEntry("shipped", "classify", "nuclass", file="data/shipped.safetensors")
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda model, weights: packaged)
    result = run("calibrate", write_typed_set(tmp_path / "again", 2))
    assert result.exit_code == 2 and "-o ENTRY.yaml" in result.output


@pytest.mark.timeout(300)
def test_round_trip_with_a_network_of_our_own(tmp_path: Path) -> None:
    """Weights in a folder, calibrated there, then evaluated: what was written is what counts."""
    import json

    from safetensors.torch import save_file

    from cellslide.weights.cache import file_sha256
    from cellslide.weights.classifier import load_classifier
    from tests.support.published_nuclass import OWN, small_model

    folder, root = tmp_path / "w", write_typed_set(tmp_path / "set", 2)
    folder.mkdir()
    file = folder / "model.safetensors"
    save_file(dict(small_model(OWN, classes=2, organs=1).state_dict()), file)
    entry = WeightsEntry(
        "tiny", "classify", "nuclass", licence="Apache-2.0", file=file.name, sha256=file_sha256(file), mpp=0.5,
        config={**OWN, "crops": CROPS}, classes=CLASSES, organs=("breast",), root=folder,
    )  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(entry.as_dict()))
    assert load_classifier(None, file).spec.local == CropSpec(24, 16)
    result = run("calibrate", "--weights", file, root)
    assert result.exit_code == 0, result.output
    calibration = load_classifier(None, file).spec.calibration
    assert calibration.temperature_mix != 1.0 and calibration.reliability_global is not None
    out = tmp_path / "scores.json"
    result = run("evaluate", "--weights", file, root, "--split", "val", "--json", out)
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())
    assert scores["model"] == "tiny" and scores["nuclei"] == "given" and scores["paths"]["safe"] is not None
    assert scores["paths"]["safe"]["accuracy"] >= max(scores["paths"][p]["accuracy"] for p in ("local", "global"))
