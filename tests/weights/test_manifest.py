"""Weights: the manifest, where files are found, hashes, and models that are ready to run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cellslide.errors import CellslideError, UsageError, WeightsError
from cellslide.models import architecture_of, build_model
from cellslide.models.checkpoint import CONIC, PANNUKE, build_empty
from cellslide.types import HoverDecode
from cellslide.weights import (
    Manifest,
    Source,
    add_weights,
    cache_dir,
    fetch,
    file_sha256,
    find_file,
    load_model,
    verify_file,
)
from cellslide.weights import fetch as fetch_entry
from cellslide.weights.cache import HASHES, TRUST, WeightsBytes, require_file
from cellslide.weights.manifest import PACKAGE, WeightsEntry, parse_entry
from tests.conftest import CHECKOUT
from tests.models.test_checkpoint import MODELS, model_of, publish

ZEROS = "0" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder, and keep the hub's cache empty too."""
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def entry_of(**values: Any) -> WeightsEntry:
    """Return an entry through the parser."""
    raw = {"id": "mine", "task": "segment", "arch": "cellvta", "source": "user", **values}
    return parse_entry({k: v for k, v in raw.items() if v is not ...}, values.pop("root", PACKAGE), "test.yaml")


# ---- the manifest that ships


def test_shipped_manifest_is_complete() -> None:
    manifest = Manifest.load()
    assert manifest.defaults == {
        "segment": "cellslide-nuclei-light", "detect": "cellslide-points", "classify": "cells-breast-colon",
    }  # fmt: skip
    named = {
        "cellvta-uni-pannuke-split1", "cellvta-uni-conic", "cellvit-256-x40", "cellvit-256-x20", "cellvit-sam-h-x40",
        "cellvit-sam-h-x20", "cellvit-uni-x40", "cellvit-virchow-x40", "hipt-vit256", "sam-vit-h", "uni", "uni2-h",
        "dinov3-vitl16", "virchow", "virchow2", "muse-vit-b-224", "celldetr-swin-l-4-pannuke",
    }  # fmt: skip
    assert named <= set(manifest.entries)
    for entry in manifest.entries.values():
        assert entry.summary, entry.id
        assert entry.citation, entry.id
        assert entry.page or entry.file, entry.id
        assert parse_entry(entry.as_dict(), entry.root, "round trip") == entry


def test_shipped_segment_entries_build_and_name_their_classes() -> None:
    for entry in Manifest.load().entries.values():
        if entry.task != "segment" or entry.file is not None:
            continue
        module = build_empty(entry.arch, entry.config)
        assert module.config.num_nuclei_classes == len(entry.classes) + 1, entry.id
        assert entry.classes in (PANNUKE, CONIC)
        assert entry.mpp in (0.25, 0.5)
        assert entry.decode == (HoverDecode() if entry.mpp == 0.25 else HoverDecode(kernel_px=11, min_marker_px=3))


def test_uni_weights_are_never_fetched_for_the_user() -> None:
    entries = Manifest.load().entries
    for name in ("cellvta-uni-pannuke-split1", "cellvta-uni-conic", "cellvit-uni-x40"):
        assert entries[name].source == Source(), name
    for name in ("uni", "uni2-h", "dinov3-vitl16", "virchow", "virchow2"):
        assert entries[name].gated, name


def test_manifest_stands_at_the_top_of_the_checkout() -> None:
    raw = yaml.safe_load((CHECKOUT / "weights_manifest.yaml").read_text())
    assert raw["schema_version"] == 1
    assert {e["source"] for e in raw["weights"] if e["id"].startswith("cellvta")} == {"user"}


