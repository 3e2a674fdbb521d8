from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellslide.config import InferConfig
from cellslide.errors import MissingDependencyError, UsageError
from cellslide.inference.onnx_engine import OnnxEngine, check_providers, exported, model_key, providers
from cellslide.inference.torch_engine import TorchEngine
from cellslide.models.cellvta import CellVTA
from tests.inference.test_torch_engine import TINY
from tests.support.fakes import CLASSES, fake_spec

CPU = InferConfig(device="cpu", engine="onnx")
SPEC = fake_spec(classes=CLASSES, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
SIZE = 64

needs_export = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="needs the extra `export` (onnx, onnxscript)"
)


def tiny(seed: int = 0) -> CellVTA:
    torch.manual_seed(seed)
    return CellVTA(TINY).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLSLIDE_CACHE", str(folder))
        yield folder


@pytest.mark.slow
@needs_export
def test_onnx_gives_what_torch_gives_at_any_batch(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = tiny()
    engine = OnnxEngine(module, SPEC, CPU, SIZE)
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    torch_maps = TorchEngine(module, SPEC, replace(CPU, engine="torch"), SIZE).launch(images)()
    for first, last in ((0, 5), (0, 1)):
        for a, b in zip(torch_maps[first:last], engine.launch(images[first:last])(), strict=True):
            np.testing.assert_allclose(a.hv, b.hv, atol=2e-5)
            np.testing.assert_allclose(a.foreground_prob, b.foreground_prob, atol=2e-3)
            np.testing.assert_allclose(a.type_prob, b.type_prob, atol=2e-3)
            assert (a.foreground == b.foreground).mean() > 0.999
            assert b.foreground.dtype == np.uint8 and b.type_prob.dtype == np.float16
    assert engine.device == "cpu (CPUExecutionProvider)" and engine.precision == "fp32"
    assert capfd.readouterr().out == ""  # stdout belongs to --log-json


@pytest.mark.slow
@needs_export
def test_the_export_is_made_once_and_a_new_one_for_other_weights(cache: Path) -> None:
    path = exported(tiny(), SPEC, SIZE)
    assert path == cache / "onnx" / model_key(tiny(), SPEC, SIZE) / "model.onnx"
    stamp = path.stat().st_mtime_ns
    assert exported(tiny(), SPEC, SIZE) == path and path.stat().st_mtime_ns == stamp
    assert not list((cache / "onnx").glob(".export-*"))


@needs_export
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "sha256.json"])
def test_an_export_that_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def export(net: torch.nn.Module, images: object, path: Path, **options: object) -> None:
        path.write_bytes(b"graph")
        path.with_name("model.onnx.data").write_bytes(b"weights")

    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.onnx, "export", export)
    path = exported(tiny(), SPEC, SIZE)
    path.with_name("engine.trt").write_bytes(b"made by a runtime later")
    caplog.clear()
    assert exported(tiny(), SPEC, SIZE) == path and not caplog.records
    path.with_name(name).write_bytes(b"wfights")
    assert exported(tiny(), SPEC, SIZE) == path and "made again" in caplog.text
    assert (path.read_bytes(), path.with_name("model.onnx.data").read_bytes()) == (b"graph", b"weights")


def test_the_key_sees_weights_tile_and_normalisation() -> None:
    keys = {
        model_key(tiny(), SPEC, SIZE),
        model_key(tiny(1), SPEC, SIZE),
        model_key(tiny(), SPEC, 2 * SIZE),
        model_key(tiny(), replace(SPEC, mean=(0.0, 0.0, 0.0)), SIZE),
    }
    assert len(keys) == 4 and model_key(tiny(), SPEC, SIZE) in keys


def test_a_silent_fall_back_to_the_cpu_is_an_error() -> None:
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    with pytest.raises(MissingDependencyError, match="CPUExecutionProvider.*--device cpu"):
        check_providers(["CPUExecutionProvider"], cuda)
    check_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], cuda)
    check_providers(["CPUExecutionProvider"], cpu)


def test_providers_follow_the_device(tmp_path: Path) -> None:
    assert providers(torch.device("cpu"), tmp_path) == ["CPUExecutionProvider"]
    asked = [p if isinstance(p, str) else p[0] for p in providers(torch.device("cuda:1"), tmp_path)]
    assert asked[-2:] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers(torch.device("cuda:1"), tmp_path)[-2][1] == {"device_id": 1}


def test_flags_that_onnx_cannot_follow_are_refused() -> None:
    with pytest.raises(UsageError, match="--precision bf16"):
        OnnxEngine(tiny(), SPEC, replace(CPU, precision="bf16"), SIZE)
    with pytest.raises(UsageError, match="--compile"):
        OnnxEngine(tiny(), SPEC, replace(CPU, compile=True), SIZE)
    with pytest.raises(MissingDependencyError, match="cuda:99"):
        OnnxEngine(tiny(), SPEC, replace(CPU, device="cuda:99"), SIZE)


def test_without_the_export_packages_the_error_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path))
    monkeypatch.setattr("cellslide.inference.onnx_engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"cellslide\[export\]"):
        exported(tiny(), SPEC, SIZE)


@pytest.mark.gpu
@needs_export
def test_onnx_on_cuda_gives_what_torch_gives(cache: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    engine = OnnxEngine(tiny(), SPEC, replace(CPU, device="cuda"), SIZE)
    for a, b in zip(
        TorchEngine(tiny(), SPEC, replace(CPU, engine="torch"), SIZE).launch(images)(),
        engine.launch(images)(),
        strict=True,
    ):
        np.testing.assert_allclose(a.hv, b.hv, atol=5e-3)
