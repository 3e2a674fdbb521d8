from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cellslide.config import InferConfig
from cellslide.errors import MissingDependencyError, UsageError, WeightsError
from cellslide.inference.device import available_cpus, resolve_device, resolve_precision
from cellslide.inference.micro_batches import auto_batch_size
from cellslide.inference.torch_engine import TorchEngine, output_names
from cellslide.models.cellvta import CellVTA, CellVTAConfig
from cellslide.types import DetectDecode, HoverMaps, Instances, NoOutput, UInt8
from tests.support.fakes import CLASSES, FakeBox, FakeMask, FakePoint, HungryMask, fake_spec

CPU = InferConfig(device="cpu")
TINY = CellVTAConfig(
    embed_dim=32, depth=4, num_heads=2, interaction_indexes=((0, 0), (1, 1), (2, 2), (3, 3)), conv_inplane=16,
    deform_num_heads=4, num_nuclei_classes=3, num_tissue_classes=0, decoder_widths=(8, 8, 16, 16),
)  # fmt: skip


def tiles(n: int, size: int = 64) -> UInt8:
    """Return white tiles with one purple square each, at a place of its own."""
    images = np.full((n, size, size, 3), 240, np.uint8)
    for i in range(n):
        images[i, 10 + i : 20 + i, 5 + 2 * i : 17 + 2 * i] = (120, 60, 150)
    return images


def same(a: HoverMaps, b: HoverMaps) -> None:
    np.testing.assert_array_equal(a.foreground, b.foreground)
    np.testing.assert_array_equal(a.foreground_prob, b.foreground_prob)
    np.testing.assert_array_equal(a.hv, b.hv)


class Constant(nn.Module):
    """Gives the logits it was made with, and keeps what it was fed."""

    def __init__(self, **logits: Tensor) -> None:
        super().__init__()
        self.logits, self.fed = logits, torch.empty(0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.fed = x
        return self.logits


def test_pixels_are_normalised_as_the_spec_says() -> None:
    spec = fake_spec(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    module = Constant(nuclei_binary_map=torch.zeros(1, 2, 4, 4), hv_map=torch.zeros(1, 2, 4, 4))
    image = np.full((1, 4, 4, 3), (255, 0, 51), np.uint8)
    TorchEngine(module, spec, CPU, 4).launch(image)()
    assert module.fed.shape == (1, 3, 4, 4)
    np.testing.assert_allclose(module.fed[0, :, 0, 0].numpy(), [1.0, -0.5, 0.1], atol=1e-6)


def test_maps_are_reduced_to_small_types_and_a_tie_is_background() -> None:
    binary = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]).view(1, 3, 2).permute(0, 2, 1).reshape(1, 2, 1, 3)
    kind = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 1, 3)
    module = Constant(nuclei_binary_map=binary, hv_map=torch.ones(1, 2, 1, 3), nuclei_type_map=kind)
    maps = TorchEngine(module, fake_spec(classes=CLASSES), CPU, 3).launch(np.zeros((1, 1, 3, 3), np.uint8))()[0]
    assert isinstance(maps, HoverMaps) and maps.type_prob is not None
    assert maps.foreground.tolist() == [[0, 0, 1]] and maps.foreground.dtype == np.uint8
    np.testing.assert_allclose(maps.foreground_prob, torch.softmax(binary, 1)[0, 1].numpy(), atol=1e-3)
    np.testing.assert_allclose(maps.type_prob[:, 0, 0], torch.softmax(kind, 1)[0, :, 0, 0].numpy(), atol=1e-3)
    assert (maps.foreground_prob.dtype, maps.hv.dtype, maps.type_prob.dtype) == (np.float16, np.float32, np.float16)


def test_weights_with_classes_need_a_type_branch() -> None:
    engine = TorchEngine(FakeMask(), fake_spec(classes=CLASSES), CPU, 64)
    with pytest.raises(WeightsError, match="no type branch"):
        engine.launch(tiles(1))


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_micro_batch_does_not_change_fake_maps(batch: int) -> None:
    whole = TorchEngine(FakeMask(), fake_spec(), replace(CPU, batch_size=5), 64).launch(tiles(5))()
    split = TorchEngine(FakeMask(), fake_spec(), replace(CPU, batch_size=batch), 64).launch(tiles(5))()
    assert len(whole) == len(split) == 5
    for a, b in zip(whole, split, strict=True):
        same(a, b)
    assert not np.array_equal(whole[0].foreground, whole[1].foreground)