# ---- reading manifests


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"licens": "MIT"}, "unknown keys licens"),
        ({"file": "../x.pth"}, "below the manifest's folder"),
        ({"file": "/etc/passwd"}, "below the manifest's folder"),
        ({"file": "a\\..\\..\\b"}, "below the manifest's folder"),
        ({"file": "C:/x"}, "below the manifest's folder"),
        ({"id": "../up"}, "letters, digits"),
        ({"sha256": "abc"}, "64 lower-case hex"),
        ({"task": "dance"}, "one of segment"),
        ({"source": ...}, "`file` or `source`"),
        ({"source": "http://x.org/a.pth"}, "https"),
        ({"source": {"hub": "a/b"}}, "needs `file`"),
        ({"source": {"hub": "a/b", "file": "../c"}}, "below the manifest's folder"),
        ({"source": {"hub": "a/b", "file": "c", "token": "t"}}, "token"),
        ({"published_as": "../c.pth"}, "must be a file name"),
        ({"mpp": 25}, "0.05 to 2"),
        ({"std": [1, 0, 1]}, "above 0"),
        ({"mean": [1, 0]}, "mine"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}]}, "0 to 255"),
        ({"classes": [{"name": "a", "color": [0, 0, 0]}] * 2}, "one name"),
        ({"decode": {"kernel": 3}}, "kernel"),
    ],
)
def test_wrong_entries_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(WeightsError, match=why):
        entry_of(**values)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ([], "schema_version 1"),
        ({"schema_version": 2}, "schema_version 1"),
        ({"schema_version": 1, "models": []}, "unknown keys models"),
        ({"schema_version": 1, "defaults": {"segment": "x"}}, "defaults.segment is x"),
        (
            {"schema_version": 1, "weights": [{"id": "a", "task": "segment", "arch": "cellvta", "source": "user"}] * 2},
            "twice",
        ),
    ],
)
def test_wrong_manifests_are_refused(raw: Any, why: str) -> None:
    with pytest.raises(WeightsError, match=why):
        Manifest.parse(raw, "test.yaml")


def test_broken_yaml_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("a: [")
    with pytest.raises(WeightsError, match="not valid YAML"):
        Manifest.load(tmp_path / "m.yaml")


def test_unknown_id_names_near_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*cellvit-256-x40"):
        Manifest.load().entry("cellvit-256")


# ---- files and hashes


def test_order_of_places(cache: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    entry = replace(entry_of(id="m", file="data/a.pth", source={"hub": "o/r", "file": "a.pth"}), root=package)
    assert find_file(entry) is None
    hub = tmp_path / "hub" / "models--o--r"
    (hub / "snapshots" / "c1").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("c1")
    (hub / "snapshots" / "c1" / "a.pth").write_bytes(b"hub")
    assert find_file(entry) == hub / "snapshots" / "c1" / "a.pth"
    places = []
    for place in (cache / "m" / "a.pth", package / "data" / "a.pth"):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"x")
        places.append((find_file(entry), place))
    assert all(found == place for found, place in places)


def test_link_out_of_the_package_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "secret.pth").write_bytes(b"x")
    (tmp_path / "package" / "a.pth").symlink_to(tmp_path / "secret.pth")
    assert find_file(replace(entry_of(file="a.pth", source=...), root=tmp_path / "package")) is None


def test_any_single_file_in_the_cache_folder_serves(cache: Path) -> None:
    entry = entry_of()
    (cache / "mine").mkdir(parents=True)
    (cache / "mine" / "renamed.pth").write_bytes(b"x")
    assert find_file(entry) == cache / "mine" / "renamed.pth"
    (cache / "mine" / "other.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match="keep one of"):
        find_file(entry)


def test_default_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CELLSLIDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "cellslide"
    assert not cache_dir().exists()


def test_hash_is_remembered_until_the_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    first = file_sha256(path)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *args: pytest.fail("hashed again"))
        assert file_sha256(path) == first
    path.write_bytes(b"other")
    assert file_sha256(path) != first
    assert (cache / HASHES).is_file()


def test_wrong_hash_and_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    with pytest.raises(WeightsError, match="another file or damaged"):
        verify_file(entry_of(sha256=ZEROS), path)
    with pytest.raises(WeightsError, match="3 bytes, mine has 4"):
        verify_file(entry_of(size_bytes=4), path)


def test_trust_on_first_use(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"one")
    first = verify_file(entry_of(), path)
    assert verify_file(entry_of(), path) == first
    assert first in (cache / TRUST).read_text()
    path.write_bytes(b"two")
    with pytest.raises(WeightsError, match=r"when first used.*--trust"):
        verify_file(entry_of(), path)
    assert verify_file(entry_of(id="another"), path) != first


def test_read_only_cache_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "a.pth").write_bytes(b"one")
    assert len(verify_file(entry_of(), tmp_path / "a.pth")) == 64
    assert "CELLSLIDE_CACHE" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uni", ["gated", "huggingface.co/MahmoodLab/UNI", "hf auth login", "weights fetch uni", "pytorch_model.bin"]),
        ("cellvta-uni-conic", ["UNI_conic.pth", "drive.google.com", "--id cellvta-uni-conic", "--weights FILE"]),
        ("cellvit-sam-h-x40-amp", ["Apache-2.0", "weights fetch cellvit-sam-h-x40-amp"]),
    ],
)  # fmt: skip
def test_missing_weights_say_how_to_get_them(name: str, words: list[str]) -> None:
    with pytest.raises(WeightsError) as caught:
        require_file(Manifest.load().entry(name))
    assert caught.value.exit_code == 3
    assert [w for w in words if w not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_missing_shipped_file_is_said_clearly() -> None:
    entry = replace(Manifest.load().default("segment"), file="data/not-there.safetensors")
    with pytest.raises(WeightsError, match=r"data/not-there.safetensors is missing from .*--weights"):
        require_file(entry)


# ---- models


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_alone_are_enough(name: str, tmp_path: Path) -> None:
    module = model_of(name)
    path = publish(tmp_path / "my cellvta_pannuke.pth", name, module)
    loaded = load_model(weights=path)
    spec = loaded.spec
    assert spec.classes == PANNUKE
    assert (spec.name, spec.kind, spec.mpp, spec.mean, spec.std) == (
        "my-cellvta_pannuke",
        "mask",
        0.25,
        (0.5,) * 3,
        (0.5,) * 3,
    )
    assert (spec.tile_px, spec.overlap_px) == (512, 128)
    assert spec.decode == HoverDecode("published", 21, 10)
    assert spec.weights_sha256 == file_sha256(path, fresh=True)
    assert architecture_of(loaded.entry.arch).task == loaded.entry.task
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.module(x)["nuclei_type_map"], module(x)["nuclei_type_map"])


def test_config_of_the_file_wins(tmp_path: Path) -> None:
    config = {
        **{f"dataset_config.nuclei_types.{name}": i for i, name in enumerate(("bg", "Tumor", "Immune"))},
        "transformations.normalize.mean": (0.7, 0.5, 0.6), "transformations.normalize.std": (0.2, 0.3, 0.2),
        "data.magnification": 20,
    }  # fmt: skip
    path = publish(tmp_path / "x.pth", "CellViT256", model_of("CellViT256", num_nuclei_classes=3), config=config)
    spec = load_model(weights=path).spec
    assert [c.name for c in spec.classes] == ["Tumor", "Immune"]
    assert (spec.mean, spec.std, spec.mpp, spec.overlap_px) == ((0.7, 0.5, 0.6), (0.2, 0.3, 0.2), 0.5, 64)
    assert (spec.decode.kernel_px, spec.decode.min_marker_px) == (11, 3)


def test_known_file_name_brings_its_entry(tmp_path: Path) -> None:
    path = publish(tmp_path / "CellViT-256-x20.pth", "CellViT256", model_of("CellViT256"), config={})
    loaded = load_model(weights=path)
    assert (loaded.spec.mpp, loaded.spec.decode.kernel_px) == (0.5, 11)
    assert loaded.spec.licence == "Apache-2.0 with Commons Clause"
    assert loaded.spec.classes == PANNUKE


def test_bare_safetensors_load(tmp_path: Path) -> None:
    save_file(model_of("CellViTUNIAdapter", num_nuclei_classes=7).state_dict(), tmp_path / "mine-x20.safetensors")
    spec = load_model(weights=tmp_path / "mine-x20.safetensors").spec
    assert (spec.classes, spec.mpp) == (CONIC, 0.5)