def test_micro_batch_changes_a_real_network_by_rounding_only() -> None:
    torch.manual_seed(0)
    module = CellVTA(TINY).eval()
    spec = fake_spec(classes=CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    whole = TorchEngine(module, spec, replace(CPU, batch_size=3), 64).launch(images)()
    single = TorchEngine(module, spec, replace(CPU, batch_size=1), 64).launch(images)()
    for a, b in zip(whole, single, strict=True):
        np.testing.assert_allclose(a.hv, b.hv, atol=1e-5)
        np.testing.assert_allclose(a.foreground_prob, b.foreground_prob, atol=1e-3)
    assert not np.allclose(whole[0].hv, whole[1].hv, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = HungryMask(fits=3)
    engine = TorchEngine(module, fake_spec(), replace(CPU, batch_size=8), 64)
    with caplog.at_level(logging.WARNING, logger="cellslide"):
        found = engine.launch(tiles(8))()
    assert module.asked == [8, 4, 2, 2, 2, 2] and engine.batch_size == 2
    assert [r.message for r in caplog.records] == [
        "out of memory on cpu: going on with --batch-size 4",
        "out of memory on cpu: going on with --batch-size 2",
    ]
    for a, b in zip(found, TorchEngine(FakeMask(), fake_spec(), CPU, 64).launch(tiles(8))(), strict=True):
        same(a, b)


def test_a_tile_that_never_fits_fails_alone_with_a_remedy() -> None:
    class Sometimes(HungryMask):
        """Runs out of memory on bright tiles, however few, and once on anything."""

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.asked.append(len(x))
            if len(x) > 1 or float(x.min()) == 1.0 or len(self.asked) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return FakeMask.forward(self, x)

    images = tiles(4)
    images[2] = 255
    module = Sometimes(fits=1)
    engine = TorchEngine(module, fake_spec(), replace(CPU, batch_size=4), 64)
    found = engine.launch(images)()
    words = "one tile of 64 px exceeds the memory of cpu; use a smaller --tile-size"
    assert [f.error if isinstance(f, NoOutput) else None for f in found] == [None, None, words, None]
    assert module.asked == [4, 2, 1, 1, 1, 1, 1, 1]  # halved twice; a tile that did not fit is tried once more
    same(found[3], TorchEngine(FakeMask(), fake_spec(), CPU, 64).launch(images[3:])()[0])


def test_other_runtime_errors_are_not_taken_for_memory() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        TorchEngine(Broken(), fake_spec(), CPU, 64).launch(tiles(1))


def test_boxes_and_points_come_as_instances() -> None:
    images = tiles(2)
    images[1, :4, 20:30] = (120, 60, 150)  # touches the upper edge
    boxes = TorchEngine(FakeBox(), fake_spec("box"), CPU, 64).launch(images)()
    assert isinstance(boxes[1], Instances) and boxes[1].box_xyxy is not None
    assert boxes[0].box_xyxy is not None and boxes[0].box_xyxy.tolist() == [[5, 10, 17, 20]]
    assert boxes[0].centroid_xy.tolist() == [[11, 15]] and boxes[0].area_px.tolist() == [120]
    assert boxes[1].box_xyxy.tolist() == [[20, 0, 30, 4], [7, 11, 19, 21]] and boxes[1].cut.tolist() == [True, False]
    points = TorchEngine(FakePoint(), fake_spec("point"), CPU, 64).launch(images)()
    assert points[0].centroid_xy.tolist() == [[11, 15]] and points[0].area_px.tolist() == [0]


def test_thresholds_and_suppression_come_from_the_spec() -> None:
    points = torch.tensor([[[10.0, 10.0], [14.0, 10.0], [30.0, 10.0], [18.5, 10.0], [50.0, 50.0]]])
    scores = torch.tensor([[0.6, 0.9, 0.39, 0.5, 0.0]])
    module = Constant(points=points, scores=scores)

    def found(detect: DetectDecode) -> list[float]:
        engine = TorchEngine(module, fake_spec("point", mpp=0.5, detect=detect), CPU, 64)
        return engine.launch(tiles(1))()[0].centroid_xy[:, 0].tolist()

    assert found(DetectDecode(0.0)) == [10, 14, 30, 18.5]  # a query scored 0 is none
    assert found(DetectDecode(0.4)) == [10, 14, 18.5]
    assert found(DetectDecode(0.4, nms_um=2.0)) == [14, 18.5]  # 4 px is 2 µm, and within
    assert found(DetectDecode(0.4, nms_um=3.0)) == [14]
    with pytest.raises(ValueError, match="score_threshold"):
        DetectDecode(1.5)


def test_embeddings_follow_their_nuclei_and_must_be_there_when_promised() -> None:
    boxes = torch.tensor([[[0.2, 4.0, 9.0, 9.0], [10, 10, 20, 20], [30, 30, 63.8, 40]]])
    scores = torch.tensor([[0.7, 0.1, 0.8]])
    embedding = torch.arange(6.0).view(1, 3, 2)
    spec = fake_spec("box", embedding_dim=2)
    engine = TorchEngine(Constant(boxes=boxes, scores=scores, embedding=embedding), spec, CPU, 64)
    (found,) = engine.launch(tiles(1))()
    assert isinstance(found, Instances) and found.embedding is not None
    assert found.embedding.tolist() == [[0, 1], [4, 5]] and found.embedding.dtype == np.float32
    assert found.cut.tolist() == [True, True]  # a fraction of a pixel from the tile's edge
    with pytest.raises(WeightsError, match="gives no embedding"):
        TorchEngine(Constant(boxes=boxes, scores=scores), spec, CPU, 64).launch(tiles(1))


def test_names_of_outputs_follow_kind_and_classes() -> None:
    assert output_names(fake_spec()) == ("foreground", "foreground_prob", "hv")
    assert output_names(fake_spec("box", classes=CLASSES)) == ("box_xyxy", "score", "class_prob")
    assert output_names(fake_spec("point", embedding_dim=4)) == ("point_xy", "score", "embedding")


def test_bf16_on_the_cpu_runs_in_autocast() -> None:
    engine = TorchEngine(CellVTA(TINY), fake_spec(classes=CLASSES), replace(CPU, precision="bf16"), 64)
    exact = TorchEngine(engine._net.module, fake_spec(classes=CLASSES), CPU, 64)
    a, b = engine.launch(tiles(1))()[0], exact.launch(tiles(1))()[0]
    assert engine.precision == "bf16" and exact.precision == "fp32" and a.hv.dtype == np.float32
    assert 0 < np.abs(a.hv - b.hv).max() < 0.1


def test_in_bf16_on_the_cpu_the_micro_batch_changes_nothing_at_all() -> None:
    torch.manual_seed(0)
    module, spec = CellVTA(TINY).eval(), fake_spec(classes=CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    single, pairs, whole = (
        TorchEngine(module, spec, replace(CPU, precision="bf16", batch_size=n), 64).launch(images)() for n in (1, 2, 3)
    )
    for a, b, c in zip(single, pairs, whole, strict=True):
        same(a, b)
        same(a, c)


def test_a_network_whose_scores_hold_in_bf16_takes_it_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("cellslide.inference.device.cpu_computes_bf16", lambda able=able: able)
        assert TorchEngine(FakeMask(), fake_spec(bf16_on_cpu=True), CPU, 64).precision == expected
        assert TorchEngine(FakeMask(), fake_spec(), CPU, 64).precision == "fp32"
        assert resolve_precision("fp32", torch.device("cpu"), True) == "fp32"


def test_devices_that_are_not_there_and_names_that_are_none() -> None:
    assert resolve_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(UsageError, match="--device"):
            resolve_device(name)
    with pytest.raises(MissingDependencyError, match="--device cuda:99"):
        resolve_device("cuda:99")


def test_defaults_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == "fp32" and resolve_precision("bf16", cpu) == "bf16"
    assert (auto_batch_size("tile", 256, cpu), auto_batch_size("tile", 1024, cpu)) == (2, 1)
    assert available_cpus() >= 1


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    module, spec = CellVTA(TINY).eval(), fake_spec(classes=CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), np.uint8)
    cpu = TorchEngine(module, spec, CPU, 128).launch(images)()
    engine = TorchEngine(module, spec, InferConfig(device="cuda", precision="fp32"), 128)
    assert engine.batch_size > 1
    for a, b in zip(cpu, engine.launch(images)(), strict=True):
        np.testing.assert_allclose(a.hv, b.hv, atol=2e-3)
        np.testing.assert_allclose(a.foreground_prob, b.foreground_prob, atol=5e-3)
    assert engine.peak_device_bytes() > 0