def train_output(folder: Path, **changes: Any) -> Path:
    """Write what `cellslide train` writes: tensors and one manifest entry."""
    folder.mkdir(parents=True, exist_ok=True)
    module = build_model(
        "cellvta", {**MODELS["CellViTUNIAdapter"][1], "num_nuclei_classes": 0, "num_tissue_classes": 0}
    )
    save_file(module.state_dict(), folder / "model.safetensors")
    raw = {
        "id": "trained", "task": "segment", "arch": "cellvta", "file": "model.safetensors", "mpp": 0.5, "tile_px": 256,
        "config": {**module_config(), "num_nuclei_classes": 0, "num_tissue_classes": 0}, "licence": "Apache-2.0",
        "sha256": file_sha256(folder / "model.safetensors"), "classes": [], "mean": [0.6, 0.5, 0.6],
        "decode": {"mode": "fixed", "kernel_px": 11, "min_marker_px": 3, "hv_gradient_range": [-1, 2.5]}, **changes,
    }  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(raw))
    return folder


def module_config() -> dict[str, Any]:
    """Return the small CellVTA's config as YAML would hold it."""
    config = dict(MODELS["CellViTUNIAdapter"][1])
    return {
        k: [list(p) if isinstance(p, tuple) else p for p in v] if isinstance(v, tuple) else v for k, v in config.items()
    }


@pytest.mark.parametrize("named", ["", "model.safetensors", "model.yaml"])
def test_training_output_loads_by_folder_or_file(named: str, tmp_path: Path) -> None:
    spec = load_model(weights=train_output(tmp_path / "run") / named).spec
    assert (spec.name, spec.classes, spec.mpp, spec.tile_px) == ("trained", (), 0.5, 256)
    assert spec.decode == HoverDecode("fixed", 11, 3, hv_gradient_range=(-1.0, 2.5))


def test_training_output_with_other_weights_is_refused(tmp_path: Path) -> None:
    folder = train_output(tmp_path / "run", sha256=ZEROS)
    with pytest.raises(WeightsError, match="another file or damaged"):
        load_model(weights=folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_hashed_is_what_is_loaded(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is exchanged after it was hashed: neither its tensors nor its hash are taken."""
    first, second = model_of("CellViT256"), model_of("CellViT256")
    torch.nn.init.ones_(next(second.parameters()))
    paths = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for path, module in zip(paths, (first, second), strict=True):
        publish(path, "CellViT256", module) if suffix == ".pth" else save_file(module.state_dict(), path)
    sha256, read = file_sha256(paths[0], fresh=True), WeightsBytes.read

    def exchanged(path: Path, entry: Any = None) -> WeightsBytes:
        file = read(path, entry)
        shutil.copy(paths[1], path)
        return file

    monkeypatch.setattr(WeightsBytes, "read", exchanged)
    loaded = load_model(weights=paths[0])
    assert loaded.spec.weights_sha256 == loaded.entry.sha256 == sha256
    assert torch.equal(next(loaded.module.parameters()), next(first.parameters()))


def test_weights_of_the_same_size_and_time_are_refused(tmp_path: Path) -> None:
    folder = train_output(tmp_path / "run")
    load_model(weights=folder)
    path = folder / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(WeightsError, match="another file or damaged"):
        load_model(weights=folder)


def test_model_with_weights_must_be_that_model(tmp_path: Path) -> None:
    path = publish(tmp_path / "x.pth", "CellViT256", model_of("CellViT256"))
    with pytest.raises(WeightsError, match="a cellvit_256 checkpoint, cellvit-uni-x40 is cellvit_uni"):
        load_model("cellvit-uni-x40", path)
    with pytest.raises(WeightsError, match="other shape"):
        load_model("cellvit-256-x40", path)


def test_classes_must_match_the_network(tmp_path: Path) -> None:
    folder = train_output(tmp_path / "run")
    raw = yaml.safe_load((folder / "model.yaml").read_text())
    module = build_model("cellvta", MODELS["CellViTUNIAdapter"][1])
    save_file(module.state_dict(), folder / "model.safetensors")
    raw |= {"config": module_config(), "sha256": None, "classes": [{"name": "only", "color": [1, 2, 3]}]}
    (folder / "model.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(WeightsError, match="5 nucleus types, trained names 1 classes"):
        load_model(weights=folder)


def test_wrong_requests_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="uni: made to backbone"):
        load_model("uni")
    with pytest.raises(UsageError, match="no weights for backbone ship"):
        load_model(task="backbone")
    with pytest.raises(WeightsError, match="no such file"):
        load_model(weights=tmp_path / "absent.pth")


# ---- adding and fetching


def test_added_file_is_found_by_id(tmp_path: Path, cache: Path) -> None:
    path = publish(tmp_path / "mine.pth", "CellViT256", model_of("CellViT256"))
    entry = add_weights(path, "lab-model", Manifest.load())
    path.unlink()
    loaded = load_model("lab-model")
    assert loaded.spec.classes == PANNUKE
    assert loaded.entry.root == cache / "lab-model" == entry.root
    with pytest.raises(UsageError, match="taken already"):
        add_weights(cache / "lab-model" / "mine.pth", "lab-model", Manifest.load())
    (cache / "lab-model" / "mine.pth").write_bytes(b"changed")
    with pytest.raises(WeightsError, match="bytes"):
        load_model("lab-model")


def test_added_training_output_keeps_its_entry(tmp_path: Path) -> None:
    folder = train_output(tmp_path / "run")
    add_weights(folder, None, Manifest.load())
    shutil.rmtree(folder)
    assert load_model("trained").spec.decode.hv_gradient_range == (-1.0, 2.5)


def test_file_is_added_as_a_known_entry(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "download.bin").write_bytes(b"some backbone")
    add_weights(tmp_path / "download.bin", "uni", Manifest.load())
    assert find_file(Manifest.load().entry("uni")) == cache / "uni" / "pytorch_model.bin"


def test_unusable_file_is_not_added(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError):
        add_weights(tmp_path / "a.pth", "broken", Manifest.load())
    assert not (cache / "broken").exists()
    with pytest.raises(CellslideError):
        add_weights(tmp_path / "a.pth", "cellvit-256-x40", Manifest.load())
    assert find_file(Manifest.load().entry("cellvit-256-x40")) is None


class Answer:
    """What a web server answers."""

    def __init__(self, data: bytes, length: int | None = None) -> None:
        self.data = data
        self.headers = {"Content-Length": str(len(data) if length is None else length)}

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def read(self, n: int) -> bytes:
        data, self.data = self.data[:n], self.data[n:]
        return data


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Return a call that makes every download give `answer`."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return lambda answer: monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kw: answer)


WEB = {"source": "https://example.org/w.pth", "licence": "MIT"}


def test_fetch_asks_then_downloads(serve: Callable[[Answer], None], cache: Path) -> None:
    asked: list[str] = []
    serve(Answer(b"weights"))
    path = fetch(entry_of(**WEB), None, lambda licence: not asked.append(licence))
    assert (asked, path, path.read_bytes()) == (["MIT"], cache / "mine" / "w.pth", b"weights")
    assert fetch(entry_of(**WEB), None, lambda licence: pytest.fail("asked again")) == path


def test_fetch_needs_consent(serve: Callable[[Answer], None], cache: Path) -> None:
    serve(Answer(b"weights"))
    with pytest.raises(UsageError, match="--accept-licence 'MIT'"):
        fetch(entry_of(**WEB), None, lambda licence: False)
    with pytest.raises(UsageError, match="is under 'MIT'"):
        fetch(entry_of(**WEB), "Apache-2.0", lambda licence: True)
    assert not cache.exists()
    assert fetch(entry_of(**WEB), "mit", lambda licence: False).is_file()


@pytest.mark.parametrize("answer", [Answer(b"weights", length=99), Answer(b"wrong")])
def test_bad_downloads_leave_nothing(answer: Answer, serve: Callable[[Answer], None], cache: Path) -> None:
    serve(answer)
    with pytest.raises(WeightsError):
        fetch(entry_of(**WEB, sha256=ZEROS), "MIT", lambda licence: False)
    assert list((cache / "mine").iterdir()) == []


def test_nothing_is_fetched_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kw: pytest.fail("network used"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kw: pytest.fail("network used"))
    for name in ("uni", "cellvit-256-x40-amp"):
        entry = Manifest.load().entry(name)
        with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
            fetch_entry(entry, entry.licence, lambda licence: True)


def test_refused_access_gives_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    class Refused(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "403")

    def refuse(*args: object, **kw: object) -> None:
        raise Refused

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(WeightsError, match=r"refused access.*ask for access at .*MahmoodLab/UNI2-h"):
        fetch_entry(Manifest.load().entry("uni2-h"), "CC-BY-NC-ND-4.0", lambda licence: False)
